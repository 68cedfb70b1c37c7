"""The kernels of the causal convolution against its definition."""

from collections.abc import Sequence

import pytest
import torch
from checks import TOLERANCES, assert_pure, relative_error
from torch import Tensor

from qwen3_next.errors import BackendError
from qwen3_next.ops import causal_conv_grad_triton, causal_conv_triton
from qwen3_next.ops.backend import use
from qwen3_next.ops.causal_conv import ProjectionColumns, causal_conv, causal_conv_
from qwen3_next.ops.segments import Segments
from qwen3_next.ops.snapshots import Snapshots

GROUPED = ProjectionColumns(key_heads=2, value_heads=4, key_width=8, value_width=12)
ODD = ProjectionColumns(key_heads=3, value_heads=9, key_width=5, value_width=7)
LAYOUTS = [None, GROUPED, ODD]
LENGTHS = [[1], [0, 2, 0], [3, 1, 19, 0, 2], [8, 16], [66]]


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch, on_device: str) -> None:
    """In the interpreter, parts so short that few tokens fill several."""
    if on_device == "cpu":
        monkeypatch.setitem(causal_conv_triton.FORWARD, "SIZE", 8)
        monkeypatch.setitem(causal_conv_grad_triton.BACKWARD, "SIZE", 8)


class Inputs:
    """Fresh random arguments of a call; `x` is what the layout says, channels or whole projections."""

    def __init__(
        self, lengths: Sequence[int], columns: ProjectionColumns | None, dtype: torch.dtype, taps: int = 4
    ) -> None:
        self.columns, self.segments = columns, Segments.from_lengths(lengths)
        channels = 37 if columns is None else columns.channels
        width = channels if columns is None else channels + columns.key_heads * columns.values
        self.x = torch.randn(sum(lengths), width).to(dtype)
        self.weight = torch.randn(channels, taps).to(dtype)
        self.state = torch.randn(len(lengths), channels, taps - 1).to(dtype)

    def tensors(self) -> list[Tensor]:
        return [self.x, self.weight, self.state]

    def run(self, x: Tensor, weight: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return tuple(causal_conv(x, weight, self.segments, state, self.columns))


def in_fp32(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.float() for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", LAYOUTS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_equals_the_definition(
    lengths: list[int], columns: ProjectionColumns | None, dtype: torch.dtype, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs(lengths, columns, dtype)
    with use("reference"):
        expected = inputs.run(*in_fp32(inputs.tensors()))
    with use("triton"):
        output, final = inputs.run(*inputs.tensors())
    assert output.dtype == final.dtype == dtype
    assert relative_error(output, expected[0]) <= TOLERANCES["causal_conv", str(dtype)[6:]][0]
    assert torch.equal(final.float(), expected[1])


@pytest.mark.parametrize("taps", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[1, 0, 2], [10, 3]])
def test_fewer_taps(lengths: list[int], taps: int, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs(lengths, GROUPED, torch.float32, taps)
    with use("reference"):
        expected = inputs.run(*inputs.tensors())
    with use("triton"):
        result = inputs.run(*inputs.tensors())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [[2, 9], [0, 1]])
def test_without_a_state_the_past_is_zero(lengths: list[int], fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs(lengths, None, torch.float32)
    with use("triton"):
        result = inputs.run(inputs.x, inputs.weight, None)
        expected = inputs.run(inputs.x, inputs.weight, torch.zeros_like(inputs.state))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("columns", LAYOUTS)
@pytest.mark.parametrize("lengths", [[1, 0, 2], [3, 18], [17, 1]])
def test_gradients_are_those_of_the_definition(
    lengths: list[int], columns: ProjectionColumns | None, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs(lengths, columns, torch.float32)
    leaves = [x.requires_grad_() for x in inputs.tensors()]
    with use("reference"):
        expected = inputs.run(*leaves)
    with use("triton"):
        result = inputs.run(*leaves)
    directions = [torch.randn_like(x) for x in expected]
    grads = torch.autograd.grad(result, leaves, directions, retain_graph=True)
    for a, b in zip(grads, torch.autograd.grad(expected, leaves, directions), strict=True):
        assert relative_error(a, b) <= TOLERANCES["causal_conv", "float32"][1]
    again = torch.autograd.grad(result, leaves, directions)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("which", [0, 1])
def test_the_gradient_of_one_result_alone(which: int, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs([2, 11], GROUPED, torch.float32)
    x = inputs.x.requires_grad_()
    grads: list[Tensor] = []
    direction = torch.randn(13, GROUPED.channels) if which == 0 else torch.randn_like(inputs.state)
    for backend in ("reference", "triton"):
        with use(backend):
            result = inputs.run(x, inputs.weight, inputs.state)[which]
        grads.append(torch.autograd.grad(result, x, direction)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


def test_inputs_stay_and_a_second_run_is_identical(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs([2, 10], GROUPED, torch.bfloat16)
    with use("triton"):
        assert_pure(lambda *tensors: inputs.run(*tensors)[0], inputs.tensors())
        assert_pure(lambda *tensors: inputs.run(*tensors)[1], inputs.tensors())


def test_rows_may_be_far_apart_and_columns_too(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs([3, 10], None, torch.float32)
    wide, turned = torch.randn(13, 50), inputs.x.T.contiguous().T
    wide[:, 5:42] = inputs.x
    with use("triton"):
        expected = inputs.run(*inputs.tensors())[0]
        assert torch.equal(inputs.run(wide[:, 5:42], inputs.weight, inputs.state)[0], expected)
        assert torch.equal(inputs.run(turned, inputs.weight, inputs.state)[0], expected)


@pytest.mark.parametrize("columns", [None, GROUPED])
@pytest.mark.parametrize("positions", [[], [0], [1, 2, 3, 4, 16, 20, 21, 52, 53]])
def test_slots_hold_what_the_definition_leaves(
    positions: list[int], columns: ProjectionColumns | None, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs([0, 18, 3, 0, 32], columns, torch.float32)
    slots = torch.tensor([4, 4, 2, 0, 6], dtype=torch.int32)
    snapshots = Snapshots.at(positions, list(range(8, 8 + len(positions)))) if positions else None
    before = torch.randn(20, *inputs.state.shape[1:])
    states = before.clone(), before.clone()
    outputs: list[Tensor] = []
    for backend, kept in zip(("reference", "triton"), states, strict=True):
        with use(backend):
            args = (inputs.segments, kept, slots, columns, snapshots)
            outputs.append(causal_conv_(inputs.x, inputs.weight, *args))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(states[1], states[0])
    assert not torch.equal(states[1], before)


def test_what_is_not_taken_is_refused(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    with use("triton"), pytest.raises(BackendError, match="fp64"):
        causal_conv(torch.randn(1, 2).double(), torch.randn(2, 4).double(), Segments.from_lengths([1]))
    with use("triton"), pytest.raises(BackendError, match="four taps"):
        causal_conv(torch.randn(1, 2), torch.randn(2, 5), Segments.from_lengths([1]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_sizes(dtype: torch.dtype, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    columns = ProjectionColumns(key_heads=16, value_heads=32, key_width=128, value_width=128)
    inputs = Inputs([1000, 1, 0, 3095], columns, dtype)
    leaves = [x.requires_grad_() for x in inputs.tensors()]
    with use("triton"):
        result = inputs.run(*leaves)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    with use("reference"):
        expected = inputs.run(*exact)
    directions = [torch.randn_like(x) for x in result]
    forward, gradient = TOLERANCES["causal_conv", str(dtype)[6:]]
    assert all(relative_error(a, b) <= forward for a, b in zip(result, expected, strict=True))
    grads = torch.autograd.grad(result, leaves, directions)
    exact_grads = torch.autograd.grad(expected, exact, in_fp32(directions))
    assert all(relative_error(a, b) <= gradient for a, b in zip(grads, exact_grads, strict=True))
