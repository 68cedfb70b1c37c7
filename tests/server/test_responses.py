"""/v1/responses: what it writes is what a chat writes, and the official client reads it."""

import json
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel
from tests.server.conftest import Ask
from tests.server.test_app import BODY, CHAT, MESSAGES
from tests.server.test_tools import WRITTEN, writes

from qwen3_next.engine import AsyncEngine

__all__ = ["writes"]  # a fixture

PATH = "/v1/responses"
ASKED: dict[str, Any] = {"model": "qwen3-next", "input": MESSAGES, "temperature": 0, "max_output_tokens": 12}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": "weather", "strict": False, "parameters": {"type": "object"}},
    {"type": "function", "name": "time", "strict": False, "parameters": None},
]
LABELS = {"id", "item_id", "call_id", "created_at"}


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which are numbered and named twice."""
    events: list[dict[str, Any]] = []
    for place, piece in enumerate(text.removesuffix("\n\n").split("\n\n")):
        name, data = piece.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert (name, event["sequence_number"]) == (f"event: {event['type']}", place)
        events.append(event)
    return events


def plain(value: Any) -> Any:
    """Without names that are new each time, and counts that a prefix cache changes."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {name: plain(one) for name, one in value.items() if name not in LABELS | {"input_tokens_details"}}


def told(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a stream adds up to."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        item = items[event["output_index"]] if event.get("output_index", len(items)) < len(items) else {}
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            item["content"][0]["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "output_item.done":
            item["status"] = event["item"]["status"]
            assert item == event["item"]
    return items


async def both(client: httpx.AsyncClient, **changes: Any) -> dict[str, Any]:
    """The answer, which its stream must add up to."""
    whole = (await client.post(PATH, json=ASKED | changes)).raise_for_status().json()
    response = await client.post(PATH, json=ASKED | changes | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert plain(events[-1]["response"]) == plain(whole | {"user": whole["user"]})
    assert told(events) == events[-1]["response"]["output"]
    return whole


def test_a_response_is_what_the_chat_writes(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        chat = (await client.post(CHAT, json=BODY)).json()
        whole = await both(client)
        (item,) = whole["output"]
        assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
        assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert whole["usage"]["total_tokens"] == chat["usage"]["total_tokens"]
        system = [{"role": "system", "content": "Be brief."}, *MESSAGES]
        chat = (await client.post(CHAT, json=BODY | {"messages": system})).json()
        whole = await both(client, instructions="Be brief.", input=MESSAGES[0]["content"], metadata={"a": "b"})
        assert whole["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
        assert (whole["instructions"], whole["metadata"]) == ("Be brief.", {"a": "b"})

    ask(use)


def test_reasoning_texts_and_calls_are_items_in_their_order(ask: Ask, writes: Any) -> None:
    writes(f"<think>\nSo.\n</think>\n\n{WRITTEN}\nDone.")

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        whole = await both(client, tools=TOOLS, max_output_tokens=200)
        kinds = [item["type"] for item in whole["output"]]
        assert kinds == ["reasoning", "message", "function_call", "function_call", "message"]
        assert whole["output"][0]["content"] == [{"type": "reasoning_text", "text": "So."}]
        assert whole["output"][2]["arguments"] == '{"city":"Röme", "x": "tool"}'
        assert whole["status"] == "completed"
        assert 0 < whole["usage"]["output_tokens_details"]["reasoning_tokens"] < whole["usage"]["output_tokens"]

    ask(use)


def test_items_of_an_answer_may_be_sent_back(ask: Ask, writes: Any) -> None:
    writes(f"<think>\nSo.\n</think>\n\n{WRITTEN}")

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        output = (await both(client, tools=TOOLS, max_output_tokens=200))["output"]
        calls = [item for item in output if item["type"] == "function_call"]
        results = [{"type": "function_call_output", "call_id": call["call_id"], "output": "21"} for call in calls]
        again = await both(client, input=[*MESSAGES, *output, *results], tools=TOOLS, max_output_tokens=1)
        turn = {"role": "assistant", "content": "I look.", "reasoning_content": "So."}
        turn["tool_calls"] = [
            {"id": call["call_id"], "function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in calls
        ]
        answers = [{"role": "tool", "tool_call_id": call["call_id"], "content": "21"} for call in calls]
        nested = [{"type": "function", "function": {"name": tool["name"]}} for tool in TOOLS]
        nested[0]["function"]["parameters"] = TOOLS[0]["parameters"]
        body = BODY | {"messages": [*MESSAGES, turn, *answers], "tools": nested, "max_tokens": 1}
        chat = (await client.post(CHAT, json=body)).raise_for_status().json()
        assert again["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]

    ask(use)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"include": ["reasoning.encrypted_content"]}, "include"),
    ({"foo": 1}, "foo"),
    ({"text": {"verbosity": "low"}}, "verbosity"),
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
    ({"input": [{"role": "user"}]}, "content"),
    ({"input": [{"role": "user", "content": "x", "call_id": "y"}]}, "call_id"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "call_id"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "same name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema"),
    ({"temperature": -1}, "temperature"),
]


def test_what_is_wrong_is_named(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        for change, named in WRONG:
            for stream in (False, True):
                response = await client.post(PATH, json=ASKED | change | {"stream": stream})
                assert response.status_code == 400, change
                assert named in response.json()["error"]["message"]
        document = (await client.get("/openapi.json")).json()
        assert PATH in document["paths"]
        assert "ResponsesRequest" in document["components"]["schemas"]

    ask(use)


class Pet(BaseModel):
    name: Literal["dog", "cat"]


def test_the_official_client_reads_responses(client: OpenAI) -> None:
    responses: Any = client.responses
    whole = responses.create(**ASKED, stream=False)
    assert whole.output_text
    assert whole.usage
    with responses.stream(**ASKED | {"text_format": Pet, "max_output_tokens": 60}) as stream:
        kinds = {event.type for event in stream}
        assert {"response.output_text.delta", "response.completed"} <= kinds
        assert stream.get_final_response().output_parsed in (Pet(name="dog"), Pet(name="cat"))
    parsed = responses.parse(**ASKED | {"text_format": Pet, "max_output_tokens": 60})
    assert parsed.output_parsed in (Pet(name="dog"), Pet(name="cat"))
    called = responses.create(
        **ASKED | {"tools": TOOLS[1:], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 60}
    )
    assert [(item.type, item.name) for item in called.output] == [("function_call", "time")]
    with pytest.raises(openai.BadRequestError, match="store"):
        responses.create(**ASKED, store=True)
