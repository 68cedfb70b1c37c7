"""The gradients of the chunked gated delta rule's kernels against autograd through the recurrence in fp64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.ops.checks import relative_error, tolerance
from torch import Tensor

from qwen3_next.errors import BackendError
from qwen3_next.ops.backend import use
from qwen3_next.ops.gated_delta import GatedDeltaOutput, gated_delta_rule, gated_delta_rule_recurrent
from qwen3_next.ops.gated_delta_chunk_triton import solve_chunks
from qwen3_next.ops.gated_delta_grad_triton import gated_delta_backward
from qwen3_next.ops.segments import Segments

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
WIDTHS, DTYPE = ((128, 128), torch.bfloat16) if ON_GPU else ((8, 12), torch.float32)
"""A GPU takes gradients of wide heads in half precision alone; the interpreter takes all, and is slow."""
EXACT = tolerance("gated_delta_rule", DTYPE)[1]
NAMES = ("q", "k", "v", "log_decay", "beta", "initial_state")


def random_inputs(
    lengths: Sequence[int],
    heads: tuple[int, int] = (1, 2),
    widths: tuple[int, int] = WIDTHS,
    dtype: torch.dtype = DTYPE,
) -> list[Tensor]:
    """q, k, v (columns of wider rows, as the convolution leaves them), log_decay, beta and initial states."""
    (key_heads, value_heads), (dk, dv), tokens = heads, widths, sum(lengths)
    keys, values = key_heads * dk, value_heads * dv
    row = torch.randn(tokens, 2 * keys + values, device=DEVICE).to(dtype)
    q, k, v = row.split([keys, keys, values], dim=1)
    log_decay = -2 * torch.rand(tokens, value_heads, device=DEVICE) ** 3
    beta = torch.rand(tokens, value_heads, device=DEVICE)
    state = torch.randn(len(lengths), value_heads, dk, dv, device=DEVICE)
    return [q.unflatten(1, (-1, dk)), k.unflatten(1, (-1, dk)), v.unflatten(1, (-1, dv)), log_decay, beta, state]


def random_directions(inputs: list[Tensor]) -> GatedDeltaOutput:
    """Small for the state: the gradient of a decay has a sum over all of it, of which bf16 keeps little near 0."""
    return GatedDeltaOutput(torch.randn_like(inputs[2]), torch.randn_like(inputs[5]) / 10)


def forward(rule: Callable[..., GatedDeltaOutput], inputs: list[Tensor], lengths: Sequence[int]) -> GatedDeltaOutput:
    return rule(*inputs[:5], Segments.from_lengths(lengths, DEVICE), *inputs[5:])


def gradients(inputs: list[Tensor], lengths: Sequence[int], directions: GatedDeltaOutput) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with use("triton"):
        result = forward(gated_delta_rule, leaves, lengths)
    return torch.autograd.grad(tuple(result), leaves, tuple(directions))


def expected_gradients(
    inputs: list[Tensor],
    lengths: Sequence[int],
    directions: GatedDeltaOutput,
    rule: Callable[..., GatedDeltaOutput] = gated_delta_rule_recurrent,
) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    with use("reference"):
        result = forward(rule, leaves, lengths)
    grads = torch.autograd.grad(
        tuple(result), leaves, tuple(x.double() for x in directions), allow_unused=True, materialize_grads=True
    )
    return list(grads)


def assert_equals_the_recurrence(inputs: list[Tensor], lengths: Sequence[int], largest: float = EXACT) -> None:
    directions = random_directions(inputs)
    grads = gradients(inputs, lengths, directions)
    expected = expected_gradients(inputs, lengths, directions)
    # Where nothing is written, the gradients of v and k are zero, and what the recurrence has of k is rounding.
    scale = max(x.norm().item() for x in expected) * 1e-6
    for name, x, grad, other in zip(NAMES, inputs, grads, expected, strict=True):
        assert grad.dtype == x.dtype, name
        assert grad.isfinite().all(), name
        small = max(grad.double().norm().item(), other.norm().item()) <= scale
        assert small or relative_error(grad, other) <= largest, (name, relative_error(grad, other))


@pytest.mark.parametrize("lengths", [[0, 1, 63, 64, 65, 130], [5, 0, 0], [1] * 3])
def test_packed_sequences_of_any_length(fresh_seed: int, lengths: list[int]) -> None:
    torch.manual_seed(fresh_seed)
    assert_equals_the_recurrence(random_inputs(lengths), lengths)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (1, 3), (2, 4)])
@pytest.mark.parametrize(
    "widths", [(64, 64), (64, 128), (128, 64), (128, 128)] if ON_GPU else [(16, 16), (20, 5), (5, 70)]
)
def test_any_heads_and_widths(fresh_seed: int, heads: tuple[int, int], widths: tuple[int, int]) -> None:
    torch.manual_seed(fresh_seed)
    assert_equals_the_recurrence(random_inputs([20], heads, widths), [20])


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float16])
def test_half_precision(fresh_seed: int, dtype: torch.dtype) -> None:
    """The interpreter truncates to bf16 where a GPU rounds, so that its error is twice as large."""
    torch.manual_seed(fresh_seed)
    inputs = random_inputs([70, 3], (1, 2), (64, 64) if ON_GPU else (32, 32), dtype)
    assert_equals_the_recurrence(inputs, [70, 3], tolerance("gated_delta_rule", dtype)[1])


@pytest.mark.parametrize(("beta", "repeated"), [(0.0, False), (1.0, False), (1.0, True)])
@pytest.mark.parametrize("decays", [[0.0], [-20.0], [0.0, 0.0, 0.0, -100.0], [-1e-3, -1e-3, -50.0]])
def test_extremes(fresh_seed: int, beta: float, repeated: bool, decays: list[float]) -> None:
    """Forgetting all, nothing, and both in turn; writing nothing and everything; the same key throughout."""
    torch.manual_seed(fresh_seed)
    lengths, heads = ([70] * 8, (2, 4)) if ON_GPU else ([70], (1, 1))
    q, k, v, log_decay, _, state = random_inputs(lengths, heads)
    log_decay = torch.tensor(decays, device=DEVICE).repeat(len(v))[: len(v), None].expand_as(log_decay)
    k = torch.ones_like(k) if repeated else k
    inputs = [q, k, v, log_decay, torch.full_like(log_decay, beta), state]
    # With one key throughout, each token replaces what those before it wrote: of the gradient of their decays only the
    # rounding of half precision remains, beside what the entering state gives.
    assert_equals_the_recurrence(inputs, lengths, 5 * EXACT if repeated and ON_GPU else EXACT)


@pytest.mark.parametrize("present", ["output", "final_state"])
def test_the_gradient_of_one_result_alone(fresh_seed: int, present: str) -> None:
    torch.manual_seed(fresh_seed)
    inputs, lengths = random_inputs([67, 0, 3]), [67, 0, 3]
    zeros = GatedDeltaOutput(torch.zeros_like(inputs[2]), torch.zeros_like(inputs[5]))
    direction = getattr(random_directions(inputs), present)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with use("triton"):
        result = forward(gated_delta_rule, leaves, lengths)
    grads = torch.autograd.grad(getattr(result, present), leaves, direction)
    expected = expected_gradients(inputs, lengths, zeros._replace(**{present: direction}))
    for grad, other in zip(grads, expected, strict=True):
        assert relative_error(grad, other) <= EXACT or not (grad.any() or other.any())


def test_without_initial_state_and_with_few_gradients_wanted(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs, lengths = random_inputs([67, 3]), [67, 3]
    inputs[5].zero_()
    directions = random_directions(inputs)
    leaves = [x.detach() for x in inputs[:5]]
    leaves[1].requires_grad_()
    with use("triton"):
        result = forward(gated_delta_rule, leaves, lengths)
    (grad,) = torch.autograd.grad(tuple(result), [leaves[1]], tuple(directions))
    assert relative_error(grad, expected_gradients(inputs, lengths, directions)[1]) <= EXACT


def test_a_gradient_that_is_one_number_everywhere(fresh_seed: int) -> None:
    """As `sum()` gives it: expanded, not laid out in memory."""
    torch.manual_seed(fresh_seed)
    inputs, lengths = random_inputs([67]), [67]
    directions = GatedDeltaOutput(torch.ones_like(inputs[2]), torch.ones_like(inputs[5]))
    leaves = [x.detach().requires_grad_() for x in inputs]
    with use("triton"):
        output, state = forward(gated_delta_rule, leaves, lengths)
    grads = torch.autograd.grad(output.sum() + state.sum(), leaves)
    for grad, expected in zip(grads, expected_gradients(inputs, lengths, directions), strict=True):
        assert relative_error(grad, expected) <= EXACT


@pytest.mark.parametrize("lengths", [[0], [0, 0]])
def test_no_tokens_pass_the_gradient_of_the_state_through(lengths: list[int]) -> None:
    inputs = random_inputs(lengths)
    directions = random_directions(inputs)
    grads = gradients(inputs, lengths, directions)
    assert torch.equal(grads[5], directions.final_state)
    assert all(grad.shape == x.shape for grad, x in zip(grads, inputs, strict=True))


def test_inputs_stay_and_a_second_run_is_identical(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs, lengths = random_inputs([65]), [65]
    directions = random_directions(inputs)
    copies = [x.clone() for x in (*inputs, *directions)]
    first, second = (gradients(inputs, lengths, directions) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for grad in first:
        grad.zero_()
    assert all(torch.equal(a, b) for a, b in zip((*inputs, *directions), copies, strict=True))


def test_systems_that_the_forward_pass_kept_are_used(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs, segments = random_inputs([20]), Segments.from_lengths([20], DEVICE)
    directions = random_directions(inputs)
    q, k, v, log_decay, beta, state = inputs
    systems = solve_chunks(q, k, log_decay, beta, segments)
    wrong = systems._replace(inverse=torch.zeros_like(systems.inverse))
    found, kept, spoilt = (
        gated_delta_backward(q, k, v, log_decay, beta, segments, state, *directions, systems=x)
        for x in (None, systems, wrong)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True) if a is not None and b is not None)
    assert not spoilt.v.any()


def test_inputs_that_start_at_any_address(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs, segments = random_inputs([67]), Segments.from_lengths([67], DEVICE)
    tensors = [*inputs, *random_directions(inputs)]
    shifted = [x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in tensors]
    systems = solve_chunks(*inputs[:2], *inputs[3:5], segments)
    grads, expected = (gated_delta_backward(*x[:5], segments, *x[5:], systems=systems) for x in (shifted, tensors))
    for grad, other in zip(grads, expected, strict=True):
        assert grad is not None
        assert other is not None
        assert relative_error(grad, other) <= EXACT


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("lengths", [[70, 3, 66], [64, 64, 64]])
def test_a_broken_sequence_does_not_leak(fresh_seed: int, lengths: list[int]) -> None:
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(lengths)
    inputs[2][lengths[0] : sum(lengths[:2])] = float("nan")
    inputs[5][1] = float("inf")
    grads = gradients(inputs, lengths, random_directions(inputs))
    for grad in grads[:5]:
        assert all(grad.split(lengths)[n].isfinite().all() for n in (0, 2))
    assert all(grads[5][n].isfinite().all() for n in (0, 2))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "heads", "widths"),
    [
        ([4097], (16, 32), (128, 128)),
        ([1000, 37, 0, 2011, 1, 1047], (16, 32), (128, 128)),
        ([997] * 40, (1, 2), (128, 128)),
        ([997] * 40, (1, 2), (64, 128)),
        ([997] * 40, (2, 4), (64, 64)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_state", [True, False])
def test_heads_of_published_and_trained_models(
    fresh_seed: int,
    lengths: list[int],
    heads: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    with_state: bool,
) -> None:
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(lengths, heads, widths, dtype)[: 6 if with_state else 5]
    found, expected = [x.detach().requires_grad_() for x in inputs], [x.double().requires_grad_() for x in inputs]
    with use("triton"):
        output = forward(gated_delta_rule, found, lengths).output
    with use("reference"):
        exact = forward(gated_delta_rule, expected, lengths).output
    direction = torch.randn_like(output)
    grads = torch.autograd.grad(output, found, direction)
    for name, grad, other in zip(NAMES, grads, torch.autograd.grad(exact, expected, direction.double()), strict=False):
        error = relative_error(grad, other)
        assert error <= tolerance("gated_delta_rule", dtype)[1], (name, error)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("widths", "dtype"),
    [
        ((256, 128), torch.bfloat16),
        ((128, 32), torch.bfloat16),
        ((96, 64), torch.float16),
        ((128, 128), torch.float32),
    ],
)
def test_what_was_not_found_right_on_a_card_is_refused_there(widths: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = random_inputs([3], (1, 2), widths, dtype)
    inputs[2].requires_grad_()
    with use("triton"), pytest.raises(BackendError, match="gradients"):
        forward(gated_delta_rule, inputs, [3])
