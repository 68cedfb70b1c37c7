"""The kernel of the fused step against its definition."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from checks import TOLERANCES, relative_error
from torch import Tensor

from qwen3_next.errors import BackendError, InputError
from qwen3_next.ops.backend import use
from qwen3_next.ops.causal_conv import ProjectionColumns
from qwen3_next.ops.gated_delta_step import StepState, StepWeights, delta_net_step_
from qwen3_next.ops.segments import Segments

SMALL = ProjectionColumns(key_heads=2, value_heads=4, key_width=8, value_width=12)
ODD = ProjectionColumns(key_heads=1, value_heads=3, key_width=5, value_width=3)
PUBLISHED = ProjectionColumns(key_heads=16, value_heads=32, key_width=128, value_width=128)
PENDING = 3

Calls = list[tuple[list[int], list[int] | None]]
"""The lengths and the accepted tokens of calls in a row."""


class Layer:
    """Fresh random weights and states; `slots[n]` is where sequence n lives."""

    def __init__(
        self,
        columns: ProjectionColumns,
        dtype: torch.dtype,
        slots: Sequence[int],
        recurrent_dtype: torch.dtype = torch.float32,
        taps: int = 4,
    ) -> None:
        conv = torch.randn(columns.channels, taps).to(dtype)
        heads, norm = columns.value_heads, (1 + torch.randn(columns.value_width) / 4).to(dtype)
        self.weights = StepWeights(conv, torch.randn(heads), torch.randn(heads), norm, 1e-6, columns)
        self.state = StepState.allocate(max(slots) + 2, self.weights, PENDING, dtype, recurrent_dtype)
        for field in dataclasses.fields(self.state):
            getattr(self.state, field.name).normal_()
        self.slots, self.dtype = torch.tensor(slots, dtype=torch.int32), dtype

    def tokens(self, count: int) -> tuple[Tensor, Tensor]:
        columns = self.weights.columns
        width = columns.channels + columns.key_heads * columns.values
        return torch.randn(count, width).to(self.dtype), torch.randn(count, 2 * columns.value_heads).to(self.dtype)


def copied(tensors: StepState | StepWeights, dtype: torch.dtype | None = None) -> StepState | StepWeights:
    values = {f.name: getattr(tensors, f.name) for f in dataclasses.fields(tensors)}
    changed = {k: x.to(dtype or x.dtype, copy=True) for k, x in values.items() if isinstance(x, Tensor)}
    return dataclasses.replace(tensors, **changed)


def assert_same_calls(layers: Sequence[Layer], calls: Calls) -> None:
    """Run them by the kernel, and by the definition in fp32; compare states, and the outputs of all layers together."""
    exact = [(copied(layer.weights, torch.float32), copied(layer.state, torch.float32)) for layer in layers]
    tolerance = TOLERANCES["delta_net_step_", str(layers[0].dtype)[6:]][0]
    for lengths, verdict in calls:
        segments, accepted = Segments.from_lengths(lengths), None if verdict is None else torch.tensor(verdict)
        outputs, expected = list[Tensor](), list[Tensor]()
        for layer, (exact_weights, exact_state) in zip(layers, exact, strict=True):
            qkvz, ba = layer.tokens(sum(lengths))
            with use("reference"):
                args = (exact_weights, exact_state, layer.slots, segments, accepted)
                expected.append(delta_net_step_(qkvz.float(), ba.float(), *args))
            with use("triton"):
                outputs.append(delta_net_step_(qkvz, ba, layer.weights, layer.state, layer.slots, segments, accepted))
            assert outputs[-1].dtype == layer.dtype
            assert relative_error(layer.state.recurrent, exact_state.recurrent) <= tolerance
            assert torch.equal(layer.state.conv.float(), exact_state.conv)
            assert torch.equal(layer.state.pending_qkv.float(), exact_state.pending_qkv)
            assert torch.equal(layer.state.pending_ba.float(), exact_state.pending_ba)
        assert relative_error(torch.cat(outputs), torch.cat(expected)) <= tolerance


@pytest.mark.parametrize(("columns", "dtype"), [(SMALL, torch.float32), (ODD, torch.float32), (SMALL, torch.bfloat16)])
@pytest.mark.parametrize(
    "calls",
    [
        [([1, 1, 1], None), ([1, 1, 1], None)],
        [([2, 0, 5], None)],
        [([3, 3, 3], [0, 1, 3]), ([2, 2, 2], [3, 0, 2]), ([1, 1, 1], None)],
        [([1, 0, 3], [3, 2, 0]), ([0, 0, 0], [1, 0, 2])],
    ],
)
def test_equals_the_definition(calls: Calls, columns: ProjectionColumns, dtype: torch.dtype, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    # A few tokens of one small layer are too noisy a sample of what bf16 rounds away.
    layers = [Layer(columns, dtype, slots=[4, 0, 2]) for _ in range(1 if dtype == torch.float32 else 8)]
    assert_same_calls(layers, calls)


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_fewer_taps(taps: int, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    layer = Layer(SMALL, torch.float32, slots=[1, 2], taps=taps)
    assert_same_calls([layer], [([1, 1], None), ([2, 3], [2, 0]), ([1, 3], [1, 3])])


def test_several_sequences(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    layer = Layer(SMALL, torch.float32, slots=[3, 1, 0])
    assert_same_calls([layer], [([1, 1, 1], None), ([1, 2, 0], [3, 0, 1])])


@pytest.mark.parametrize("verdict", [None, [1, 2, 0]])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 3, 1]])
def test_null_sequences_are_zero_and_have_no_state(
    lengths: list[int], verdict: list[int] | None, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    layer = Layer(SMALL, torch.float32, slots=[-1, 2, -1])
    before = copied(layer.state)
    qkvz, ba = layer.tokens(sum(lengths))
    accepted = None if verdict is None else torch.tensor(verdict)
    with use("triton"):
        args = (layer.weights, layer.state, layer.slots, Segments.from_lengths(lengths), accepted)
        first, _, last = delta_net_step_(qkvz, ba, *args).split(lengths)
    assert not first.any()
    assert not last.any()
    for field in dataclasses.fields(layer.state):
        old, new = getattr(before, field.name), getattr(layer.state, field.name)
        assert torch.equal(new[[0, 1, 3]], old[[0, 1, 3]])


def test_a_state_in_bf16_is_rounded_once_per_call(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    layer = Layer(SMALL, torch.float32, slots=[0], recurrent_dtype=torch.bfloat16)
    exact = copied(layer.state, torch.float32)
    qkvz, ba = layer.tokens(2)
    args = (layer.slots, Segments.from_lengths([2]))
    with use("triton"):
        output = delta_net_step_(qkvz, ba, layer.weights, layer.state, *args)
    with use("reference"):
        expected = delta_net_step_(qkvz, ba, layer.weights, exact, *args)
    assert layer.state.recurrent.dtype == torch.bfloat16
    assert relative_error(output, expected) <= TOLERANCES["delta_net_step_", "float32"][0]
    assert relative_error(layer.state.recurrent, exact.recurrent) <= 6e-3


def test_inputs_stay_and_a_second_run_is_identical(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    layer = Layer(SMALL, torch.bfloat16, slots=[1, 0])
    states, tokens = [copied(layer.state), copied(layer.state)], layer.tokens(5)
    inputs = [*tokens, layer.weights.conv, layer.weights.A_log, layer.slots]
    copies = [x.clone() for x in inputs]
    with use("triton"):
        args = (layer.slots, Segments.from_lengths([2, 3]), torch.tensor([1, 3]))
        first, second = (delta_net_step_(*tokens, layer.weights, state, *args) for state in states)
    assert torch.equal(first, second)
    assert torch.equal(states[0].recurrent, states[1].recurrent)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


def test_slots_may_be_far_apart_and_rows_too(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    layer = Layer(SMALL, torch.float32, slots=[1, 0])
    spread = [torch.randn(x.shape[0], 2, *x.shape[1:]) for x in (layer.state.recurrent, layer.state.conv)]
    spread[0][:, 1], spread[1][:, 1] = layer.state.recurrent, layer.state.conv
    apart = dataclasses.replace(copied(layer.state), recurrent=spread[0][:, 1], conv=spread[1][:, 1])
    qkvz, ba = layer.tokens(3)
    wide = torch.randn(3, qkvz.shape[1] + ba.shape[1])
    wide[:, : qkvz.shape[1]], wide[:, qkvz.shape[1] :] = qkvz, ba
    args = (layer.slots, Segments.from_lengths([1, 2]))
    with use("triton"):
        expected = delta_net_step_(qkvz, ba, layer.weights, layer.state, *args)
        output = delta_net_step_(*wide.split([qkvz.shape[1], ba.shape[1]], dim=1), layer.weights, apart, *args)
    assert torch.equal(output, expected)
    assert torch.equal(apart.recurrent, layer.state.recurrent)
    assert torch.equal(apart.conv, layer.state.conv)


def test_what_is_not_taken_is_refused(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    layer = Layer(SMALL, torch.float32, slots=[0])
    qkvz, ba = layer.tokens(4)
    args = (layer.weights, layer.state, layer.slots, Segments.from_lengths([4]))
    with use("triton"), pytest.raises(BackendError, match="fp64"):
        delta_net_step_(qkvz.double(), ba, *args)
    with use("triton"), pytest.raises(BackendError, match="another dtype"):
        delta_net_step_(qkvz.bfloat16(), ba, *args)
    with use("triton"), pytest.raises(InputError, match="room for 3"):
        delta_net_step_(qkvz, ba, *args, torch.tensor([0]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 16])
def test_published_sizes(count: int, dtype: torch.dtype, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    layer = Layer(PUBLISHED, dtype, slots=[n + 1 for n in range(count)])
    uniform, none = [3] * count, [0] * count
    mixed = [n % 4 for n in range(count)]
    calls = [([1] * count, None), (uniform, none), (uniform, mixed), (mixed, mixed[::-1]), ([8] * count, None)]
    assert_same_calls([layer], calls)
