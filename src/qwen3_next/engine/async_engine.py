"""The engine for asyncio: one thread computes, any number of tasks read what it writes."""

import asyncio
import contextlib
import contextvars
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Condition, Thread

from qwen3_next.engine.answers import Completion, Growing, StreamUpdate
from qwen3_next.engine.grammar import GrammarState
from qwen3_next.engine.llm import LLM, Prompt
from qwen3_next.engine.memory import MemoryFigures
from qwen3_next.engine.request import FinishReason, Request, SamplingParams
from qwen3_next.engine.scheduler_config import SchedulerFigures
from qwen3_next.engine.stream import Output
from qwen3_next.errors import DeadlineError, EngineError, InputError, OverloadedError, Qwen3NextError

RESTART_WINDOW = 300.0
"""Seconds in which restarts are counted."""

logger = logging.getLogger("qwen3_next.engine")


@dataclass(frozen=True, kw_only=True)
class AsyncFigures:
    """Counts since the start, and queues and memory as they were after the last step.

    Attributes:
        open: requests that have not ended, each sample of a prompt being one.
        refused: because too many waited.
        finished: requests by the reason of their end.
        prompt_tokens: of the requests that have ended; of these, `cached_tokens` came from the prefix cache.
        output_tokens: of all requests.
        steps: calls of the engine, and how many of them failed as a whole.
    """

    open: int
    refused: int
    finished: Mapping[FinishReason, int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    steps: int
    failed_steps: int
    scheduler: SchedulerFigures
    memory: MemoryFigures


class _Channel:
    """From the engine's thread to one reader: what it has not read yet, in one piece however long it takes."""

    def __init__(self, name: str, requests: Sequence[Request], as_whole: bool, grammar: GrammarState | None) -> None:
        self.name, self.as_whole, self.grammar = name, as_whole, grammar
        self.growing = {request.request_id: Growing(request) for request in requests}
        self.open = set(self.growing)
        self.error: Qwen3NextError | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.news, self.loop = asyncio.Event(), asyncio.get_running_loop()
        self.is_called = False

    def call(self) -> None:
        """Wake the reader, unless it was woken and has not looked yet."""
        is_worth_it = self.error is not None or not self.open or not self.as_whole
        if is_worth_it and not self.is_called:
            self.is_called = True
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody reads this any more
                self.loop.call_soon_threadsafe(self.news.set)


class AsyncEngine:
    """Serves an `LLM` to the tasks of one event loop; meanwhile the `LLM` itself must not be used.

    async with AsyncEngine(LLM()) as engine:
        async for update in engine.stream("Once upon a time"):
            print(update.text, end="")
    """

    def __init__(self, llm: LLM, *, max_waiting: int = 1024, max_restarts: int = 5) -> None:
        """Start the thread.

        Args:
            max_waiting: requests that may be open beyond those that are computed at the same time.
            max_restarts: after steps that fail, within `RESTART_WINDOW`; one more failure ends the thread.

        Raises:
            InputError: a negative number of them.
        """
        for name, value in (("max_waiting", max_waiting), ("max_restarts", max_restarts)):
            if value < 0:
                raise InputError(f"{name} = {value} cannot be served. Allowed: 0 or more.")
        self.llm, self.engine, self.max_waiting, self.max_restarts = llm, llm.engine, max_waiting, max_restarts
        self._changed = Condition()
        """Guards everything below. The engine itself is the thread's alone."""
        self._channels: dict[str, _Channel] = {}
        self._owners: dict[str, _Channel] = {}
        self._added: list[_Channel] = []
        self._aborted: list[_Channel] = []
        self._closing = False
        self._failure: Exception | None = None
        self._restarts: deque[float] = deque(maxlen=max_restarts)
        self._counts: Counter[str] = Counter()
        self._finished: Counter[FinishReason] = Counter()
        self._numbers = itertools.count()
        self._measured = self.engine.scheduler.figures, self.engine.scheduler.memory.figures
        context = contextvars.copy_context()
        self._thread = Thread(target=context.run, args=(self._serve,), name="qwen3-next engine", daemon=True)
        self._thread.start()

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[StreamUpdate]:
        """Continue a prompt piece by piece; with `params.n` answers their pieces take turns.

        A reader that is slow gets more at a time. Leaving the iterator, by cancellation too, ends the request.

        Args:
            params: None for those of the model's generation_config.json.
            priority: a request counts as if it had come so many times `Scheduler.aging` steps earlier.
            request_id: for `abort`; None for a new one.
            timeout: seconds that it may be open, waiting included; None for as long as it takes.

        Raises:
            InputError, CapacityError: the request cannot be served.
            OverloadedError: too many wait.
            DeadlineError: it was not done in time; its memory is free after the step in progress.
            EngineError: the engine failed in the middle of it, or is closed.
        """
        channel = await self._open(prompt, params, priority, request_id, timeout, as_whole=False)
        try:
            is_open, growing = True, list(channel.growing.values())
            while is_open:
                await channel.news.wait()
                with self._changed:
                    updates = [update for one in growing if (update := one.take())]
                    growing = [one for one in growing if not one.has_ended]  # an end is told once
                    is_open = self._look(channel)
                for update in updates:
                    yield update
        finally:
            self._leave(channel)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> tuple[Completion, ...]:
        """The `params.n` whole answers; the rest is as in `stream`."""
        channel = await self._open(prompt, params, priority, request_id, timeout, as_whole=True)
        try:
            await channel.news.wait()
            with self._changed:
                self._look(channel)
            return tuple(one.completion() for one in channel.growing.values())
        finally:
            self._leave(channel)

    def abort(self, request_id: str) -> bool:
        """End a request with all its samples; its reader is told. False: there is none of that name."""
        with self._changed:
            channel = self._channels.get(request_id)
            if channel is not None:
                self._leave(channel)
            return channel is not None

    async def close(self, drain: bool = True) -> None:
        """End the thread. Nothing is taken any more.

        Args:
            drain: let the open requests end by themselves; False aborts them.
        """
        with self._changed:
            self._closing = True
            self._aborted += [] if drain else self._channels.values()
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.close(drain=kind is None)

    @property
    def is_healthy(self) -> bool:
        """Whether the thread takes requests."""
        return self._failure is None and not self._closing and self._thread.is_alive()

    @property
    def reason(self) -> str:
        """Why nothing is taken any more; empty while it is."""
        if self._failure is not None:
            return f"the engine failed and is not restarted ({type(self._failure).__name__}: {self._failure})"
        return "" if self.is_healthy else "the engine is closed"

    @property
    def most_open(self) -> int:
        """Requests, each sample being one, that are computed or may wait; the next is refused."""
        return self.engine.division.limits.max_sequences + self.max_waiting

    @property
    def figures(self) -> AsyncFigures:
        """Counts, queues and memory."""
        with self._changed:
            counts, (scheduler, memory) = self._counts, self._measured
            return AsyncFigures(
                open=len(self._owners),
                refused=counts["refused"],
                finished=dict(self._finished),
                prompt_tokens=counts["prompt"],
                cached_tokens=counts["cached"],
                output_tokens=counts["output"],
                steps=counts["steps"],
                failed_steps=counts["failed"],
                scheduler=scheduler,
                memory=memory,
            )

    async def _open(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        priority: int,
        name: str | None,
        timeout: float | None,
        *,
        as_whole: bool,
    ) -> _Channel:
        name = f"stream-{next(self._numbers)}" if name is None else name
        chosen = self.llm.default_params() if params is None else params
        requests = self.llm.requests(prompt, chosen, name)
        start, grammar = asyncio.get_running_loop().time(), None
        if chosen.structured is not None:  # may take a second, during which the others go on
            try:
                async with asyncio.timeout(timeout):
                    grammar = await asyncio.to_thread(self.engine.compiled, chosen.structured)
            except TimeoutError as error:
                raise DeadlineError(f"the grammar takes more than {timeout} seconds. Simplify it.") from error
        for request in requests:
            request.priority = priority
        channel = _Channel(name, requests, as_whole, grammar)
        with self._changed:
            if self._failure is not None or self._closing:
                raise EngineError(f"{self.reason}; start another one.") from self._failure
            if name in self._channels or self._owners.keys() & channel.open:
                raise InputError(f"request_id = {name!r} is in use. Allowed: one that no open request has.")
            most = self.most_open
            if len(requests) > most:
                raise InputError(f"n = {len(requests)} cannot be served. Allowed: at most {most}. Ask several times.")
            if len(self._owners) + len(requests) > most:
                self._counts["refused"] += 1
                raise OverloadedError(
                    f"{len(self._owners)} requests are open and {len(requests)} more cannot wait. Allowed: {most} in "
                    "all. Try again later."
                )
            self._channels[name] = channel
            self._owners |= dict.fromkeys(channel.growing, channel)
            self._added.append(channel)
            self._changed.notify()
        if timeout is not None:
            channel.timer = channel.loop.call_at(start + timeout, self._expire, channel, timeout)
        return channel

    def _expire(self, channel: _Channel, seconds: float) -> None:
        with self._changed:
            if channel.open:
                channel.error = DeadlineError(f"no end after {seconds} seconds, which are allowed. Ask for less.")
                channel.news.set()
                self._leave(channel)

    def _look(self, channel: _Channel) -> bool:
        """A reader has taken what there was. Whether more will come."""
        channel.is_called = False
        channel.news.clear()
        if channel.error is not None:
            raise channel.error
        return bool(channel.open)

    def _leave(self, channel: _Channel) -> None:
        """Nobody wants what has not come yet."""
        if channel.timer is not None:
            channel.timer.cancel()
        with self._changed:
            if channel.open:
                self._aborted.append(channel)
                self._changed.notify()

    # What follows runs in the thread.

    def _serve(self) -> None:
        try:
            while self._take_orders():
                with self._changed:
                    self._counts["steps"] += 1
                try:
                    self._hand_out(self.engine.step())
                except Exception as error:
                    self._fail(error)
                    self._require_restart(error)
                    self._hand_out(self.engine.reset())
        except Exception as error:  # not even ending all requests works, or it failed too often
            logger.error("engine stopped", exc_info=error)
            with self._changed:
                self._failure = error
                self._added.clear()
                self._answer(list(self._channels.values()), error)

    def _require_restart(self, error: Exception) -> None:
        """Count a restart; raise the error again where there were too many: what breaks each time is not mended so."""
        now, most = time.monotonic(), self.max_restarts
        if len(self._restarts) == most and (not most or now - self._restarts[0] < RESTART_WINDOW):
            raise error
        self._restarts.append(now)
        logger.error("engine restarts", exc_info=error)

    def _take_orders(self) -> bool:
        """Wait for something to do. False: it is all done."""
        with self._changed:
            while not (self._added or self._aborted or self.engine.has_work or self._closing):
                self._changed.wait()
            added, self._added = self._added, []
            aborted, self._aborted = self._aborted, []
            is_closing = self._closing
        for channel in added:
            self._add(channel)
        for channel in aborted:
            for name in channel.open:
                self.engine.abort(name)
        return self.engine.has_work or not is_closing

    def _add(self, channel: _Channel) -> None:
        try:
            for one in channel.growing.values():
                self.engine.add(one.request, channel.grammar)
        except Exception as error:
            for name in channel.growing:
                self.engine.abort(name)
            with self._changed:
                self._answer([channel], error)

    def _hand_out(self, outputs: Iterable[Output]) -> None:
        self._measured = self.engine.scheduler.figures, self.engine.scheduler.memory.figures
        with self._changed:
            for output in outputs:
                self._counts["output"] += len(output.state.tokens)
                channel = self._owners.get(output.state.request_id)
                if output.state.finish is not None:
                    self._count_end(output, output.state.finish)
                if channel is None:  # it was answered with an error before
                    continue
                channel.growing[output.state.request_id].add(output)
                if output.state.finish is not None:
                    self._forget(output.state.request_id, channel)
                channel.call()

    def _count_end(self, output: Output, finish: FinishReason) -> None:
        self._finished[finish] += 1
        self._counts["prompt"] += output.state.prompt_tokens
        self._counts["cached"] += output.state.cached_tokens

    def _fail(self, error: Exception) -> None:
        """Answer every request that was begun: what happened is not theirs."""
        with self._changed:
            self._counts["failed"] += 1
            self._answer([channel for channel in self._channels.values() if channel not in self._added], error)

    def _answer(self, channels: Iterable[_Channel], error: Exception) -> None:
        for channel in channels:
            if isinstance(error, InputError):
                channel.error = error
            else:
                channel.error = EngineError(f"the engine failed ({type(error).__name__}: {error}); try again.")
                channel.error.__cause__ = error
            for name in list(channel.open):
                self._forget(name, channel)
            channel.call()

    def _forget(self, request_id: str, channel: _Channel) -> None:
        channel.open.discard(request_id)
        del self._owners[request_id]
        if not channel.open:
            self._channels.pop(channel.name, None)
