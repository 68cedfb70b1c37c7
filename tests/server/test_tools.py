"""Tools and reasoning through the routes: what the model is shown, what it must write, and what comes back of it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import SecretStr
from tests.server.conftest import Ask
from tests.server.test_app import BODY, CHAT, events_of, text_of

from qwen3_next.engine import LLM, AsyncEngine, Structured
from qwen3_next.server import bridge

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Paris", "Rome"]}},
}


def tool(name: str, **rest: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **rest}}


TOOLS = [tool("weather", description="The weather <there>.", parameters=CITY), tool("time")]
CALLED = {"role": "assistant", "tool_calls": [
    {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city":  "Paris"}'}},
    {"id": "b", "type": "function", "function": {"name": "time", "arguments": "{}"}},
]}  # fmt: skip
RESULTS = [{"role": "tool", "tool_call_id": name, "content": f"result {name}"} for name in ("b", "a")]
WRITTEN = (
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city":"Röme", "x": "tool"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
THINKS = (
    "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% if enable_thinking is not false %}<think>\n{% endif %}{% endif %}"
)


async def post(client: httpx.AsyncClient, **changes: Any) -> Any:
    response = await client.post(CHAT, json=BODY | changes)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


async def both(client: httpx.AsyncClient, **changes: Any) -> dict[str, Any]:
    """The first choice, which its stream must add up to."""
    whole = await post(client, **changes)
    events = events_of((await client.post(CHAT, json=BODY | changes | {"stream": True})).text)
    pieces = [choice for event in events for choice in event["choices"]]
    calls = [call for piece in pieces for call in piece["delta"].get("tool_calls", ())]
    assert [call["index"] for call in calls] == list(range(len(calls)))
    assert [call["function"] for call in calls] == [call["function"] for call in whole["message"].get("tool_calls", ())]
    assert text_of(events) == (whole["message"]["content"] or "")
    reasoning = "".join(piece["delta"].get("reasoning_content", "") for piece in pieces)
    assert reasoning == whole["message"].get("reasoning_content", "")
    assert pieces[-1]["finish_reason"] == whole["finish_reason"]
    return whole


def functions(choice: dict[str, Any]) -> list[tuple[str, str]]:
    calls = choice["message"].get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(call.keys() == {"id", "type", "function"} for call in calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> Any:
    """Make the model write a text, token by token."""

    def write(text: str) -> None:
        parts = [part for part in re.split("(</?(?:tool_call|think)>)", text) if part]
        rule = " ".join(part if part[0] == "<" and part[-1] == ">" else json.dumps(part) for part in parts)
        form = Structured(kind="grammar", grammar=f"start: {rule}")
        monkeypatch.setattr(bridge, "form_of", lambda *_, **__: form)

    return write


def test_calls_that_the_model_writes_come_back_as_calls(ask: Ask, writes: Any) -> None:
    writes(WRITTEN)

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        choice = await both(client, tools=TOOLS, max_tokens=200)
        assert functions(choice) == [("weather", '{"city":"Röme", "x": "tool"}'), ("time", "{}")]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("I look.", "tool_calls")
        one = await both(client, tools=TOOLS, parallel_tool_calls=False, max_tokens=200)
        assert [name for name, _ in functions(one)] == ["weather"]
        for change in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": [tool("other")]}):
            plain = await both(client, **change, max_tokens=200)
            assert plain["message"]["content"] == WRITTEN
            assert plain["finish_reason"] == "stop"
        cut = await both(client, tools=TOOLS, max_tokens=12)
        assert cut["finish_reason"] == "length"
        assert "<tool_call>" in cut["message"]["content"]

    ask(use)


@pytest.mark.parametrize("inside", ['{"name": "time"}', "time()", '{"name": "time", "arguments": {"a": "}}'])
def test_a_malformed_call_is_content(ask: Ask, writes: Any, inside: str) -> None:
    text = f"I look. <tool_call>\n{inside}\n</tool_call>\n"
    writes(text)

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        choice = await both(client, tools=TOOLS, max_tokens=200)
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        assert choice["finish_reason"] == "stop"

    ask(use)


@pytest.mark.parametrize("opened", [False, True])
def test_reasoning_stands_in_its_own_field(
    ask: Ask, writes: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    if opened:
        monkeypatch.setattr(llm.renderer, "chat_template", THINKS)
    writes(("" if opened else "<think>\n") + "A dog.\n</think>\n\nIt barks.")

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        choice = await both(client, max_tokens=200)
        assert choice["message"]["reasoning_content"] == "A dog."
        assert choice["message"]["content"] == "It barks."

    ask(use)


@pytest.mark.parametrize("thinks", [False, True])
def test_a_template_that_can_think_is_told_whether_to(
    ask: Ask, writes: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch, thinks: bool
) -> None:
    monkeypatch.setattr(llm.renderer, "chat_template", THINKS)
    monkeypatch.setattr(llm.engine, "loaded", replace(llm.engine.loaded, chat_template=THINKS))
    writes("A dog barks.")

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        choice = await both(client, chat_template_kwargs={"enable_thinking": thinks}, max_tokens=200)
        assert choice["message"]["reasoning_content" if thinks else "content"] == "A dog barks."

    ask(use)


def test_the_model_is_shown_tools_calls_and_results_in_their_order(
    ask: Ask, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    encoded = LLM.encoded
    monkeypatch.setattr(LLM, "encoded", lambda self, text: shown.append(text) or encoded(self, text))
    messages = [*BODY["messages"], CALLED, *RESULTS]

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        await post(client, messages=messages, tools=TOOLS, max_tokens=1)
        await post(client, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=1)

    ask(use)
    assert json.dumps(TOOLS[0]) in shown[0]
    assert '{"name": "weather", "arguments": {"city":  "Paris"}}\n</tool_call>' in shown[0]
    assert shown[0].index("result a") < shown[0].index("result b")
    assert "<there>" not in shown[1]


@pytest.mark.parametrize("choice", ["required", "weather"])
def test_calls_that_are_required_fit_their_schema(ask: Ask, choice: str) -> None:
    named = {"type": "function", "function": {"name": choice}}

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        for seed in range(4):
            settings = {"seed": seed, "temperature": 1, "max_tokens": 80, "parallel_tool_calls": False}
            answer = await both(client, tools=TOOLS, tool_choice=named if choice == "weather" else choice, **settings)
            ((name, arguments),) = functions(answer)
            assert name in ("weather", choice if choice == "weather" else "time")
            if name == "weather":
                jsonschema_rs.validate(CITY, json.loads(arguments))
            assert (answer["message"]["content"], answer["finish_reason"]) == (None, "tool_calls")

    ask(use)


def test_several_calls_may_be_required_at_once(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        end = engine.llm.engine.loaded.tokenizer.token_to_id("<|im_end|>")
        answer = await both(
            client, tools=[tool("time")], tool_choice="required", max_tokens=90, logit_bias={str(end): -100}
        )
        assert len(functions(answer)) > 1
        assert {name for name, _ in functions(answer)} == {"time"}

    ask(use)


def test_a_strict_tool_is_kept_to_its_schema_where_the_model_calls_it(ask: Ask, llm: LLM) -> None:
    begin = llm.engine.loaded.tokenizer.token_to_id("<tool_call>")
    strict = [tool("weather", parameters=CITY, strict=True)]

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        assert functions(await both(client, tools=strict)) == []
        settings = {"logit_bias": {str(begin): 100}, "parallel_tool_calls": False, "max_tokens": 80}
        ((_, arguments),) = functions(await both(client, tools=strict, **settings))
        jsonschema_rs.validate(CITY, json.loads(arguments))

    ask(use)


def test_with_a_response_format_the_answer_is_json_or_a_call(ask: Ask, llm: LLM) -> None:
    begin = llm.engine.loaded.tokenizer.token_to_id("<tool_call>")
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        for bias in (-100, 100):
            settings = {"logit_bias": {str(begin): bias}, "parallel_tool_calls": False, "max_tokens": 80}
            answer = await both(client, tools=TOOLS[:1], response_format=form, **settings)
            found = functions(answer)
            assert len(found) == (bias > 0)
            jsonschema_rs.validate(CITY, json.loads(found[0][1] if found else answer["message"]["content"]))

    ask(use)


def test_a_form_begins_after_the_reasoning(ask: Ask, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.renderer, "chat_template", THINKS)
    end = llm.engine.loaded.tokenizer.token_to_id("</think>")
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        settings = {"logit_bias": {str(end): 100}, "max_tokens": 80, "parallel_tool_calls": False}
        answer = await both(client, response_format=form, **settings)
        jsonschema_rs.validate(CITY, json.loads(answer["message"]["content"]))
        answer = await both(client, tools=TOOLS, tool_choice="required", **settings)
        assert len(functions(answer)) == 1

    ask(use)


def test_an_answer_is_continued(ask: Ask, llm: LLM) -> None:
    messages = [*BODY["messages"], {"role": "assistant", "content": "Once upon a time"}]
    prompt = llm.render(BODY["messages"]) + "Once upon a time"
    (expected,) = llm.generate(prompt, llm.default_params(temperature=0, max_tokens=12))[0]

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        for more in ({}, {"add_generation_prompt": False}):
            answer = await both(client, messages=messages, continue_final_message=True, **more)
            assert answer["message"]["content"] == expected.text

    ask(use)


SAYS: dict[str, Any] = {"role": "assistant", "content": "I"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [tool("a b")]}, "tools.0.function.name"),
    ({"tools": [tool("a"), tool("a")]}, "same name"),
    ({"tools": [tool(f"t{i}") for i in range(129)]}, "tools"),
    ({"tools": [tool("a", description="x" * 2**18)]}, "characters"),
    ({"tools": [tool("a", parameters={"type": "string"})]}, "type 'object'"),
    ({"tools": []}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "'other'"),
    ({"tools": TOOLS, "tool_choice": "weather"}, "tool_choice"),
    ({"tools": [tool("a", parameters={"properties": 5})], "tool_choice": "required"}, "properties"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
    ({"messages": [RESULTS[0]]}, "tool_call_id"),
    ({"messages": [CALLED, {"role": "tool", "content": "x", "tool_call_id": "c"}]}, "'c'"),
    ({"messages": [{"role": "user", "tool_calls": CALLED["tool_calls"]}]}, "tool_calls"),
    ({"messages": [{"role": "assistant"}]}, "content"),
    ({"chat_template_kwargs": {"documents": []}}, "chat_template_kwargs.documents"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"messages": [SAYS], "continue_final_message": True, "add_generation_prompt": True}, "exclude"),
    ({"messages": [CALLED | {"content": "x"}], "continue_final_message": True}, "no tool_calls"),
]


def test_what_is_wrong_is_named(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        for change, named in WRONG:
            for stream in (False, True):
                response = await client.post(CHAT, json=BODY | change | {"stream": stream})
                assert response.status_code == 400, change
                assert named in response.json()["error"]["message"]
            assert (await client.post(CHAT, json=BODY | {"max_tokens": 1})).status_code == 200

    ask(use)


def test_the_official_client_reads_calls(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": "qwen3-next", "messages": BODY["messages"], "tools": TOOLS, "temperature": 0}
    settings |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 80}
    whole = client.chat.completions.create(**settings).choices[0]
    assert whole.message.tool_calls
    with client.chat.completions.stream(**settings) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    for one, other in zip(streamed.message.tool_calls, whole.message.tool_calls, strict=True):
        assert one.function.name == other.function.name
        assert one.function.arguments == other.function.arguments


def test_langchain_binds_tools(client: OpenAI) -> None:
    model = ChatOpenAI(base_url=str(client.base_url), api_key=SecretStr("none"), model="qwen3-next", temperature=0)
    bound = model.bind_tools(TOOLS, tool_choice="weather", parallel_tool_calls=False).bind(max_tokens=80)
    question = HumanMessage("What is the weather in Paris?")
    answer = bound.invoke([question])
    ((call),) = answer.tool_calls
    jsonschema_rs.validate(CITY, call["args"])
    first, *rest = bound.stream([question])
    whole = sum(rest, start=first)
    assert isinstance(whole, AIMessageChunk)
    assert [one["args"] for one in whole.tool_calls] == [call["args"]]
    result = ToolMessage("21 degrees", tool_call_id=call["id"])
    last = model.bind_tools(TOOLS, tool_choice="none").bind(max_tokens=5)
    assert last.invoke([question, answer, result]).content


def test_the_examples_of_the_page_run(client: OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    section = PAGE.partition("## Tools and reasoning\n")[2].partition("\n## ")[0]
    body = re.search(r"-d '(.*?)'\n", section, re.DOTALL)
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert body is not None
    assert code is not None
    answer = client.post("/chat/completions", body=json.loads(body[1]), cast_to=httpx.Response).json()
    ((call),) = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    exec(code[1].replace("http://127.0.0.1:8000/v1", str(client.base_url)), {})
    assert capsys.readouterr().out.strip()
