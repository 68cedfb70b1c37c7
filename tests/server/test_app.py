"""The routes, without a network: answers are the engine's, and whatever comes in gets an answer in OpenAI's shape."""

import asyncio
import json
from typing import Any

import httpx
import jsonschema_rs
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.server.conftest import Ask

from qwen3_next.engine import LLM, AsyncEngine, Engine, Output
from qwen3_next.errors import CheckpointError
from qwen3_next.server import ServerConfig, create_app

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me a story about a dog."}]
BODY: dict[str, Any] = {"model": "qwen3-next", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}


def events_of(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, which must be whole."""
    *events, last, empty = text.split("\n\n")
    assert (last, empty) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    pieces = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(piece["delta"].get("content", "") for piece in pieces)


def test_a_greedy_answer_is_the_engines_own(ask: Ask, llm: LLM) -> None:
    (expected,) = llm.generate(llm.render(MESSAGES), llm.default_params(temperature=0, max_tokens=12))[0]

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        answer = (await client.post(CHAT, json=BODY)).raise_for_status().json()
        assert answer["object"] == "chat.completion"
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
        assert choice["finish_reason"] == expected.finish.value
        usage = answer["usage"]
        assert usage["prompt_tokens"] == expected.prompt_tokens
        assert usage["completion_tokens"] == len(expected.token_ids)
        assert usage["total_tokens"] == expected.prompt_tokens + len(expected.token_ids)

    ask(use)


def test_a_stream_adds_up_to_the_answer(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        body = BODY | {"n": 2, "seed": 5, "temperature": 1, "logprobs": True, "top_logprobs": 2}
        whole = (await client.post(CHAT, json=body)).raise_for_status().json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = await client.post(CHAT, json=body | options)
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, last = events_of(response.text)
        assert all(event["usage"] is None for event in events)
        assert last["choices"] == []
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [last["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]
        assert len({event["id"] for event in events}) == 1
        for choice in whole["choices"]:
            index = choice["index"]
            pieces = [piece for event in events for piece in event["choices"] if piece["index"] == index]
            assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
            assert text_of(events, index) == choice["message"]["content"]
            assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == [choice["finish_reason"]]
            scores = [one for piece in pieces if piece["logprobs"] for one in piece["logprobs"]["content"]]
            assert [one["token"] for one in scores] == [one["token"] for one in choice["logprobs"]["content"]]
        assert whole["choices"][0]["message"] != whole["choices"][1]["message"]

    ask(use)


def test_the_same_seed_writes_the_same(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        async def text(seed: int) -> str:
            body = BODY | {"seed": seed, "temperature": 1.5}
            return (await client.post(CHAT, json=body)).raise_for_status().json()["choices"][0]["message"]["content"]

        assert await text(7) == await text(7)
        assert await text(-1) == await text(2**64 - 1)
        assert await text(7) != await text(8)

    ask(use)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_string_ends_the_answer_before_it(ask: Ask, as_list: bool) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        whole = (await client.post(CHAT, json=BODY)).json()["choices"][0]["message"]["content"]
        stop = whole[len(whole) // 2 :][:3]
        answer = (await client.post(CHAT, json=BODY | {"stop": [stop] if as_list else stop})).json()["choices"][0]
        assert answer["message"]["content"] == whole[: whole.index(stop)]
        assert answer["finish_reason"] == "stop"

    ask(use)


def test_parts_and_developers_are_rendered_as_text(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        plain = [{"role": "system", "content": "Be brief."}, *MESSAGES]
        parts = [{"type": "text", "text": "Tell me a story"}, {"type": "text", "text": " about a dog."}]
        other = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts, "name": None}]
        answers = [(await client.post(CHAT, json=BODY | {"messages": one})).json() for one in (plain, other)]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]

    ask(use)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"foo": 1}, "foo"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"store": True}, "store"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"temperature": "hot"}, "temperature"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ({"messages": []}, "messages"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
]


@pytest.mark.parametrize(("change", "param"), WRONG, ids=[f"{change}"[:40] for change, _ in WRONG])
def test_what_is_wrong_is_named(ask: Ask, change: dict[str, Any], param: str) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        response = await client.post(CHAT, json=BODY | change)
        error = response.json()["error"]
        assert response.status_code == 400
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["param"].startswith(param)
        assert param.split(".")[-1] in error["message"]

    ask(use)


@pytest.mark.parametrize(
    "change", [{"temperature": -1}, {"top_p": 2}, {"max_tokens": 0}, {"stop": ""}, {"presence_penalty": 3}], ids=str
)
@pytest.mark.parametrize("stream", [False, True])
def test_values_that_the_engine_refuses_are_the_clients_mistake(ask: Ask, change: dict[str, Any], stream: bool) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        response = await client.post(CHAT, json=BODY | change | {"stream": stream})
        assert response.status_code == 400
        assert next(iter(change)) in response.json()["error"]["message"]

    ask(use)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_has_a_code(ask: Ask, stream: bool) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        messages = [{"role": "user", "content": "dog " * 600}]
        response = await client.post(CHAT, json=BODY | {"messages": messages, "stream": stream})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")

    ask(use)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 5_000, b"null", b'{"model": "\\ud800"}', b'{"n": 1e400}'],
    ids=lambda data: repr(data[:8]),
)
def test_bodies_that_are_no_request_are_answered(ask: Ask, data: bytes) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        response = await client.post(CHAT, content=data)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")

    ask(use)


def test_a_body_that_is_too_long_is_refused(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        assert (await client.post(CHAT, content=b" " * 1001)).status_code == 413
        assert (await client.post(CHAT, content=b" " * 1000)).status_code == 400

    ask(use, ServerConfig(max_body_bytes=1000))


def test_keys_guard_all_but_health(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        right = {"Authorization": "Bearer second"}
        for wrong in (
            {},
            {"Authorization": "Bearer third"},
            {"Authorization": "second"},
            {"Authorization": b"Bearer \xe4"},
        ):
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/models/qwen3-next")):
                response = await client.request(method, path, headers=wrong)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await client.get("/v1/models", headers=right)).status_code == 200
        assert (
            await client.get("/v1/models", headers={"Authorization": "Bearer dritter Schlüssel".encode()})
        ).is_success
        assert (await client.post(CHAT, json=BODY, headers=right)).status_code == 200
        assert (await client.get("/health")).json() == {"status": "ok"}

    ask(use, ServerConfig(api_keys=("first", "second", "dritter Schlüssel")))


def test_models_are_listed_and_others_are_not_here(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        (card,) = (await client.get("/v1/models")).json()["data"]
        assert (card["id"], card["object"]) == ("a/name", "model")
        assert (await client.get("/v1/models/a/name")).json() == card
        for response in (await client.get("/v1/models/other"), await client.post(CHAT, json=BODY)):
            assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert (await client.get("/nowhere")).status_code == 404
        assert "GET /nowhere" in (await client.get("/nowhere")).json()["error"]["message"]
        assert (await client.get(CHAT)).status_code == 405

    ask(use, ServerConfig(model_name="a/name"))


@pytest.mark.parametrize("stream", [False, True])
def test_who_comes_when_too_many_wait_is_told_to_come_again(ask: Ask, stream: bool) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        others = engine.stream("Once", engine.llm.default_params(n=8, max_tokens=400, ignore_eos=True))
        await anext(others)
        response = await client.post(CHAT, json=BODY | {"stream": stream})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
        assert int(response.headers["retry-after"]) > 0
        await others.aclose()
        while engine.figures.open:
            await asyncio.sleep(0.001)
        assert (await client.post(CHAT, json=BODY)).status_code == 200

    ask(use, max_waiting=0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_memory(ask: Ask, stream: bool) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        body = BODY | {"max_tokens": 400, "ignore_eos": True, "stream": stream}
        task = asyncio.ensure_future(client.post(CHAT, json=body))
        while not engine.figures.output_tokens:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while engine.figures.open:
            await asyncio.sleep(0.01)
        assert {reason.value for reason in engine.figures.finished} == {"abort"}

    ask(use)


def test_a_closed_engine_is_not_healthy(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        await engine.close()
        assert (await client.get("/health")).status_code == 503
        response = await client.post(CHAT, json=BODY)
        assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")

    ask(use)


COMPLETE = "/v1/completions"
PROMPT: dict[str, Any] = {"model": "qwen3-next", "prompt": "Once upon a time", "temperature": 0}


def test_a_completion_is_the_engines_own_with_sixteen_tokens(ask: Ask, llm: LLM) -> None:
    ids = llm.encoded("Once upon a time")
    (expected,) = llm.generate("Once upon a time", llm.default_params(temperature=0, max_tokens=16, logprobs=2))[0]

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        for prompt in ("Once upon a time", ids, [ids]):
            answer = (await client.post(COMPLETE, json=PROMPT | {"prompt": prompt, "logprobs": 2})).json()
            assert answer["object"] == "text_completion"
            (choice,) = answer["choices"]
            assert (choice["text"], choice["finish_reason"]) == (expected.text, "length")
            found = choice["logprobs"]
            assert expected.logprobs is not None
            assert found["token_logprobs"] == [drawn.logprob for drawn in expected.logprobs]
            assert "".join(found["tokens"]) == expected.text
            assert [expected.text[place:][:1] for place in found["text_offset"]] == [t[:1] for t in found["tokens"]]
            assert all(len(top) == 2 for top in found["top_logprobs"])
            assert answer["usage"]["completion_tokens"] == 16

    ask(use)


def test_choices_of_several_prompts_stand_in_their_order(ask: Ask, llm: LLM) -> None:
    prompts = ["Once upon a time", "def add("]
    params = llm.default_params(temperature=1, seed=4, n=2, max_tokens=5)
    expected = [one for group in llm.generate(prompts, params) for one in group]

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        body = PROMPT | {"prompt": prompts, "n": 2, "temperature": 1, "seed": 4, "max_tokens": 5}
        answer = (await client.post(COMPLETE, json=body)).raise_for_status().json()
        assert [one["text"] for one in answer["choices"]] == [one.text for one in expected]
        assert [one["index"] for one in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"]["prompt_tokens"] == expected[0].prompt_tokens + expected[2].prompt_tokens
        assert answer["usage"]["completion_tokens"] == sum(len(one.token_ids) for one in expected)

    ask(use)


def test_of_several_prompts_none_stays_when_one_is_refused(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        body = PROMPT | {"prompt": [[5, 6], [10**6]], "max_tokens": 400, "ignore_eos": True}
        response = await client.post(COMPLETE, json=body)
        assert (response.status_code, "1000000" in response.json()["error"]["message"]) == (400, True)

    ask(use)


def test_a_streamed_completion_adds_up(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        whole = (await client.post(COMPLETE, json=PROMPT | {"logprobs": 1})).json()["choices"][0]
        response = await client.post(COMPLETE, json=PROMPT | {"logprobs": 1, "stream": True})
        pieces = [choice for event in events_of(response.text) for choice in event["choices"]]
        assert "".join(piece["text"] for piece in pieces) == whole["text"]
        offsets = [place for piece in pieces for place in piece["logprobs"]["text_offset"]]
        assert offsets == whole["logprobs"]["text_offset"]

    ask(use)


def test_several_prompts_stream_as_they_answer(ask: Ask) -> None:
    body = PROMPT | {"prompt": ["Once upon", "def add(", "The"], "n": 2, "temperature": 1, "seed": 4, "max_tokens": 6}

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        whole = (await client.post(COMPLETE, json=body)).raise_for_status().json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *events, last = events_of((await client.post(COMPLETE, json=body | options)).text)
        pieces = [choice for event in events for choice in event["choices"]]
        for choice in whole["choices"]:
            own = [piece for piece in pieces if piece["index"] == choice["index"]]
            assert "".join(piece["text"] for piece in own) == choice["text"]
            assert [piece["finish_reason"] for piece in own if piece["finish_reason"]] == [choice["finish_reason"]]
        counts = ("prompt_tokens", "completion_tokens")
        assert [last["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]
        refused = await client.post(COMPLETE, json=body | options | {"prompt": [[5], [10**6]]})
        assert refused.status_code == 400

    ask(use)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change", [{"n": 11}, {"prompt": ["a"] * 6, "n": 2}], ids=str)
def test_what_can_never_be_open_at_once_is_the_clients_mistake(ask: Ask, change: dict[str, Any], stream: bool) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        response = await client.post(COMPLETE, json=PROMPT | change | {"stream": stream})
        assert (response.status_code, "Allowed: 10 in all" in response.json()["error"]["message"]) == (400, True)
        assert engine.figures.refused == 0

    ask(use, max_waiting=2)


def test_pages_of_other_places_may_not_ask(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        headers = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
        for response in (
            await client.options(CHAT, headers=headers),
            await client.post(CHAT, json=BODY, headers=headers),
        ):
            assert not [name for name in response.headers if name.startswith("access-control-")]

    ask(use)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["dog", "cat"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_schema_is_kept(ask: Ask) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        body = BODY | {"response_format": form, "max_tokens": 100, "temperature": 1, "seed": 1, "n": 3}
        for choice in (await client.post(CHAT, json=body)).raise_for_status().json()["choices"]:
            assert choice["finish_reason"] == "stop"
            assert jsonschema_rs.is_valid(SCHEMA, json.loads(choice["message"]["content"]))
        broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        for stream in (False, True):
            response = await client.post(CHAT, json=BODY | {"response_format": broken, "stream": stream})
            assert response.status_code == 400
        missing = await client.post(CHAT, json=BODY | {"response_format": {"type": "json_schema"}})
        assert missing.json()["error"]["param"] == "response_format"

    ask(use)


def test_any_object_of_json_is_one(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        body = BODY | {"response_format": {"type": "json_object"}, "temperature": 1, "seed": 2, "max_tokens": 10}
        content = (await client.post(CHAT, json=body)).json()["choices"][0]["message"]["content"]
        assert content.startswith("{")

    ask(use)


def test_text_becomes_tokens_and_comes_back(ask: Ask, llm: LLM) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        text = "À bientôt, 你好 🙂<|im_end|>"
        found = (await client.post("/tokenize", json={"prompt": text})).json()
        assert found == {"tokens": llm.encoded(text), "count": len(llm.encoded(text)), "max_model_len": 512}
        assert (await client.post("/detokenize", json={"tokens": found["tokens"]})).json() == {"prompt": text}
        assert (await client.post("/detokenize", json={"tokens": [10**6]})).status_code == 400
        assert (await client.post("/detokenize", json={"tokens": [-1]})).status_code == 400
        assert (await client.post("/tokenize", json={"prompt": "a", "model": "other"})).status_code == 404

    ask(use)


def test_ready_is_what_has_just_written_a_token(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        answers = await asyncio.gather(*(client.get("/ready") for _ in range(3)))
        assert [answer.json() for answer in answers] == [{"ready": True, "reason": None}] * 3
        assert engine.figures.output_tokens == 1
        await engine.close()
        assert (await client.get("/ready")).status_code == 503

    ask(use, ServerConfig(api_keys=("key",)))


def test_a_trial_that_takes_too_long_is_not_ready(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        response = await client.get("/ready")
        assert (response.status_code, response.json()["ready"]) == (503, False)

    ask(use, ServerConfig(ready_seconds=0))


def test_metrics_are_the_engines_figures(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        await client.post(COMPLETE, json=PROMPT | {"max_tokens": 7, "ignore_eos": True, "stream": True})
        await client.post(COMPLETE, json=PROMPT | {"max_tokens": 0})
        text = (await client.get("/metrics")).text
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert found["qwen3_next_output_tokens_total",] == 7
        assert found["qwen3_next_finished_requests_total", "length"] == 1
        assert found["qwen3_next_time_to_first_token_seconds_count",] == 1
        assert found["qwen3_next_inter_token_seconds_count",] == 6
        assert found["qwen3_next_http_errors_total", "400"] == 1
        assert found["qwen3_next_open_requests",] == 0
        assert found["qwen3_next_pages", "used"] == engine.figures.memory.used_pages
        assert found["qwen3_next_healthy",] == 1

    ask(use)


@pytest.mark.parametrize("path", ["/v1/embeddings"])
def test_other_interfaces_are_refused_by_name(ask: Ask, path: str) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        response = await client.post(path, json={})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_served")
        assert path in response.json()["error"]["message"]

    ask(use)


class Fails:
    """Makes a step of the engine fail, counted from the first after `after` tokens were written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        step, self.written, self.has_failed = Engine.step, 0, False

        def failing(engine: Engine) -> list[Output]:
            if self.written >= after and not self.has_failed:
                self.has_failed = True
                raise RuntimeError("a cable was pulled")
            outputs = step(engine)
            self.written += sum(len(output.state.tokens) for output in outputs)
            return outputs

        monkeypatch.setattr(Engine, "step", failing)


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails_is_the_servers_mistake_and_the_next_request_is_served(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    Fails(monkeypatch, after=0)

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        response = await client.post(CHAT, json=BODY | {"stream": stream})
        assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
        assert (await client.post(CHAT, json=BODY | {"stream": stream})).status_code == 200

    ask(use)


def test_a_stream_that_fails_half_way_says_so_at_its_end(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    Fails(monkeypatch, after=3)

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        response = await client.post(CHAT, json=BODY | {"stream": True, "ignore_eos": True})
        *events, last = events_of(response.text)
        assert len(text_of(events)) > 0
        assert last["error"]["type"] == "server_error"

    ask(use)


def test_a_mistake_of_our_own_is_not_shown(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "render", lambda *_, **__: 1 // 0)

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        response = await client.post(CHAT, json=BODY)
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert "division" not in response.text

    ask(use)


def test_messages_that_the_template_refuses_are_the_clients_mistake(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise CheckpointError("the model's chat template cannot render the messages (no).")

    monkeypatch.setattr(LLM, "render", refuse)

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        response = await client.post(CHAT, json=BODY)
        assert (response.status_code, "template" in response.json()["error"]["message"]) == (400, True)

    ask(use)


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_failure(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        sent: list[Any] = []
        received = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(received)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
        await create_app(engine)(scope, receive, send)
        assert sent[0]["status"] == 499

    ask(use)


def test_many_at_a_time_get_what_each_gets_alone(ask: Ask, llm: LLM) -> None:
    prompts = [f"Story number {number}:" for number in range(12)]
    params = [llm.default_params(seed=number, temperature=1, max_tokens=8) for number in range(12)]
    expected = [one.text for (one,) in llm.generate(prompts, params)]

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        bodies = [
            PROMPT | {"prompt": text, "seed": i, "temperature": 1, "max_tokens": 8} for i, text in enumerate(prompts)
        ]
        answers = await asyncio.gather(*(client.post(COMPLETE, json=body) for body in bodies))
        assert [answer.json()["choices"][0]["text"] for answer in answers] == expected

    ask(use)
