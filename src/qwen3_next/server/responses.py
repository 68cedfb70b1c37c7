"""Answers of /v1/responses: the parts of a chat's answer as items, whole or as events of a stream."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Literal

from qwen3_next.engine import AsyncEngine, Completion, FinishReason, StreamUpdate
from qwen3_next.errors import Qwen3NextError
from qwen3_next.server.bridge import Answers, Job, Json, Part, event, raise_for
from qwen3_next.server.parsers import Call
from qwen3_next.server.responses_schema import ResponsesRequest

Kind = Literal["reasoning", "message"]
PART_TYPES: dict[Kind, str] = {"reasoning": "reasoning_text", "message": "output_text"}
PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


async def answer(engine: AsyncEngine, job: Job, body: ResponsesRequest, timeout: float | None, report: Json) -> Json:
    """The whole answer.

    Args:
        timeout: seconds that it may take; None for as long as it takes.
        report: takes the counts of tokens.

    Raises:
        Qwen3NextError: the engine refused it, or failed.
    """
    (completion,) = await engine.generate(job.prompts[0], job.params, timeout=timeout)
    raise_for(completion)
    response = _Response(Answers(engine.llm, job), body)
    for _ in response.events(completion, len(completion.token_ids)):
        pass
    report |= response.answers.usage()
    return response.whole()


async def chunks(
    engine: AsyncEngine, job: Job, body: ResponsesRequest, parts: AsyncIterator[Part], first: Part, report: Json
) -> AsyncGenerator[str]:
    """Server-sent events of a stream whose first part was taken; a failure half-way is the last of them.

    Args:
        report: takes the counts of tokens, however it ends.
    """
    response = _Response(Answers(engine.llm, job), body)
    try:
        for name in ("created", "in_progress"):
            yield _sent(response.event(name, response=response.whole()))
        part: Part | None = first
        while part is not None:
            raise_for(part.update)
            for content in response.events(part.update, part.update.output_tokens):
                yield _sent(content)
            part = await anext(parts, None)
        yield _sent(response.event(response.status, response=response.whole()))
    except Qwen3NextError as error:
        report["error"] = f"{type(error).__name__}: {error}"
        response.status, response.error = "failed", {"code": "server_error", "message": str(error)}
        yield _sent(response.event("failed", response=response.whole()))
    finally:
        report |= response.answers.usage()


@dataclass(eq=False)
class _Response:
    """One response as it is written.

    Attributes:
        output: its items; the last one is open where it has a part that may go on.
    """

    answers: Answers
    body: ResponsesRequest
    status: str = "in_progress"
    error: Json | None = None
    output: list[Json] = field(default_factory=list[Json])

    def __post_init__(self) -> None:
        self.name, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._sequence = 0
        self._open: Kind | None = None
        self._reasoning = ""

    def events(self, outcome: Completion | StreamUpdate, output_tokens: int) -> Iterator[Json]:
        """Take what is new of the answer; events that tell it."""
        self.answers.count(0, 0, outcome, output_tokens)
        for part in self.answers.read(0, outcome).parts():
            if isinstance(part, Call):
                yield from self._close("completed")
                yield from self._call(part)
            else:
                yield from self._text(*part)
        if outcome.finish is not None:
            if not self.output:
                yield from self._begin("message")
            self.status = "incomplete" if outcome.finish is FinishReason.LENGTH else "completed"
            yield from self._close(self.status)

    def event(self, kind: str, **content: object) -> Json:
        """An event with its number."""
        self._sequence += 1
        return {"type": f"response.{kind}", "sequence_number": self._sequence - 1, **content}

    def whole(self) -> Json:
        """The response as it is now."""
        body, params = self.body, self.answers.job.params
        is_done = self.status != "in_progress"
        shown = (
            "model",
            "instructions",
            "max_output_tokens",
            "metadata",
            "parallel_tool_calls",
            "tool_choice",
            "tools",
        )
        shown += ("text", "truncation", "background", "store", "user")
        return {
            "id": self.name,
            "object": "response",
            "created_at": self.created,
            "status": self.status,
            "error": self.error,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "output": self.output,
            "previous_response_id": None,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "usage": self._usage() if is_done else None,
            **body.model_dump(include=set(shown), by_alias=True),
        }

    def _usage(self) -> Json:
        found = self.answers.usage()
        reasoning = len(self.answers.llm.encoded(self._reasoning))
        return {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": found["prompt_tokens_details"],
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": found["total_tokens"],
        }

    def _text(self, kind: Kind, text: str) -> Iterator[Json]:
        if self._open != kind:
            yield from self._close("completed")
            yield from self._begin(kind)
        self.output[-1]["content"][0]["text"] += text
        self._reasoning += text if kind == "reasoning" else ""
        yield self._told(f"{PART_TYPES[kind]}.delta", content_index=0, delta=text, **_scores(kind))

    def _begin(self, kind: Kind) -> Iterator[Json]:
        rest = {"role": "assistant"} if kind == "message" else {"summary": []}
        yield from self._added(kind, content=[], **rest)
        part = {"type": PART_TYPES[kind], "text": "", **({"annotations": []} if kind == "message" else {})}
        self.output[-1]["content"].append(part | _scores(kind))
        self._open = kind
        yield self._told("content_part.added", content_index=0, part=self.output[-1]["content"][0])

    def _close(self, status: str) -> Iterator[Json]:
        if self._open is None:
            return
        kind, part = self._open, self.output[-1]["content"][0]
        self._open = None
        yield self._told(f"{PART_TYPES[kind]}.done", content_index=0, text=part["text"], **_scores(kind))
        yield self._told("content_part.done", content_index=0, part=part)
        yield self._done(status)

    def _call(self, call: Call) -> Iterator[Json]:
        """Whole, as it is known to be one only at its end."""
        yield from self._added("function_call", name=call.name, call_id=f"call_{uuid.uuid4().hex}", arguments="")
        yield self._told("function_call_arguments.delta", delta=call.arguments)
        self.output[-1]["arguments"] = call.arguments
        yield self._told("function_call_arguments.done", name=call.name, arguments=call.arguments)
        yield self._done("completed")

    def _added(self, kind: str, **content: object) -> Iterator[Json]:
        item = {"type": kind, "id": f"{PREFIXES[kind]}_{uuid.uuid4().hex}", "status": "in_progress", **content}
        self.output.append(item)
        yield self.event("output_item.added", output_index=len(self.output) - 1, item=item)

    def _done(self, status: str) -> Json:
        self.output[-1]["status"] = status
        return self.event("output_item.done", output_index=len(self.output) - 1, item=self.output[-1])

    def _told(self, kind: str, **content: object) -> Json:
        place = {"output_index": len(self.output) - 1, "item_id": self.output[-1]["id"]}
        return self.event(kind, **place, **content)


def _scores(kind: Kind) -> Json:
    """Log-probabilities, of which there are none; clients want the field with texts of messages."""
    return {"logprobs": []} if kind == "message" else {}


def _sent(content: Json) -> str:
    return f"event: {content['type']}\n{event(content)}"
