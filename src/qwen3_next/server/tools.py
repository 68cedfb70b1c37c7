"""Tools and reasoning on the way in: the prompt that offers them, and the form of an answer that must use them."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qwen3_next.engine import LLM, Structured
from qwen3_next.errors import CheckpointError, InputError
from qwen3_next.server.parsers import CALL, CALLED, THINK, THOUGHT
from qwen3_next.server.schema import ChatRequest, NamedChoice, Tool

LAYOUT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""JSON as chat templates write it; small models fill whole contexts with blanks where they may."""


def prompt_of(llm: LLM, body: ChatRequest) -> tuple[str, bool | None]:
    """The text before the answer, and whether it ends inside of the reasoning; None: inside of the content.

    Raises:
        InputError: the chat template does not render the messages, or does not read a variable.
    """
    variables = body.chat_template_kwargs.model_dump(exclude_none=True)
    known = llm.engine.loaded.chat_template or ""
    for name in variables:
        if not re.search(rf"\b{name}\b", known):
            raise InputError(f"chat_template_kwargs.{name}: the model's chat template does not read it. Leave it out.")
    begins = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    messages = body.conversation()
    try:
        text = llm.render(
            [message.for_template() for message in messages],
            tools=[tool.for_template() for tool in body.callable_tools()],
            ending="last message" if body.continue_final_message else "answer" if begins else "nothing",
            variables=variables,
        )
    except CheckpointError as error:
        raise InputError(str(error)) from error
    if not body.continue_final_message:
        return text, begins and text.rstrip().endswith(THINK)
    last = messages[-1].text()
    return text, True if last.rfind(THINK) > last.rfind(THOUGHT) else None


def form_of(llm: LLM, body: ChatRequest, *, opened: bool) -> Structured | None:
    """What the text must look like; None: anything.

    Reasoning that the prompt has opened comes first, and is free.
    """
    schema, tools = body.response_format.schema_of(), body.callable_tools()
    tags = {tag: _tag(llm, tag) for tag in (THINK, THOUGHT, CALL, CALLED)}
    before = f'TEXT {tags[THOUGHT]} "\\n\\n" ' if opened else ""
    if tools and body.tool_choice != "auto":
        answer = "calls"
    elif tools and schema is not None:
        answer = "(form | calls)"
    elif any(tool.function.strict for tool in tools):
        before = f"TEXT {tags[THOUGHT]} " if opened else f"({tags[THINK]} TEXT {tags[THOUGHT]})? "
        answer = "TEXT calls?"
    elif schema is None or not opened:
        return alone(schema)
    else:
        answer = "form"
    rules = [f"start: {before}{answer}", f"TEXT: /(?s:.*)/ & ~/(?s:.*){CALL}(?s:.*)/"]
    if schema is not None:
        rules.append(f"form: %json {_json(schema)}")
    if isinstance(body.tool_choice, NamedChoice):
        tools = [tool for tool in tools if tool.function.name == body.tool_choice.function.name]
    if tools:
        rules += _rules_of_calls(tools, tags, are_several=body.parallel_tool_calls)
    return Structured(kind="grammar", grammar="\n".join(rules))


def alone(schema: dict[str, Any] | None) -> Structured | None:
    """The form of a text that is nothing but JSON."""
    return None if schema is None else Structured(kind="json_schema", grammar=json.dumps(schema))


def _rules_of_calls(tools: list[Tool], tags: Mapping[str, str], *, are_several: bool) -> Iterator[str]:
    yield 'calls: call ("\\n" call)*' if are_several else "calls: call"
    any_of_them = " | ".join(f"call_{place}" for place in range(len(tools)))
    yield f'call: {tags[CALL]} "\\n" ({any_of_them}) "\\n" {tags[CALLED]}'
    for place, tool in enumerate(tools):
        head = json.dumps(f'{{"name": "{tool.function.name}", "arguments": ')
        yield f'call_{place}: {head} arguments_{place} "}}"'
        yield f"arguments_{place}: %json {_json(tool.function.parameters)}"


def _tag(llm: LLM, tag: str) -> str:
    """In a grammar the name of a token stands for it alone, and a text never means such a token."""
    return tag if llm.engine.loaded.tokenizer.token_to_id(tag) is not None else json.dumps(tag)


def _json(schema: dict[str, Any]) -> str:
    return json.dumps(schema | LAYOUT)
