"""Who takes part in a call: budgets, ranks, preemption, the prefix cache, ends."""

import random
from collections.abc import Iterable
from typing import Any

import pytest
from tests.engine.simulation import END, VOCABULARY, Device, Simulation, expected_output, next_token

from qwen3_next.engine import (
    FinishReason,
    Memory,
    Request,
    SamplingParams,
    Scheduler,
    SchedulerConfig,
    SequenceResult,
    Status,
)
from qwen3_next.errors import CapacityError, InputError, Qwen3NextError

PAGE = 4


def simulation(pages: int = 200, slots: int = 60, depth: int = 1, quality: float = 0.6, **changes: Any) -> Simulation:
    memory = Memory(pages, slots, PAGE)
    limits: dict[str, Any] = {"max_sequences": 8, "token_budget": 48, "max_context": 200, "max_drafts": 3}
    config = SchedulerConfig(eos_token_ids=frozenset({END}), **(limits | changes))
    return Simulation(Scheduler(config, memory), Device(memory, random.Random(1), quality), depth)


def request(name: str, prompt: Iterable[int], output: int | None = 8, priority: int = 0, **params: Any) -> Request:
    params = {"ignore_eos": True, "max_tokens": output} | params
    return Request(request_id=name, prompt=tuple(prompt), params=SamplingParams(**params), priority=priority)


def text(count: int, seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(1, VOCABULARY) for _ in range(count)]


@pytest.mark.parametrize(
    "limits",
    [{"max_sequences": 0}, {"max_context": 1}, {"max_drafts": -1}, {"snapshot_stride": 0}, {"token_budget": 32}],
)
def test_limits_that_cannot_be_kept_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(limits))} = .* Allowed: "):
        simulation(**limits)


def test_a_context_that_can_never_fit_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"at most 12 .*Lower max_context"):
        simulation(pages=5, max_context=13)
    simulation(pages=5, max_context=12)


def test_a_request_that_can_never_fit_is_refused_alone() -> None:
    run = simulation()
    with pytest.raises(CapacityError, match=r"'long': 200 tokens .* at most 199"):
        run.add(request("long", text(200)))
    run.add(request("a", text(199)))
    with pytest.raises(InputError, match="'a'"):
        run.add(request("a", text(5)))
    with pytest.raises(InputError, match="n = 2"):
        run.add(request("two", text(5), n=2))
    run.drain()
    run.verify()


def test_prefill_chunks_decodes_and_verifications_share_a_call() -> None:
    run = simulation(quality=1.0)
    run.add(request("steps", text(5, 1), output=40))
    for _ in range(3):
        run.step(next_drafts=3)
    run.add(request("long", text(100, 2)))
    run.add(request("short", text(3, 3)))
    plan = run.plan(next_drafts=3)
    assert [(s.request.request_id, s.awaits_verdict, s.drafts) for s in plan] == [
        ("steps", True, 3),
        ("long", False, 0),
    ]
    assert [s.length for s in plan] == [4, 44]
    run.commit()
    lengths = {s.request.request_id: s.length for s in run.plan()}
    assert lengths == {"steps": 4, "long": 44}
    run.commit()
    assert {s.request.request_id: (s.length, s.samples) for s in run.plan()} == {
        "steps": (1, True),
        "long": (12, True),
        "short": (3, True),
    }
    run.drain()
    run.verify()


def test_a_chunk_that_is_not_the_last_ends_with_a_page() -> None:
    run = simulation(token_budget=34)
    run.add(request("a", text(100)))
    assert [s.length for s in run.plan()] == [32]


def test_drafts_never_exceed_what_the_request_may_still_say() -> None:
    run = simulation(quality=1.0)
    run.add(request("a", text(5), output=6))
    lengths: list[int] = []
    while run.scheduler.has_work:
        lengths.append(run.plan(next_drafts=3).token_count)
        run.commit()
    assert lengths == [5, 4, 1]
    run.verify()


def test_a_call_planned_ahead_knows_how_late_it_may_start() -> None:
    run = simulation(quality=0.5, depth=2)
    run.add(request("a", text(5), output=30))
    run.plan(next_drafts=3)
    (second,) = run.plan(next_drafts=3)
    assert (second.start, second.uncertain, second.drafts, second.accepted) == (5, 0, 3, 0)
    (third,) = run.plan(next_drafts=2)
    assert (third.start, third.uncertain, third.drafts, third.accepted) == (6, 3, 3, 1)
    run.commit()
    (fourth,) = run.plan()
    assert (fourth.start, fourth.uncertain, fourth.drafts) == (7, 6, 2)
    run.drain(2)
    run.verify()


@pytest.mark.parametrize("depth", [1, 2])
def test_an_end_token_ends_a_request_and_drops_what_follows(depth: int) -> None:
    run = simulation(quality=1.0, depth=depth)
    for seed in range(20):
        run.add(request(f"r{seed}", text(6, seed), None, ignore_eos=False, stop_token_ids=(3,), min_tokens=seed % 5))
    run.drain(3)
    run.verify()
    assert {output[-1].finish for output in run.outputs.values()} == {FinishReason.STOP}


def test_a_full_context_ends_a_request() -> None:
    run = simulation(max_context=20)
    run.add(request("a", text(6), output=None))
    run.drain(3)
    run.verify()
    assert run.outputs["a"][-1].finish is FinishReason.LENGTH
    assert len(run.requests["a"].tokens) == 20


@pytest.mark.parametrize("depth", [1, 2])
def test_preempted_is_undisturbed(depth: int) -> None:
    run = simulation(pages=24, depth=depth, max_context=80)
    for number in range(6):
        run.add(request(f"r{number}", text(10, number), output=40))
    run.drain(2)
    run.verify()
    preempted = [one for one in run.requests.values() if one.preemptions]
    assert preempted
    assert any(one.cached for one in preempted), "some did not start from nothing"
    assert run.requests["r0"].preemptions == 0, "the first in rank is never preempted"


def test_a_priority_preempts_and_waits_for_nobody() -> None:
    run = simulation(max_sequences=2, token_budget=40, aging=100)
    for number in range(2):
        run.add(request(f"r{number}", text(10, number), output=50))
    for _ in range(5):
        run.step()
    run.add(request("urgent", text(10, 7), output=3, priority=1))
    for _ in range(4):
        run.step()
    assert run.requests["urgent"].status is Status.FINISHED
    assert [run.requests[name].preemptions for name in ("r0", "r1")] == [0, 1]
    run.drain()
    run.verify()
    assert run.requests["r1"].cached > 10, "it resumed from its own state, in the middle of its output"


def test_a_priority_does_not_preempt_its_equals() -> None:
    run = simulation(max_sequences=1, token_budget=40)
    run.add(request("first", text(10, 1), priority=1))
    run.step()
    run.add(request("second", text(10, 2), priority=1))
    run.drain()
    run.verify()
    assert run.requests["first"].preemptions == 0


def test_nobody_starves_below_a_stream_of_higher_priorities() -> None:
    run = simulation(max_sequences=2, token_budget=40, aging=20)
    run.add(request("humble", text(10), output=4, priority=0))
    steps = 0
    while run.requests["humble"].status is not Status.FINISHED:
        run.add(request(f"u{steps}", text(30, steps), output=6, priority=2))
        run.step()
        steps += 1
        assert steps < 400
    run.drain()
    run.verify()


def test_a_long_prompt_does_not_wait_for_those_that_would_fit_before_it() -> None:
    run = simulation(pages=30, max_context=100)
    run.add(request("running", text(40, 1), output=30))
    run.step()
    run.add(request("long", text(90, 2)))
    for number in range(40):
        run.add(request(f"short{number}", text(4, 10 + number), output=8))
        run.step()
    assert run.requests["long"].output_length > 0
    run.drain()
    run.verify()


def test_an_abort_frees_everything_within_one_step() -> None:
    run = simulation(prefix_cache=False)
    run.add(request("a", text(30)))
    run.step()
    run.add(request("waiting", text(30)))
    for name in ("a", "waiting"):
        assert run.scheduler.abort(name)
        assert not run.scheduler.abort(name)
        run.cut.add(name)
    run.scheduler.check()
    figures = run.scheduler.memory.figures
    assert (figures.free_pages, figures.free_slots) == (199, 59)
    run.step()
    assert [output[-1].finish for output in run.outputs.values()] == [FinishReason.ABORT] * 2
    assert not run.scheduler.has_work


def test_an_abort_with_calls_in_flight_frees_everything_when_they_are_committed() -> None:
    run = simulation(depth=2)
    run.add(request("a", text(5), output=50))
    run.plan(2)
    run.plan(2)
    run.scheduler.abort("a")
    run.cut.add("a")
    assert not run.plan()
    assert run.scheduler.memory.figures.used_slots > 0
    run.drain()
    run.verify()


def test_a_request_that_fails_fails_alone_and_is_forgotten() -> None:
    run = simulation()
    run.add(request("bad", text(20, 1)))
    run.add(request("good", text(20, 2)))
    run.plan()

    def change(sequence: Any, result: SequenceResult) -> SequenceResult:
        bad = sequence.request.request_id == "bad"
        return SequenceResult(error=Qwen3NextError("the logits are NaN")) if bad else result

    run.commit(change)
    run.cut.add("bad")
    run.drain()
    run.verify()
    assert run.outputs["bad"][-1].finish is FinishReason.ERROR
    assert isinstance(run.outputs["bad"][-1].error, Qwen3NextError)
    assert run.scheduler.memory.lookup(text(20, 1), 19).pages == 0


@pytest.mark.parametrize("calls", [1, 2])
def test_a_call_that_fails_as_a_whole_loses_nothing(calls: int) -> None:
    run = simulation(depth=3)
    for number in range(3):
        run.add(request(f"r{number}", text(30, number), output=20))
    for _ in range(6):
        run.step(2)
    while len(run.flights) < calls:
        run.plan(2)
    run.fail_all()
    assert run.scheduler.memory.figures.used_slots == 0
    run.drain(2)
    run.verify()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_second_turn_computes_only_what_is_new(depth: int) -> None:
    run = simulation(depth=depth)
    first = request("first", text(50), output=13)
    run.add(first)
    run.drain(3)
    run.add(request("second", [*first.tokens, *text(9, 5)]))
    run.drain(3)
    run.verify()
    assert run.requests["second"].cached == 62, "all but the last token of the first turn, which was never computed"


def test_the_same_prompt_again_computes_less_than_a_page() -> None:
    run = simulation()
    for name in ("cold", "warm"):
        run.add(request(name, text(50)))
        run.drain()
    run.verify()
    assert (run.requests["cold"].cached, run.requests["warm"].cached) == (0, 48)


def test_a_branch_point_is_learnt_from_the_first_that_branches() -> None:
    run = simulation()
    for number in range(3):
        run.add(request(f"r{number}", [*text(40), *text(20, 9 + number)]))
        run.drain()
    run.verify()
    assert [one.cached for one in run.requests.values()] == [0, 0, 40]


def test_a_branch_point_that_is_named_is_kept_at_once() -> None:
    run = simulation()
    for number in range(2):
        one = request(f"r{number}", [*text(42), *text(20, 9 + number)])
        one.branch_points = (42,)
        run.add(one)
        run.drain()
    run.verify()
    assert run.requests["r1"].cached == 40


def test_a_long_prompt_keeps_a_state_at_every_stride() -> None:
    run = simulation(snapshot_stride=16)
    run.add(request("a", text(100)))
    run.drain()
    run.add(request("edited", [*text(70), *text(20, 3)]))
    run.drain()
    run.verify()
    assert run.requests["edited"].cached == 64


def test_samples_of_one_prompt_compute_it_once() -> None:
    run = simulation()
    for sample in request("a", text(100), n=5).samples():
        run.add(sample)
    run.drain()
    run.verify()
    assert [one.cached for one in run.requests.values()] == [0, 96, 96, 96, 96]


@pytest.mark.parametrize("budget", [33, 48, 70, 300])
def test_requests_that_come_together_share_their_beginning(budget: int) -> None:
    run = simulation(token_budget=budget)
    for number in range(4):
        run.add(request(f"r{number}", [*text(60), *text(10, 30 + number)]))
    run.drain()
    run.verify()
    assert [one.cached for one in run.requests.values()] == [0, 60, 60, 60]


def test_log_probabilities_of_a_prompt_are_computed_not_looked_up() -> None:
    run = simulation()
    run.add(request("a", text(50)))
    run.drain()
    run.add(request("b", text(50), prompt_logprobs=0))
    run.drain()
    run.verify()
    assert run.requests["b"].cached == 0


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    run = simulation(prefix_cache=False)
    for name in "ab":
        run.add(request(name, text(50)))
        run.drain(2)
    run.verify()
    assert run.requests["b"].cached == 0
    assert run.scheduler.memory.figures.free_slots == 59


def test_figures_say_why_lookups_ended() -> None:
    run = simulation()
    for name in "ab":
        run.add(request(name, text(50)))
        run.drain()
    figures = run.scheduler.figures
    assert {end.value: count for end, count in figures.matches.items()} == {"no pages": 1, "whole": 1}
    assert (figures.cached_tokens, figures.looked_up_tokens) == (48, 100)
    assert (figures.waiting, figures.running) == (0, 0)


def test_the_oracle_is_one_token_at_a_time() -> None:
    one = request("a", text(5), output=3)
    output = expected_output(one, 100)
    assert output[0] == next_token(one.prompt)
    assert output[2] == next_token((*one.prompt, *output[:2]))
