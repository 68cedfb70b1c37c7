"""The kernels of the chunked gated delta rule against the recurrence in fp64."""

from collections.abc import Sequence

import pytest
import torch
from tests.ops.checks import TOLERANCES, relative_error
from torch import Tensor

from qwen3_next.errors import BackendError
from qwen3_next.ops.backend import use
from qwen3_next.ops.gated_delta import gated_delta_rule, gated_delta_rule_, gated_delta_rule_recurrent
from qwen3_next.ops.segments import Segments
from qwen3_next.ops.snapshots import Snapshots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = TOLERANCES["gated_delta_rule", "float32"][0]


def random_inputs(
    tokens: int, heads: tuple[int, int] = (1, 2), widths: tuple[int, int] = (8, 12), dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v, log_decay and beta; q and k as columns of wider rows, as the convolution leaves them."""
    (key_heads, value_heads), (dk, dv) = heads, widths
    keys, values = key_heads * dk, value_heads * dv
    row = torch.randn(tokens, 2 * keys + values, device=DEVICE).to(dtype)
    q, k, v = row.split([keys, keys, values], dim=1)
    log_decay = -2 * torch.rand(tokens, value_heads, device=DEVICE) ** 3
    beta = torch.rand(tokens, value_heads, device=DEVICE)
    return [q.unflatten(1, (-1, dk)), k.unflatten(1, (-1, dk)), v.unflatten(1, (-1, dv)), log_decay, beta]


def random_states(count: int, inputs: list[Tensor]) -> Tensor:
    return torch.randn(count, inputs[2].shape[1], inputs[1].shape[2], inputs[2].shape[2], device=DEVICE)


def assert_equals_the_recurrence(
    inputs: list[Tensor], lengths: Sequence[int], state: Tensor | None, tolerance: float = EXACT
) -> None:
    segments = Segments.from_lengths(lengths, DEVICE)
    with use("triton"):
        result = gated_delta_rule(*inputs, segments, state)
    exact = [x.double() for x in inputs]
    expected = gated_delta_rule_recurrent(*exact, segments, None if state is None else state.double())
    assert result.output.dtype == inputs[2].dtype
    assert result.final_state.dtype == torch.float32
    assert relative_error(result.output, expected.output) <= tolerance
    assert relative_error(result.final_state, expected.final_state) <= tolerance


@pytest.mark.parametrize("lengths", [[0, 1, 63, 64, 65, 130], [5], [0, 0, 2], [1] * 5])
@pytest.mark.parametrize("with_state", [True, False])
def test_packed_sequences_of_any_length(fresh_seed: int, lengths: list[int], with_state: bool) -> None:
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(sum(lengths))
    state = random_states(len(lengths), inputs) if with_state else None
    assert_equals_the_recurrence(inputs, lengths, state)


@pytest.mark.parametrize(
    ("heads", "widths"), [((1, 1), (16, 16)), ((2, 2), (20, 5)), ((1, 3), (5, 70)), ((2, 4), (40, 33))]
)
def test_any_heads_and_widths(fresh_seed: int, heads: tuple[int, int], widths: tuple[int, int]) -> None:
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(70, heads, widths)
    assert_equals_the_recurrence(inputs, [67, 3], random_states(2, inputs))


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float16])
def test_half_precision(fresh_seed: int, dtype: torch.dtype) -> None:
    """The interpreter truncates to bf16 where a GPU rounds, so that its error is twice as large."""
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(133, (1, 2), (32, 32), dtype)
    tolerance = TOLERANCES["gated_delta_rule", str(dtype).removeprefix("torch.")][0]
    assert_equals_the_recurrence(inputs, [130, 3], random_states(2, inputs), tolerance)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("decays", [[0.0], [-20.0], [0.0, 0.0, 0.0, -100.0], [-1e-3, -1e-3, -50.0]])
@pytest.mark.parametrize("repeated", [False, True])
def test_extremes(fresh_seed: int, beta: float, decays: list[float], repeated: bool) -> None:
    """Forgetting all, nothing, and both in turn; writing nothing and everything; the same key throughout."""
    torch.manual_seed(fresh_seed)
    q, k, v, _, _ = random_inputs(130, (1, 1))
    log_decay = torch.tensor(decays, device=DEVICE).repeat(130)[:130, None]
    k = torch.ones_like(k) if repeated else k
    inputs = [q, k, v, log_decay, torch.full_like(log_decay, beta)]
    assert_equals_the_recurrence(inputs, [130], random_states(1, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_in_slots_and_snapshots(fresh_seed: int, dtype: torch.dtype) -> None:
    """Snapshots at the start, inside and at the borders of chunks and of sequences; states in fp32 or bf16."""
    torch.manual_seed(fresh_seed)
    lengths, positions = (0, 70, 3, 0, 130), [203, 0, 1, 63, 64, 65, 70, 71, 73, 74, 137, 138, 202, 100, 100]
    segments = Segments.from_lengths(lengths, DEVICE)
    inputs = random_inputs(sum(lengths), (1, 2))
    slots = torch.tensor([0, 4, 2, 0, 6], dtype=torch.int32, device=DEVICE)
    states = random_states(30, inputs).to(dtype)
    expected_states, untouched = states.double(), states.clone()
    snapshots = Snapshots.at(positions, list(range(10, 25)), DEVICE)
    expected = gated_delta_rule_(*(x.double() for x in inputs), segments, expected_states, slots, snapshots)
    with use("triton"):
        output = gated_delta_rule_(*inputs, segments, states, slots, snapshots)
    tolerance = EXACT if dtype == torch.float32 else 4e-3
    assert relative_error(output, expected) <= EXACT
    for slot in (4, 2, 6, *range(10, 25)):
        assert relative_error(states[slot], expected_states[slot]) <= tolerance, slot
    others = [0, 1, 3, 5, 7, 8, 9, 25, 26, 27, 28, 29]
    assert torch.equal(states[others], untouched[others])


def test_inputs_stay_and_a_second_run_is_identical(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(70)
    state, segments = random_states(2, inputs), Segments.from_lengths([67, 3], DEVICE)
    copies = [x.clone() for x in (*inputs, state)]
    with use("triton"):
        first, second = (gated_delta_rule(*inputs, segments, state) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    first.output.zero_()
    first.final_state.zero_()
    assert all(torch.equal(a, b) for a, b in zip((*inputs, state), copies, strict=True))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("lengths", [[70, 3, 66], [64, 64, 64]])
def test_a_broken_sequence_does_not_leak(fresh_seed: int, lengths: list[int]) -> None:
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(sum(lengths))
    inputs[2][lengths[0] : sum(lengths[:2])] = float("nan")
    state = random_states(3, inputs)
    state[1] = float("inf")
    with use("triton"):
        result = gated_delta_rule(*inputs, Segments.from_lengths(lengths, DEVICE), state)
    outputs = result.output.split(lengths)
    assert all(outputs[n].isfinite().all() and result.final_state[n].isfinite().all() for n in (0, 2))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens_keep_the_state(lengths: list[int]) -> None:
    inputs = random_inputs(0)
    state, segments = random_states(len(lengths), inputs), Segments.from_lengths(lengths, DEVICE)
    with use("triton"):
        result = gated_delta_rule(*inputs, segments, state)
        assert torch.equal(result.final_state, state)
        assert not gated_delta_rule(*inputs, segments).final_state.any()
    assert result.output.shape == inputs[2].shape


def test_what_the_kernels_cannot_take_is_refused() -> None:
    segments = Segments.from_lengths([3], DEVICE)
    with use("triton"):
        with pytest.raises(BackendError, match="bf16, fp16 and fp32"):
            gated_delta_rule(*(x.double() for x in random_inputs(3)), segments)
        with pytest.raises(BackendError, match="up to 256 channels"):
            gated_delta_rule(*random_inputs(3, widths=(257, 8)), segments)
        inputs = random_inputs(3)
        states = random_states(2, inputs).transpose(2, 3).contiguous().transpose(2, 3)
        with pytest.raises(BackendError, match="contiguous within a slot"):
            gated_delta_rule_(*inputs, segments, states, torch.zeros(1, dtype=torch.int32, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4097, 131071])
def test_heads_of_the_published_model(fresh_seed: int, tokens: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(tokens, (16, 32), (128, 128), torch.bfloat16)
    state, segments = random_states(1, inputs), Segments.from_lengths([tokens], DEVICE)
    with use("triton"):
        result, again = (gated_delta_rule(*inputs, segments, state) for _ in range(2))
    with use("reference"):
        expected = gated_delta_rule(*(x.float() for x in inputs), segments, state)
    tolerance = TOLERANCES["gated_delta_rule", "bfloat16"][0]
    assert relative_error(result.output, expected.output) <= tolerance
    assert relative_error(result.final_state, expected.final_state) <= tolerance
    assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))


# The kernels for Hopper take these widths; the others take the rest.
HOPPER = [((1, 2), (128, 128)), ((2, 2), (64, 64)), ((1, 3), (64, 128)), ((2, 8), (128, 64))]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "widths"), HOPPER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1], [64], [0, 1, 63, 64, 65, 0, 130, 513], [1] * 70, [1000]])
@pytest.mark.parametrize("with_state", [True, False])
def test_hopper_packed(
    fresh_seed: int,
    heads: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    lengths: list[int],
    with_state: bool,
) -> None:
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(sum(lengths), heads, widths, dtype)
    state = random_states(len(lengths), inputs) if with_state else None
    tolerance = TOLERANCES["gated_delta_rule", str(dtype).removeprefix("torch.")][0]
    assert_equals_the_recurrence(inputs, lengths, state, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("decays", [[0.0], [-20.0], [0.0, 0.0, 0.0, -100.0], [-1e-3, -1e-3, -50.0]])
@pytest.mark.parametrize("repeated", [False, True])
def test_hopper_extremes(fresh_seed: int, beta: float, decays: list[float], repeated: bool) -> None:
    torch.manual_seed(fresh_seed)
    q, k, v, _, _ = random_inputs(330, (1, 1), (128, 128), torch.bfloat16)
    log_decay = torch.tensor(decays, device=DEVICE).repeat(330)[:330, None]
    k = torch.ones_like(k) if repeated else k
    inputs = [q, k, v, log_decay, torch.full_like(log_decay, beta)]
    # Twice that of random keys; how much less would do was not measured.
    tolerance = 2 * TOLERANCES["gated_delta_rule", "bfloat16"][0]
    assert_equals_the_recurrence(inputs, [330], random_states(1, inputs), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hopper_slots_and_snapshots(fresh_seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(fresh_seed)
    lengths, positions = (0, 70, 3, 0, 530), [603, 0, 1, 63, 64, 65, 70, 71, 73, 74, 137, 138, 602, 100, 100, 393]
    segments = Segments.from_lengths(lengths, DEVICE)
    inputs = random_inputs(sum(lengths), (2, 4), (128, 128), torch.bfloat16)
    slots = torch.tensor([0, 4, 2, 0, 6], dtype=torch.int32, device=DEVICE)
    states = random_states(30, inputs).to(dtype)
    expected_states, untouched = states.double(), states.clone()
    snapshots = Snapshots.at(positions, list(range(10, 26)), DEVICE)
    expected = gated_delta_rule_(*(x.double() for x in inputs), segments, expected_states, slots, snapshots)
    plain = states.clone()
    with use("triton"):
        output = gated_delta_rule_(*inputs, segments, states, slots, snapshots)
        unsnapped = gated_delta_rule_(*inputs, segments, plain, slots)
    tolerance = TOLERANCES["gated_delta_rule", "bfloat16"][0]
    assert relative_error(output, expected) <= tolerance
    assert relative_error(unsnapped, expected) <= tolerance
    for slot in (4, 2, 6, *range(10, 26)):
        assert relative_error(states[slot], expected_states[slot]) <= tolerance, slot
    for slot in (4, 2, 6):
        assert relative_error(plain[slot], expected_states[slot]) <= tolerance, slot
    others = [0, 1, 3, 5, 7, 8, 9, 26, 27, 28, 29]
    assert torch.equal(states[others], untouched[others])
    others += range(10, 26)
    assert torch.equal(plain[others], untouched[others])


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[70, 3, 66], [64, 64, 64], [1, 1, 1]])
def test_hopper_a_broken_sequence_does_not_leak(fresh_seed: int, lengths: list[int]) -> None:
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(sum(lengths), (1, 2), (128, 128), torch.bfloat16)
    for x in inputs:
        x[lengths[0] : sum(lengths[:2])] = float("nan")
    state = random_states(3, inputs)
    state[1] = float("inf")
    with use("triton"):
        result = gated_delta_rule(*inputs, Segments.from_lengths(lengths, DEVICE), state)
    outputs = result.output.split(lengths)
    assert all(outputs[n].isfinite().all() and result.final_state[n].isfinite().all() for n in (0, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(256, 256), (64, 256), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wide_heads(fresh_seed: int, widths: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(200, (2, 4), widths, dtype)
    tolerance = TOLERANCES["gated_delta_rule", str(dtype).removeprefix("torch.")][0]
    assert_equals_the_recurrence(inputs, [70, 130], random_states(2, inputs), tolerance)
