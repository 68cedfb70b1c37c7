"""A device without arithmetic: it stores which tokens are where, and raises as soon as a call reads anything else."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from qwen3_next.engine import (
    FinishReason,
    Memory,
    Plan,
    Request,
    RequestOutput,
    ScheduledSequence,
    Scheduler,
    SequenceResult,
)

VOCABULARY = 11
END = 0
GARBAGE = (-1,)


def next_token(prefix: tuple[int, ...]) -> int:
    """The model: a token that depends on every token before it."""
    return zlib.crc32(bytes(prefix)) % VOCABULARY


def expected_output(request: Request, max_context: int) -> list[int]:
    """What a request alone would be answered, if nothing but its parameters ended it."""
    params, tokens = request.params, list(request.prompt)
    most = max_context if params.max_tokens is None else min(max_context, len(tokens) + params.max_tokens)
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else (END,))}
    while len(tokens) < most:
        tokens.append(next_token(tuple(tokens)))
        if tokens[-1] in ends and len(tokens) - len(request.prompt) >= params.min_tokens:
            break
    return tokens[len(request.prompt) :]


@dataclass
class State:
    """Of the DeltaNet layers: the tokens that are part of it, and those that await a verdict."""

    tokens: tuple[int, ...] = GARBAGE
    pending: tuple[int, ...] = ()


@dataclass
class Device:
    """Pages of prefixes (an entry depends on all tokens before it) and slots of states, all garbage at first."""

    memory: Memory
    chance: random.Random
    draft_quality: float = 0.6
    pages: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    slots: dict[int, State] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    drafts: dict[str, list[int]] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    computed: int = 0

    def run(self, plan: Plan) -> list[SequenceResult]:
        """Execute a call and say what it did."""
        size = self.memory.page_size
        states = [(s.state_copy.target, self.slots[s.state_copy.source]) for s in plan if s.state_copy]
        entries = [
            ((s.page_copy.target, i), self.pages.get((s.page_copy.source, i), GARBAGE))
            for s in plan
            if s.page_copy
            for i in range(size)
        ]
        self.slots.update((slot, State(state.tokens, state.pending)) for slot, state in states)
        self.pages.update(entries)
        self.slots.update((s.slot, State(())) for s in plan if s.starts_empty)
        written = [s.slot for s in plan] + [order.slot for s in plan for order in s.snapshots]
        assert len(set(written)) == len(written)
        assert 0 not in written
        return [self._run_sequence(sequence) for sequence in plan]

    def _run_sequence(self, sequence: ScheduledSequence) -> SequenceResult:
        name, state = sequence.request.request_id, self.slots[sequence.slot]
        if not sequence.awaits_verdict:
            tokens = self.tokens[name] = list(sequence.request.tokens)
            drafts, start = [], sequence.start
            new = tokens[start : sequence.end]
            assert sequence.uncertain == 0
        else:
            tokens = self.tokens.setdefault(name, list(sequence.request.tokens))
            drafts, start = self.drafts.get(name, [])[: sequence.drafts], len(tokens) - 1
            new = [tokens[-1], *drafts]
            assert sequence.start <= start <= sequence.start + sequence.uncertain
            assert len(drafts) == sequence.drafts
        assert len(new) == sequence.length
        accepted = self.accepted[name] if sequence.uncertain else sequence.accepted
        assert accepted >= sequence.accepted
        state.tokens += state.pending[:accepted]
        assert accepted <= len(state.pending)
        assert state.tokens == tuple(tokens[:start]), "the state is of other tokens"
        self._write(sequence, tokens[:start], new)
        for order in sequence.snapshots:
            assert start < order.position <= start + len(new)
            self.slots[order.slot] = State(tuple(tokens[: order.position]))
        state.pending = tuple(new) if sequence.leaves_pending else ()
        if not sequence.leaves_pending:
            assert not drafts, "a draft joins the state"
            state.tokens = tuple(tokens[:start]) + tuple(new)
        return self._sample(sequence, tokens, drafts)

    def _write(self, sequence: ScheduledSequence, before: list[int], new: list[int]) -> None:
        size, text = self.memory.page_size, tuple(before) + tuple(new)
        assert len(sequence.pages) * size >= len(text)
        for position in range(len(before)):
            entry = self.pages.get((sequence.pages[position // size], position % size))
            assert entry == text[: position + 1], f"position {position} holds other tokens"
        for position in range(len(before), len(text)):
            assert sequence.pages[position // size] != 0
            self.pages[sequence.pages[position // size], position % size] = text[: position + 1]
        self.computed += len(new)

    def _sample(self, sequence: ScheduledSequence, tokens: list[int], drafts: list[int]) -> SequenceResult:
        if not sequence.samples:
            return SequenceResult()
        known = len(tokens)
        for draft in [*drafts, -1]:
            tokens.append(next_token(tuple(tokens)))
            if tokens[-1] != draft or (tokens[-1] == END and not sequence.request.params.ignore_eos):
                break
        self.accepted[sequence.request.request_id] = len(tokens) - known if sequence.leaves_pending else 0
        guess, proposals = list(tokens), []
        for _ in range(sequence.next_drafts):
            good = self.chance.random() < self.draft_quality
            guess.append(next_token(tuple(guess)) if good else self.chance.randrange(VOCABULARY))
            proposals.append(guess[-1])
        self.drafts[sequence.request.request_id] = proposals
        return SequenceResult(tokens=tuple(tokens[known:]), drafts=tuple(proposals))


@dataclass
class Simulation:
    """A scheduler and a device, with up to `depth` calls in flight."""

    scheduler: Scheduler
    device: Device
    depth: int = 1
    flights: list[tuple[Plan, list[SequenceResult]]] = field(default_factory=list)
    requests: dict[str, Request] = field(default_factory=dict)
    outputs: dict[str, list[RequestOutput]] = field(default_factory=dict)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.requests[request.request_id], self.outputs[request.request_id] = request, []

    def plan(self, next_drafts: int = 0) -> Plan:
        plan = self.scheduler.plan(next_drafts)
        assert plan.token_count <= self.scheduler.config.token_budget
        assert len(plan) <= self.scheduler.config.max_sequences
        for sequence in plan:
            most = sequence.start + sequence.uncertain + sequence.length
            assert most < self.scheduler.config.most_tokens(sequence.request), "positions beyond the last token"
        self.flights.append((plan, self.device.run(plan)))
        self.scheduler.check()
        return plan

    def commit(self, change: Callable[[ScheduledSequence, SequenceResult], SequenceResult] | None = None) -> None:
        plan, results = self.flights.pop(0)
        if change is not None:
            results = [change(sequence, result) for sequence, result in zip(plan, results, strict=True)]
        for output in self.scheduler.commit(plan, results):
            self.outputs[output.request_id].append(output)
            if output.finish is not None:
                assert self.outputs[output.request_id].count(output) == 1
        self.scheduler.check()

    def fail_all(self) -> None:
        """The first call in flight fails, and those behind it, after they wrote anything anywhere they may."""
        for plan, _ in reversed(self.flights):
            for sequence in plan:
                self.device.slots[sequence.slot] = State()
                self.device.tokens.pop(sequence.request.request_id, None)
                self.device.drafts.pop(sequence.request.request_id, None)
                self.device.slots.update((order.slot, State()) for order in sequence.snapshots)
            self.scheduler.withdraw(plan)
            self.scheduler.check()
        self.flights.clear()

    def step(self, next_drafts: int = 0) -> None:
        self.plan(next_drafts)
        while len(self.flights) >= self.depth:
            self.commit()

    def drain(self, next_drafts: int = 0, steps: int = 5000) -> None:
        """Go on until every request has ended."""
        for _ in range(steps):
            if not self.scheduler.has_work:
                break
            self.step(next_drafts)
        while self.flights:
            self.commit()
        assert not self.scheduler.has_work, "a request never ended"

    def verify(self) -> None:
        """Every request has exactly one end, and the answer that it would have had alone, up to there."""
        for name, request in self.requests.items():
            outputs = self.outputs[name]
            told = [token for output in outputs for token in output.tokens]
            assert [output.finish is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
            assert told == list(request.output)
            expected = expected_output(request, self.scheduler.config.max_context)
            assert told == expected[: len(told)]
            if outputs[-1].finish in (FinishReason.STOP, FinishReason.LENGTH) and name not in self.cut:
                assert told == expected
        figures = self.scheduler.memory.figures
        assert figures.used_pages == figures.used_slots == 0

    cut: set[str] = field(default_factory=set)
    """Requests that something outside the scheduler ended early."""
