"""What a client may send to /v1/responses, and the same as a request for a chat."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qwen3_next.server.schema import (
    MOST_TOOLS,
    ChatRequest,
    Function,
    ResponseFormat,
    Strict,
    TemplateOptions,
    ToolName,
)

REFUSED = {
    "access_programs": "there is none",
    "background_options": "an answer is waited for, or streamed",
    "context_management": "send what the model is to see",
    "conversation": "nothing is stored; send the items of earlier turns in input",
    "image": "the model reads and writes text only",
    "include": "the answer is whole; leave it out",
    "max_tool_calls": "it counts calls of tools of a server's own, and there are none",
    "moderation": "nothing is judged; leave it out",
    "previous_response_id": "nothing is stored; send the items of earlier turns in input",
    "prompt": "no templates are stored; send instructions and input",
    "prompt_cache_key": "prompts that begin alike share their beginnings anyway; leave it out",
    "prompt_cache_options": "prompts that begin alike share their beginnings anyway; leave it out",
    "prompt_cache_retention": "prompts that begin alike share their beginnings anyway; leave it out",
    "reasoning": "the model has one effort; leave it out, or see chat_template_kwargs",
    "safety_identifier": "give a label as user or metadata",
    "service_tier": "there is one tier; leave it out",
    "top_logprobs": "use /v1/chat/completions",
    "verbosity": "say it in instructions",
}
"""Fields of OpenAI's Responses that are not served, and what to do instead."""

FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "message": ({"role", "content"}, set()),
    "function_call": ({"call_id", "name", "arguments"}, set()),
    "function_call_output": ({"call_id", "output"}, set()),
    "reasoning": (set(), {"summary", "content"}),
}
"""What an item of a type must have, and what it may have."""

SHARED = {
    "model", "metadata", "parallel_tool_calls", "stream", "temperature", "top_p", "user",
    "chat_template_kwargs", "min_p", "repetition_penalty", "seed", "top_k",
}  # fmt: skip
"""Fields that mean the same in a chat."""

Nothing = Annotated[list[Any], Field(max_length=0)]


class Part(Strict):
    """One piece of an item; `annotations` and `logprobs` as answers have them."""

    type: Literal["input_text", "output_text", "reasoning_text"]
    text: str
    annotations: Nothing = Field(default_factory=list[Any])
    logprobs: Nothing = Field(default_factory=list[Any])


Parts = str | Annotated[list[Part], Field(fail_fast=True, max_length=4096)]


class Item(Strict):
    """One entry of `input`: a message, a call, its result, or the reasoning before these.

    Attributes:
        id: with `status` a label; nothing depends on it.
    """

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: str = ""
    status: Literal["in_progress", "completed", "incomplete"] = "completed"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Parts | None = None
    summary: Nothing = Field(default_factory=list[Any])
    call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    name: ToolName | None = None
    arguments: str | None = None
    output: Parts | None = None

    @model_validator(mode="after")
    def _fits_its_type(self) -> "Item":
        must, may = FIELDS[self.type]
        given = self.model_fields_set - {"type", "id", "status"}
        if missing := sorted(must - given):
            raise ValueError(f"{missing[0]} is missing in an item of type {self.type!r}")
        if others := sorted(given - must - may):
            raise ValueError(f"{others[0]} does not belong to an item of type {self.type!r}")
        parts = [part for one in (self.content, self.output) if isinstance(one, list) for part in one]
        if any((part.type == "reasoning_text") != (self.type == "reasoning") for part in parts):
            raise ValueError("reasoning_text belongs to items of type 'reasoning', and those have no other")
        return self

    def text(self) -> str:
        """The content, or the result of a call."""
        found = self.output if self.type == "function_call_output" else self.content
        return "".join(part.text for part in found) if isinstance(found, list) else found or ""


class FlatTool(Function):
    """One entry of `tools`."""

    type: Literal["function"]


class FlatChoice(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    name: str


class FlatFormat(Strict):
    """The form of the text; a schema is kept whether it is called strict or not."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "FlatFormat":
        if (self.type == "json_schema") != (None not in (self.name, self.schema_)):
            raise ValueError("name and schema belong to type 'json_schema', and that needs them")
        return self

    def nested(self) -> ResponseFormat:
        """As a chat has it."""
        rest = self.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return ResponseFormat.model_validate({"type": self.type, "json_schema": rest or None})


class TextOptions(Strict):
    """How the text is written."""

    format: FlatFormat = FlatFormat(type="text")


class ObfuscationOptions(Strict):
    """Nothing is added to events that would hide how long they are."""

    include_obfuscation: Literal[False] = False


class ResponsesRequest(Strict):
    """POST /v1/responses.

    Attributes:
        store: with `background` and `truncation` what the server does anyway; another value is refused.
    """

    model: str
    input: str | Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=4095)]
    background: Literal[False] = False
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] = Field(default_factory=dict[str, str])
    min_p: float | None = None
    parallel_tool_calls: bool = True
    repetition_penalty: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    store: Literal[False] = False
    stream: bool = False
    stream_options: ObfuscationOptions | None = None
    temperature: float | None = None
    text: TextOptions = TextOptions()
    tool_choice: Literal["none", "auto", "required"] | FlatChoice = "auto"
    tools: Annotated[list[FlatTool], Field(fail_fast=True, max_length=MOST_TOOLS)] = Field(
        default_factory=list[FlatTool]
    )
    top_k: int | None = None
    top_p: float | None = None
    truncation: Literal["disabled"] = "disabled"
    user: str = ""

    def as_chat(self) -> ChatRequest:
        """The same for a chat.

        Raises:
            pydantic.ValidationError: what does not fit together there.
        """
        choice = self.tool_choice
        if isinstance(choice, FlatChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        tools = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools]
        return ChatRequest.model_validate(
            self.model_dump(include=SHARED)
            | {
                "messages": self._messages(),
                "tools": tools or None,
                "tool_choice": choice,
                "response_format": self.text.format.nested(),
                "max_tokens": self.max_output_tokens,
            }
        )

    def _messages(self) -> list[dict[str, Any]]:
        """Reasoning, a text and calls that follow each other are one turn of the assistant."""
        items = [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        turn: dict[str, Any] | None = None
        for item in items:
            if item.type == "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text()})
                turn = None
            elif item.type == "message" and item.role != "assistant":
                messages.append({"role": item.role, "content": item.text()})
                turn = None
            else:
                if turn is None or (item.type != "function_call" and (turn["content"] or "tool_calls" in turn)):
                    turn = {"role": "assistant", "content": ""}
                    messages.append(turn)
                _add(turn, item)
        return messages


def _add(turn: dict[str, Any], item: Item) -> None:
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        turn.setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
    elif item.type == "message":
        turn["content"] = item.text()
    elif text := item.text():
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text
