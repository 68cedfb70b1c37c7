"""The benchmark of the whole network compares before it times, and its floors are what the arithmetic says."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from benchmarks import alone
from tests.conftest import tiny_config

from qwen3_next.ops import use

SETTINGS = {name: getattr(tiny_config(), name) for name in alone.PUBLISHED}


@pytest.fixture(scope="module")
def published() -> alone.Qwen3NextForCausalLM:
    """All layers at the published sizes, without values."""
    with torch.device("meta"):
        model = alone.random_model(alone.PUBLISHED, "meta", fp8=False)
    alone.repeat_layers_(model, alone.LAYERS)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_the_network_is_compared_with_its_definition_in_prompts_and_steps(fp8: bool) -> None:
    model = alone.random_model(SETTINGS, "cpu", fp8)
    assert model.dtype == torch.bfloat16
    found = alone.differences(model)
    assert len(found) == len(alone.CHECKED) * alone.PATTERN
    assert all(one.ours == one.theirs for one in found)  # on a CPU both are the definition
    assert all(0 < one.theirs < 0.2 for one in found)


@torch.inference_mode()
def test_a_layer_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weight is wrong but while the definitions run."""
    model = alone.random_model(SETTINGS, "cpu", fp8=False)
    weight = model.get_parameter("model.layers.2.input_layernorm.weight")
    right, wrong = weight.clone(), weight + 0.2
    weight.copy_(wrong)

    @contextmanager
    def right_weight() -> Iterator[None]:
        weight.copy_(right)
        yield
        weight.copy_(wrong)

    def widened(layer: alone.nn.Module) -> alone.nn.Module:
        with right_weight():
            return copied(layer)

    copied = alone.widened
    monkeypatch.setattr(alone, "widened", widened)
    monkeypatch.setattr(alone, "use", lambda _: right_weight())
    assert max(one.ratio for one in alone.differences(model)) > alone.TOLERANCE


@torch.inference_mode()
def test_kernels_agree_with_definitions_in_every_layer_of_prompts_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "CHECKED", ((20, 0, 9), (1, 1, 1), (2, 1, 3)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = alone.random_model(SETTINGS, device, fp8=False, dtype=torch.float32)
    with use("triton"):
        assert max(one.ours for one in alone.differences(model)) < 1e-5


@torch.inference_mode()
def test_four_layers_stand_for_all(published: alone.Qwen3NextForCausalLM) -> None:
    model = alone.random_model(SETTINGS, "cpu", fp8=False)
    before = alone.Batch(model, 2, 20).call([9, 4])()
    alone.repeat_layers_(model, 12)
    assert len(model.model.layers) == 12
    assert not torch.equal(alone.Batch(model, 2, 20).call([9, 4])(), before)
    types = [layer.layer_type for layer in published.model.layers]
    assert (types.count("linear_attention"), types.count("full_attention")) == (36, 12)


def test_a_floor_counts_every_byte_that_a_step_must_move(published: alone.Qwen3NextForCausalLM) -> None:
    """The parameters that one token uses are 3.25 billion and the head (published figures), its states and keys."""
    states, keys = 2 * 36 * (32 * 128 * 128 * 4 + 8192 * 3 * 2), 12 * 2 * 2 * 256 * 2 * 1_024
    active = 2 * (3.25e9 + 151936 * 2048)
    assert alone.step_bytes(published, 1, 1_024) == pytest.approx(active + states + keys, rel=5e-3)
    # 16 tokens are expected to hit 138.5 of 512 experts, 13.85 times as many as one token.
    more = 2 * (48 * 128.5 * 3 * 512 * 2048) + 15 * (states + keys)
    assert alone.step_bytes(published, 16, 1_024) == pytest.approx(active + states + keys + more, rel=5e-3)


def test_without_a_gpu_nothing_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert alone.main([]) == alone.UNUSABLE
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_network_that_differs_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(alone, "card_rates", lambda: alone.Rates(copy=1.0, read=1.0, bf16=1.0, fp8=1.0))
    monkeypatch.setattr(alone, "random_model", lambda *_, **__: None)
    monkeypatch.setattr(alone, "differences", lambda _: [alone.Difference(float("nan"), 1.0)])
    assert alone.main(["--weights", "fp8"]) == alone.RED
    assert "tok/s" not in capsys.readouterr().out
