"""What the server costs: streams of tokens over HTTP beside those of the bare engine, with times to the first token.

    python -m benchmarks.overhead [--clients 1 8 64] [--tokens 64] [--rounds 3] [--model DIRECTORY]
                                  [--device cuda --random-weights CONFIG_DIRECTORY --quantization fp8]

One process holds the model and writes for tasks of its own (the bare `AsyncEngine`) and for a server around the same
engine, in turns. So both have the same weights, dtype, threads and, emptied before each turn, prefix cache. Clients of
the server are this process: open sockets that read events and do little else. The median of the rounds counts. CPU
seconds of the thread that computes and of the one that serves show where the difference is.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from qwen3_next.engine import LLM, AsyncEngine, EngineConfig
from qwen3_next.server import RunConfig, Server
from qwen3_next.server.logs import configure

NAME = "qwen3-next"


@dataclass(frozen=True)
class Turn:
    """What one turn took.

    Attributes:
        seconds: from the first request to the last token.
        first: of each client, seconds from its request to its first text.
        computing, serving: CPU seconds of the engine's thread and of the event loop's.
        steps: calls of the engine.
    """

    seconds: float
    first: list[float]
    computing: float
    serving: float
    steps: int


@dataclass
class Clock:
    """CPU time of the two threads, and steps, since it was made."""

    engine: AsyncEngine

    def __post_init__(self) -> None:
        self.start = self._now()

    def spent(self) -> tuple[float, float, int]:
        """Seconds of the engine's thread and of this one; steps."""
        computing, serving, steps = self._now()
        return computing - self.start[0], serving - self.start[1], steps - self.start[2]

    def _now(self) -> tuple[float, float, int]:
        identity = self.engine._thread.ident  # of the benchmark alone: who computes has no public name
        assert identity is not None
        computing = time.clock_gettime(time.pthread_getcpuclockid(identity))
        return computing, time.thread_time(), self.engine.figures.steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    options = _parser().parse_args(arguments)
    if options.child:
        return _child(options)
    given = sys.argv[1:] if arguments is None else list(arguments)
    settings = {"OMP_NUM_THREADS": "1"} | os.environ
    command = [sys.executable, "-m", "benchmarks.overhead", *given, "--child"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=settings
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _measure(options, process.stdin, process.stdout)
        finally:
            process.stdin.close()  # which ends it
    return process.returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="left out, the model in the package")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="auto is float32 on a CPU")
    parser.add_argument("--random-weights", metavar="CONFIG_DIRECTORY", help="a model of that config.json")
    parser.add_argument("--quantization", choices=("auto", "fp8", "none"), default="auto")
    parser.add_argument("--drafts", type=int, help="as of `serve`")
    parser.add_argument("--profile", metavar="FILE", help="also profile the event loop while it serves (slows it)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def _measure(options: argparse.Namespace, orders: TextIO, answers: TextIO) -> None:
    """Ask for turns and show them."""

    def told() -> Any:
        line = answers.readline()
        assert line, "the process with the model ended"
        return json.loads(line)

    def order(**what: Any) -> None:
        print(json.dumps(what), file=orders, flush=True)

    table = Table("clients", "engine: tokens/s", "server: tokens/s", "server / engine", "time to first text, engine")
    for name in (
        "server",
        "CPU a token: computing, engine",
        "server",
        "serving, engine",
        "server",
        "steps, engine",
        "server",
    ):
        table.add_column(name)
    for clients in options.clients:
        bare, served = list[Turn](), list[Turn]()
        for number in range(options.rounds + 1):  # the first warms up
            order(clients=clients)
            turn = Turn(**told())
            bare += [turn] if number else []
            order()
            port = told()
            seconds, first = asyncio.run(_ask(port, clients, options.tokens))
            order()
            turn = Turn(seconds, first, *told())
            served += [turn] if number else []
        table.add_row(str(clients), *_shown(bare, served, clients * options.tokens))
    Console(width=200).print(table)


def _shown(bare: list[Turn], served: list[Turn], tokens: int) -> list[str]:
    engine, server = (statistics.median(tokens / turn.seconds for turn in turns) for turns in (bare, served))
    first = list[str]()
    for turns in (bare, served):
        times = sorted(value for turn in turns for value in turn.first)
        last = times[min(len(times) - 1, round(0.95 * len(times)))]
        first.append(f"{statistics.median(times) * 1e3:.0f} ms, 95 %: {last * 1e3:.0f} ms")
    spent = [
        f"{statistics.median(getattr(turn, name) for turn in turns) / tokens * 1e6:.0f} us"
        for name in ("computing", "serving")
        for turns in (bare, served)
    ]
    spent += [str(statistics.median(turn.steps for turn in turns)) for turns in (bare, served)]
    return [f"{engine:.0f}", f"{server:.0f}", f"{server / engine:.3f}", *first, *spent]


async def _ask(port: int, clients: int, tokens: int) -> tuple[float, list[float]]:
    """Streams at the same time over connections that are open before; the whole time and those to first events."""
    pipes = [await asyncio.open_connection("127.0.0.1", port) for _ in range(clients)]
    first = list[float]()

    async def one(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = {"model": NAME, "prompt": f"Number {number}", "max_tokens": tokens, "temperature": 0}
        data = json.dumps(body | {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}})
        start = time.perf_counter()
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n{data}".encode())
        text = await reader.readuntil(b"data: ")
        first.append(time.perf_counter() - start)
        assert text.startswith(b"HTTP/1.1 200")
        text = b""
        while not text.endswith(b"0\r\n\r\n"):
            piece = await reader.read(2**16)
            assert piece, "the server hung up"
            text = text[-4096:] + piece
        assert f'"completion_tokens":{tokens},'.encode() in text, text

    start = time.perf_counter()
    await asyncio.gather(*(one(number, *pipe) for number, pipe in enumerate(pipes)))
    seconds = time.perf_counter() - start
    for _, writer in pipes:
        writer.close()
    return seconds, first


def _child(options: argparse.Namespace) -> int:
    """Hold the model and take turns until there are no more orders."""
    configure()  # as `qwen3-next serve` does
    is_random = options.random_weights is not None
    llm = LLM(
        options.random_weights if is_random else options.model,
        device=options.device,
        dtype="float32" if options.dtype == "auto" and options.device == "cpu" else options.dtype,
        quantization=options.quantization,
        random_weights=is_random,
        config=EngineConfig(
            max_sequences=max(options.clients), drafts="auto" if options.drafts is None else options.drafts
        ),
    )
    for line in sys.stdin:
        llm.engine.scheduler.memory.evict_all()
        if clients := json.loads(line).get("clients"):
            print(json.dumps(asdict(asyncio.run(_bare(llm, clients, options.tokens)))), flush=True)
        else:
            asyncio.run(_serve(llm, options.profile))
    return 0


async def _bare(llm: LLM, clients: int, tokens: int) -> Turn:
    params = llm.default_params(temperature=0, max_tokens=tokens, ignore_eos=True)
    first = list[float]()

    async def read(engine: AsyncEngine, number: int) -> None:
        start, has_text = time.perf_counter(), False
        async for update in engine.stream(f"Number {number}", params):
            if update.text and not has_text:
                first.append(time.perf_counter() - start)
                has_text = True

    async with AsyncEngine(llm) as engine:
        clock, start = Clock(engine), time.perf_counter()
        await asyncio.gather(*(read(engine, number) for number in range(clients)))
        return Turn(time.perf_counter() - start, first, *clock.spent())


async def _serve(llm: LLM, profile: str | None) -> None:
    """Serve until the next order; tell the port and then what it took."""
    async with AsyncEngine(llm) as engine:
        server = Server(engine, RunConfig(port=0))
        task = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        clock = Clock(engine)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        if profile is None:
            await asyncio.to_thread(sys.stdin.readline)
        else:
            await _profiled(profile)
        print(json.dumps(clock.spent()), flush=True)
        server.should_exit = True
        await task


async def _profiled(file: str) -> None:
    import cProfile

    found = cProfile.Profile(builtins=True)
    found.enable()
    await asyncio.to_thread(sys.stdin.readline)
    found.disable()
    found.dump_stats(file)


if __name__ == "__main__":
    sys.exit(main())
