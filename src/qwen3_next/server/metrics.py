"""What /metrics shows, in the text format of Prometheus: the engine's own figures, and times that clients see."""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qwen3_next.engine import AsyncEngine
from qwen3_next.server.bridge import Part

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Of one server.

    Attributes:
        errors: answers of 400 and more, by status.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Figures(engine))
        self.errors = Counter(
            "qwen3_next_http_errors", "Requests answered with an error, by status.", ["status"], registry=self.registry
        )
        self._first = Histogram(
            "qwen3_next_time_to_first_token_seconds",
            "From a request to the first token of each of its answers; streams only.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._between = Histogram(
            "qwen3_next_inter_token_seconds",
            "Between the tokens of an answer; streams only. Tokens that come together share their time.",
            buckets=SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """Everything as it is now."""
        return generate_latest(self.registry)

    async def timed(self, updates: AsyncGenerator[Part]) -> AsyncGenerator[Part]:
        """The same updates, timed as they pass."""
        start, last = time.perf_counter(), dict[tuple[int, int], float]()
        async with aclosing(updates):
            async for part in updates:
                now, count = time.perf_counter(), len(part.update.token_ids)
                answer = part.prompt, part.update.sample
                if count and answer not in last:
                    self._first.observe(now - start)
                elif count:
                    for _ in range(count):
                        self._between.observe((now - last[answer]) / count)
                if count:
                    last[answer] = now
                yield part


class _Figures(Collector):
    """`AsyncEngine.figures`, read when somebody asks."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        figures = self.engine.figures
        queues, memory = figures.scheduler, figures.memory
        gauges = {
            "healthy": ("Whether the engine takes requests.", self.engine.is_healthy),
            "open_requests": ("Requests that have not ended, each sample being one.", figures.open),
            "waiting_requests": ("Requests in the queue.", queues.waiting),
            "running_requests": ("Requests that are computed.", queues.running),
        }
        counts = {
            "refused_requests": ("Requests refused because too many waited.", figures.refused),
            "preemptions": ("Requests that gave their memory back and began again.", queues.preemptions),
            "prompt_tokens": ("Tokens of the prompts of ended requests.", figures.prompt_tokens),
            "cached_prompt_tokens": ("Of these, from the prefix cache.", figures.cached_tokens),
            "output_tokens": ("Tokens written.", figures.output_tokens),
            "steps": ("Calls of the engine.", figures.steps),
            "failed_steps": ("Calls of the engine that failed.", figures.failed_steps),
        }
        for name, (meaning, value) in gauges.items():
            yield GaugeMetricFamily(f"qwen3_next_{name}", meaning, value=float(value))
        for name, (meaning, value) in counts.items():
            yield CounterMetricFamily(f"qwen3_next_{name}", meaning, value=value)
        finished = CounterMetricFamily("qwen3_next_finished_requests", "By the reason of their end.", labels=["reason"])
        for reason, count in figures.finished.items():
            finished.add_metric([reason.value], count)
        yield finished
        for kind in ("pages", "slots"):
            found = GaugeMetricFamily(f"qwen3_next_{kind}", f"{kind.title()} of memory by use.", labels=["use"])
            for use in ("free", "idle", "used"):
                found.add_metric([use], getattr(memory, f"{use}_{kind}"))
            yield found
