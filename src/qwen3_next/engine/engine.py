"""Requests in, tokens out: the loop of plan, call, choice and commit."""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import NoReturn

import torch
from torch import Tensor

from qwen3_next.engine.batch import integers
from qwen3_next.engine.config import Division, EngineConfig, free_bytes
from qwen3_next.engine.draft_policy import DraftPolicy
from qwen3_next.engine.grammar import GrammarCompiler, GrammarState
from qwen3_next.engine.loading import LoadedModel
from qwen3_next.engine.memory import Memory
from qwen3_next.engine.plan import Plan, ScheduledSequence, SequenceResult
from qwen3_next.engine.request import FinishReason, Request, RequestOutput, Structured, common_prefix
from qwen3_next.engine.runner import Computed, Runner
from qwen3_next.engine.sampler import Choice, Draw, Drawn, choose, draw, likeliest
from qwen3_next.engine.scheduler import Scheduler
from qwen3_next.engine.speculative import Drafter, Verdict, verify
from qwen3_next.engine.stream import Output, Step, Stream
from qwen3_next.engine.text import Characters, StopStrings
from qwen3_next.errors import BackendError, InputError
from qwen3_next.ops.pages import PAGE


@dataclass(eq=False)
class _Flight:
    """A call that the device has begun.

    Attributes:
        begun: when.
        choice: the tokens that come of it; of each sequence that samples, `1 + drafts` rows. None until the host has
            said how to choose.
        draws: those rows, sequence by sequence.
    """

    plan: Plan
    computed: Computed | None
    begun: float
    draws: list[list[Draw]] = field(default_factory=list[list[Draw]])
    choice: Choice | None = None


class Engine:
    """Serves many requests at once: continuous batching, chunked prompts, a prefix cache over keys and states.

    Every request gets what it would get alone: its tokens depend on its prompt, its parameters and its seed.

    Attributes:
        drafts: how many tokens the MTP layer proposes; `drafts.figures` is what became of them.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig | None = None,
        *,
        agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
        least: Callable[[int], int] = lambda number: number,
    ) -> None:
        """Allocate the memory.

        Args:
            agree: makes tokens on the device those of all ranks, where several serve one model.
            least: of the bytes that are free on each of them.

        Raises:
            CapacityError: it does not hold one sequence.
            InputError: drafts are asked for, and the model has no MTP layer.
        """
        self.loaded = loaded
        model = loaded.model
        limits = config or EngineConfig()
        room = least(free_bytes(loaded.device)) if limits.memory_bytes is None else limits.memory_bytes
        self.division: Division = replace(limits, memory_bytes=room).divided(
            model.config, model.lm_head.weight.dtype, loaded.device, model.mtp is not None
        )
        self._agree = agree
        memory = Memory(self.division.pages, self.division.slots, PAGE)
        self.scheduler = Scheduler(self.division.scheduler(loaded.eos_ids), memory)
        self._streams: dict[str, Stream] = {}
        self._known = min(loaded.tokenizer.get_vocab_size(), loaded.config.vocab_size)
        self.runner = Runner(model, self.division, self._known)
        self._grammars = GrammarCompiler(loaded.tokenizer, self._known, loaded.eos_ids)
        self.drafts = DraftPolicy(self.division.drafts, is_fixed=self.division.limits.drafts != "auto")
        chosen = partial(choose, known=self._known, ends=loaded.eos_ids, agree=agree)
        greedy = partial(likeliest, known=self._known, agree=agree)
        self.drafter = Drafter.allocate(model, self.division, chosen, greedy) if self.division.drafts else None
        self._flight: _Flight | None = None
        self._busy_since: float | None = None

    def compiled(self, structured: Structured) -> GrammarState:
        """The beginning of a text of that form, for `add`; unlike the rest this may be asked for by any thread.

        Raises:
            InputError: the grammar is wrong, too large, or lets nothing follow.
        """
        return self._grammars.matcher(structured)

    def add(self, request: Request, grammar: GrammarState | None = None, *, seed: int | None = None) -> None:
        """Queue a request.

        Args:
            grammar: of `request.params.structured` where that is compiled already.
            seed: of its random numbers, where another engine has chosen it.

        Raises:
            InputError: its id is in use, its tokens are not the model's, or its grammar is wrong.
            CapacityError: its prompt leaves no room for a token.
        """
        self._require_known_tokens(request)
        given, structured = request.params.seed, request.params.structured
        if seed is None:
            seed = secrets.randbits(64) if given is None else given + (request.sample << 48)
        if structured is not None:
            grammar = self.compiled(structured) if grammar is None else grammar.copy()
        self.scheduler.add(request)
        self._streams[request.request_id] = Stream(
            seed=seed,
            characters=Characters(self.loaded.tokenizer),
            stops=StopStrings(request.params.stop),
            grammar=grammar,
            prompt_logprobs=[] if request.params.prompt_logprobs is None else [Drawn(request.prompt[0])],
        )

    def abort(self, request_id: str) -> bool:
        """End a request; the next step reports it. False: it has ended already."""
        return self.scheduler.abort(request_id)

    def reset(self) -> list[Output]:
        """After a step that was cut short: take back what was planned, end every request, and report that."""
        self._flight = None
        self.scheduler.withdraw_all()
        for name in self._streams:
            self.scheduler.abort(name)
        return self.step()

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended, or its end was not reported."""
        return self.scheduler.has_work

    def step(self) -> list[Output]:
        """Finish a call of the network, and report what it did for the requests that take part in it.

        While the device computes it the host plans and begins the next one, whose tokens the host need not know: they
        go from call to call on the device. Only drafts have to be told first how many of them were right.

        Raises:
            BackendError: the device has not enough memory for a call with a single sequence. The engine goes on: the
                requests of the call start again from the prefix cache with the next step.
        """
        queues = self.scheduler.figures
        expected = min(queues.running + queues.waiting, self.scheduler.config.max_sequences)
        return self.advance(self.drafts.choose(expected))

    def advance(self, drafts: int) -> list[Output]:
        """A step, which asks the calls that it begins for so many drafts of each sequence; raises as `step` does."""
        flight, self._flight = self._flight, None
        if flight is None:
            flight = self._begun(drafts)
            self._choose(flight)
        following = self._begun_ahead(drafts, flight)
        try:
            results = self._results(flight)
        except torch.OutOfMemoryError as error:
            if following is not None:
                self.scheduler.withdraw(following.plan)
            self._take_back(flight.plan, error)
        now = time.perf_counter()
        self.drafts.learn(flight.plan, results, now - (self._busy_since or flight.begun))
        states = self.scheduler.commit(flight.plan, results)
        self._busy_since = now if self.has_work else None
        if following is not None:
            self._flight = self._chosen_ahead(following)
        return [self._output(state) for state in states]

    def _begun(self, drafts: int, earlier: _Flight | None = None) -> _Flight:
        """Plan a call and begin it behind `earlier`, which was not committed yet."""
        begun = time.perf_counter()
        plan = self.scheduler.plan(drafts)
        try:
            computed = self.runner.run(plan, earlier.choice if earlier else None) if len(plan) else None
        except torch.OutOfMemoryError as error:
            self._take_back(plan, error)
        return _Flight(plan, computed, begun)

    def _begun_ahead(self, drafts: int, flight: _Flight) -> _Flight | None:
        """The call behind one that is computed, where it can be begun; what it lacks is tried again after that one."""
        if not self.division.limits.plan_ahead or flight.plan.has_drafts or not len(flight.plan):
            return None
        try:
            following = self._begun(drafts, flight)
        except BackendError:  # alone it may fit; if not, it is then that it fails
            return None
        if len(following.plan):
            return following
        self.scheduler.withdraw(following.plan)
        return None

    def _chosen_ahead(self, flight: _Flight) -> _Flight | None:
        try:
            self._choose(flight)
        except BackendError:  # as above
            return None
        return flight

    def _take_back(self, plan: Plan, error: torch.OutOfMemoryError) -> NoReturn:
        self.scheduler.withdraw(plan)
        raise BackendError(
            f"a call of {plan.token_count} tokens does not fit the memory of {self.loaded.device}; lower "
            "token_budget or max_sequences."
        ) from error

    def _choose(self, flight: _Flight) -> None:
        """Let the device choose tokens, now that everything before them is committed.

        Raises:
            BackendError: see `step`.
        """
        if flight.computed is None:
            return
        logits, rows, behind = flight.computed.logits, list[int](), 0
        for sequence in flight.computed.batch.sampling:
            request, drafts = sequence.request, sequence.request.drafts[: sequence.drafts]
            first, behind = behind, behind + sequence.drafts + 1
            if request.finish is not None:  # it ended while this was computed; its rows have no reader
                continue
            stream = self._streams[request.request_id]
            stream.drafts = drafts
            masks = zip_longest(self._masks(stream, drafts), range(sequence.drafts + 1))
            flight.draws.append([Draw(request, stream.seed, mask, drafts[:count]) for mask, count in masks])
            rows += range(first, behind)
        if len(rows) < len(logits):
            logits = logits[integers(rows, logits.device).long()]
        try:
            flat = [one for own in flight.draws for one in own]
            flight.choice = draw(logits, flat, self._known, self.loaded.eos_ids, self._agree)
        except torch.OutOfMemoryError as error:
            self._take_back(flight.plan, error)

    def _require_known_tokens(self, request: Request) -> None:
        size = self.loaded.config.vocab_size
        wrong = [token for token in request.prompt if not 0 <= token < size]
        if wrong:
            raise InputError(
                f"request {request.request_id!r}: token id {wrong[0]} is not the model's. Allowed: 0 to {size - 1}. "
                "Use the model's own tokenizer."
            )

    def _results(self, flight: _Flight) -> list[SequenceResult]:
        """Wait for what was chosen, and draft what may come after it."""
        computed = flight.computed
        if computed is None:
            return []
        drawn = iter(flight.choice.drawn() if flight.choice else ())
        verdicts = {
            rows[0].request.request_id: Verdict(rows[0], verify([next(drawn) for _ in rows], rows[-1].ahead))
            for rows in flight.draws
        }
        for sequence in flight.plan:
            name = sequence.request.request_id
            if name in computed.prompt_scores and name in self._streams:
                # after a preemption, once more from the start
                self._streams[name].prompt_logprobs[sequence.start + 1 :] = computed.prompt_scores[name]
        drafts = {} if self.drafter is None else self.drafter.draft(flight.plan, computed, verdicts)
        return [self._result(sequence, verdicts, drafts) for sequence in flight.plan]

    def _masks(self, stream: Stream, drafts: tuple[int, ...]) -> list[Tensor]:
        """What a grammar lets follow each beginning of the drafts, up to the first that it forbids.

        Computed here, while the device is busy. Rows without one come after a draft that is rejected.
        """
        try:
            return stream.grammar.masks_along(drafts) if stream.grammar else []
        except InputError as error:
            stream.error = error
            return []

    def _result(
        self,
        sequence: ScheduledSequence,
        verdicts: Mapping[str, Verdict],
        drafts: Mapping[str, tuple[int, ...]],
    ) -> SequenceResult:
        request, name = sequence.request, sequence.request.request_id
        if name not in verdicts or request.finish is not None:
            return SequenceResult()
        if not verdicts[name].accepted:
            return SequenceResult(
                error=BackendError(
                    f"request {request.request_id!r}: the logits after {len(request.tokens)} tokens are not finite; "
                    "check the checkpoint, or compute in a wider dtype."
                )
            )
        stream = self._streams[name]
        try:
            tokens, is_over = stream.push(request, verdicts[name], self.loaded.eos_ids)
        except InputError as error:
            return SequenceResult(error=error)
        return SequenceResult(
            tokens=tokens,
            drafts=drafts.get(name, ()),
            finish=FinishReason.STOP if is_over else None,
        )

    def _output(self, state: RequestOutput) -> Output:
        stream = self._streams[state.request_id]
        if state.finish is not None:
            if not stream.stops.found:
                stream.text += stream.stops.push(stream.characters.finish()) + stream.stops.finish()
            del self._streams[state.request_id]
            if self.drafter is not None:
                self.drafter.forget(state.request_id)
        accepted = common_prefix(state.tokens, stream.drafts)
        lengths = tuple(stream.lengths[: len(state.tokens)])
        output = Output(
            state=state,
            text=stream.text,
            step=Step(lengths=lengths, accepted=accepted, rejected=len(stream.drafts) - accepted),
            logprobs=tuple(stream.logprobs),
            prompt_logprobs=tuple(stream.prompt_logprobs),
        )
        stream.text, stream.lengths, stream.drafts, stream.logprobs, stream.prompt_logprobs = "", [], (), [], []
        return output
