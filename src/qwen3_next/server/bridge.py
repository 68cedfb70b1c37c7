"""Between OpenAI's objects and the engine's: requests become prompts and parameters, answers become JSON."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen3_next.engine import LLM, AsyncEngine, Completion, FinishReason, SamplingParams, StreamUpdate, Structured
from qwen3_next.errors import DeadlineError, EngineError, InputError, Qwen3NextError
from qwen3_next.server.drafts import cut
from qwen3_next.server.parsers import AnswerParser, Parsed
from qwen3_next.server.schema import ChatRequest, CompletionRequest, Sampled
from qwen3_next.server.tools import alone, form_of, prompt_of

LEAST_LOGPROB = -9999.0
"""JSON has no infinity; this is OpenAI's number for a token that cannot come."""

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request as the engine takes it.

    Attributes:
        prompts: token ids of each.
        opened: of a chat, whether its prompt ends inside of the reasoning; None: inside of the content.
    """

    body: ChatRequest | CompletionRequest
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    opened: bool | None = None

    @property
    def is_chat(self) -> bool:
        """Whether messages come back, and not plain text."""
        return isinstance(self.body, ChatRequest)


@dataclass(frozen=True)
class Part:
    """What is new of an answer to the prompt of that number."""

    prompt: int
    update: StreamUpdate


def job_of(llm: LLM, body: ChatRequest | CompletionRequest) -> Job:
    """Render, tokenise and check a request; takes a while for long prompts.

    Raises:
        InputError: a value that the engine does not serve, or messages that the chat template does not render.
    """
    if isinstance(body, CompletionRequest):
        prompts = [llm.encoded(one) if isinstance(one, str) else one for one in body.prompts()]
        form = alone(body.response_format.schema_of())
        return Job(body=body, prompts=prompts, params=_params(llm, body, body.max_tokens, body.logprobs, form))
    text, opened = prompt_of(llm, body)
    form = form_of(llm, body, opened=opened is True)
    most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    reported = (body.top_logprobs or 0) if body.logprobs else None
    params = _params(llm, body, most, reported, form)
    return Job(body=body, prompts=[llm.encoded(text)], params=params, opened=opened)


async def answer(engine: AsyncEngine, job: Job, timeout: float | None, report: Json) -> Json:
    """The whole answer.

    Args:
        timeout: seconds that it may take; None for as long as it takes.
        report: takes the counts of tokens.

    Raises:
        Qwen3NextError: the engine refused it, or failed.
    """
    tasks = [asyncio.ensure_future(engine.generate(prompt, job.params, timeout=timeout)) for prompt in job.prompts]
    try:
        groups = await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # of several prompts the others, where one is refused
            task.cancel()
    answers = Answers(engine.llm, job)
    choices: list[Json] = []
    for group in groups:
        for completion in group:
            raise_for(completion)
            answers.count(len(choices) // job.params.n, len(choices), completion, len(completion.token_ids))
            choices.append(answers.choice(len(choices), completion))
    report |= answers.usage()
    return answers.envelope(choices, is_chunk=False) | {"usage": answers.usage()}


async def updates_of(engine: AsyncEngine, job: Job, timeout: float | None) -> AsyncGenerator[Part]:
    """The answers to all prompts as they come; closing it ends them all.

    Raises:
        Qwen3NextError: the engine refused one of them, or failed.
    """
    streams = [engine.stream(prompt, job.params, timeout=timeout) for prompt in job.prompts]
    if len(streams) == 1:  # without a task for each token
        async with aclosing(streams[0]):
            async for update in streams[0]:
                yield Part(0, update)
        return
    waiting = {asyncio.ensure_future(anext(stream, None)): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, update = waiting.pop(task), task.result()
                if update is not None:
                    yield Part(number, update)
                    waiting[asyncio.ensure_future(anext(streams[number], None))] = number
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def chunks(
    engine: AsyncEngine, job: Job, parts: AsyncIterator[Part], first: Part, report: Json
) -> AsyncGenerator[str]:
    """Server-sent events of a stream whose first part was taken; a failure half-way is the last of them.

    Args:
        report: takes the counts of tokens, however it ends.
    """
    answers = Answers(engine.llm, job)
    options = job.body.stream_options
    with_usage = options is not None and options.include_usage
    with_drafts = options is not None and options.include_drafts
    empty = {"usage": None} if with_usage else {}
    try:
        if job.is_chat:
            for index in range(job.params.n):
                yield event(answers.envelope([answers.opening(index)], is_chunk=True) | empty)
        part: Part | None = first
        while part is not None:
            update, index = part.update, part.prompt * job.params.n + part.update.sample
            raise_for(update)
            answers.count(part.prompt, index, update, update.output_tokens)
            for piece, origin in cut(update) if with_drafts else [(update, None)]:
                told = answers.piece(index, piece)
                if told.get("text") or told.get("delta") or piece.finish or piece.logprobs or origin:
                    drafts = {} if origin is None else {"drafts": asdict(origin)}
                    yield event(answers.envelope([told | drafts], is_chunk=True) | empty)
            part = await anext(parts, None)
        if with_usage:
            yield event(answers.envelope([], is_chunk=True) | {"usage": answers.usage()})
    except Qwen3NextError as error:
        report["error"] = f"{type(error).__name__}: {error}"
        yield event(failure(str(error), "server_error", code="timeout" if isinstance(error, DeadlineError) else None))
    finally:
        report |= answers.usage()
    yield "data: [DONE]\n\n"


def raise_for(outcome: Completion | StreamUpdate) -> None:
    """Raise what a request ended with, if that is no answer."""
    if outcome.error is not None:
        raise outcome.error
    if outcome.finish is FinishReason.ABORT:
        raise EngineError("the server shuts down and did not finish this answer; try again.")


def failure(message: str, kind: str, param: str | None = None, code: str | None = None) -> Json:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _params(llm: LLM, body: Sampled, most: int | None, logprobs: int | None, form: Structured | None) -> SamplingParams:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return llm.default_params(
        **{name: value for name in names if (value := getattr(body, name)) is not None},
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias={int(token): bias for token, bias in body.logit_bias.items()},
        seed=None if body.seed is None else body.seed % 2**64,
        n=body.n,
        logprobs=logprobs,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        max_tokens=most,
        structured=form,
    )


@dataclass(eq=False)
class Answers:
    """Writes the choices of one request, and counts its tokens."""

    llm: LLM
    job: Job
    prompt_tokens: dict[int, int] = field(default_factory=dict[int, int])
    cached_tokens: dict[int, int] = field(default_factory=dict[int, int])
    output_tokens: dict[int, int] = field(default_factory=dict[int, int])
    offsets: dict[int, int] = field(default_factory=dict[int, int])
    parsers: dict[int, AnswerParser] = field(default_factory=dict[int, AnswerParser])

    def __post_init__(self) -> None:
        self.name = f"{'chatcmpl' if self.job.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def count(self, prompt: int, index: int, outcome: Completion | StreamUpdate, output_tokens: int) -> None:
        """Take note of an answer's tokens; a prompt counts once, by its first sample."""
        self.prompt_tokens[prompt] = outcome.prompt_tokens
        self.cached_tokens.setdefault(prompt, outcome.cached_tokens)
        self.output_tokens[index] = output_tokens

    def usage(self) -> Json:
        """All that was counted."""
        prompt, output = sum(self.prompt_tokens.values()), sum(self.output_tokens.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }

    def envelope(self, choices: list[Json], *, is_chunk: bool) -> Json:
        """What stands around choices."""
        kind = "chat.completion" + (".chunk" if is_chunk else "") if self.job.is_chat else "text_completion"
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.job.body.model,
            "choices": choices,
        }

    def opening(self, index: int) -> Json:
        """The first chunk of a message."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, index: int, completion: Completion) -> Json:
        """A whole answer."""
        found = self.read(index, completion)
        parts = _delta(found)
        message = {"role": "assistant", "content": found.content, "refusal": None} | parts
        if found.calls and not found.content:
            message["content"] = None
        for call in parts.get("tool_calls", ()):
            del call["index"]  # which belongs to streams
        return self._around(index, completion, {"message": message})

    def piece(self, index: int, update: StreamUpdate) -> Json:
        """What is new of an answer."""
        return self._around(index, update, {"delta": _delta(self.read(index, update))})

    def read(self, index: int, outcome: Completion | StreamUpdate) -> Parsed:
        """What a message has that is new; nothing of a plain text."""
        if not isinstance(self.job.body, ChatRequest):
            return Parsed()
        if index not in self.parsers:
            self.parsers[index] = _parser(self.job.body, self.job.opened)
        parser = self.parsers[index]
        found = parser.push(outcome.text)
        return found if outcome.finish is None else found + parser.finish()

    def _around(self, index: int, outcome: Completion | StreamUpdate, content: Json) -> Json:
        finish = None if outcome.finish is None else outcome.finish.value
        has_called = index in self.parsers and self.parsers[index].calls > 0
        return {
            "index": index,
            **(content if self.job.is_chat else {"text": outcome.text}),
            "logprobs": self._logprobs(index, outcome),
            "finish_reason": "tool_calls" if finish and has_called else finish,
        }

    def _logprobs(self, index: int, outcome: Completion | StreamUpdate) -> Json | None:
        if outcome.logprobs is None:
            return None
        tokens = [self._scored(drawn.token, drawn.logprob) for drawn in outcome.logprobs]
        tops = [[self._scored(*pair) for pair in drawn.top_logprobs] for drawn in outcome.logprobs]
        if self.job.is_chat:
            content = [one | {"top_logprobs": top} for one, top in zip(tokens, tops, strict=True)]
            return {"content": content, "refusal": None}
        return {
            "tokens": [one["token"] for one in tokens],
            "token_logprobs": [one["logprob"] for one in tokens],
            "top_logprobs": [{one["token"]: one["logprob"] for one in top} for top in tops],
            "text_offset": list(self._advanced(index, tokens)),
        }

    def _advanced(self, index: int, tokens: Sequence[Json]) -> Iterator[int]:
        for one in tokens:
            yield self.offsets.setdefault(index, 0)
            self.offsets[index] += len(one["token"])

    def _scored(self, token: int | None, logprob: float | None) -> Json:
        data = b"" if token is None else token_bytes(self.llm, token)
        try:
            text = data.decode()
        except UnicodeDecodeError:  # a part of a character; written so that each is another key
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        score = LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)
        return {"token": text, "logprob": score, "bytes": list(data)}


def _parser(body: ChatRequest, opened: bool | None) -> AnswerParser:
    names = {tool.function.name for tool in body.callable_tools()}
    return AnswerParser(names, most_calls=None if body.parallel_tool_calls else 1, opened=opened)


def _delta(found: Parsed) -> Json:
    """The parts that are there; a call is whole."""
    calls = [
        {
            "index": call.index,
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in found.calls
    ]
    parts = {"reasoning_content": found.reasoning, "content": found.content, "tool_calls": calls}
    return {name: part for name, part in parts.items() if part}


def text_of(llm: LLM, tokens: Sequence[int]) -> str:
    """What tokens write, the names of special ones included.

    Raises:
        InputError: one that the tokenizer does not have.
    """
    tokenizer = llm.engine.loaded.tokenizer
    size = tokenizer.get_vocab_size()
    wrong = [token for token in tokens if token >= size]
    if wrong:
        raise InputError(f"tokens: {wrong[0]} is not the model's. Allowed: 0 to {size - 1}.")
    return tokenizer.decode(list(tokens), skip_special_tokens=False)


def token_bytes(llm: LLM, token: int) -> bytes:
    """What a token of a byte-level tokenizer writes; the name of a special one."""
    name = llm.engine.loaded.tokenizer.id_to_token(token) or ""
    known = [_BYTES.get(character) for character in name]
    return name.encode() if None in known else bytes(byte for byte in known if byte is not None)


def _byte_alphabet() -> Mapping[str, int]:
    """The characters that stand for bytes in the names of tokens (GPT-2): what is printable for itself."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def event(content: Json) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
