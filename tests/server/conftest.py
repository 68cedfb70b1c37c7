"""A server around the model in the box, asked without a network and over one."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI

from qwen3_next.engine import LLM, AsyncEngine, EngineConfig
from qwen3_next.server import ServerConfig, create_app

Use = Callable[[httpx.AsyncClient, AsyncEngine], Awaitable[None]]
Ask = Callable[..., None]


@pytest.fixture(scope="session")
def llm() -> LLM:
    config = EngineConfig(max_sequences=8, token_budget=256, max_context=512, memory_bytes=2**27, drafts=0)
    return LLM(dtype="float32", device="cpu", config=config)


@pytest.fixture
def ask(llm: LLM) -> Ask:
    """Run a function with a client of a fresh server; then nothing may have stayed in the engine."""

    def run(use: Use, config: ServerConfig | None = None, **settings: Any) -> None:
        async def go() -> None:
            async with AsyncEngine(llm, **settings) as engine:
                transport = httpx.ASGITransport(create_app(engine, config), raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=120) as client:
                    await use(client, engine)
            figures = engine.figures
            assert (figures.open, figures.memory.used_pages, figures.memory.used_slots) == (0, 0, 0)

        asyncio.run(asyncio.wait_for(go(), 240))

    return run


@pytest.fixture(scope="module")
def client(llm: LLM) -> Generator[OpenAI]:
    """The official client of a server on a free port."""
    started: threading.Event = threading.Event()
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        async with AsyncEngine(llm) as engine:
            server = uvicorn.Server(uvicorn.Config(create_app(engine), port=0, log_level="error"))
            servers.append(server)
            task = asyncio.ensure_future(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            started.set()
            await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(60)
    port = servers[0].servers[0].sockets[0].getsockname()[1]
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made
    servers[0].should_exit = True
    thread.join(60)
    assert not thread.is_alive()
