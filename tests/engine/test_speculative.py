"""Drafts change nothing but the time: every request is given the tokens that it is given without them."""

import itertools
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import scramble, tiny_config
from tests.engine.test_engine import memory_is_checked as memory_is_checked

import qwen3_next
from qwen3_next import Qwen3NextForCausalLM
from qwen3_next.engine import (
    LLM,
    Completion,
    Engine,
    EngineConfig,
    FinishReason,
    Plan,
    Request,
    SamplingParams,
    Structured,
)
from qwen3_next.engine.runner import Computed
from qwen3_next.engine.sampler import Draw, Drawn, draw
from qwen3_next.engine.speculative import Drafter, Verdict, verify
from qwen3_next.errors import BackendError, InputError

ASSETS = Path(qwen3_next.__file__).parent / "assets"
KNOWN = 4096
LENGTHS = (3, 90, 17, 64, 1, 130)
TEXTS = ("Once upon a time, there was a little", "def add(a, b):\n", "The sun", "One day, Tom and his dog went to")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends no text by itself."""
    directory = tmp_path_factory.mktemp("drafts")
    torch.manual_seed(5)
    model = Qwen3NextForCausalLM(
        tiny_config(
            vocab_size=KNOWN, num_hidden_layers=4, max_position_embeddings=400, eos_token_id=None, dtype="float32"
        )
    )
    scramble(model)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, directory)
    return directory


def engine_of(model: Path | None, drafts: Any = 0, **limits: Any) -> LLM:
    settings: dict[str, Any] = {"max_sequences": 4, "token_budget": 48, "memory_bytes": 2**26, "max_context": 400}
    name = None if model is None else str(model)
    return LLM(name, dtype="float32", config=EngineConfig(**(settings | limits), drafts=drafts))


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, KNOWN, (length,), generator=generator).tolist() for length in lengths]


def greedy(tokens: int = 12, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, **changes)


def flat(completions: Sequence[tuple[Completion, ...]]) -> list[Completion]:
    return [completion for group in completions for completion in group]


def told(completions: Sequence[tuple[Completion, ...]]) -> list[tuple[tuple[int, ...], str, FinishReason]]:
    return [(one.token_ids, one.text, one.finish) for one in flat(completions)]


@pytest.mark.parametrize("drafts", [1, 2, 3, 7])
@pytest.mark.parametrize("limits", [{}, {"token_budget": 9, "max_sequences": 1}, {"prefix_cache": False}], ids=str)
def test_random_weights_write_the_same(checkpoint: Path, drafts: int, limits: dict[str, Any]) -> None:
    few = greedy(logit_bias=dict.fromkeys((5, 6, 7), 40.0))  # of three tokens a draft is often right
    params = [greedy(), few, few, few, greedy(), few]
    expected = told(engine_of(checkpoint).generate(prompts(), params))
    llm = engine_of(checkpoint, drafts, **limits)
    assert told(llm.generate(prompts(), params)) == expected
    assert llm.engine.drafts.figures.by_position[0].accepted > 0


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_the_shipped_model_writes_the_same_and_accepts_drafts(drafts: int) -> None:
    params = greedy(60)
    expected = told(engine_of(None).generate(TEXTS, params))
    llm = engine_of(None, drafts)
    assert told(llm.generate(TEXTS, params)) == expected
    tallies = llm.engine.drafts.figures.by_position
    assert len(tallies) == drafts
    assert all(tally.accepted > 0.2 * tally.proposed > 0 for tally in tallies)


@pytest.mark.parametrize("drafts", [3, "auto"])
def test_sampled_tokens_are_those_of_the_same_seeds(checkpoint: Path, drafts: Any) -> None:
    for model, given in ((None, TEXTS), (checkpoint, prompts())):
        params = [
            SamplingParams(temperature=0.8, top_p=0.95, top_k=40 * (n % 2), seed=n, max_tokens=30, n=2)
            for n in range(len(given))
        ]
        expected = told(engine_of(model).generate(given, params))
        assert told(engine_of(model, drafts).generate(given, params)) == expected


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("drafts", [1, 3])
def test_texts_that_must_have_a_form_are_the_same(drafts: int, temperature: float) -> None:
    """Drafts that the form forbids are rejected, also behind its end."""
    forms = (
        Structured(kind="regex", grammar=r"(the (cat|dog) was very happy[.] ){2,9}"),
        Structured(kind="json_schema", grammar='{"type": "array", "items": {"type": "integer"}, "maxItems": 9}'),
        Structured(kind="grammar", grammar='start: "def " NAME "(self, " NAME "):"\nNAME: /[a-z]{3,8}/'),
    )
    params = [
        SamplingParams(temperature=temperature, seed=n, structured=form, max_tokens=60, prompt_logprobs=1, logprobs=2)
        for n, form in enumerate(forms * 2)
    ]
    given = [*TEXTS, *TEXTS[:2]]
    plain, llm = engine_of(None).generate(given, params), engine_of(None, drafts)
    completions = llm.generate(given, params)
    assert told(completions) == told(plain)
    for one, other in zip(flat(completions), flat(plain), strict=True):
        assert one.prompt_logprobs is not None
        assert other.prompt_logprobs is not None
        for a, b in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
    assert llm.engine.drafts.figures.by_position[0].accepted > 0


EACH = (
    greedy(30),
    greedy(30, repetition_penalty=1.3, frequency_penalty=0.5),
    SamplingParams(temperature=1.3, seed=3, presence_penalty=1, max_tokens=30),
    greedy(70, min_tokens=20),
    SamplingParams(temperature=1.5, top_p=0.8, seed=7, max_tokens=29, logit_bias={5: 9.0}),
    greedy(1),
)
"""For each prompt of `prompts()`."""


def guessing(
    monkeypatch: pytest.MonkeyPatch, answers: Mapping[tuple[int, ...], tuple[int, ...]], errors: float
) -> None:
    """In place of the MTP layer: the right tokens, some of them wrong."""
    chance = random.Random(1)

    def draft(_: Drafter, plan: Plan, __: Computed, verdicts: Mapping[str, Verdict]) -> dict[str, tuple[int, ...]]:
        drafts: dict[str, tuple[int, ...]] = {}
        for sequence in plan:
            name, request = sequence.request.request_id, sequence.request
            if name in verdicts:
                written = request.output_length + len(verdicts[name].tokens)
                right = answers.get(request.prompt, ())[written : written + sequence.next_drafts]
                drafts[name] = tuple(chance.randrange(KNOWN) if chance.random() < errors else one for one in right)
        return drafts

    monkeypatch.setattr(Drafter, "draft", draft)


@pytest.mark.parametrize("errors", [0, 0.3, 1])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"token_budget": 9, "max_sequences": 1},
        {"prefix_cache": False, "token_budget": 400, "max_sequences": 8},
    ],
    ids=("default", "one by one", "all at once"),
)
def test_right_and_wrong_drafts_change_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], errors: float
) -> None:
    expected = flat(engine_of(checkpoint).generate(prompts(), EACH))
    guessing(monkeypatch, {tuple(p): c.token_ids for p, c in zip(prompts(), expected, strict=True)}, errors)
    llm = engine_of(checkpoint, 3, **limits)
    for _ in range(2):  # from the prefix cache the second time
        again = flat(llm.generate(prompts(), EACH))
        assert [(c.token_ids, c.text, c.finish) for c in again] == [(c.token_ids, c.text, c.finish) for c in expected]
    accepted = [tally.accepted for tally in llm.engine.drafts.figures.by_position]
    assert min(accepted) > 0 or errors == 1


def test_preempted_requests_draft_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, params = prompts((60, 61, 62)), [greedy(100), SamplingParams(seed=1, max_tokens=90), greedy(100)]
    expected = flat(engine_of(checkpoint).generate(long, params))
    small = {"max_context": 192, "memory_bytes": 320_000}  # pages for one of them and a half
    for errors in (None, 0.3):  # the layer's own drafts, then mostly right ones
        if errors is not None:
            guessing(monkeypatch, {tuple(p): c.token_ids for p, c in zip(long, expected, strict=True)}, errors)
        llm = engine_of(checkpoint, 3, **small)
        assert [one.token_ids for one in flat(llm.generate(long, params))] == [one.token_ids for one in expected]
        assert llm.engine.scheduler.figures.preemptions > 0


def test_ends_and_logprobs_inside_accepted_drafts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, prompt = engine_of(checkpoint), prompts()[2]
    whole = plain.generate(prompt, greedy(20))[0][0]
    guessing(monkeypatch, {tuple(prompt): whole.token_ids}, 0)
    llm = engine_of(checkpoint, 3)
    for place in range(1, 9):
        text = plain.engine.loaded.tokenizer.decode(list(whole.token_ids[place : place + 2]))
        common: dict[str, Any] = {"max_tokens": 20}
        cases: list[dict[str, Any]] = [
            {"stop_token_ids": (whole.token_ids[place],)},
            {"stop_token_ids": (whole.token_ids[place],), "min_tokens": place},
            {"stop": ("\x00never", text)},
            {"stop": (text,), "min_tokens": 4},
            {"max_tokens": place},
        ]
        for changes in cases:
            params = SamplingParams(temperature=0, logprobs=2, **(common | changes))
            ours, expected = llm.generate(prompt, params)[0][0], plain.generate(prompt, params)[0][0]
            assert (ours.token_ids, ours.text, ours.finish) == (expected.token_ids, expected.text, expected.finish)
            assert ours.logprobs is not None
            assert expected.logprobs is not None
            assert len(ours.logprobs) == len(expected.logprobs)
            for a, b in zip(ours.logprobs, expected.logprobs, strict=True):
                assert (a.token, a.logprob) == (b.token, pytest.approx(b.logprob, abs=1e-4))
                assert [token for token, _ in a.top_logprobs] == [token for token, _ in b.top_logprobs]
    second_turn = [*prompt, *whole.token_ids, *prompts()[0]]  # the first one ended with drafts pending
    assert told(llm.generate(second_turn, greedy())) == told(plain.generate(second_turn, greedy()))


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], tuple[int, ...]]]:
    """The tokens that each sequence had, and the drafts that the MTP layer then made."""
    made: list[tuple[list[int], tuple[int, ...]]] = []
    original: Callable[..., dict[str, tuple[int, ...]]] = Drafter.draft

    def draft(
        drafter: Drafter, plan: Plan, computed: Computed, verdicts: Mapping[str, Verdict]
    ) -> dict[str, tuple[int, ...]]:
        drafts = original(drafter, plan, computed, verdicts)
        for sequence in plan:
            name = sequence.request.request_id
            if name in drafts:
                made.append(([*sequence.request.tokens, *verdicts[name].tokens], drafts[name]))
        return drafts

    monkeypatch.setattr(Drafter, "draft", draft)
    return made


@pytest.mark.parametrize("budget", [20, 400])
def test_drafts_are_those_of_the_model_with_a_cache_of_its_own(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Whatever was accepted, whatever lay in the pages, and however prompts were cut."""
    reference = Qwen3NextForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    made, llm = recorded(monkeypatch), engine_of(checkpoint, 3, token_budget=budget, prefix_cache=False)
    assert llm.engine.drafter is not None
    for tensor in (llm.engine.drafter.memory.keys, llm.engine.drafter.memory.values):
        tensor.fill_(float("nan"))
    llm.generate(prompts(), greedy(8))
    assert len(made) > 30
    for tokens, drafts in made:
        row = torch.tensor([tokens])
        with torch.no_grad():
            hidden = reference.model(row[:, :-1]).last_hidden_state
        expected = reference.draft(hidden, row[:, 1:], 3).token_ids[0].tolist()
        room = 64 - (len(tokens) - 2) % 64  # keys of the chain lie in the page of the last pair
        assert list(drafts) == expected[:room]


def test_a_layer_that_computes_nan_makes_no_drafts(checkpoint: Path) -> None:
    expected = told(engine_of(checkpoint).generate(prompts(), greedy()))
    llm = engine_of(checkpoint, 2)
    mtp = llm.engine.loaded.model.mtp
    assert mtp is not None
    with torch.no_grad():
        mtp.fc.weight.fill_(float("nan"))
    assert told(llm.generate(prompts(), greedy())) == expected
    assert llm.engine.drafts.figures.by_position == ()


def test_a_layer_without_memory_starts_the_call_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = told(engine_of(checkpoint).generate(prompts(), greedy()))
    llm, made = engine_of(checkpoint, 2), Drafter._read
    steps = itertools.count()

    def failing(drafter: Drafter, readings: Any) -> Any:
        if next(steps) in (1, 9, 12):
            raise torch.OutOfMemoryError("no room")
        return made(drafter, readings)

    monkeypatch.setattr(Drafter, "_read", failing)
    step, failures = Engine.step, 0

    def again(engine: Engine) -> Any:
        nonlocal failures
        try:
            return step(engine)
        except BackendError:
            failures += 1
            return []

    monkeypatch.setattr(Engine, "step", again)
    assert told(llm.generate(prompts(), greedy())) == expected
    assert failures == 3


def test_what_verification_writes_has_the_models_distribution() -> None:
    """Pairs of a token and the one behind it, under random drafts, against the product of their probabilities."""
    size, count = 6, 24_000
    generator, chance = torch.Generator().manual_seed(0), random.Random(0)
    first = torch.randn(size, generator=generator) * 1.5
    second = torch.randn(size, size, generator=generator) * 1.5  # given the first
    request = Request(request_id="a", prompt=(1, 2), params=SamplingParams(temperature=1))
    drafts = [chance.randrange(size) for _ in range(count)]
    draws = [Draw(request, seed, ahead=ahead) for seed, one in enumerate(drafts) for ahead in ((), (one,))]
    rows = draw(
        torch.stack([first.expand(count, -1), second[drafts]], 1).flatten(0, 1), draws, size, frozenset()
    ).drawn()
    written = [verify(rows[2 * n : 2 * n + 2], (one,)) for n, one in enumerate(drafts)]
    singles = Counter(accepted[0].token for accepted in written)
    assert chi_square(singles, first.softmax(0), count) < 25.7  # 5 degrees of freedom, one in 10,000
    for token in range(size):
        pairs = Counter(a[1].token for a in written if len(a) == 2 and a[0].token == token)
        assert chi_square(pairs, second[token].softmax(0), pairs.total()) < 25.7
    assert 0.1 < sum(len(accepted) == 2 for accepted in written) / count < 0.3  # a sixth


def chi_square(counts: Counter[int | None], probabilities: torch.Tensor, total: int) -> float:
    expected = [total * p for p in probabilities.tolist()]
    return sum((counts[token] - one) ** 2 / one for token, one in enumerate(expected))


def test_a_run_ends_before_a_row_that_is_not_finite() -> None:
    rows = [Drawn(4), Drawn(5), Drawn(None), Drawn(7)]
    assert verify(rows, (4, 5, 6)) == (Drawn(4), Drawn(5))
    assert verify(rows[2:3], ()) == ()
    assert verify(rows[:2], (3,)) == (Drawn(4),)


def test_drafts_that_cannot_be_made_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"drafts = 8 cannot be served\. Allowed: 'auto', or 0 to 7"):
        EngineConfig(drafts=8)
    model = Qwen3NextForCausalLM(tiny_config(vocab_size=KNOWN, num_nextn_predict_layers=0, dtype="float32"))
    model.save_pretrained(tmp_path)
    shutil.copy(ASSETS / "tokenizer.json", tmp_path)
    with pytest.raises(InputError, match="has no MTP layer"):
        engine_of(tmp_path, 1)
    assert engine_of(tmp_path, "auto").engine.drafter is None
