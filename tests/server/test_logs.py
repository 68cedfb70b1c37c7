"""What is written of requests, and what is not."""

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest
from tests.server.conftest import Ask

from qwen3_next.engine import LLM, AsyncEngine
from qwen3_next.server import ServerConfig
from qwen3_next.server.logs import Formatter

SECRET = "a secret village"
BODY: dict[str, Any] = {"model": "qwen3-next", "prompt": SECRET, "temperature": 0, "max_tokens": 5, "ignore_eos": True}


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    records = [Formatter().format(record) for record in caplog.records if record.name.startswith("qwen3_next")]
    assert not any("\n" in line for line in records)
    return [json.loads(line) for line in records]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_line_with_its_counts_and_without_its_text(
    ask: Ask, caplog: pytest.LogCaptureFixture, llm: LLM, stream: bool
) -> None:
    caplog.set_level(logging.INFO, "qwen3_next")

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        response = await client.post("/v1/completions", json=BODY | {"stream": stream}, headers={"X-Request-Id": "m-1"})
        assert response.headers["x-request-id"] == "m-1"

    ask(use)
    (line,) = lines(caplog)
    found = {name: line[name] for name in ("level", "event", "request_id", "method", "route", "status", "stream")}
    assert found == {
        "level": "info",
        "event": "request",
        "request_id": "m-1",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "stream": stream,
    }
    assert (line["prompt_tokens"], line["completion_tokens"]) == (len(llm.encoded(SECRET)), 5)
    assert line["seconds"] > 0
    assert line["time"].endswith("+00:00")
    assert "secret" not in caplog.text + json.dumps(line)


def test_prompts_are_logged_on_request(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qwen3_next")

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        await client.post("/v1/completions", json=BODY)

    ask(use, ServerConfig(log_prompts=True))
    assert lines(caplog)[0]["request"]["prompt"] == SECRET


@pytest.mark.parametrize("name", ["", "a" * 65, "a b", "a\tb", '"', "ä".encode()])
def test_other_names_of_requests_are_replaced(ask: Ask, name: str | bytes) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        made = [(await client.get("/health", headers={"X-Request-Id": name})).headers["x-request-id"] for _ in range(2)]
        assert len(set(made)) == 2
        assert all(len(one) == 32 and one.isalnum() for one in made)

    ask(use)


def test_a_mistake_of_our_own_is_logged_and_has_a_name(
    ask: Ask, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "encoded", lambda *_: 1 // 0)

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        response = await client.post("/v1/completions", json=BODY)
        assert (response.status_code, len(response.headers["x-request-id"])) == (500, 32)

    ask(use)
    (line,) = lines(caplog)
    assert (line["level"], line["status"], "ZeroDivisionError" in line["error"]) == ("error", 500, True)


def test_a_client_that_leaves_is_logged_with_what_it_got(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qwen3_next")

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        task = asyncio.ensure_future(client.post("/v1/completions", json=BODY | {"max_tokens": 400, "stream": True}))
        while engine.figures.output_tokens < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    ask(use)
    (line,) = lines(caplog)
    assert line["route"] == "/v1/completions"
    assert line.get("completion_tokens", 0) < 400
