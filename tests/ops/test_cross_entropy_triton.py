"""The kernels of the head's loss and argmax against their definitions."""

import pytest
import torch
from tests.ops.checks import assert_pure, relative_error, tolerance
from torch import Tensor

from qwen3_next.errors import BackendError, InputError
from qwen3_next.ops import cross_entropy_triton, linear_argmax_triton
from qwen3_next.ops.backend import use
from qwen3_next.ops.cross_entropy import IGNORED, linear_argmax, linear_cross_entropy
from qwen3_next.ops.quant import block_scale_shape, dequantize_block_fp8

SMALL = {"TOKENS": 16, "IDS": 32, "K": 16, "GROUP": 2, "num_warps": 4, "num_stages": 2}
SIZES = [(1, 5, 4), (40, 97, 20), (70, 32, 16), (17, 300, 33), (3, 64, 70)]
"""T, V, D."""


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch: pytest.MonkeyPatch, on_device: str) -> None:
    """In the interpreter, tiles so small that few tokens and ids fill several."""
    if on_device == "cpu":
        for name in ("WIDE", "NARROW", "SINGLE_PRECISION"):
            monkeypatch.setattr(cross_entropy_triton, name, SMALL)
        monkeypatch.setattr(cross_entropy_triton, "COMBINE", {"TOKENS": 16, "TILES": 4, "K": 16, "num_warps": 4})
        for name in ("FEW", "MANY", "SINGLE_PRECISION"):
            monkeypatch.setattr(linear_argmax_triton, name, {"IDS": 32, "K": 16, "num_warps": 4, "num_stages": 2})
        monkeypatch.setattr(linear_argmax_triton, "FP8", {"IDS": 64, "K": 128, "num_warps": 4, "num_stages": 2})


def head(tokens: int, ids: int, width: int, dtype: torch.dtype, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(ids, (tokens,)).masked_fill(torch.rand(tokens) < ignored, IGNORED)
    return torch.randn(tokens, width).to(dtype), (2 * torch.randn(ids, width) / width**0.5).to(dtype), targets


def losses(backend: str, *inputs: Tensor) -> Tensor:
    with use(backend):
        return linear_cross_entropy(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_losses_are_those_of_the_definition(sizes: tuple[int, int, int], dtype: torch.dtype, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    hidden, weight, targets = head(*sizes, dtype)
    result = losses("triton", hidden, weight, targets)
    assert (result.dtype, result.shape) == (torch.float32, targets.shape)
    expected = losses("reference", hidden.double(), weight.double(), targets)
    assert relative_error(result, expected) <= tolerance("linear_cross_entropy", dtype)[0]
    assert (result[targets == IGNORED] == 0).all()


@pytest.mark.parametrize("limit", [2**9, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [*SIZES, (300, 30, 8), (20, 300, 8)])
def test_gradients_are_those_of_the_definition(
    sizes: tuple[int, int, int], dtype: torch.dtype, limit: int, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block, and in blocks along tokens or ids."""
    torch.manual_seed(fresh_seed)
    for name in ("GRADIENT_BYTES", "PARTIAL_BYTES"):
        monkeypatch.setattr(cross_entropy_triton, name, limit)
    found: list[list[Tensor]] = [[], []]
    exact: list[list[Tensor]] = [[], []]
    for _ in range(max(1, 16 // sizes[0])):  # one token's few numbers are too noisy a sample of what bf16 rounds away
        hidden, weight, targets = head(*sizes, dtype)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        wide = [x.detach().float().requires_grad_() for x in leaves]
        result, expected = losses("triton", *leaves, targets), losses("reference", *wide, targets)
        direction = torch.rand(len(targets))
        grads = torch.autograd.grad(result, leaves, direction, retain_graph=True)
        for which, grad in enumerate(torch.autograd.grad(expected, wide, direction)):
            assert grads[which].dtype == dtype
            found[which].append(grads[which])
            exact[which].append(grad)
        assert not grads[0][targets == IGNORED].any()
        again = torch.autograd.grad(result, leaves, direction)
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    for a, b in zip(found, exact, strict=True):
        assert relative_error(torch.cat(a), torch.cat(b)) <= tolerance("linear_cross_entropy", dtype)[1]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("sizes", [(40, 20, 8), (20, 40, 8)])
def test_the_gradient_of_one_input_alone(sizes: tuple[int, int, int], which: int, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = head(*sizes, torch.float32)
    wanted = inputs[which].requires_grad_()
    grads = [torch.autograd.grad(losses(b, *inputs).sum(), wanted)[0] for b in ("reference", "triton")]
    assert relative_error(grads[1], grads[0]) <= tolerance("linear_cross_entropy", torch.float32)[1]


def test_all_ignored_gives_zeros_and_gradients_of_zeros() -> None:
    hidden, weight, targets = head(5, 50, 12, torch.float32, ignored=1.1)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    result = losses("triton", *leaves, targets)
    assert torch.equal(result, torch.zeros(5))
    assert all((grad == 0).all() for grad in torch.autograd.grad(result.sum(), leaves))


def test_another_index_can_be_ignored(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    hidden, weight, targets = head(6, 50, 12, torch.float32, ignored=0)
    targets[2] = 7
    with use("triton"):
        result = linear_cross_entropy(hidden, weight, targets, ignore_index=7)
    expected = losses("reference", hidden, weight, targets).masked_fill(targets == 7, 0)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_no_tokens_have_no_loss() -> None:
    hidden, weight, targets = head(0, 50, 12, torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    result = losses("triton", *leaves, targets)
    assert result.shape == (0,)
    assert [g.abs().sum().item() for g in torch.autograd.grad(result.sum(), leaves)] == [0, 0]


def test_large_logits_stay_finite_and_a_target_that_is_no_id_shows(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    hidden, weight, targets = head(8, 50, 12, torch.float32, ignored=0)
    hidden = hidden * 1e5
    targets[3] = 50
    result = losses("triton", hidden, weight, targets)
    assert result[3].isnan()
    others = torch.arange(8) != 3
    expected = losses("reference", hidden[others], weight, targets[others])
    torch.testing.assert_close(result[others], expected, rtol=1e-5, atol=1e-1)


def test_inputs_may_lie_anywhere(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    hidden, weight, targets = head(9, 50, 12, torch.float32)
    expected = losses("triton", hidden, weight, targets)
    turned, wide = weight.T.contiguous().T, torch.randn(9, 40)
    wide[:, 7:19] = hidden
    every_other = torch.stack([targets, targets], dim=1)[:, 0]
    assert torch.equal(losses("triton", wide[:, 7:19], turned, every_other), expected)


def test_inputs_stay_and_a_second_run_is_identical(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    hidden, weight, targets = head(20, 50, 12, torch.bfloat16)
    with use("triton"):
        assert_pure(linear_cross_entropy, (hidden, weight, targets))
        assert_pure(linear_argmax, (hidden, weight))


def test_what_is_not_taken_is_said() -> None:
    hidden, weight, targets = head(3, 20, 8, torch.float16)
    with pytest.raises(BackendError, match="fp64"):
        losses("triton", hidden.double(), weight.double(), targets)
    with pytest.raises(BackendError, match="another dtype"):
        losses("triton", hidden, weight.float(), targets)
    with pytest.raises(BackendError, match="vanish in fp16"):
        losses("triton", hidden.requires_grad_(), weight, targets)
    with use("triton"), pytest.raises(BackendError, match="scales of another shape"):
        linear_argmax(hidden, weight.to(torch.float8_e4m3fn), torch.ones(2, 1))
    with use("triton"), pytest.raises(InputError, match="limit=0"):
        linear_argmax(hidden, weight, None, 0)


def lost(hidden: Tensor, weight: Tensor, ids: Tensor) -> float:
    """How much smaller the chosen logits are than the largest, as a share of those."""
    logits = hidden.double() @ weight.double().T
    best = logits.max(dim=1).values
    return ((best - logits.gather(1, ids[:, None])[:, 0]) / best.abs()).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "ids", "width"), [(1, 97, 20), (2, 64, 16), (16, 33, 7), (30, 300, 33), (140, 40, 8)]
)
def test_the_largest_logit_is_chosen(tokens: int, ids: int, width: int, dtype: torch.dtype, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    hidden, weight, _ = head(tokens, ids, width, dtype)
    for limit in (None, ids // 2, 3 * ids):
        with use("triton"):
            result = linear_argmax(hidden, weight, None, limit)
        assert (result.dtype, result.shape) == (torch.int64, (tokens,))
        assert (result < (limit or ids)).all()
        assert lost(hidden, weight[:limit], result) <= 1e-6


@pytest.mark.parametrize(("tokens", "ids", "width"), [(1, 300, 256), (5, 129, 200), (70, 100, 40)])
def test_the_largest_logit_of_a_quantised_head_is_chosen(tokens: int, ids: int, width: int, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    hidden, weight = torch.randn(tokens, width).bfloat16(), (8 * torch.randn(ids, width)).to(torch.float8_e4m3fn)
    scales = torch.rand(block_scale_shape((ids, width))) + 0.1
    full = dequantize_block_fp8(weight, scales, torch.float32)
    for limit in (None, 77):
        with use("triton"):
            result = linear_argmax(hidden, weight, scales, limit)
        assert lost(hidden, full[:limit], result) <= 1e-6
        assert torch.equal(result, (hidden.float() @ full[:limit].T).argmax(dim=1))


def test_of_equal_logits_the_first_is_chosen() -> None:
    weight = torch.zeros(300, 8)
    weight[[70, 71, 299]] = 1
    hidden = torch.stack([torch.ones(8), torch.zeros(8), -torch.ones(8)])
    with use("triton"):
        assert linear_argmax(hidden, weight).tolist() == [70, 0, 0]
        assert linear_argmax(hidden[:1], weight, None, 60).tolist() == [0]


def test_no_tokens_choose_nothing_and_rows_may_be_far_apart(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    hidden, weight, _ = head(9, 50, 12, torch.float32)
    with use("triton"):
        assert linear_argmax(hidden[:0], weight).shape == (0,)
        expected = linear_argmax(hidden, weight)
        assert torch.equal(linear_argmax(hidden.T.contiguous().T, weight.T.contiguous().T), expected)
        assert torch.equal(linear_argmax(torch.cat([hidden, hidden], 1)[:, :12], weight), expected)


@pytest.mark.gpu
def test_the_published_head(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    hidden, weight, targets = head(700, 151_936, 2_048, torch.bfloat16)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    wide = [x.detach().float().requires_grad_() for x in leaves]
    result, expected = losses("triton", *leaves, targets), losses("reference", *wide, targets)
    forward, gradient = tolerance("linear_cross_entropy", torch.bfloat16)
    assert relative_error(result, expected) <= forward
    grads = torch.autograd.grad(result.sum(), leaves)
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), wide), strict=True):
        assert relative_error(a, b) <= gradient
    for tokens in (1, 16, 700):
        with use("triton"), torch.no_grad():
            assert lost(hidden[:tokens], weight, linear_argmax(hidden[:tokens], weight)) <= 1e-5
