"""All on together = each alone, under any order of events."""

import random

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.engine.simulation import END, VOCABULARY, Device, Simulation

from qwen3_next.engine import (
    FinishReason,
    Memory,
    Request,
    SamplingParams,
    ScheduledSequence,
    Scheduler,
    SchedulerConfig,
    SequenceResult,
)
from qwen3_next.errors import Qwen3NextError

TOKENS = st.integers(1, VOCABULARY - 1)
BACK = st.just(0) | st.integers(0, 12)
OPTIONS = {
    "priority": st.integers(-1, 2),
    "output": st.none() | st.integers(1, 12),
    "ignore_eos": st.booleans(),
    "logprobs": st.sampled_from([False, False, False, True]),
}


class ScheduleMachine(RuleBasedStateMachine):
    """Add, abort, evict, preempt, branch, edit history; commits at once or one call late."""

    @initialize(
        pages=st.integers(6, 40),
        slots=st.integers(3, 12),
        page_size=st.sampled_from([1, 2, 4, 8]),
        sequences=st.integers(1, 6),
        drafts=st.integers(0, 3),
        spare=st.integers(1, 24),
        stride=st.sampled_from([4, 16, 1000]),
        aging=st.sampled_from([1, 8]),
        depth=st.integers(1, 3),
        cached=st.sampled_from([True, True, True, False]),
        seed=st.integers(0, 2**20),
    )
    def start(self, pages, slots, page_size, sequences, drafts, spare, stride, aging, depth, cached, seed) -> None:
        memory = Memory(pages, slots, page_size)
        config = SchedulerConfig(
            max_sequences=sequences,
            token_budget=sequences * (1 + drafts) + spare,
            max_context=min((pages - 2) * page_size, 60),
            max_drafts=drafts,
            snapshot_stride=stride,
            aging=aging,
            prefix_cache=cached,
            eos_token_ids=frozenset({END}),
        )
        self.simulation = Simulation(Scheduler(config, memory), Device(memory, random.Random(seed)), depth)
        self.names = 0

    def add(self, prompt: list[int], priority: int, output: int | None, ignore_eos: bool, logprobs: bool) -> None:
        prompt = prompt[: self.simulation.scheduler.config.max_context - 1]
        params = SamplingParams(
            max_tokens=output, ignore_eos=ignore_eos, prompt_logprobs=0 if logprobs else None, stop_token_ids=(7,)
        )
        name = f"r{self.names}"
        self.names += 1
        self.simulation.add(Request(request_id=name, prompt=tuple(prompt), params=params, priority=priority))

    @rule(prompt=st.lists(TOKENS, min_size=1, max_size=30), **OPTIONS)
    def add_new(self, prompt, priority, output, ignore_eos, logprobs) -> None:
        self.add(prompt, priority, output, ignore_eos, logprobs)

    @precondition(lambda self: self.simulation.requests)
    @rule(data=st.data(), more=st.lists(TOKENS, min_size=1, max_size=6), back=BACK, **OPTIONS)
    def continue_or_edit(self, data, more, back, priority, output, ignore_eos, logprobs) -> None:
        """The next turn of a chat, a turn that was edited, or a branch of a prompt that is still computed."""
        request = self.simulation.requests[data.draw(st.sampled_from(sorted(self.simulation.requests)))]
        tokens = request.tokens[: max(0, len(request.tokens) - back)]
        self.add([*tokens, *more], priority, output, ignore_eos, logprobs)

    @precondition(lambda self: self.simulation.requests)
    @rule(data=st.data())
    def abort(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.simulation.requests)))
        if self.simulation.scheduler.abort(name):
            self.simulation.cut.add(name)

    @rule()
    def evict(self) -> None:
        self.simulation.scheduler.memory.evict_all()

    @rule(next_drafts=st.integers(0, 3), count=st.integers(1, 4))
    def step(self, next_drafts, count) -> None:
        for _ in range(count):
            self.simulation.step(next_drafts)

    @rule(next_drafts=st.integers(0, 3))
    def plan_ahead(self, next_drafts) -> None:
        if len(self.simulation.flights) < self.simulation.depth:
            self.simulation.plan(next_drafts)

    @precondition(lambda self: self.simulation.flights)
    @rule(data=st.data())
    def commit_with_trouble(self, data) -> None:
        """A stop string is found, or a sequence fails."""

        def change(sequence: ScheduledSequence, result: SequenceResult) -> SequenceResult:
            name = sequence.request.request_id
            outcome = data.draw(st.sampled_from(["go on", "go on", "stop", "fail"]))
            if outcome == "go on" or sequence.request.finish is not None:
                return result
            self.simulation.cut.add(name)
            if outcome == "fail":
                return SequenceResult(error=Qwen3NextError("the logits are NaN"))
            kept = data.draw(st.integers(0, len(result.tokens)))
            return SequenceResult(tokens=result.tokens[:kept], finish=FinishReason.STOP)

        self.simulation.commit(change)

    @precondition(lambda self: self.simulation.flights)
    @rule()
    def fail_all(self) -> None:
        self.simulation.fail_all()

    @invariant()
    def everything_has_one_owner(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain(next_drafts=2)
            self.simulation.verify()


TestScheduleMachine = ScheduleMachine.TestCase
TestScheduleMachine.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
