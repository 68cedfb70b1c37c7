"""Requests in, tokens out: the loop of plan, call, choice and commit."""

import secrets
from dataclasses import dataclass, field

import torch

from qwen3_next.engine.config import Division, EngineConfig
from qwen3_next.engine.grammar import GrammarCompiler, GrammarState
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
        prompt_logprobs: of every token of the prompt, where they were asked for: told once, in the first output. The
            first token has none.
    """

    state: RequestOutput
    text: str
    logprobs: tuple[Drawn, ...]
    prompt_logprobs: tuple[Drawn, ...]


@dataclass(eq=False)
class _Stream:
    """What the engine knows of a request beside the scheduler."""

    seed: int
    characters: Characters
    stops: StopStrings
    grammar: GrammarState | None
    prompt_logprobs: list[Drawn]
    text: str = ""
    logprobs: list[Drawn] = field(default_factory=list[Drawn])
    error: InputError | None = None


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
        self._streams: dict[str, _Stream] = {}
        self._known = min(loaded.tokenizer.get_vocab_size(), loaded.config.vocab_size)
        self.runner = Runner(model, self.division, self._known)
        self._grammars = GrammarCompiler(loaded.tokenizer, self._known, loaded.eos_ids)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InputError: its id is in use, its tokens are not the model's, or its grammar is wrong.
            CapacityError: its prompt leaves no room for a token.
        """
        self._require_known_tokens(request)
        seed, structured = request.params.seed, request.params.structured
        grammar = None if structured is None else self._grammars.matcher(structured)
        self.scheduler.add(request)
        self._streams[request.request_id] = _Stream(
            seed=secrets.randbits(64) if seed is None else seed + (request.sample << 48),
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

    def _require_known_tokens(self, request: Request) -> None:
        size = self.loaded.config.vocab_size
        wrong = [token for token in request.prompt if not 0 <= token < size]
        if wrong:
            raise InputError(
                f"request {request.request_id!r}: token id {wrong[0]} is not the model's. Allowed: 0 to {size - 1}. "
                "Use the model's own tokenizer."
            )

    def _computed(self, plan: Plan) -> list[SequenceResult]:
        computed = self.runner.run(plan)
        draws = [self._draw(sequence.request) for sequence in computed.batch.sampling]
        drawn = draw(computed.logits, draws, self._known, self.loaded.eos_ids)
        by_name = {one.request.request_id: token for one, token in zip(draws, drawn, strict=True)}
        for sequence in plan:
            name = sequence.request.request_id
            if name in computed.prompt_scores:  # after a preemption, once more from the start
                self._streams[name].prompt_logprobs[sequence.start + 1 :] = computed.prompt_scores[name]
        return [self._result(sequence.request, by_name.get(sequence.request.request_id)) for sequence in plan]

    def _draw(self, request: Request) -> Draw:
        """What to draw with; masks are computed here, while the device is busy."""
        stream, allowed = self._streams[request.request_id], None
        try:
            allowed = stream.grammar.allowed() if stream.grammar else None
        except InputError as error:
            stream.error = error
        return Draw(request, stream.seed, allowed)

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
        try:
            is_over = self._accept(stream, drawn.token)
        except InputError as error:
            return SequenceResult(error=error)
        stream.logprobs.append(drawn)
        ends = {*request.params.stop_token_ids, *(() if request.params.ignore_eos else self.loaded.eos_ids)}
        if drawn.token not in ends:
            text = stream.characters.push(drawn.token)
            may_stop = request.output_length + 1 >= request.params.min_tokens
            stream.text += stream.stops.push(text) if may_stop else text
        is_over |= stream.stops.found
        return SequenceResult(tokens=(drawn.token,), finish=FinishReason.STOP if is_over else None)

    def _accept(self, stream: _Stream, token: int) -> bool:
        """Go on by the grammar, where there is one. True: it ends there."""
        if stream.error is not None:
            raise stream.error
        if stream.grammar is None:
            return False
        stream.grammar.accept(token)
        return stream.grammar.is_finished

    def _output(self, state: RequestOutput) -> Output:
        stream = self._streams[state.request_id]
        if state.finish is not None:
            if not stream.stops.found:
                stream.text += stream.stops.push(stream.characters.finish()) + stream.stops.finish()
            del self._streams[state.request_id]
        output = Output(
            state=state,
            text=stream.text,
            logprobs=tuple(stream.logprobs),
            prompt_logprobs=tuple(stream.prompt_logprobs),
        )
        stream.text, stream.logprobs, stream.prompt_logprobs = "", [], []
        return output
