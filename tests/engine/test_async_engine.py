"""The engine for asyncio: what a stream gives, and that nobody hangs and nothing stays behind, whatever happens."""

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from tests.conftest import scramble, tiny_config

import qwen3_next
from qwen3_next import Qwen3NextForCausalLM
from qwen3_next.engine import LLM, AsyncEngine, Engine, EngineConfig, FinishReason, SamplingParams, StreamUpdate
from qwen3_next.engine.request import Structured
from qwen3_next.errors import CapacityError, DeadlineError, EngineError, InputError, OverloadedError
from qwen3_next.ops.backend import _selected, use

ASSETS = Path(qwen3_next.__file__).parent / "assets"
PROMPTS = ["Once upon a time", "def add(a, b):\n", [5, 6, 7] * 30, "À bientôt, 你好 🙂"]
BAD = "\ud800"
GREEDY = SamplingParams(temperature=0, max_tokens=9)
ENDLESS = SamplingParams(temperature=0, max_tokens=300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends no text by itself."""
    directory = tmp_path_factory.mktemp("async")
    torch.manual_seed(5)
    model = Qwen3NextForCausalLM(
        tiny_config(vocab_size=4096, max_position_embeddings=400, eos_token_id=None, dtype="float32")
    )
    scramble(model)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, directory)
    return directory


@pytest.fixture
def llm(checkpoint: Path) -> LLM:
    config = EngineConfig(max_sequences=4, token_budget=48, memory_bytes=2**24)
    return LLM(str(checkpoint), dtype="float32", config=config)


class Pause:
    """Stops the engine's thread before a step, until told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = Event()
        step = Engine.step

        def paused(engine: Engine) -> Any:
            assert self.go.wait(60)
            return step(engine)

        monkeypatch.setattr(Engine, "step", paused)


def run(llm: LLM, use_it: Callable[[AsyncEngine], Awaitable[None]], **settings: Any) -> AsyncEngine:
    """Use an engine in an event loop; then everything that it owned must be back."""

    async def go() -> AsyncEngine:
        async with AsyncEngine(llm, **settings) as engine:
            await use_it(engine)
        return engine

    engine = asyncio.run(asyncio.wait_for(go(), 120))
    owns_nothing(llm)
    assert engine.figures.open == 0
    return engine


def owns_nothing(llm: LLM) -> None:
    llm.engine.scheduler.check()
    figures = llm.engine.scheduler.memory.figures
    assert (figures.used_pages, figures.used_slots) == (0, 0)
    assert not llm.engine.has_work


async def collect(stream: Any) -> list[StreamUpdate]:
    return [update async for update in stream]


def text(updates: Sequence[StreamUpdate]) -> str:
    return "".join(update.text for update in updates)


def ids(updates: Sequence[StreamUpdate]) -> tuple[int, ...]:
    return tuple(token for update in updates for token in update.token_ids)


def test_streams_side_by_side_give_what_generate_gives_alone(llm: LLM) -> None:
    params = SamplingParams(temperature=1.2, seed=3, max_tokens=9, logprobs=2)
    alone = [llm.generate(prompt, params)[0][0] for prompt in PROMPTS]

    async def use_it(engine: AsyncEngine) -> None:
        streams = await asyncio.gather(*(collect(engine.stream(prompt, params)) for prompt in PROMPTS))
        for updates, expected in zip(streams, alone, strict=True):
            assert (ids(updates), text(updates)) == (expected.token_ids, expected.text)
            last = updates[-1]
            assert [update.finish for update in updates] == [None] * (len(updates) - 1) + [expected.finish]
            assert (last.output_tokens, last.prompt_tokens) == (9, expected.prompt_tokens)
            found = [drawn for update in updates for drawn in update.logprobs or ()]
            assert [drawn.token for drawn in found] == list(expected.token_ids)
            assert all(len(drawn.top_logprobs) == 2 for drawn in found)
        wholes = await asyncio.gather(*(engine.generate(prompt, params) for prompt in PROMPTS))
        assert [whole[0].text for whole in wholes] == [one.text for one in alone]

    figures = run(llm, use_it).figures
    assert figures.finished == {FinishReason.LENGTH: 8}
    assert figures.output_tokens == 8 * 9
    assert figures.prompt_tokens == 2 * sum(one.prompt_tokens for one in alone)
    assert 0 < figures.cached_tokens < figures.prompt_tokens
    assert figures.steps > 0
    assert figures.failed_steps == 0


def test_each_sample_ends_once_while_others_go_on(llm: LLM) -> None:
    params = SamplingParams(temperature=2, seed=3, n=3, max_tokens=30)
    (alone,) = llm.generate(PROMPTS[0], params)
    early = SamplingParams(temperature=2, seed=3, n=3, max_tokens=30, stop_token_ids=alone[0].token_ids[:1])

    async def use_it(engine: AsyncEngine) -> None:
        updates = await collect(engine.stream(PROMPTS[0], early))
        ends = [(update.sample, update.finish) for update in updates if update.finish]
        assert sorted(sample for sample, _ in ends) == [0, 1, 2]
        assert {finish for _, finish in ends} == {FinishReason.STOP, FinishReason.LENGTH}

    run(llm, use_it)


def test_samples_of_a_prompt_are_told_apart(llm: LLM) -> None:
    params = SamplingParams(temperature=2, seed=3, n=3, max_tokens=6)
    (alone,) = llm.generate(PROMPTS[0], params)

    async def use_it(engine: AsyncEngine) -> None:
        updates = await collect(engine.stream(PROMPTS[0], params))
        for sample, expected in enumerate(alone):
            assert ids([update for update in updates if update.sample == sample]) == expected.token_ids
        assert [one.token_ids for one in await engine.generate(PROMPTS[0], params)] == [one.token_ids for one in alone]

    run(llm, use_it)


def test_a_reader_that_leaves_ends_its_request(llm: LLM) -> None:
    async def use_it(engine: AsyncEngine) -> None:
        stream = engine.stream(PROMPTS[0], ENDLESS)
        async for _ in stream:
            break
        await stream.aclose()
        await drained(engine)

    assert run(llm, use_it).figures.finished == {FinishReason.ABORT: 1}


@pytest.mark.parametrize("whole", [False, True])
def test_a_reader_that_is_cancelled_ends_its_request_and_no_other(llm: LLM, whole: bool) -> None:
    expected = llm.generate(PROMPTS[1], GREEDY)[0][0]

    async def use_it(engine: AsyncEngine) -> None:
        begun = asyncio.Event()

        async def read() -> None:
            if whole:
                begun.set()
                await engine.generate(PROMPTS[0], ENDLESS)
            async for _ in engine.stream(PROMPTS[0], ENDLESS):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        other = asyncio.create_task(collect(engine.stream(PROMPTS[1], GREEDY)))
        await asyncio.sleep(0)
        task.cancel()
        assert ids(await other) == expected.token_ids
        await drained(engine)
        assert task.cancelled()

    assert run(llm, use_it).figures.finished == {FinishReason.ABORT: 1, FinishReason.LENGTH: 1}


async def drained(engine: AsyncEngine) -> None:
    while engine.figures.open:
        await asyncio.sleep(0.001)


def test_abort_by_name_is_told_to_the_reader(llm: LLM) -> None:
    async def use_it(engine: AsyncEngine) -> None:
        finishes: list[FinishReason | None] = []
        async for update in engine.stream(PROMPTS[0], ENDLESS, request_id="mine"):
            finishes.append(update.finish)
            assert engine.abort("mine") is (update.finish is None)
        assert finishes[-1] is FinishReason.ABORT
        assert not engine.abort("mine")

    run(llm, use_it)


def test_a_name_is_free_again_for_the_next_and_refused_before(llm: LLM) -> None:
    async def use_it(engine: AsyncEngine) -> None:
        first = engine.stream(PROMPTS[0], GREEDY, request_id="mine")
        await anext(first)
        with pytest.raises(InputError, match="'mine' is in use"):
            await engine.generate(PROMPTS[0], GREEDY, request_id="mine")
        await drained(engine)
        second = engine.stream(PROMPTS[0], ENDLESS, request_id="mine")
        await anext(second)
        await first.aclose()  # nothing of the second one's
        assert len(ids(await collect(second))) > 200

    run(llm, use_it)


def test_more_than_may_wait_are_refused_and_the_others_served(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pause = Pause(monkeypatch)

    async def use_it(engine: AsyncEngine) -> None:
        accepted = [asyncio.create_task(collect(engine.stream(PROMPTS[1], GREEDY))) for _ in range(6)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="Allowed: 6"):
            await collect(engine.stream(PROMPTS[1], GREEDY))
        pause.go.set()
        assert {len(ids(updates)) for updates in await asyncio.gather(*accepted)} == {9}
        assert len(await engine.generate(PROMPTS[1], GREEDY)) == 1

    assert run(llm, use_it, max_waiting=2).figures.refused == 1


@pytest.mark.parametrize(
    ("prompt", "error", "said"),
    [
        ([5000], InputError, "5000"),
        ([1] * 500, CapacityError, "399"),
        ([], InputError, "prompt"),
        (BAD, InputError, "UTF-8"),
    ],
)
def test_what_cannot_be_served_is_the_readers_own_error(llm: LLM, prompt: Any, error: Any, said: str) -> None:
    async def use_it(engine: AsyncEngine) -> None:
        with pytest.raises(error, match=said):
            await collect(engine.stream(prompt, SamplingParams(n=2)))
        with pytest.raises(error, match=said):
            await engine.generate(prompt, GREEDY)
        assert len(ids(await collect(engine.stream(PROMPTS[0], GREEDY)))) == 9

    assert run(llm, use_it).figures.failed_steps == 0


@pytest.mark.parametrize("place", ["runner.run", "scheduler.commit", "scheduler.memory.publish"])
def test_a_step_that_raises_answers_everyone_and_the_engine_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    expected = llm.generate(PROMPTS[2], GREEDY)[0][0]
    *path, method = place.split(".")
    owner: Any = llm.engine
    for name in path:
        owner = getattr(owner, name)
    works, broken = getattr(owner, method), Event()

    def fails(*arguments: Any) -> Any:
        if broken.is_set():
            broken.clear()
            raise ZeroDivisionError("a loose wire")
        return works(*arguments)

    monkeypatch.setattr(owner, method, fails)

    async def use_it(engine: AsyncEngine) -> None:
        async def read(prompt: Any) -> None:
            async for _ in engine.stream(prompt, ENDLESS):
                pass

        tasks = [asyncio.create_task(read(prompt)) for prompt in PROMPTS]
        tasks.append(asyncio.create_task(engine.generate(PROMPTS[0], ENDLESS)))
        while engine.figures.output_tokens < 40:
            await asyncio.sleep(0.001)
        broken.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in outcomes:
            assert isinstance(outcome, EngineError)
            assert "a loose wire" in str(outcome)
            assert isinstance(outcome.__cause__, ZeroDivisionError)
        await drained(engine)
        assert engine.is_healthy
        assert ids(await collect(engine.stream(PROMPTS[2], GREEDY))) == expected.token_ids

    figures = run(llm, use_it).figures
    assert figures.failed_steps == 1


def test_a_request_that_comes_while_a_step_fails_is_served(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, step = Event(), Event(), Engine.step

    def fails_once(engine: Engine) -> Any:
        if not go.is_set():
            begun.set()
            assert go.wait(60)
            raise ZeroDivisionError
        return step(engine)

    monkeypatch.setattr(Engine, "step", fails_once)

    async def use_it(engine: AsyncEngine) -> None:
        early = asyncio.create_task(collect(engine.stream(PROMPTS[0], GREEDY)))
        assert await asyncio.to_thread(begun.wait, 60)
        late = asyncio.create_task(collect(engine.stream(PROMPTS[1], GREEDY)))
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(EngineError):
            await early
        assert len(ids(await late)) == 9

    run(llm, use_it)


def test_where_the_engine_cannot_go_on_everyone_is_told_then_and_later(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Engine) -> None:
        raise ZeroDivisionError("a loose wire")

    monkeypatch.setattr(Engine, "step", fails)

    async def use_it() -> None:
        async with AsyncEngine(llm) as engine:
            both = [collect(engine.stream(PROMPTS[0], GREEDY)), engine.generate(PROMPTS[1], GREEDY)]
            for outcome in await asyncio.gather(*both, return_exceptions=True):
                assert isinstance(outcome, EngineError)
            with pytest.raises(EngineError):
                await engine.generate(PROMPTS[1], GREEDY)
            assert not engine.is_healthy

    asyncio.run(asyncio.wait_for(use_it(), 60))


@pytest.mark.parametrize("drain", [False, True])
def test_closing_lets_requests_end_or_ends_them(llm: LLM, drain: bool) -> None:
    async def use_it() -> None:
        engine = AsyncEngine(llm)
        assert engine.is_healthy
        streams = [engine.stream(prompt, ENDLESS) for prompt in PROMPTS]
        first = [await anext(stream) for stream in streams]
        await engine.close(drain=drain)
        assert not engine.is_healthy
        for update, stream in zip(first, streams, strict=True):
            updates = [update, *await collect(stream)]
            assert updates[-1].finish is (FinishReason.LENGTH if drain else FinishReason.ABORT)
            assert (len(ids(updates)) == 300) is drain
        with pytest.raises(EngineError, match="closed"):
            await engine.generate(PROMPTS[0], GREEDY)
        await engine.close()

    asyncio.run(asyncio.wait_for(use_it(), 120))
    owns_nothing(llm)


def test_a_slow_reader_holds_nobody_up_and_gets_the_rest_in_one_piece(llm: LLM) -> None:
    expected = llm.generate(PROMPTS[0], ENDLESS)[0][0]

    async def use_it(engine: AsyncEngine) -> None:
        slow = engine.stream(PROMPTS[0], ENDLESS)
        first = await anext(slow)
        assert len(ids(await collect(engine.stream(PROMPTS[1], ENDLESS)))) == 300
        await drained(engine)
        rest = await collect(slow)
        assert ids([first, *rest]) == expected.token_ids
        assert text([first, *rest]) == expected.text
        assert len(rest) == 1

    run(llm, use_it)


def test_the_thread_computes_with_the_backend_of_its_maker(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    step = Engine.step

    def spied(engine: Engine) -> Any:
        seen.add(_selected.get())
        return step(engine)

    monkeypatch.setattr(Engine, "step", spied)

    async def use_it(engine: AsyncEngine) -> None:
        await engine.generate(PROMPTS[0], GREEDY)

    with use("reference"):
        run(llm, use_it)
    assert seen == {"reference"}


def test_a_limit_below_nothing_is_refused(llm: LLM) -> None:
    with pytest.raises(InputError, match="max_waiting = -1"):
        AsyncEngine(llm, max_waiting=-1)


@pytest.mark.parametrize("whole", [False, True])
def test_time_that_is_over_ends_a_request_and_no_other(llm: LLM, whole: bool) -> None:
    async def use_it(engine: AsyncEngine) -> None:
        other = asyncio.create_task(collect(engine.stream(PROMPTS[1], ENDLESS, timeout=60)))
        late = engine.generate if whole else lambda *given, **named: collect(engine.stream(*given, **named))
        with pytest.raises(DeadlineError, match=r"0\.05 seconds"):
            await late(PROMPTS[0], ENDLESS, timeout=0.05)
        assert len(ids(await other)) == 300
        await drained(engine)

    assert run(llm, use_it).figures.finished == {FinishReason.ABORT: 1, FinishReason.LENGTH: 1}


def test_others_go_on_while_a_grammar_is_compiled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, compiled = Event(), Event(), Engine.compiled

    def slow(engine: Engine, structured: Structured) -> Any:
        begun.set()
        assert go.wait(60)
        return compiled(engine, structured)

    monkeypatch.setattr(Engine, "compiled", slow)
    params = SamplingParams(max_tokens=9, n=2, structured=Structured(kind="regex", grammar="(ab){1,9}"))

    async def use_it(engine: AsyncEngine) -> None:
        asked = asyncio.create_task(engine.generate(PROMPTS[0], params))
        assert await asyncio.to_thread(begun.wait, 60)
        assert len(ids(await collect(engine.stream(PROMPTS[1], ENDLESS)))) == 300
        with pytest.raises(DeadlineError, match="grammar"):
            await engine.generate(PROMPTS[0], params, timeout=0.01)
        go.set()
        for answer in await asked:
            assert answer.text.startswith("ab")

    run(llm, use_it)


def test_the_time_of_a_request_runs_while_its_grammar_is_compiled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, ends = Engine.compiled, list[float]()

    def slowly(engine: Engine, structured: Structured) -> Any:
        time.sleep(0.2)
        ends.append(time.monotonic())
        return compiled(engine, structured)

    monkeypatch.setattr(Engine, "compiled", slowly)

    async def use_it(engine: AsyncEngine) -> None:
        loop, moments = asyncio.get_running_loop(), list[float]()
        call_at = loop.call_at

        def noted(when: float, callback: Any, *arguments: Any, **settings: Any) -> asyncio.TimerHandle:
            if callback == engine._expire:
                moments.append(when)
            return call_at(when, callback, *arguments, **settings)

        monkeypatch.setattr(loop, "call_at", noted)
        params = SamplingParams(temperature=0, max_tokens=4, structured=Structured(kind="regex", grammar="[ab]{2}"))
        await engine.generate("Once", params, timeout=60)
        assert moments[0] < ends[0] + 60

    run(llm, use_it)


def test_a_grammar_that_takes_too_much_is_refused_alone(llm: LLM) -> None:
    params = SamplingParams(max_tokens=9, structured=Structured(kind="regex", grammar="a?" * 20_000))

    async def use_it(engine: AsyncEngine) -> None:
        other = asyncio.create_task(collect(engine.stream(PROMPTS[1], ENDLESS)))
        with pytest.raises(InputError, match="too big"):
            await engine.generate(PROMPTS[0], params)
        assert len(ids(await other)) == 300

    run(llm, use_it)


def test_more_samples_than_can_ever_be_open_are_an_input_error(llm: LLM) -> None:
    async def use_it(engine: AsyncEngine) -> None:
        with pytest.raises(InputError, match="at most 6"):
            await engine.generate(PROMPTS[0], SamplingParams(n=7))

    run(llm, use_it, max_waiting=2)
