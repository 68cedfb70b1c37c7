"""A server on a port: whom it listens to, and that its end leaves nobody without an answer."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen3_next.cli import main
from qwen3_next.engine import LLM, AsyncEngine
from qwen3_next.errors import InputError
from qwen3_next.server import RunConfig, Server, ServerConfig

BODY: dict[str, Any] = {"model": "qwen3-next", "prompt": "Once", "max_tokens": 400, "ignore_eos": True}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::", "example.org"])
def test_others_are_not_served_without_a_key(host: str) -> None:
    with pytest.raises(InputError, match="--api-key-file"):
        RunConfig(host=host)
    RunConfig(host=host, is_insecure=True)
    RunConfig(host=host, server=ServerConfig(api_keys=("key",)))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str) -> None:
    assert RunConfig(host=host).server.api_keys == ()


def test_keys_do_not_show() -> None:
    assert "hidden" not in repr(RunConfig(server=ServerConfig(api_keys=("hidden",))))


@pytest.mark.parametrize("drain_seconds", [0.0, 100.0])
@pytest.mark.parametrize("stream", [False, True])
def test_open_requests_are_answered_at_the_end(llm: LLM, drain_seconds: float, stream: bool) -> None:
    async def go() -> tuple[httpx.Response, int]:
        async with AsyncEngine(llm) as engine:
            server = Server(engine, RunConfig(port=0, drain_seconds=drain_seconds))
            task = asyncio.ensure_future(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                asked = asyncio.ensure_future(client.post("/v1/completions", json=BODY | {"stream": stream}))
                while not engine.figures.output_tokens:
                    await asyncio.sleep(0.001)
                server.should_exit = True
                response = await asked
            await task
            return response, engine.figures.output_tokens

    response, written = asyncio.run(asyncio.wait_for(go(), 120))
    if drain_seconds:
        assert (response.status_code, written) == (200, 400)
        assert "error" not in response.text
    elif stream:
        *_, last, done, empty = response.text.split("\n\n")
        assert "shuts down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert (done, empty) == ("data: [DONE]", "")
    else:
        assert response.status_code == 503
        assert "shuts down" in response.json()["error"]["message"]


def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("\none\n two \n")
    command = [sys.executable, "-c", "import sys; from qwen3_next.cli import main; sys.exit(main())", "serve"]
    options = ["--port", "0", "--device", "cpu", "--api-key-file", str(keys), "--served-model-name", "box"]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=settings)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        address = next(found[0] for line in lines if (found := re.search(r"http://[\d.:]+", line)))
        with httpx.Client(base_url=address, timeout=120) as client:
            assert client.get("/ready").json() == {"ready": True, "reason": None}
            assert client.get("/v1/models").status_code == 401
            models = client.get("/v1/models", headers={"Authorization": "Bearer two"}).json()
            assert [model["id"] for model in models["data"]] == ["box"]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
    finally:
        process.kill()
        process.wait()


def test_mistakes_of_the_command_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n \n")
    for options in (["--host", "0.0.0.0"], ["--api-key-file", str(empty)], ["--api-key-file", str(tmp_path / "no")]):
        assert main(["serve", *options]) == 2
        message = capsys.readouterr().err
        assert message.startswith("qwen3-next: ")
        assert message.count("\n") == 1
