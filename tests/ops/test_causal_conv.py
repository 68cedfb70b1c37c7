"""The causal convolution against a loop over tokens."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen3_next.ops.causal_conv import causal_conv
from qwen3_next.ops.segments import Segments

CHANNELS = 5
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}

lengths_of_sequences = st.lists(st.sampled_from([0, 1, 2, 3, 4, 63, 64, 65, 130]), min_size=1, max_size=5)
short_lengths = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def token_loop(x: Tensor, weight: Tensor, lengths: Sequence[int], states: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: keep a window of W inputs per sequence, shift it by one for every token."""
    outputs, finals, position = [], [], 0
    for n, length in enumerate(lengths):
        window = [states[n, :, i] for i in range(weight.shape[1] - 1)]
        for _ in range(length):
            window.append(x[position])
            total = sum(weight[:, i] * window[i] for i in range(weight.shape[1]))
            outputs.append(total * torch.sigmoid(total))
            window.pop(0)
            position += 1
        finals.append(torch.stack(window, -1))
    return torch.stack(outputs) if outputs else x.clone(), torch.stack(finals)


def random_inputs(
    lengths: Sequence[int], dtype: torch.dtype = torch.float64, width: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(len(lengths) + sum(lengths))
    x = torch.randn(sum(lengths), CHANNELS, dtype=dtype)
    return x, torch.randn(CHANNELS, width, dtype=dtype), torch.randn(len(lengths), CHANNELS, width - 1, dtype=dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths_of_sequences | short_lengths, st.booleans(), st.sampled_from(list(TOLERANCE)))
def test_equals_a_loop_over_tokens(lengths: list[int], with_state: bool, dtype: torch.dtype) -> None:
    x, weight, state = random_inputs(lengths, dtype)
    result = causal_conv(x, weight, Segments.from_lengths(lengths), state if with_state else None)
    output, final = token_loop(x, weight, lengths, state if with_state else torch.zeros_like(state))
    torch.testing.assert_close(result.output, output, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(result.final_state, final)


@pytest.mark.parametrize("lengths", [[1], [1] * 8, [70], [33, 33], [0, 1, 0, 130, 2, 0]])
def test_the_last_tap_multiplies_the_current_token(lengths: list[int]) -> None:
    x, weight, state = random_inputs(lengths)
    weight[:, :3] = 0
    result = causal_conv(x, weight, Segments.from_lengths(lengths), state)
    torch.testing.assert_close(result.output, torch.nn.functional.silu(x * weight[:, 3]))


@pytest.mark.parametrize("width", [1, 2, 6])
@pytest.mark.parametrize("lengths", [[1, 1], [9], [3, 0, 8]])
def test_any_width(width: int, lengths: list[int]) -> None:
    x, weight, state = random_inputs(lengths, width=width)
    result = causal_conv(x, weight, Segments.from_lengths(lengths), state)
    output, final = token_loop(x, weight, lengths, state) if width > 1 else (None, state)
    torch.testing.assert_close(result.output, torch.nn.functional.silu(x * weight[:, 0]) if output is None else output)
    assert torch.equal(result.final_state, final)


@pytest.mark.parametrize("parts", [[1, 1, 1, 1], [2, 1, 130], [64, 1, 63], [3, 0, 5]])
def test_split_equals_whole(parts: list[int]) -> None:
    x, weight, state = random_inputs([sum(parts)])
    whole = causal_conv(x, weight, Segments.from_lengths([sum(parts)]), state)
    outputs = []
    for part in x.split(parts):
        piece = causal_conv(part, weight, Segments.from_lengths([len(part)]), state)
        outputs.append(piece.output)
        state = piece.final_state
    torch.testing.assert_close(torch.cat(outputs), whole.output)
    assert torch.equal(state, whole.final_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_alone(dtype: torch.dtype) -> None:
    lengths = [3, 1, 0, 70, 2]
    x, weight, state = random_inputs(lengths, dtype)
    packed = causal_conv(x, weight, Segments.from_lengths(lengths), state)
    alone = [
        causal_conv(part, weight, Segments.from_lengths([len(part)]), state[n : n + 1])
        for n, part in enumerate(x.split(lengths))
    ]
    torch.testing.assert_close(packed.output, torch.cat([a.output for a in alone]), rtol=8e-3, atol=1e-6)
    assert torch.equal(packed.final_state, torch.cat([a.final_state for a in alone]))


@pytest.mark.parametrize("lengths", [[5, 3, 66, 1], [4, 4, 4, 4], [1, 1, 1, 1]])
def test_a_broken_sequence_does_not_leak(lengths: list[int]) -> None:
    x, weight, state = random_inputs(lengths)
    x[sum(lengths[:1]) : sum(lengths[:2])] = float("nan")
    state[1] = float("inf")
    result = causal_conv(x, weight, Segments.from_lengths(lengths), state)
    outputs = result.output.split(lengths)
    assert all(outputs[n].isfinite().all() and result.final_state[n].isfinite().all() for n in (0, 2, 3))


@pytest.mark.parametrize("lengths", [[1, 1, 1], [9], [70, 70], [0, 2, 5, 1]])
def test_gradients_are_those_of_the_loop(lengths: list[int]) -> None:
    inputs = [x.requires_grad_() for x in random_inputs(lengths)]
    x, weight, state = inputs
    result = causal_conv(x, weight, Segments.from_lengths(lengths), state)
    expected = token_loop(x, weight, lengths, state)
    directions = [torch.randn_like(y) for y in expected]
    for a, b in zip(
        torch.autograd.grad(tuple(result), inputs, directions),
        torch.autograd.grad(expected, inputs, directions),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    x, weight, state = random_inputs([3, 80], torch.bfloat16)
    segments = Segments.from_lengths([3, 80])
    rounded = causal_conv(x, weight, segments, state)
    exact = causal_conv(x.float(), weight.float(), segments, state.float())
    assert rounded.output.dtype == rounded.final_state.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.output, exact.output.bfloat16(), rtol=8e-3, atol=1e-6)
    assert causal_conv(x, weight, segments, state.float()).final_state.dtype == torch.bfloat16


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens_keep_the_state(lengths: list[int]) -> None:
    x, weight, state = random_inputs(lengths)
    result = causal_conv(x, weight, Segments.from_lengths(lengths), state)
    assert result.output.shape == (0, CHANNELS)
    assert torch.equal(result.final_state, state)
    empty = causal_conv(x, weight, Segments.from_lengths(lengths))
    assert torch.equal(empty.final_state, torch.zeros_like(state))


@pytest.mark.parametrize("lengths", [[1, 1], [7], [0, 2, 66]])
def test_inputs_stay_and_a_second_run_is_identical(lengths: list[int]) -> None:
    inputs = random_inputs(lengths, torch.float32)
    copies = [x.clone() for x in inputs]
    x, weight, state = inputs
    first = causal_conv(x, weight, Segments.from_lengths(lengths), state)
    second = causal_conv(x, weight, Segments.from_lengths(lengths), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    first.final_state.zero_()
    first.output.zero_()
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
