"""A request: what is asked for, how far it has come, and what is reported of it. No torch."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal, NoReturn

from qwen3_next.errors import InputError, Qwen3NextError

__all__ = ["FinishReason", "Request", "RequestOutput", "SamplingParams", "Status", "Structured", "common_prefix"]

MOST_LOGPROBS = 100
"""Log-probabilities of the likeliest tokens that one position may report."""

LONGEST_GRAMMAR = 64 * 2**10
"""Bytes."""


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"
    """A stop token, a stop string or the end of its grammar."""
    LENGTH = "length"
    """`max_tokens`, or the context is full."""
    ABORT = "abort"
    """The client asked for no more."""
    ERROR = "error"
    """It failed; the output carries the exception."""


class Status(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    """It owns no page and no slot: new, or preempted."""
    RUNNING = "running"
    """It owns pages and a slot."""
    LEAVING = "leaving"
    """It runs no further; its pages and slot go back when the calls in flight are committed."""
    FINISHED = "finished"
    """It ended, and owns nothing."""


@dataclass(frozen=True, kw_only=True)
class Structured:
    """A form that the text must have.

    Attributes:
        kind: of grammar.
        grammar: a JSON schema as JSON text, a regular expression, or a Lark grammar; at most 64 KiB.

    Raises:
        InputError: another kind, or no text of that size; the engine refuses what is no grammar.
    """

    kind: Literal["json_schema", "regex", "grammar"]
    grammar: str

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "regex", "grammar"):
            _refuse("structured.kind", self.kind, "'json_schema', 'regex' or 'grammar'", "Name one of these.")
        _instance("structured.grammar", self.grammar, str, "Write a schema with json.dumps.")
        if not self.grammar:
            _refuse("structured.grammar", self.grammar, "a text that is not empty", "Leave `structured` out.")
        beginning = self.grammar[:80].encode(errors="replace").decode()
        try:
            size = len(self.grammar.encode())
            if self.kind == "json_schema":
                json.loads(self.grammar)
        except (ValueError, RecursionError) as error:
            _refuse("structured.grammar", beginning, f"Unicode, and JSON for a schema ({error})", "Correct it.")
        if size > LONGEST_GRAMMAR:
            _refuse("structured.grammar", f"{beginning}...", f"at most {LONGEST_GRAMMAR} bytes", "Shorten it.")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen and when they end. The defaults draw from the model's own distribution.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities reach p.
        min_p: drop what is less likely than min_p times the likeliest token.
        repetition_penalty: makes tokens of prompt and output less likely, by a factor; 1 changes nothing.
        presence_penalty: is taken from the logit of each token that the output already holds.
        frequency_penalty: the same, once for each time that it occurs.
        logit_bias: is added to the logits of these token ids.
        seed: of the random numbers, which depend on it and the position alone; None draws one.
        n: samples of the same prompt.
        logprobs: log-probabilities to report per output token, besides that of the token itself; None reports none.
        prompt_logprobs: the same for the tokens of the prompt.
        stop: texts that end the output, which does not contain them.
        stop_token_ids: tokens that end the output, besides the model's own.
        ignore_eos: go on after the model's own end tokens.
        min_tokens: nothing of the above ends the output before it has so many tokens.
        max_tokens: the most tokens of the output; None goes on to the end of the context.
        structured: the form that the output must have; where it is complete the output ends, whatever `min_tokens` is.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    structured: Structured | None = None

    def __post_init__(self) -> None:
        self._check_distribution()
        self._check_penalties()
        self._check_ends()
        self._check_reports()

    def _check_distribution(self) -> None:
        _number("temperature", self.temperature, 0, math.inf, "Use 0 for the likeliest token.")
        _whole("top_k", self.top_k, 0, "Use 0 for all tokens.")
        _number("top_p", self.top_p, 0, 1, "Use 1 for all tokens.", above=True)
        _number("min_p", self.min_p, 0, 1, "Use 0 for all tokens.")

    def _check_penalties(self) -> None:
        _number("repetition_penalty", self.repetition_penalty, 0, math.inf, "Use 1 for none.", above=True)
        _number("presence_penalty", self.presence_penalty, -2, 2, "Use 0 for none.")
        _number("frequency_penalty", self.frequency_penalty, -2, 2, "Use 0 for none.")
        for token, bias in self.logit_bias.items():
            _whole("logit_bias: token id", token, 0, "Use ids of the tokenizer.")
            _number(f"logit_bias[{token}]", bias, -math.inf, math.inf, "Use -100 for a token that must not come.")

    def _check_ends(self) -> None:
        if any(not text for text in self.stop):
            _refuse("stop", self.stop, "texts that are not empty", "Leave the empty text out.")
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0, "Use ids of the tokenizer.")
        _whole("min_tokens", self.min_tokens, 0, "Use 0 for no lower limit.")
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, "Leave it out for the rest of the context.")
            if self.min_tokens > self.max_tokens:
                _refuse("min_tokens", self.min_tokens, f"up to max_tokens = {self.max_tokens}", "Raise max_tokens.")

    def _check_reports(self) -> None:
        _whole("n", self.n, 1, "Use 1 for one sample.")
        if self.seed is not None:
            _whole("seed", self.seed, 0, "Leave it out for a random one.")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _whole(name, count, 0, "Leave it out for no log-probabilities.", most=MOST_LOGPROBS)
        if self.structured is not None:
            _instance("structured", self.structured, Structured, "Say which kind of grammar it is.")


@dataclass(eq=False, kw_only=True)
class Request:
    """One sequence of tokens on its way through the engine. The fields below `arrival` are the scheduler's.

    A token is **computed** once its keys and values are in the pages and it is part of the DeltaNet state, counting
    `pending` tokens that lie in the slot beside the state and join it in the next call. Between calls a request that
    generates has computed every token but the last.

    Attributes:
        request_id: unique among the requests of an engine.
        prompt: token ids.
        params: how tokens are chosen.
        priority: a request counts as if it had arrived `priority * Scheduler.aging` steps earlier.
        branch_points: positions of the prompt where other requests are likely to part from it, such as the end of a
            system prompt; states are kept there.
        sample: which of the `params.n` samples this is.
        arrival: the number of calls planned before it came.
        tokens: the prompt and every token that was committed since.
        computed: how many of these are computed.
        pending: how many of the computed ones the slot holds beside its state.
        drafts: proposals for the next tokens, not committed.
        cached: computed tokens that the prefix cache gave at the last admission.
        preemptions: how often it gave its pages back and started again.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    branch_points: tuple[int, ...] = ()
    sample: int = 0
    arrival: int = 0
    status: Status = Status.WAITING
    finish: FinishReason | None = None
    error: Qwen3NextError | None = None
    tokens: list[int] = field(init=False)
    computed: int = 0
    pending: int = 0
    drafts: tuple[int, ...] = ()
    cached: int = 0
    preemptions: int = 0

    def __post_init__(self) -> None:
        if not self.prompt:
            _refuse("prompt", self.prompt, "at least one token", "Start with the model's begin token, or any text.")
        self.tokens = list(self.prompt)

    @property
    def output(self) -> Sequence[int]:
        """The tokens committed after the prompt."""
        return self.tokens[len(self.prompt) :]

    @property
    def output_length(self) -> int:
        """How many tokens were committed after the prompt."""
        return len(self.tokens) - len(self.prompt)

    def samples(self) -> list["Request"]:
        """One request for each of `params.n` samples, `<id>#<sample>`; the prefix cache lets them share the prompt."""
        if self.params.n == 1:
            return [self]
        single = replace(self.params, n=1)
        return [
            Request(
                request_id=f"{self.request_id}#{sample}",
                prompt=self.prompt,
                params=single,
                priority=self.priority,
                branch_points=self.branch_points,
                sample=sample,
            )
            for sample in range(self.params.n)
        ]


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """What one step did for a request.

    Attributes:
        tokens: committed in this step; the rest of an accepted run is cut off behind a stop token.
        finish: why it ended; None while it goes on.
        error: with `FinishReason.ERROR`.
        prompt_tokens: length of the prompt.
        cached_tokens: of these, how many came from the prefix cache at the last admission.
        output_tokens: committed so far.
    """

    request_id: str
    tokens: tuple[int, ...]
    finish: FinishReason | None
    error: Qwen3NextError | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, request: Request, tokens: Sequence[int] = ()) -> "RequestOutput":
        """The state of a request, and the tokens that are new."""
        return cls(
            request_id=request.request_id,
            tokens=tuple(tokens),
            finish=request.finish,
            error=request.error,
            prompt_tokens=len(request.prompt),
            cached_tokens=min(request.cached, len(request.prompt)),
            output_tokens=request.output_length,
        )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the start; by comparing slices, since prompts are long."""
    known, most = 0, min(len(a), len(b))
    while known < most:
        middle = (known + most + 1) // 2
        if a[known:middle] == b[known:middle]:
            known = middle
        else:
            most = middle - 1
    return known


def _number(name: str, value: Any, least: float, most: float, remedy: str, *, above: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < least or value > most or (above and value == least):
        start = "a finite number" if least == -math.inf else f"{'above' if above else 'at least'} {least:g}"
        _refuse(name, value, start + ("" if most == math.inf else f", at most {most:g}"), remedy)


def _whole(name: str, value: Any, least: int, remedy: str, *, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        allowed = f"a whole number of at least {least}" + ("" if most is None else f", at most {most}")
        _refuse(name, value, allowed, remedy)


def _instance(name: str, value: Any, kind: type, remedy: str) -> None:
    if not isinstance(value, kind):
        _refuse(name, value, f"a {kind.__name__}", remedy)


def _refuse(name: str, value: object, allowed: str, remedy: str) -> NoReturn:
    raise InputError(f"{name} = {value!r} cannot be served. Allowed: {allowed}. {remedy}")
