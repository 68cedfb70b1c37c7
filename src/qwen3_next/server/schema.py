"""What a client may send: each field of OpenAI's requests is honoured, or refused by its name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import models_json_schema

REFUSED = {
    "tools": "calls of tools are not read out of the text yet; describe them in a message",
    "tool_choice": "calls of tools are not read out of the text yet",
    "parallel_tool_calls": "calls of tools are not read out of the text yet",
    "tool_calls": "calls of tools are not read out of the text yet; write them into the content",
    "tool_call_id": "calls of tools are not read out of the text yet",
    "functions": "calls of functions are not read out of the text yet; describe them in a message",
    "function_call": "calls of functions are not read out of the text yet",
    "audio": "the model reads and writes text only",
    "modalities": "the model reads and writes text only; leave it out",
    "prediction": "the engine makes its own drafts; leave it out",
    "store": "nothing is stored; leave it out",
    "service_tier": "there is one tier; leave it out",
    "reasoning_effort": "the model has one; leave it out",
    "verbosity": "say it in a message",
    "web_search_options": "the server reaches no network",
    "best_of": "use n, and choose among the answers",
    "echo": "put the prompt before the answer yourself",
    "suffix": "the model continues texts and fills no gaps",
    "name": "the chat template knows roles only; write the name into the content",
}
"""Fields of OpenAI's requests that are not served, and what to do instead."""

MOST_FIELDS = 1024

# Lists stop at their first mistake: a report of millions would take the memory and the minutes of everybody.
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=128)]
TokenIds = Annotated[list[int], Field(fail_fast=True, min_length=1)]
ManyTokenIds = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=128)]
TokenName = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Strict(BaseModel):
    """An object without unknown fields, in which null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if any(isinstance(one, dict) and len(one) > MOST_FIELDS for one in (data, *data.values())):
            raise ValueError(f"an object has more than {MOST_FIELDS} fields")
        return {name: value for name, value in data.items() if value is not None}


class TextPart(Strict):
    """One piece of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn; pieces are joined with nothing between them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=4096)]

    def for_template(self) -> dict[str, str]:
        """As chat templates want it; they know "developer" by its older name."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": text}


class StreamOptions(Strict):
    """`include_usage` adds a last chunk that counts tokens."""

    include_usage: bool = False


class NamedSchema(Strict):
    """A JSON schema; the text fits it whether it is called strict or not."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str = ""
    strict: bool = True


class ResponseFormat(Strict):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', and that needs it")
        return self

    def schema_of(self) -> dict[str, Any] | None:
        """What the text must fit; None: anything."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class Sampled(Strict):
    """What both kinds of requests share. The engine says which numbers it serves.

    Attributes:
        temperature: with `top_p`, `top_k`, `min_p` and `repetition_penalty` from generation_config.json where left out.
        seed: a negative one counts from 2**64 down.
        metadata: a label, like `user`; nothing depends on it.
    """

    model: str
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=MOST_FIELDS)] = {}
    max_tokens: int | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] = {}
    min_p: float | None = None
    min_tokens: int = 0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    presence_penalty: float = 0.0
    repetition_penalty: float | None = None
    response_format: ResponseFormat = ResponseFormat(type="text")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[Texts, Field(max_length=16)] = Field(default_factory=list[str])
    stop_token_ids: Annotated[list[int], Field(fail_fast=True, max_length=128)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    user: str = ""

    @model_validator(mode="after")
    def _streams_with_options(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belongs to stream = true")
        return self


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs belongs to logprobs = true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        return self


class CompletionRequest(Sampled):
    """POST /v1/completions; OpenAI's answers have 16 tokens where nothing else is said."""

    prompt: str | Texts | TokenIds | ManyTokenIds
    max_tokens: int | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each of them."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        numbers = [one for one in self.prompt if isinstance(one, int)]
        return [numbers] if numbers else [one for one in self.prompt if not isinstance(one, int)]


class TokenizeRequest(Strict):
    """POST /tokenize."""

    model: str | None = None
    prompt: str


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]


def definitions() -> dict[str, Any]:
    """Every body as a JSON schema, for the OpenAPI document."""
    kinds = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
    inputs: list[tuple[type[BaseModel], Literal["validation"]]] = [(kind, "validation") for kind in kinds]
    _, found = models_json_schema(inputs, ref_template="#/components/schemas/{model}")
    return found["$defs"]


def explained(error: ValidationError) -> tuple[str, str | None]:
    """What is wrong with a request in a sentence, and the field that it is about."""
    # Of the branches of a union the one that came farthest, and not the one that only says that it is no text.
    found = error.errors(include_url=False, include_context=False)
    first = max(found, key=lambda one: (len(one["loc"]), one["type"] != "string_type"))
    place = [str(part) for part in first["loc"] if part != "str" and "[" not in str(part)]
    field = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        reason = REFUSED.get(str(first["loc"][-1]))
        if reason is None:
            return f"unknown field {field!r}. Leave it out, or see docs/serving.md for the fields there are.", field
        return f"field {field!r} is not served: {reason}.", field
    shown = f" (found {repr(first['input'])[:80]})" if field else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"{field or 'the request'}: {message}{shown}. See docs/serving.md for the fields there are.", field
