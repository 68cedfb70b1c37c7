"""Drafts change nothing but the time: every request is given the tokens that it is given without them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import scramble, tiny_config

import qwen3_next
from qwen3_next import Qwen3NextForCausalLM
from qwen3_next.engine import LLM, Completion, Engine, EngineConfig, FinishReason, SamplingParams

ASSETS = Path(qwen3_next.__file__).parent / "assets"
KNOWN = 4096
LENGTHS = (3, 90, 17, 64, 1, 130)
TEXTS = ("Once upon a time, there was a little", "def add(a, b):\n", "The sun", "One day, Tom and his dog went to")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends no text by itself. Its few tokens repeat, so that some drafts are right."""
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


@pytest.fixture(autouse=True)
def memory_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def checked(engine: Engine) -> Any:
        outputs = step(engine)
        engine.scheduler.check()
        return outputs

    monkeypatch.setattr(Engine, "step", checked)


def engine_of(model: Path | None, drafts: int = 0, **limits: Any) -> LLM:
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
    expected = told(engine_of(checkpoint).generate(prompts(), greedy()))
    assert told(engine_of(checkpoint, drafts, **limits).generate(prompts(), greedy())) == expected


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_the_shipped_model_writes_the_same_and_accepts_drafts(drafts: int) -> None:
    params = greedy(60)
    expected = told(engine_of(None).generate(TEXTS, params))
    llm = engine_of(None, drafts)
    assert told(llm.generate(TEXTS, params)) == expected


def test_sampled_tokens_are_those_of_the_same_seeds(checkpoint: Path) -> None:
    for model, given in ((None, TEXTS), (checkpoint, prompts())):
        params = [
            SamplingParams(temperature=0.8, top_p=0.95, top_k=40 * (n % 2), seed=n, max_tokens=30, n=2)
            for n in range(len(given))
        ]
        expected = told(engine_of(model).generate(given, params))
        assert told(engine_of(model, 3).generate(given, params)) == expected
