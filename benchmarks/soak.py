"""A server under load for minutes: every request is answered, nothing stays behind, and no answer depends on the load.

    python -m benchmarks.soak [--minutes 10] [--requests 500] [--fuzz SECONDS] [--clients 1 8 64]

Starts `qwen3-next serve` with the model in the package on the CPU as a process of its own and asks it: requests that
come, last, share beginnings, follow grammars and are left at random; probes of fixed seeds, alone and among them; ten
times as many as it takes; with `--fuzz` whatever the OpenAPI document allows or forbids; with `--clients` streams of
tokens beside those of the bare engine. In fp32: where values round to bf16, so does what a batch adds up to. Prints
what it saw and returns 1 where a check is red.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from rich.console import Console

from qwen3_next.engine import LLM, AsyncEngine, EngineConfig

RED = 1
NAME = "qwen3-next"
GROWTH = 32 * 2**20
"""Bytes of resident memory that the last half of a soak may add."""

LONG_ENOUGH = 120.0
"""Seconds of a soak from which on its memory is judged; before, libraries and caches still fill."""

PATIENCE = 60.0
"""Seconds for which a client that is told to come again does so; a benchmark holds it to less than five."""

BEGINNINGS = ("Once upon a time, in a small village by the sea, ", "def add(a, b):\n    return ", "À bientôt, 你好 🙂 ")
Body = dict[str, Any]


@dataclass
class Serving:
    """A server in its own process.

    Attributes:
        log: what it wrote on stderr.
    """

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)

    def memory(self) -> int:
        """Resident bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]

    def figure(self, name: str) -> float:
        """A line of /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"qwen3_next_{name} "))

    def is_clean(self) -> bool:
        """Whether, soon after the last request, no page and no slot is in use."""
        names = ("open_requests", 'pages{use="used"}', 'slots{use="used"}')
        for _ in range(100):
            if not any(self.figure(name) for name in names):
                return True
            time.sleep(0.1)
        return False


@contextmanager
def serving(*options: str) -> Iterator[Serving]:
    """Start a server on a free port; kill it where it does not end by itself."""
    command = [sys.executable, "-c", "import sys; from qwen3_next.cli import main; sys.exit(main())", "serve"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found, ready = Serving(process), threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            found.log.append(line)
            if address := re.search(r"http://[\d.:]+", line):
                found.url = address[0]
                ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        if not ready.wait(120):
            raise TimeoutError(f"the server did not start: {''.join(found.log)[-2000:]}")
        yield found
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()


def body_of(draw: random.Random) -> Body:
    """A request of random form."""
    prompt = draw.choice(BEGINNINGS) + "dog " * draw.choice((0, 1, 7, 40, 150)) + str(draw.randrange(20))
    body: Body = {"model": NAME, "max_tokens": draw.choice((1, 4, 16, 48)), "temperature": draw.choice((0, 0.7, 1.5))}
    body |= {"n": draw.choice((1, 1, 1, 2, 5)), "seed": draw.randrange(2**32), "stream": draw.random() < 0.5}
    if draw.random() < 0.2:
        form = {"type": "object", "properties": {"a": {"enum": ["dog", "cat"]}}, "required": ["a"]}
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": form}}
    if draw.random() < 0.5:
        return body | {"messages": [{"role": "user", "content": prompt}]}
    return body | {"prompt": prompt}


async def ask(client: httpx.AsyncClient, body: Body, patience: float | None = None) -> str:
    """One request; how it ended: "ok", "left", a status, or "broken" for what is no whole answer."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    try:
        async with asyncio.timeout(patience):
            response = await client.post(path, json=body)
    except TimeoutError:
        return "left"
    except httpx.HTTPError as error:
        return f"broken: {type(error).__name__}"
    if response.status_code != 200:
        return "429" if response.status_code == 429 else f"{response.status_code} {response.text[:200]}"
    if body.get("stream"):
        return "ok" if response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text else "broken"
    return "ok" if len(response.json()["choices"]) == body.get("n", 1) else "broken"


async def probe(client: httpx.AsyncClient, number: int) -> list[str]:
    """What a request of fixed seed writes."""
    body = {"model": NAME, "prompt": BEGINNINGS[number % 3] + str(number), "max_tokens": 12, "temperature": 1.0}
    response = await client.post("/v1/completions", json=body | {"seed": number, "n": 1 + number % 2})
    return [choice["text"] for choice in response.raise_for_status().json()["choices"]]


async def soak(server: Serving, seconds: float, requests: int, probes: int, draw: random.Random) -> dict[str, bool]:
    """Random load; each check by name."""
    limits = httpx.Limits(max_connections=None)
    ends, memory, under = Counter[str](), list[int](), list[list[str]]()
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        alone = [await probe(client, number) for number in range(probes)]
        times = sorted(draw.random() * seconds for _ in range(requests))
        start = time.monotonic()

        async def one(moment: float) -> None:
            await asyncio.sleep(moment)
            ends[await ask(client, body_of(draw), draw.random() if draw.random() < 0.2 else None)] += 1

        async def watch() -> None:
            while True:
                memory.append(server.memory())
                await asyncio.sleep(seconds / 200)

        async def probing() -> None:
            for number in range(probes):
                await asyncio.sleep(max(0.0, start + seconds * number / probes - time.monotonic()))
                under.append(await probe(client, number))

        watching = asyncio.ensure_future(watch())
        await asyncio.gather(probing(), *(one(moment) for moment in times))
        watching.cancel()
    half = memory[len(memory) // 2 :]
    quarter = max(1, len(half) // 4)
    growth = statistics.median(half[-quarter:]) - statistics.median(half[:quarter])
    print(f"soak: {dict(ends)}, resident {memory[-1] / 2**20:.0f} MiB, last half {growth / 2**20:+.1f} MiB")
    checks = {
        "every request ended with an answer or a refusal": sum(ends.values()) == requests
        and all(end in ("ok", "left", "429") for end in ends),
        f"{probes} probes are alike alone and under load": alone == under,
        "memory is clean": server.is_clean(),
    }
    if seconds >= LONG_ENOUGH:
        checks[f"the last half adds less than {GROWTH / 2**20:.0f} MiB"] = growth < GROWTH
    return checks


async def overload(server: Serving, capacity: int, times: int = 10, is_timed: bool = True) -> dict[str, bool]:
    """Many times as many requests at once as are taken; then one that must be answered. Times are judged or shown."""
    body: Body = {"model": NAME, "prompt": "Once", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    waits, ends = list[float](), Counter[str]()

    async def timed(client: httpx.AsyncClient) -> None:
        start = time.monotonic()
        end = await ask(client, body)
        ends[end] += 1
        if end == "ok":
            waits.append(time.monotonic() - start)

    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        await timed(client)
        start = time.monotonic()
        await asyncio.gather(*(timed(client) for _ in range(capacity)))
        bound = 3 * (time.monotonic() - start) + 1
        full = ends["ok"] == capacity + 1
        waits.clear()
        await asyncio.gather(*(timed(client) for _ in range(times * capacity)))
        await asyncio.gather(*(ask(client, body | {"max_tokens": 200}, 0.5) for _ in range(200)))
        start = time.monotonic()
        last = await ask(client, body)
        while last == "429" and time.monotonic() - start < PATIENCE:  # the server hears one by one who has left
            await asyncio.sleep(0.1)
            last = await ask(client, body)
        after = time.monotonic() - start
    print(f"overload: {dict(ends)}, longest wait {max(waits):.2f} s, bound {bound:.2f} s; after 200 left {after:.2f} s")
    checks = {
        "a full server takes everyone that it has room for": full,
        "overload: the rest is told to come again": ends["429"] > 0 and not ends.keys() - {"ok", "429"},
        "after 200 clients that gave up one is answered": last == "ok",
        "memory is clean after overload": server.is_clean(),
    }
    if is_timed:
        checks["overload: who is taken waits at most 3 times as long as at a full server"] = max(waits) <= bound
        checks["after 200 clients that gave up the next waits less than 5 s"] = after < 5
    return checks


def fuzz(server: Serving, seconds: float, number: int) -> dict[str, bool]:
    """Every operation of the OpenAPI document with data that it allows and that it forbids."""
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in document.get_all_operations()]
    statuses, failed = Counter[int](), list[str]()
    share = seconds / (2 * len(operations))
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            end = time.monotonic() + share

            @seed(number)
            @settings(
                max_examples=100_000,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy(generation_mode=mode))
            def sent(case: schemathesis.Case) -> None:
                if time.monotonic() > end:  # noqa: B023 - called before it changes
                    raise _OverError
                if isinstance(case.body, dict) and len(repr(case.body)) % 2:
                    case.body = case.body | {"model": NAME}  # or else all of them stop at its name
                response = case.call(timeout=60)
                statuses[response.status_code] += 1
                if response.status_code >= 500:
                    failed.append(f"{response.status_code} {case.as_curl_command()}"[:2000])

            with suppress(_OverError, Unsatisfiable):  # what takes nothing has no wrong data
                sent()
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": NAME, "prompt": "a"}, timeout=60)
    print(f"fuzz: seed {number}, {len(operations)} operations, {dict(statuses)}", *failed[:5], sep="\n")
    return {
        "fuzz: nothing was the server's mistake": not failed,
        "fuzz: the server answers afterwards": answer.status_code == 200,
        "fuzz: memory is clean": server.is_clean(),
    }


class _OverError(Exception):
    """The time of an operation is over."""


async def speeds(server: Serving, clients: int, tokens: int) -> float:
    """Tokens per second of the streams of a server."""
    body = {"model": NAME, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        start = time.perf_counter()
        asked = (client.post("/v1/completions", json=body | {"prompt": f"Number {i}"}) for i in range(clients))
        assert all(response.status_code == 200 for response in await asyncio.gather(*asked))
        return clients * tokens / (time.perf_counter() - start)


async def bare_speeds(llm: LLM, clients: int, tokens: int) -> float:
    """Those of the engine in this process."""
    params = llm.default_params(temperature=0, max_tokens=tokens, ignore_eos=True)

    async def read(engine: AsyncEngine, number: int) -> None:
        async for _ in engine.stream(f"Number {number}", params):
            pass

    async with AsyncEngine(llm) as engine:
        start = time.perf_counter()
        await asyncio.gather(*(read(engine, number) for number in range(clients)))
        return clients * tokens / (time.perf_counter() - start)


def overhead(counts: Sequence[int], tokens: int) -> None:
    """Print the server beside the engine, in turns."""
    llm = LLM(device="cpu", dtype="float32", config=EngineConfig(max_sequences=64))
    with serving("--sequences", "64", "--dtype", "float32") as server:
        for clients in counts:
            bare, served = list[float](), list[float]()
            for _ in range(3):
                llm.engine.scheduler.memory.evict_all()
                bare.append(asyncio.run(bare_speeds(llm, clients, tokens)))
                served.append(asyncio.run(speeds(server, clients, tokens)))
            a, b = statistics.median(bare), statistics.median(served)
            print(f"{clients} clients: engine {a:.0f} tokens/s, server {b:.0f}, {b / a:.3f} x")


def reported(checks: dict[str, bool]) -> int:
    """Print checks; 1 where one is red."""
    out = Console(highlight=False, markup=False)
    for name, is_green in checks.items():
        out.print(f"{'ok ' if is_green else 'RED'} {name}")
    return 0 if all(checks.values()) else RED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; return 0, or 1 where a check is red."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--probes", type=int, default=50)
    parser.add_argument("--fuzz", type=float, default=0, help="seconds")
    parser.add_argument("--clients", nargs="+", type=int, default=[], help="measure the overhead, and nothing else")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    options = parser.parse_args(arguments)
    if options.clients:
        overhead(options.clients, 64)
        return 0
    print(json.dumps(vars(options)))
    with serving("--dtype", "float32", "--sequences", "8", "--max-waiting", "24", "--max-model-len", "512") as server:
        draw = random.Random(options.seed)
        checks = asyncio.run(soak(server, options.minutes * 60, options.requests, options.probes, draw))
        checks |= asyncio.run(overload(server, 32))
        if options.fuzz:
            checks |= fuzz(server, options.fuzz, options.seed)
    return reported(checks)


if __name__ == "__main__":
    sys.exit(main())
