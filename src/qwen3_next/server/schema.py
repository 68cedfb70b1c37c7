"""What a client may send: each field of OpenAI's requests is honoured, or refused by its name."""

import itertools
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.json_schema import models_json_schema

REFUSED = {
    "functions": "it was replaced by tools",
    "function_call": "it was replaced by tool_choice, and in messages by tool_calls",
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
MOST_TOOLS = 128
LONGEST_TOOLS = 256 * 2**10
"""Characters of all tools together, as JSON."""

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


Content = str | Annotated[list[TextPart], Field(fail_fast=True, max_length=4096)]
ToolName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class CalledFunction(Strict):
    """What a call called; the arguments are JSON as the model wrote it."""

    name: ToolName
    arguments: str


class ToolCall(Strict):
    """A call of an earlier answer."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One turn; pieces are joined with nothing between them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, min_length=1, max_length=MOST_TOOLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> "Message":
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content is not None):
            raise ValueError("tool_calls and reasoning_content belong to role 'assistant'")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to role 'tool', and that needs it")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; only an assistant with tool_calls may leave it out")
        return self

    def text(self) -> str:
        """The content."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """As chat templates want it; they know "developer" by its older name."""
        role = "system" if self.role == "developer" else self.role
        rest = self.model_dump(include={"reasoning_content", "tool_calls"}, exclude_none=True)
        return {"role": role, "content": self.text(), **rest}


class Function(Strict):
    """A tool that may be called.

    Attributes:
        parameters: the JSON schema of its arguments, an object; left out, there are none.
        strict: keep the arguments to it wherever the tool is called, and not only where a call is required.
    """

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    strict: bool = False

    @field_validator("parameters")
    @classmethod
    def _is_object(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("type", "object") != "object":
            raise ValueError("arguments are an object: its schema has type 'object'")
        return {"type": "object"} | value


class Tool(Strict):
    """One entry of `tools`."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates want it."""
        function = self.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        return {"type": "function", "function": function}


class FunctionName(Strict):
    """Names a tool."""

    name: str


class NamedChoice(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class TemplateOptions(Strict):
    """Variables that chat templates of the family know besides the messages and the tools."""

    enable_thinking: bool | None = None


class StreamOptions(Strict):
    """`include_usage` adds a last chunk that counts tokens; `include_drafts` tells accepted drafts from others."""

    include_usage: bool = False
    include_drafts: bool = False


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
    """POST /v1/chat/completions.

    Attributes:
        add_generation_prompt: left out, true where no message is continued.
        continue_final_message: go on with the last message, the assistant's, and not with a new one.
    """

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    continue_final_message: bool = False
    max_completion_tokens: int | None = None
    logprobs: bool = False
    parallel_tool_calls: bool = True
    tool_choice: Literal["none", "auto", "required"] | NamedChoice = "auto"
    tools: Annotated[list[Tool], Field(fail_fast=True, min_length=1, max_length=MOST_TOOLS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("tools")
    @classmethod
    def _tools_are_few_and_short(cls, value: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in value or ()]
        if len(names) > len(set(names)):
            raise ValueError("two of the tools have the same name")
        if value and len(json.dumps([tool.for_template() for tool in value])) > LONGEST_TOOLS:
            raise ValueError(f"the tools have more than {LONGEST_TOOLS} characters")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs belongs to logprobs = true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        return self

    @model_validator(mode="after")
    def _chooses_a_tool(self) -> "ChatRequest":
        if self.tool_choice in ("none", "auto"):
            return self
        names = [tool.function.name for tool in self.tools or ()]
        if not names:
            raise ValueError(f"tool_choice = {_shown(self.tool_choice)} needs tools")
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice = {_shown(self.tool_choice)} names none of the tools")
        return self

    @model_validator(mode="after")
    def _continues_an_answer(self) -> "ChatRequest":
        last = self.messages[-1]
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if self.continue_final_message and (last.role != "assistant" or last.tool_calls or not last.text().strip()):
            raise ValueError(
                "continue_final_message needs a last message of the assistant, with content and no tool_calls"
            )
        return self

    @model_validator(mode="after")
    def _answers_its_calls(self) -> "ChatRequest":
        called: set[str] = set()
        for message in self.messages:
            if message.role == "assistant":
                called = {call.id for call in message.tool_calls or ()}
            if message.tool_call_id is not None and message.tool_call_id not in called:
                raise ValueError(f"tool_call_id = {_shown(message.tool_call_id)} is no call of the assistant before it")
        return self

    def callable_tools(self) -> list[Tool]:
        """The tools that the model is shown."""
        return [] if self.tools is None or self.tool_choice == "none" else self.tools

    def conversation(self) -> list[Message]:
        """The messages; results of calls stand in the order of the calls, since templates do not write ids."""
        ordered: list[Message] = []
        calls: list[str | None] = []
        for is_result, group in itertools.groupby(self.messages, key=lambda message: message.role == "tool"):
            messages = list(group)
            if is_result:
                messages.sort(key=lambda message: calls.index(message.tool_call_id))
            ordered += messages
            calls = [call.id for call in messages[-1].tool_calls or ()]
        return ordered


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


def definitions(*others: type[Strict]) -> dict[str, Any]:
    """Every body as a JSON schema, for the OpenAPI document; those of other modules too."""
    kinds = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, *others)
    inputs: list[tuple[type[BaseModel], Literal["validation"]]] = [(kind, "validation") for kind in kinds]
    _, found = models_json_schema(inputs, ref_template="#/components/schemas/{model}")
    return found["$defs"]


def explained(error: ValidationError, refused: Mapping[str, str] = REFUSED) -> tuple[str, str | None]:
    """What is wrong with a request in a sentence, and the field that it is about."""
    # Of the branches of a union the one that came farthest, and not the one that only says that it is no text.
    found = error.errors(include_url=False, include_context=False)
    # A wrong type of an object before what it lacks of the type that was taken for meant.
    first = max(found, key=lambda one: (len(one["loc"]), one["type"] != "string_type", one["type"] == "literal_error"))
    place = [str(part) for part in first["loc"] if part != "str" and "[" not in str(part)]
    field = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        reason = refused.get(str(first["loc"][-1]))
        if reason is None:
            return f"unknown field {field!r}. Leave it out, or see docs/serving.md for the fields there are.", field
        return f"field {field!r} is not served: {reason}.", field
    shown = f" (found {_shown(first['input'])})" if field else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"{field or 'the request'}: {message}{shown}. See docs/serving.md for the fields there are.", field


def _shown(value: object) -> str:
    return repr(value)[:80]
