"""The chunked cross-entropy against the one of all logits, and what it never allocates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.ops.checks import assert_pure, assert_same_gradients, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_next.errors import InputError
from qwen3_next.ops import cross_entropy
from qwen3_next.ops.backend import use
from qwen3_next.ops.cross_entropy import IGNORED, linear_argmax, linear_cross_entropy
from qwen3_next.ops.quant import block_scale_shape, dequantize_block_fp8

HIDDEN, VOCABULARY = 12, 50


def from_all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


def random_inputs(
    tokens: int, dtype: torch.dtype = torch.float32, ignored: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(VOCABULARY, (tokens,)).masked_fill(torch.rand(tokens) < ignored, IGNORED)
    return torch.randn(tokens, HIDDEN).to(dtype), torch.randn(VOCABULARY, HIDDEN).to(dtype), targets


@pytest.fixture(params=[1, 3, 10**6], ids=lambda rows: f"chunks of {rows}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", 4 * VOCABULARY * request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 10])
def test_losses_and_gradients_are_those_of_all_logits(tokens: int) -> None:
    hidden, weight, targets = random_inputs(tokens)
    losses = linear_cross_entropy(hidden, weight, targets)
    assert (losses.dtype, losses.shape) == (torch.float32, (tokens,))
    torch.testing.assert_close(losses.double(), from_all_logits(hidden, weight, targets), rtol=1e-5, atol=1e-5)
    assert (losses[targets == IGNORED] == 0).all()
    assert_same_gradients(
        lambda *inputs: linear_cross_entropy(*inputs, targets),
        lambda *inputs: from_all_logits(*inputs, targets),
        [hidden, weight],
        1e-5,
    )


@pytest.mark.usefixtures("chunk")
def test_bf16_losses_are_fp32_and_close() -> None:
    hidden, weight, targets = random_inputs(40, torch.bfloat16, ignored=0.1)
    losses = linear_cross_entropy(hidden, weight, targets)
    assert losses.dtype == torch.float32
    assert relative_error(losses, from_all_logits(hidden, weight, targets)) < 5e-3
    assert_same_gradients(
        lambda *inputs: linear_cross_entropy(*inputs, targets),
        lambda *inputs: from_all_logits(*inputs, targets),
        [hidden, weight],
        1e-2,
    )


@pytest.mark.usefixtures("chunk")
def test_all_ignored_gives_zeros_and_gradients_of_zeros() -> None:
    hidden, weight, targets = random_inputs(5, ignored=1.1)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    losses = linear_cross_entropy(*inputs, targets)
    assert torch.equal(losses, torch.zeros(5))
    assert all((grad == 0).all() for grad in torch.autograd.grad(losses.sum(), inputs))


def test_another_index_can_be_ignored() -> None:
    hidden, weight, targets = random_inputs(6, ignored=0)
    targets[2] = 7
    losses = linear_cross_entropy(hidden, weight, targets, ignore_index=7)
    assert losses[2] == 0
    other = targets != 7
    expected = from_all_logits(hidden, weight, targets)
    torch.testing.assert_close(losses[other].double(), expected[other], rtol=1e-5, atol=1e-5)


def test_no_tokens_have_no_loss() -> None:
    hidden, weight, targets = random_inputs(0)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    losses = linear_cross_entropy(*inputs, targets)
    assert losses.shape == (0,)
    assert [g.abs().sum().item() for g in torch.autograd.grad(losses.sum(), inputs)] == [0, 0]


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = random_inputs(8, ignored=0)
    losses = linear_cross_entropy(hidden * 1e3, weight * 1e3, targets)
    torch.testing.assert_close(
        losses.double(), from_all_logits(hidden * 1e3, weight * 1e3, targets), rtol=1e-5, atol=1e-1
    )


class LargestResult(TorchDispatchMode):
    """Watches every operation and remembers the most elements that one of their results had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@contextmanager
def largest_result() -> Iterator[LargestResult]:
    with LargestResult() as mode:
        yield mode


def test_logits_of_all_tokens_are_never_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tokens = 4, 64
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", 4 * VOCABULARY * rows)
    hidden, weight, targets = random_inputs(tokens)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    with use("reference"), largest_result() as seen, torch.autograd.set_multithreading_enabled(False):
        torch.autograd.grad(linear_cross_entropy(*inputs, targets).sum(), inputs)
    # A chunk's logits are the largest, unless an input already is.
    assert seen.elements == max(rows * VOCABULARY, tokens * HIDDEN)
    assert seen.elements < tokens * VOCABULARY / 4


def test_inputs_stay_and_a_second_run_is_identical() -> None:
    assert_pure(linear_cross_entropy, random_inputs(9))


@pytest.fixture(params=[1, 2**30], ids=["blocks of the vocabulary", "all of it"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_ARGMAX_BYTES", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 300, 77, 10**6])
def test_the_id_of_the_largest_logit_is_chosen(limit: int | None, dtype: torch.dtype, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    hidden, weight = torch.randn(9, HIDDEN).to(dtype), torch.randn(400, HIDDEN).to(dtype)
    logits = hidden.double() @ weight[:limit].double().T
    assert torch.equal(linear_argmax(hidden, weight, None, limit), logits.argmax(dim=1))


@pytest.mark.usefixtures("block")
def test_the_logits_of_a_quantised_head_are_those_of_its_true_weights(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    hidden, weight = torch.randn(7, 200).bfloat16(), (8 * torch.randn(300, 200)).to(torch.float8_e4m3fn)
    scales = torch.rand(block_scale_shape((300, 200))) + 0.1
    logits = hidden.double() @ dequantize_block_fp8(weight, scales, torch.float32).double().T
    assert torch.equal(linear_argmax(hidden, weight, scales), logits.argmax(dim=1))
    assert torch.equal(linear_argmax(hidden, weight, scales, 130), logits[:, :130].argmax(dim=1))


@pytest.mark.usefixtures("block")
def test_of_equal_logits_the_first_is_chosen() -> None:
    weight = torch.zeros(300, HIDDEN)
    weight[[70, 71, 299]] = 1
    hidden = torch.stack([torch.ones(HIDDEN), torch.zeros(HIDDEN)])
    assert linear_argmax(hidden, weight).tolist() == [70, 0]
    assert linear_argmax(hidden[:0], weight).shape == (0,)


def test_a_limit_has_to_leave_an_id() -> None:
    with pytest.raises(InputError, match="limit=0 leaves no id"):
        linear_argmax(torch.randn(1, HIDDEN), torch.randn(VOCABULARY, HIDDEN), None, 0)
