"""Requests in, tokens out: the loop of plan, call, choice and commit."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from qwen3_next.engine.config import Division, EngineConfig
from qwen3_next.engine.draft_policy import DraftPolicy
from qwen3_next.engine.loading import LoadedModel
from qwen3_next.engine.memory import Memory
from qwen3_next.engine.plan import Plan, ScheduledSequence, SequenceResult
from qwen3_next.engine.request import FinishReason, Request, RequestOutput
from qwen3_next.engine.runner import Computed, Runner
from qwen3_next.engine.sampler import Draw, Drawn, choose, draw
from qwen3_next.engine.scheduler import Scheduler
from qwen3_next.engine.speculative import Drafter, Verdict, verify
from qwen3_next.engine.text import Characters, StopStrings
from qwen3_next.errors import BackendError, InputError
from qwen3_next.ops.pages import PAGE


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one step did for a request.

    Attributes:
        state: tokens, the reason of the end, counts.
        text: what may be shown now; nothing of a stop string, and no half of a character.
        logprobs: of the new tokens, where they were asked for.
    """

    state: RequestOutput
    text: str
    logprobs: tuple[Drawn, ...]


@dataclass(eq=False)
class _Stream:
    """What the engine knows of a request beside the scheduler."""

    seed: int
    characters: Characters
    stops: StopStrings
    text: str = ""
    logprobs: list[Drawn] = field(default_factory=list[Drawn])


class Engine:
    """Serves many requests at once: continuous batching, chunked prompts, a prefix cache over keys and states.

    Every request gets what it would get alone: its tokens depend on its prompt, its parameters and its seed.

    Attributes:
        drafts: how many tokens the MTP layer proposes; `drafts.figures` is what became of them.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None) -> None:
        """Allocate the memory.

        Raises:
            CapacityError: it does not hold one sequence.
            InputError: drafts are asked for, and the model has no MTP layer.
        """
        self.loaded = loaded
        model = loaded.model
        self.division: Division = (config or EngineConfig()).divided(
            loaded.config, model.lm_head.weight.dtype, loaded.device, model.mtp is not None
        )
        memory = Memory(self.division.pages, self.division.slots, PAGE)
        self.scheduler = Scheduler(self.division.scheduler(loaded.eos_ids), memory)
        self.runner = Runner(model, self.division)
        self.drafts = DraftPolicy(self.division.drafts, is_fixed=self.division.limits.drafts != "auto")
        self._streams: dict[str, _Stream] = {}
        self._known = min(loaded.tokenizer.get_vocab_size(), loaded.config.vocab_size)
        chosen = partial(choose, known=self._known, ends=loaded.eos_ids)
        self.drafter = Drafter.allocate(model, self.division, chosen) if self.division.drafts else None

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InputError: its id is in use, its tokens are not the model's, or it asks for what is not served.
            CapacityError: its prompt leaves no room for a token.
        """
        self._require_served(request)
        self.scheduler.add(request)
        seed = request.params.seed
        self._streams[request.request_id] = _Stream(
            seed=secrets.randbits(64) if seed is None else seed + (request.sample << 48),
            characters=Characters(self.loaded.tokenizer),
            stops=StopStrings(request.params.stop),
        )

    def abort(self, request_id: str) -> bool:
        """End a request; the next step reports it. False: it has ended already."""
        return self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended, or its end was not reported."""
        return self.scheduler.has_work

    def step(self) -> list[Output]:
        """Advance every request that takes part in the next call of the network.

        Raises:
            BackendError: the device has not enough memory for a call with a single sequence. The engine goes on: the
                requests of the call start again from the prefix cache with the next step.
        """
        queues = self.scheduler.figures
        expected = min(queues.running + queues.waiting, self.scheduler.config.max_sequences)
        plan = self.scheduler.plan(self.drafts.choose(expected))
        start = time.perf_counter()
        try:
            results = self._computed(plan) if len(plan) else []
        except torch.OutOfMemoryError as error:
            self.scheduler.withdraw(plan)
            raise BackendError(
                f"a call of {plan.token_count} tokens does not fit the memory of {self.loaded.device}; lower "
                "token_budget or max_sequences."
            ) from error
        self.drafts.learn(plan, results, time.perf_counter() - start)
        return [self._output(state) for state in self.scheduler.commit(plan, results)]

    def _require_served(self, request: Request) -> None:
        params = request.params
        if params.structured is not None or params.prompt_logprobs is not None:
            name = "structured" if params.structured is not None else "prompt_logprobs"
            raise InputError(f"request {request.request_id!r}: {name} is not served in this version. Leave it out.")
        size = self.loaded.config.vocab_size
        wrong = [token for token in request.prompt if not 0 <= token < size]
        if wrong:
            raise InputError(
                f"request {request.request_id!r}: token id {wrong[0]} is not the model's. Allowed: 0 to {size - 1}. "
                "Use the model's own tokenizer."
            )

    def _computed(self, plan: Plan) -> list[SequenceResult]:
        computed = self.runner.run(plan)
        verdicts = self._verdicts(computed)
        drafts = {} if self.drafter is None else self.drafter.draft(plan, computed, verdicts)
        return [self._result(sequence, computed, verdicts, drafts) for sequence in plan]

    def _verdicts(self, computed: Computed) -> dict[str, Verdict]:
        draws: list[list[Draw]] = []
        for sequence in computed.batch.sampling:
            request, drafts = sequence.request, sequence.request.drafts[: sequence.drafts]
            seed = self._streams[request.request_id].seed
            draws.append([Draw(request, seed, drafts[:count]) for count in range(sequence.drafts + 1)])
        flat = [one for rows in draws for one in rows]
        drawn = iter(draw(computed.logits, flat, self._known, self.loaded.eos_ids))
        return {
            rows[0].request.request_id: Verdict(rows[0], verify([next(drawn) for _ in rows], rows[-1].ahead))
            for rows in draws
        }

    def _result(
        self,
        sequence: ScheduledSequence,
        computed: Computed,
        verdicts: Mapping[str, Verdict],
        drafts: Mapping[str, tuple[int, ...]],
    ) -> SequenceResult:
        request, name = sequence.request, sequence.request.request_id
        if name not in verdicts:
            return SequenceResult()
        if not verdicts[name].accepted:
            return SequenceResult(
                error=BackendError(
                    f"request {request.request_id!r}: the logits after {len(request.tokens)} tokens are not finite; "
                    "check the checkpoint, or compute in a wider dtype."
                )
            )
        tokens = self._pushed(request, verdicts[name])
        return SequenceResult(
            tokens=tokens,
            drafts=drafts.get(name, ()),
            has_joined=computed.batch.joins,
            finish=FinishReason.STOP if self._streams[name].stops.found else None,
        )

    def _pushed(self, request: Request, verdict: Verdict) -> tuple[int, ...]:
        """Add accepted tokens to the text, up to the one that ends it, and return these."""
        stream, params = self._streams[request.request_id], request.params
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.loaded.eos_ids)}
        for count, (token, drawn) in enumerate(zip(verdict.tokens, verdict.accepted, strict=True), 1):
            stream.logprobs.append(drawn)
            if token not in ends:
                text = stream.characters.push(token)
                may_stop = request.output_length + count >= params.min_tokens
                stream.text += stream.stops.push(text) if may_stop else text
            if token in ends or stream.stops.found:
                return verdict.tokens[:count]
        return verdict.tokens

    def _output(self, state: RequestOutput) -> Output:
        stream = self._streams[state.request_id]
        if state.finish is not None:
            if not stream.stops.found:
                stream.text += stream.stops.push(stream.characters.finish()) + stream.stops.finish()
            del self._streams[state.request_id]
            if self.drafter is not None:
                self.drafter.forget(state.request_id)
        output = Output(state=state, text=stream.text, logprobs=tuple(stream.logprobs))
        stream.text, stream.logprobs = "", []
        return output
