"""Answers to prompts: whole ones, what is new of one, and one that grows."""

from dataclasses import dataclass, field

from qwen3_next.engine.request import FinishReason, Request, RequestOutput
from qwen3_next.engine.sampler import Drawn
from qwen3_next.engine.stream import Output, Step
from qwen3_next.errors import Qwen3NextError


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer to a prompt.

    Attributes:
        finish: why it ended.
        error: with `FinishReason.ERROR`, what went wrong with this request.
        logprobs: of each token, where they were asked for.
        prompt_logprobs: of each token of the prompt, where they were asked for; the first one's `logprob` is None.
        cached_tokens: of the prompt, how many an earlier prompt had brought.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason
    error: Qwen3NextError | None
    logprobs: tuple[Drawn, ...] | None
    prompt_logprobs: tuple[Drawn, ...] | None
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class StreamUpdate:
    """What is new of an answer since the update before.

    Attributes:
        sample: which of the `params.n` answers.
        text: whole characters, nothing of a stop string; may be empty while one is incomplete.
        steps: that the text and the tokens come from; text behind the sum of their lengths was held back until the end.
        finish: why it ended; None while it goes on.
        error: with `FinishReason.ERROR`, what went wrong with this request.
        logprobs: of each new token, where they were asked for.
        prompt_logprobs: of each token of the prompt, where they were asked for; all of them in one update, the first.
        cached_tokens: of the prompt, how many an earlier prompt had brought.
        output_tokens: of the answer so far.
    """

    sample: int
    text: str
    token_ids: tuple[int, ...]
    steps: tuple[Step, ...]
    finish: FinishReason | None
    error: Qwen3NextError | None
    logprobs: tuple[Drawn, ...] | None
    prompt_logprobs: tuple[Drawn, ...] | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(eq=False)
class Growing:
    """An answer as it comes: what nobody has taken yet, and the newest state."""

    request: Request
    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    steps: list[Step] = field(default_factory=list[Step])
    logprobs: list[Drawn] = field(default_factory=list[Drawn])
    prompt_logprobs: list[Drawn] = field(default_factory=list[Drawn])
    state: RequestOutput | None = None

    def add(self, output: Output) -> None:
        """One step more."""
        self.state = output.state
        self.text += output.text
        self.token_ids += output.state.tokens
        self.steps += [output.step] if output.state.tokens else []
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes."""
        return self.state is not None and self.state.finish is not None

    def completion(self) -> Completion:
        """The whole, once it has ended, if no update was taken."""
        state = self.state
        assert state is not None
        assert state.finish is not None, "it has not ended"
        return Completion(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish=state.finish,
            error=state.error,
            logprobs=self._logprobs(),
            prompt_logprobs=self._prompt_logprobs(),
            prompt_tokens=state.prompt_tokens,
            cached_tokens=state.cached_tokens,
        )

    def take(self) -> StreamUpdate | None:
        """What has come since the last time; None: nothing."""
        state = self.state
        if state is None or not (self.text or self.token_ids or state.finish):
            return None
        update = StreamUpdate(
            sample=self.request.sample,
            text=self.text,
            token_ids=tuple(self.token_ids),
            steps=tuple(self.steps),
            finish=state.finish,
            error=state.error,
            logprobs=self._logprobs(),
            prompt_logprobs=self._prompt_logprobs(),
            prompt_tokens=state.prompt_tokens,
            cached_tokens=state.cached_tokens,
            output_tokens=state.output_tokens,
        )
        self.text, self.token_ids, self.steps, self.logprobs, self.prompt_logprobs = "", [], [], [], []
        return update

    def _logprobs(self) -> tuple[Drawn, ...] | None:
        return tuple(self.logprobs) if self.request.params.logprobs is not None else None

    def _prompt_logprobs(self) -> tuple[Drawn, ...] | None:
        return tuple(self.prompt_logprobs) if self.request.params.prompt_logprobs is not None else None
