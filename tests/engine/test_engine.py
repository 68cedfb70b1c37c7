"""What the engine promises: a request gets what it would get alone, whatever else is served beside it."""

import itertools
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import scramble, tiny_config

import qwen3_next
from qwen3_next import Qwen3NextForCausalLM
from qwen3_next.engine import LLM, Completion, Engine, EngineConfig, FinishReason, Request, SamplingParams, Structured
from qwen3_next.errors import BackendError, CapacityError, InputError

ASSETS = Path(qwen3_next.__file__).parent / "assets"
KNOWN, UNKNOWN = 4096, 24
LENGTHS = (3, 90, 17, 64, 1, 130)
SETTINGS: dict[str, Any] = {"max_sequences": 4, "token_budget": 48, "memory_bytes": 2**24}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends no text by itself, whose head has rows beyond the tokenizer."""
    directory = tmp_path_factory.mktemp("engine")
    torch.manual_seed(5)
    config = tiny_config(
        vocab_size=KNOWN + UNKNOWN, num_hidden_layers=4, max_position_embeddings=400, eos_token_id=None, dtype="float32"
    )
    model = Qwen3NextForCausalLM(config)
    scramble(model)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, directory)
    return directory


@pytest.fixture(autouse=True)
def memory_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every step, every page and every slot has exactly one owner."""
    step = Engine.step

    def checked(engine: Engine) -> Any:
        outputs = step(engine)
        engine.scheduler.check()
        return outputs

    monkeypatch.setattr(Engine, "step", checked)


@pytest.fixture(autouse=True, params=[False, True], ids=["in turn", "ahead"])
def plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds whether or not the next call is planned before this one is known."""
    monkeypatch.setitem(SETTINGS, "plan_ahead", request.param)


def engine_of(checkpoint: Path, **limits: Any) -> LLM:
    return LLM(str(checkpoint), dtype="float32", config=EngineConfig(**(SETTINGS | limits)))


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, KNOWN, (length,), generator=generator).tolist() for length in lengths]


def greedy(tokens: int = 8, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, **changes)


def ids(completions: Sequence[tuple[Completion, ...]]) -> list[tuple[int, ...]]:
    return [completion.token_ids for group in completions for completion in group]


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[tuple[int, ...]]:
    """Each prompt by itself, read in one piece, without a prefix cache."""
    llm = engine_of(checkpoint, token_budget=400, prefix_cache=False)
    return [llm.generate(prompt, greedy())[0][0].token_ids for prompt in prompts()]


def test_batched_equals_alone(checkpoint: Path, alone: list[tuple[int, ...]]) -> None:
    llm = engine_of(checkpoint, max_sequences=8, token_budget=400)
    assert ids(llm.generate(prompts(), greedy())) == alone


def test_chunked_equals_whole(checkpoint: Path, alone: list[tuple[int, ...]]) -> None:
    assert ids(engine_of(checkpoint, token_budget=9).generate(prompts(), greedy())) == alone


def test_preempted_equals_undisturbed(checkpoint: Path) -> None:
    long = prompts((60, 61, 62))
    undisturbed = ids(engine_of(checkpoint).generate(long, greedy(100)))
    llm = engine_of(checkpoint, max_context=192, memory_bytes=320_000)  # pages for one of them and a half
    assert ids(llm.generate(long, greedy(100))) == undisturbed
    assert llm.engine.scheduler.figures.preemptions > 0


def test_a_prefix_hit_equals_a_cold_start(checkpoint: Path) -> None:
    """A long prompt again, one that begins like it, and one that goes on from its answer."""
    llm, cold = engine_of(checkpoint), engine_of(checkpoint, prefix_cache=False)
    prompt = prompts((200,))[0]
    first = llm.generate(prompt, greedy())[0][0]
    followers = [prompt, prompt[:150] + prompts()[2], [*prompt, *first.token_ids, *prompts()[2]]]
    for follower in followers:
        warm = llm.generate(follower, greedy())[0][0]
        assert warm.token_ids == cold.generate(follower, greedy())[0][0].token_ids
    assert first.cached_tokens == 0
    # The second turn goes on where the first one ended: all but the last token of the answer, which was never read.
    assert warm.cached_tokens == len(prompt) + len(first.token_ids) - 1


def test_greedy_equals_the_generate_of_transformers(checkpoint: Path, alone: list[tuple[int, ...]]) -> None:
    model = Qwen3NextForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for prompt, ours in zip(prompts(), alone, strict=True):
        row = torch.tensor([prompt])
        theirs = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=8, do_sample=False)
        expected = theirs[0, len(prompt) :].tolist()
        if max(expected) < KNOWN:  # transformers also takes the rows that only fill up the head
            assert list(ours) == expected


def test_a_seed_draws_the_same_alone_and_in_any_batch(checkpoint: Path) -> None:
    params = [SamplingParams(temperature=1.5, top_p=0.95, seed=n, max_tokens=6) for n in range(len(LENGTHS))]
    together = ids(engine_of(checkpoint).generate(prompts(), params))
    llm = engine_of(checkpoint, token_budget=11)
    for prompt, one, expected in zip(prompts(), params, together, strict=True):
        assert llm.generate(prompt, one)[0][0].token_ids == expected
    assert ids(llm.generate(prompts(), params[::-1])) != together


def test_samples_of_a_prompt_differ_and_are_drawn_again_by_the_seed(checkpoint: Path) -> None:
    llm = engine_of(checkpoint)
    params = SamplingParams(temperature=2, n=3, seed=4, max_tokens=6)
    (first,), (second,) = llm.generate(prompts()[1], params), llm.generate(prompts()[1], params)
    assert len({completion.token_ids for completion in first}) == 3
    assert [c.token_ids for c in first] == [c.token_ids for c in second]


def test_no_state_leaks_to_the_next_owner(checkpoint: Path, alone: list[tuple[int, ...]]) -> None:
    """What is free holds NaN: in pages and slots that nobody owned yet, and after a request that computed NaN."""
    llm = engine_of(checkpoint)
    memory = llm.engine.runner.memory
    for tensor in (memory.keys, memory.values, memory.recurrent, memory.conv, memory.pending_qkv, memory.pending_ba):
        tensor.fill_(float("nan"))
    assert ids(llm.generate(prompts(), greedy())) == alone


def test_a_request_with_nan_fails_alone(checkpoint: Path, alone: list[tuple[int, ...]]) -> None:
    llm = engine_of(checkpoint)
    poison = next(token for token in range(KNOWN) if all(token not in prompt for prompt in prompts()))
    used = set(itertools.chain(*alone))
    assert poison not in used
    with torch.no_grad():
        llm.engine.loaded.model.model.embed_tokens.weight[poison] = float("nan")
    results = llm.generate([*prompts(), [5, poison, 7]], greedy())
    assert ids(results[:-1]) == alone
    failed = results[-1][0]
    assert (failed.finish, failed.token_ids) == (FinishReason.ERROR, ())
    assert isinstance(failed.error, BackendError)
    assert "not finite" in str(failed.error)
    assert ids(llm.generate(prompts(), greedy())) == alone


def test_a_call_without_memory_is_made_again(
    checkpoint: Path, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(checkpoint).engine
    requests = [Request(request_id=f"{n}", prompt=tuple(p), params=greedy()) for n, p in enumerate(prompts())]
    for request in requests:
        engine.add(request)
    run, calls, failed, told = engine.runner.run, itertools.count(), list[int](), list[str]()

    def failing(plan: Any, *others: Any) -> Any:
        computed, call = run(plan, *others), next(calls)
        if call in (0, 1, 4, 8):  # it came far before it failed
            failed.append(call)
            raise torch.OutOfMemoryError("no room")
        return computed

    monkeypatch.setattr(engine.runner, "run", failing)
    while engine.has_work:
        try:
            engine.step()
        except BackendError as error:
            told.append(str(error))
    assert failed == [0, 1, 4, 8]
    assert all("lower token_budget" in message for message in told)
    assert len(told) == (2 if SETTINGS["plan_ahead"] else 4)  # what does not fit beside another call is made alone
    assert [tuple(request.output) for request in requests] == alone


def test_abort_frees_everything_within_one_step(checkpoint: Path) -> None:
    engine = engine_of(checkpoint).engine
    for n, prompt in enumerate(prompts()):
        engine.add(Request(request_id=f"{n}", prompt=tuple(prompt), params=greedy(100)))
    engine.step()
    assert all(engine.abort(f"{n}") for n in range(len(LENGTHS)))
    assert {output.state.finish for output in engine.step()} == {FinishReason.ABORT}
    figures = engine.scheduler.memory.figures
    assert (figures.used_pages, figures.used_slots, engine.has_work) == (0, 0, False)
    assert not engine.abort("0")


def test_ends(checkpoint: Path) -> None:
    llm = engine_of(checkpoint)
    prompt = prompts()[2]
    whole = llm.generate(prompt, greedy(12))[0][0]
    assert (whole.finish, len(whole.token_ids)) == (FinishReason.LENGTH, 12)
    third = whole.token_ids[2]
    stopped = llm.generate(prompt, greedy(12, stop_token_ids=(third,)))[0][0]
    assert (stopped.finish, stopped.token_ids) == (
        FinishReason.STOP,
        whole.token_ids[: whole.token_ids.index(third) + 1],
    )
    text = whole.text[4:7]
    cut = llm.generate(prompt, greedy(12, stop=("\x00never", text)))[0][0]
    assert (cut.finish, cut.text) == (FinishReason.STOP, whole.text[: whole.text.index(text)])
    late = llm.generate(prompt, greedy(12, stop_token_ids=(third,), min_tokens=12))[0][0]
    assert len(late.token_ids) == 12
    assert third not in late.token_ids
    full = llm.generate(prompts((398,))[0], SamplingParams(temperature=0))[0][0]
    assert (full.finish, len(full.token_ids)) == (FinishReason.LENGTH, 2)


def test_rows_beyond_the_tokenizer_never_come_and_biases_are_honoured(checkpoint: Path) -> None:
    llm = engine_of(checkpoint)
    wild = SamplingParams(temperature=1000, max_tokens=60, seed=1)
    assert max(llm.generate(prompts()[0], wild)[0][0].token_ids) < KNOWN
    params = greedy(4, logit_bias={7: 1e4, 9: 2e4})
    assert llm.generate(prompts()[0], params)[0][0].token_ids == (9,) * 4
    penalised = greedy(4, logit_bias={7: 1e4, 9: 1.0001e4}, frequency_penalty=2)
    assert llm.generate(prompts()[0], penalised)[0][0].token_ids[:2] == (9, 7)


def test_logprobs_are_the_models_own(checkpoint: Path) -> None:
    completion = engine_of(checkpoint).generate(prompts()[1], greedy(3, logprobs=2))[0][0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 3
    model = Qwen3NextForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens = torch.tensor([[*prompts()[1], *completion.token_ids]])
    with torch.no_grad():
        expected = model(tokens).logits[0, -4:-1, :KNOWN].log_softmax(-1)
    for row, drawn in zip(expected, completion.logprobs, strict=True):
        values, likeliest = row.topk(2)
        assert [token for token, _ in drawn.top_logprobs] == likeliest.tolist()
        assert drawn.logprob == pytest.approx(values[0].item(), abs=1e-4)


def test_what_cannot_be_served_is_refused_before_anything_starts(checkpoint: Path) -> None:
    llm = engine_of(checkpoint, max_context=300)
    with pytest.raises(CapacityError, match="at most 299"):
        llm.generate([[1], [1] * 300], greedy())
    with pytest.raises(InputError, match="token id 5000"):
        llm.generate([[1], [5000]], greedy())
    with pytest.raises(InputError, match="unclosed group"):
        llm.generate([1], greedy(structured=Structured(kind="regex", grammar="a(")))
    with pytest.raises(InputError, match="not valid Unicode"):
        llm.generate(["good", "bad \ud800"], greedy())
    with pytest.raises(InputError, match="prompt"):
        llm.generate(["good", ""], greedy())
    assert llm.generate([], greedy()) == []
    with pytest.raises(InputError, match="2 prompts came with 1"):
        llm.generate([[1], [2]], [greedy()])
    with pytest.raises(CapacityError, match="Raise memory_bytes"):
        engine_of(checkpoint, memory_bytes=1000)
    with pytest.raises(InputError, match="quantization = 'int4'"):
        LLM(str(checkpoint), quantization="int4")  # type: ignore[arg-type]
    assert not llm.engine.has_work
    assert len(llm.generate([1], greedy(2))[0][0].token_ids) == 2


def test_fp8_weights_are_served(checkpoint: Path) -> None:
    config = EngineConfig(max_sequences=4, token_budget=48, memory_bytes=2**24, drafts=2)
    llm = LLM(str(checkpoint), dtype="float32", quantization="fp8", config=config)
    together = ids(llm.generate(prompts(), greedy(4)))
    assert together == [llm.generate(prompt, greedy(4))[0][0].token_ids for prompt in prompts()]


def test_a_conversation_in_the_shipped_models_template() -> None:
    llm = LLM(config=EngineConfig(max_sequences=2, token_budget=256))
    messages = [{"role": "user", "content": "Hello"}]
    params = llm.default_params(temperature=0, max_tokens=5)
    assert params.repetition_penalty > 1  # what ships with the model
    first = llm.chat(messages, params)
    assert first.text
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And?"}]
    assert llm.chat(messages, params).finish in (FinishReason.LENGTH, FinishReason.STOP)


@pytest.mark.parametrize("seed", range(6))
def test_all_of_it_together_equals_all_off_under_random_schedules(checkpoint: Path, seed: int) -> None:
    """Chats that go on, branch and are edited, priorities, aborts, evictions, drafts, in a memory that is too small."""
    chance = random.Random(seed)
    drafts, sizes = chance.choice([(0, (200_000, 260_000, 400_000)), (2, (330_000, 420_000, 700_000))])
    small = {"max_context": 256, "memory_bytes": chance.choice(sizes), "drafts": drafts}
    engine = engine_of(checkpoint, token_budget=chance.choice([7, 40, 90]), snapshot_stride=64, **small).engine
    cold = engine_of(checkpoint, max_sequences=1, token_budget=400, prefix_cache=False, drafts=0)
    running: dict[str, Request] = {}
    finished: list[Request] = []
    histories = [[chance.randrange(KNOWN) for _ in range(chance.randrange(1, 90))] for _ in range(3)]
    for number in itertools.count():
        if number >= 300 and not engine.has_work:
            break
        if number < 300 and chance.random() < 0.2:
            history = list(chance.choice(histories))
            if chance.random() < 0.3:  # edited
                history = [*history[: chance.randrange(len(history))], chance.randrange(KNOWN)]
            prompt = tuple([*history, *(chance.randrange(KNOWN) for _ in range(chance.randrange(1, 30)))][-180:])
            params = SamplingParams(
                temperature=chance.choice([0, 1.2]),
                seed=chance.randrange(9),
                max_tokens=chance.randrange(1, 12),
                logit_bias=dict.fromkeys((5, 6, 7), 40.0) if drafts else {},  # of three tokens a draft is often right
            )
            made = Request(request_id=f"{number}", prompt=prompt, params=params, priority=chance.randrange(-1, 2))
            engine.add(made)
            running[made.request_id] = made
        if running and chance.random() < 0.03:
            engine.abort(chance.choice(list(running)))
        if chance.random() < 0.02:
            engine.scheduler.memory.evict_all()
        for output in engine.step():
            if output.state.finish is not None:
                one = running.pop(output.state.request_id)
                if output.state.finish is not FinishReason.ABORT:
                    finished.append(one)
                    histories.append(list(one.tokens))
    assert len(finished) > 20
    assert engine.scheduler.figures.cached_tokens > 0
    assert all(tally.accepted > 0 for tally in engine.drafts.figures.by_position)
    for one in chance.sample(finished, 12):
        assert tuple(one.output) == cold.generate(one.prompt, one.params)[0][0].token_ids
