"""All on together = each alone: hundreds of requests under random schedules, most of them turns of the same chats."""

import random

import pytest
from tests.engine.simulation import END, VOCABULARY, Device, Simulation

from qwen3_next.engine import Memory, Request, SamplingParams, Scheduler, SchedulerConfig


def random_simulation(chance: random.Random) -> Simulation:
    """Small memory half of the time, so that it is fought for; large the other half, so that chats go on from it."""
    page_size, drafts, sequences = chance.choice([2, 4, 8]), chance.randint(0, 3), chance.randint(1, 6)
    pages, slots = chance.choice([(chance.randint(10, 60), chance.randint(3, 12)), (400, 60)])
    config = SchedulerConfig(
        max_sequences=sequences,
        token_budget=sequences * (1 + drafts) + chance.randint(1, 24),
        max_context=min((pages - 2) * page_size, 70),
        max_drafts=drafts,
        snapshot_stride=chance.choice([4, 16, 1000]),
        aging=chance.choice([1, 8]),
        eos_token_ids=frozenset({END}),
    )
    memory = Memory(pages, slots, page_size)
    device = Device(memory, chance, draft_quality=chance.choice([0.3, 0.9]))
    return Simulation(Scheduler(config, memory), device, depth=chance.randint(1, 3))


def random_prompt(run: Simulation, chance: random.Random) -> tuple[int, ...]:
    tokens: list[int] = []
    if run.requests and chance.random() < 0.7:
        tokens = run.requests[chance.choice(sorted(run.requests))].tokens[:]
        tokens = tokens[: len(tokens) - chance.choice([0, 0, 0, 1, chance.randint(0, 12)])]
    more = [chance.randrange(1, VOCABULARY) for _ in range(chance.randint(1, 8))]
    most = run.scheduler.config.max_context - 1
    return tuple([*tokens, *more][:most]) if len(tokens) < most else tuple(more)


@pytest.mark.parametrize("seed", range(40))
def test_all_on_together_is_each_alone(seed: int) -> None:
    chance = random.Random(seed)
    run = random_simulation(chance)
    for _ in range(15):
        for _ in range(chance.randint(0, 3)):
            params = SamplingParams(
                ignore_eos=chance.random() < 0.3, stop_token_ids=(7,), max_tokens=chance.choice([None, 5, 12, 30])
            )
            name, priority = f"r{len(run.requests)}", chance.choice([0, 0, 0, 1])
            run.add(Request(request_id=name, prompt=random_prompt(run, chance), params=params, priority=priority))
        if run.requests and chance.random() < 0.2:
            name = chance.choice(sorted(run.requests))
            if run.scheduler.abort(name):
                run.cut.add(name)
        if chance.random() < 0.05:
            run.fail_all()
        for _ in range(chance.randint(1, 8)):
            run.step(chance.randint(0, 3))
    run.drain(2)
    run.verify()
