"""Requests in, tokens out: the loop of plan, call, choice and commit."""

import secrets
from dataclasses import dataclass, field

import torch

from qwen3_next.engine.config import Division, EngineConfig
from qwen3_next.engine.loading import LoadedModel
from qwen3_next.engine.memory import Memory
from qwen3_next.engine.plan import Plan, SequenceResult
from qwen3_next.engine.request import FinishReason, Request, RequestOutput
from qwen3_next.engine.runner import Runner
from qwen3_next.engine.sampler import Draw, Drawn, draw
from qwen3_next.engine.scheduler import Scheduler
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
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None) -> None:
        """Allocate the memory.

        Raises:
            CapacityError: it does not hold one sequence.
        """
        self.loaded = loaded
        model = loaded.model
        self.division: Division = (config or EngineConfig()).divided(
            loaded.config, model.lm_head.weight.dtype, loaded.device
        )
        memory = Memory(self.division.pages, self.division.slots, PAGE)
        self.scheduler = Scheduler(self.division.scheduler(loaded.eos_ids), memory)
        self.runner = Runner(model, self.division)
        self._streams: dict[str, _Stream] = {}
        self._known = min(loaded.tokenizer.get_vocab_size(), loaded.config.vocab_size)

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

    def reset(self) -> list[Output]:
        """After a step that was cut short: take back what was planned, end every request, and report that."""
        self.scheduler.withdraw_all()
        for name in self._streams:
            self.scheduler.abort(name)
        return self.step()

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
        plan = self.scheduler.plan()
        try:
            results = self._computed(plan) if len(plan) else []
        except torch.OutOfMemoryError as error:
            self.scheduler.withdraw(plan)
            raise BackendError(
                f"a call of {plan.token_count} tokens does not fit the memory of {self.loaded.device}; lower "
                "token_budget or max_sequences."
            ) from error
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
        batch, logits = self.runner.run(plan)
        names = [sequence.request.request_id for sequence in batch.sampling]
        draws = [
            Draw(sequence.request, self._streams[name].seed)
            for sequence, name in zip(batch.sampling, names, strict=True)
        ]
        drawn = dict(zip(names, draw(logits, draws, self._known, self.loaded.eos_ids), strict=True))
        return [self._result(sequence.request, drawn.get(sequence.request.request_id)) for sequence in plan]

    def _result(self, request: Request, drawn: Drawn | None) -> SequenceResult:
        if drawn is None:
            return SequenceResult()
        if drawn.token is None:
            return SequenceResult(
                error=BackendError(
                    f"request {request.request_id!r}: the logits after {len(request.tokens)} tokens are not finite; "
                    "check the checkpoint, or compute in a wider dtype."
                )
            )
        stream = self._streams[request.request_id]
        stream.logprobs.append(drawn)
        ends = {*request.params.stop_token_ids, *(() if request.params.ignore_eos else self.loaded.eos_ids)}
        if drawn.token not in ends:
            text = stream.characters.push(drawn.token)
            may_stop = request.output_length + 1 >= request.params.min_tokens
            stream.text += stream.stops.push(text) if may_stop else text
        return SequenceResult(tokens=(drawn.token,), finish=FinishReason.STOP if stream.stops.found else None)

    def _output(self, state: RequestOutput) -> Output:
        stream = self._streams[state.request_id]
        if state.finish is not None:
            if not stream.stops.found:
                stream.text += stream.stops.push(stream.characters.finish()) + stream.stops.finish()
            del self._streams[state.request_id]
        output = Output(state=state, text=stream.text, logprobs=tuple(stream.logprobs))
        stream.text, stream.logprobs = "", []
        return output
