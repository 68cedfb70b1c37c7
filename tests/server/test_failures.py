"""What the server does when something goes wrong: steps that fail, requests without end, clients that leave."""

import asyncio
import json
from threading import Event
from typing import Any

import httpx
import pytest
from tests.server.conftest import Ask

from qwen3_next.engine import LLM, AsyncEngine
from qwen3_next.engine.runner import Runner
from qwen3_next.errors import InputError
from qwen3_next.server import RunConfig, Server, ServerConfig

COMPLETE = "/v1/completions"
SHORT: dict[str, Any] = {"model": "qwen3-next", "prompt": "Once", "temperature": 0, "max_tokens": 4}
ENDLESS = SHORT | {"max_tokens": 480, "ignore_eos": True}


class Broken:
    """Makes every step with requests fail while it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_broken = Event()
        run = Runner.run

        def failing(runner: Runner, *arguments: Any) -> Any:
            if self.is_broken.is_set():
                raise RuntimeError("a cable was pulled")
            return run(runner, *arguments)

        monkeypatch.setattr(Runner, "run", failing)


def test_after_a_failure_everyone_is_answered_and_the_server_is_ready_once_it_writes_again(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken(monkeypatch)

    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        bodies = [ENDLESS | {"stream": stream} for stream in (False, True) * 6]
        tasks = [asyncio.ensure_future(client.post(COMPLETE, json=body)) for body in bodies]
        while engine.figures.output_tokens < 40:
            await asyncio.sleep(0.001)
        broken.is_broken.set()
        for response in await asyncio.gather(*tasks):
            assert response.status_code == 503 or "a cable was pulled" in response.text.split("\n\n")[-3]
        assert engine.is_healthy
        ready = await client.get("/ready")
        assert (ready.status_code, "a cable was pulled" in ready.json()["reason"]) == (503, True)
        broken.is_broken.clear()
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post(COMPLETE, json=SHORT)).status_code == 200
        engine.engine.scheduler.check()

    ask(use)


def test_an_engine_that_fails_too_often_stays_down_and_says_why(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken(monkeypatch)
    broken.is_broken.set()

    async def go() -> None:
        engine = AsyncEngine(llm, max_restarts=2)
        server = Server(engine, RunConfig(port=0))
        transport = httpx.ASGITransport(server.config.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            for _ in range(3):
                assert (await client.post(COMPLETE, json=SHORT)).status_code == 503
            broken.is_broken.clear()
            for path in ("/ready", "/health"):
                response = await client.get(path)
                assert (response.status_code, "a cable was pulled" in response.json()["reason"]) == (503, True)
            assert (await client.post(COMPLETE, json=SHORT)).status_code == 503
        assert (engine.figures.steps, engine.figures.failed_steps) == (3, 3)
        await engine.close()

    asyncio.run(asyncio.wait_for(go(), 60))
    llm.engine.reset()
    llm.engine.scheduler.check()


def test_a_request_that_takes_too_long_is_ended(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        many = ENDLESS | {"n": 40, "temperature": 1}  # five times what is computed at once
        whole, stream = await asyncio.gather(*(client.post(COMPLETE, json=many | {"stream": s}) for s in (False, True)))
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        if stream.status_code != 504:
            *_, last, done, _ = stream.text.split("\n\n")
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
            assert done == "data: [DONE]"
        steps = engine.figures.steps
        while engine.figures.open:
            await asyncio.sleep(0)
        assert engine.figures.steps - steps <= 2  # the one in progress, and the one that reports
        assert {reason.value for reason in engine.figures.finished} == {"abort"}

    ask(use, ServerConfig(request_timeout=0.5))


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_no_time_is_no_limit_that_is_served(seconds: float) -> None:
    with pytest.raises(InputError, match="request_timeout"):
        ServerConfig(request_timeout=seconds)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_queued", [False, True])
def test_a_client_that_leaves_frees_its_place(llm: LLM, stream: bool, is_queued: bool) -> None:
    data = json.dumps(ENDLESS | {"stream": stream}).encode()
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(data)}\r\n\r\n"

    async def go() -> AsyncEngine:
        async with AsyncEngine(llm) as engine:
            server = Server(engine, RunConfig(port=0))
            task = asyncio.ensure_future(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            others = engine.stream("Once", llm.default_params(n=8, max_tokens=480, ignore_eos=True))
            if is_queued:
                await anext(others)
            before = engine.figures.open
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + data)
            while engine.figures.open == before or not (is_queued or engine.figures.output_tokens):
                await asyncio.sleep(0.001)
            writer.close()
            while engine.figures.open > before:
                await asyncio.sleep(0.001)
            await others.aclose()
            server.should_exit = True
            await task
        return engine

    engine = asyncio.run(asyncio.wait_for(go(), 60))
    figures = engine.figures
    assert (figures.open, figures.memory.used_pages, figures.memory.used_slots) == (0, 0, 0)
    assert {reason.value for reason in figures.finished} == {"abort"}
