"""The kernels of the experts against their definition."""

from typing import NamedTuple

import pytest
import torch
from tests.ops.checks import poisoned, relative_error, tolerance
from torch import Tensor

from qwen3_next.errors import BackendError
from qwen3_next.ops import experts_triton
from qwen3_next.ops.backend import use
from qwen3_next.ops.expert_order_triton import ExpertOrder
from qwen3_next.ops.experts import ExpertScales, SharedExpert, swiglu_experts
from qwen3_next.ops.quant import quantize_block_fp8


class Inputs(NamedTuple):
    """What `swiglu_experts` takes, in its order."""

    x: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    weights: Tensor
    experts: Tensor
    scales: ExpertScales | None = None
    shared: SharedExpert | None = None


class Shape(NamedTuple):
    tokens: int
    top_k: int
    experts: int
    hidden: int
    width: int


SHAPES = [
    Shape(1, 3, 6, 16, 24),  # every choice alone
    Shape(4, 2, 5, 40, 24),
    Shape(5, 3, 6, 48, 24),  # tiles of 16, a gate_up matrix that is square
    Shape(40, 3, 9, 33, 20),  # no whole 16 bytes a row
    Shape(65, 1, 4, 130, 72),  # tiles of 32
    Shape(40, 4, 6, 64, 24),  # tiles of 64, of fp8 by tensor descriptors
    Shape(70, 4, 5, 64, 24),  # tiles of 128, by tensor descriptors, more than one block of choices
]


FP8_SHAPES = [SHAPES[0], SHAPES[1], SHAPES[3], Shape(6, 2, 4, 160, 144), SHAPES[5], Shape(50, 3, 5, 144, 160)]
"""With several blocks of scales, and channels that do not fill the last."""


def random_inputs(shape: Shape, dtype: torch.dtype, shared: bool = False, choice: Tensor | None = None) -> Inputs:
    t, k, e, d, f = shape
    experts = torch.rand(t, e).topk(k).indices if choice is None else choice
    own = [torch.randn(size) / 4 for size in ((f, d), (f, d), (d, f), (1, d))] if shared else None
    return Inputs(
        torch.randn(t, d).to(dtype),
        (torch.randn(e, 2 * f, d) / d**0.5).to(dtype),
        (torch.randn(e, d, f) / f**0.5).to(dtype),
        torch.rand(t, k).to(dtype),
        experts,
        None,
        None if own is None else SharedExpert(*(x.to(dtype) for x in own)),
    )


def in_fp8(inputs: Inputs) -> Inputs:
    count, rows, width = inputs.gate_up_proj.shape
    first = quantize_block_fp8(inputs.gate_up_proj.view(2 * count, rows // 2, width))
    second = quantize_block_fp8(inputs.down_proj)
    scales = ExpertScales(first.scale_inv.view(count, -1, first.scale_inv.shape[-1]), second.scale_inv)
    shared = inputs.shared
    if shared is not None:
        own = [quantize_block_fp8(weight) for weight in shared[:3]]
        shared = SharedExpert(*(x.values for x in own), shared.share, tuple(x.scale_inv for x in own))
    return Inputs(inputs.x, first.values.view(count, rows, width), second.values, *inputs[3:5], scales, shared)


def widened(inputs: Inputs) -> Inputs:
    """In fp32, but for what is fp8."""

    def wide(x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    shared = inputs.shared
    shared = None if shared is None else SharedExpert(*(wide(x) for x in shared[:4]), shared.scales)
    return Inputs(*(wide(x) for x in inputs[:5]), inputs.scales, shared)


def run(backend: str, inputs: Inputs) -> Tensor:
    with use(backend):
        return swiglu_experts(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "shared"), [(shape, i % 2 == 0) for i, shape in enumerate(SHAPES)])
def test_equals_the_definition(shape: Shape, dtype: torch.dtype, shared: bool, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(shape, dtype, shared)
    with torch.no_grad(), poisoned():
        result, again = run("triton", inputs), run("triton", inputs)
    with torch.no_grad():
        expected = run("reference", widened(inputs))
    assert (result.dtype, result.shape) == (dtype, inputs.x.shape)
    assert torch.equal(result, again)
    assert relative_error(result, expected) <= tolerance("swiglu_experts", dtype)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "shared"), [(shape, i % 2 == 1) for i, shape in enumerate(FP8_SHAPES)])
def test_fp8_equals_the_definition(shape: Shape, dtype: torch.dtype, shared: bool, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    with use("reference"):
        inputs = in_fp8(random_inputs(shape, dtype, shared))
    with torch.no_grad(), poisoned():
        result, again = run("triton", inputs), run("triton", inputs)
    with torch.no_grad():
        expected = run("reference", widened(inputs))
    assert torch.equal(result, again)
    assert relative_error(result, expected) <= tolerance("swiglu_experts", torch.float8_e4m3fn)[0]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES[1:]), (SHAPES[0], torch.bfloat16), (SHAPES[-1], torch.bfloat16)],
)
def test_gradients_are_those_of_the_definition(shape: Shape, dtype: torch.dtype, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs, direction = random_inputs(shape, dtype), torch.randn(shape.tokens, shape.hidden)

    def gradients(backend: str, made: Inputs) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in made[:4]]
        result = run(backend, Inputs(*leaves, made.experts))
        return torch.autograd.grad(result, leaves, direction.to(result.dtype))

    with poisoned():
        result, again = gradients("triton", inputs), gradients("triton", inputs)
    for a, b, c in zip(result, again, gradients("reference", widened(inputs)), strict=True):
        assert torch.equal(a, b)
        assert relative_error(a, c) <= tolerance("swiglu_experts", dtype)[1]


@pytest.mark.parametrize("tokens", [1, 20, 60])
def test_all_tokens_may_choose_one_expert_and_the_others_get_gradients_of_zeros(tokens: int) -> None:
    choice = torch.full((tokens, 1), 4)
    inputs = random_inputs(Shape(tokens, 1, 6, 16, 8), torch.float32, choice=choice)
    leaves = [x.requires_grad_() for x in inputs[:4]]
    result = run("triton", inputs)
    assert relative_error(result, run("reference", inputs)) < 1e-6
    for grad in torch.autograd.grad(result.sum(), leaves)[1:3]:
        assert grad[4].abs().sum() > 0
        assert grad[[0, 1, 2, 3, 5]].abs().sum() == 0


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize(("shape", "shared"), [(shape, i % 2 == 0) for i, shape in enumerate(SHAPES)])
def test_experts_that_are_not_here_are_never_read(shape: Shape, shared: bool, in_blocks: bool, fresh_seed: int) -> None:
    """Numbers before and behind those of the weights: the rank of an expert-parallel group has some experts alone."""
    torch.manual_seed(fresh_seed)
    inputs = random_inputs(shape, torch.float32, shared)
    if in_blocks:
        with use("reference"):
            inputs = in_fp8(inputs)
    shifted = inputs._replace(experts=2 * inputs.experts - shape.experts // 2)
    kind = torch.float8_e4m3fn if in_blocks else torch.float32
    with torch.no_grad(), poisoned():
        result = run("triton", shifted)
    with torch.no_grad():
        assert relative_error(result, run("reference", shifted)) <= tolerance("swiglu_experts", kind)[0]


def test_gradients_pass_by_experts_that_are_not_here() -> None:
    inputs = random_inputs(Shape(40, 3, 9, 32, 24), torch.float32)

    def gradients(backend: str) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs[:4]]
        return torch.autograd.grad(run(backend, Inputs(*leaves, 2 * inputs.experts - 4)).sum(), leaves)

    with poisoned():
        found = gradients("triton")
    for ours, theirs in zip(found, gradients("reference"), strict=True):
        assert relative_error(ours, theirs) <= tolerance("swiglu_experts", torch.float32)[1]


def test_no_tokens_give_no_rows() -> None:
    inputs = random_inputs(Shape(0, 2, 4, 16, 8), torch.float32)
    assert run("triton", inputs).shape == (0, 16)


def test_a_shared_expert_of_another_width_is_added_all_the_same() -> None:
    inputs = random_inputs(Shape(9, 2, 4, 16, 8), torch.float32)
    own = SharedExpert(torch.randn(12, 16), torch.randn(12, 16), torch.randn(16, 12), torch.randn(1, 16))
    inputs = inputs._replace(shared=own)
    assert relative_error(run("triton", inputs), run("reference", inputs)) < 1e-6


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("tokens", "top_k", "count", "size"), [(1, 1, 4, 16), (90, 3, 6, 16), (70, 10, 512, 16), (150, 2, 3, 64)]
)
def test_the_order_gives_every_choice_a_row_and_every_row_a_tile(
    tokens: int, top_k: int, count: int, size: int, shared: bool
) -> None:
    experts = torch.rand(tokens, count).topk(top_k).indices
    with poisoned():
        order = ExpertOrder.of(experts, count, size, shared)
    by_expert, choices = experts.flatten().sort(stable=True)
    assert torch.equal(order.tokens.long(), choices // top_k)
    assert torch.equal(order.places.flatten()[choices].long(), torch.arange(len(choices)))
    found = torch.bincount(by_expert, minlength=count).cumsum(0)
    assert order.borders.tolist() == [0, *found.tolist()]
    described = [(e, row) for e, begin, end in order.tiles.T.tolist() for row in range(begin, min(begin + size, end))]
    own = [(count, len(choices) + t) for t in range(tokens)] if shared else []
    assert described == [*zip(by_expert.tolist(), range(len(choices)), strict=True), *own]
    assert order.rows == len(choices) + len(own)


def test_what_is_not_taken_is_said() -> None:
    inputs = random_inputs(Shape(3, 2, 4, 16, 8), torch.float64)
    with pytest.raises(BackendError, match="fp64"):
        run("triton", inputs)
    assert experts_triton.tile_size(16, 10, 512, 128) == 16
    assert experts_triton.tile_size(32_768, 10, 512, 64) == 64


PUBLISHED = Shape(0, 10, 512, 2_048, 512)
"""Of Qwen3-Next-80B-A3B."""


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True])
def test_published_sizes_equal_the_definition_at_every_number_of_tokens(quantized: bool, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    whole = random_inputs(PUBLISHED._replace(tokens=4_097), torch.bfloat16, shared=True)
    whole = in_fp8(whole) if quantized else whole
    bound = tolerance("swiglu_experts", torch.float8_e4m3fn if quantized else torch.bfloat16)[0]
    with torch.no_grad(), use("reference"):
        expected = swiglu_experts(*widened(whole)) if quantized else swiglu_experts(*whole)
    for tokens in (1, 2, 4, 5, 16, 63, 64, 65, 300, 1_025, 2_500, 4_097):
        some = whole._replace(x=whole.x[:tokens], weights=whole.weights[:tokens], experts=whole.experts[:tokens])
        with torch.no_grad(), poisoned():
            result, again = run("triton", some), run("triton", some)
        assert torch.equal(result, again)
        assert relative_error(result, expected[:tokens]) <= bound, tokens


@pytest.mark.gpu
@pytest.mark.parametrize("crowded", [False, True])
def test_gradients_at_published_sizes(crowded: bool, fresh_seed: int) -> None:
    """Most experts get no token where all of them crowd into a few."""
    torch.manual_seed(fresh_seed)
    shape = PUBLISHED._replace(tokens=1_500)
    choice = torch.randint(12, (1_500, 1)) + torch.arange(10) if crowded else None
    inputs, direction = random_inputs(shape, torch.bfloat16, choice=choice), torch.randn(1_500, 2_048)

    def gradients(backend: str) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs[:4]]
        return torch.autograd.grad(run(backend, Inputs(*leaves, inputs.experts)), leaves, direction.bfloat16())

    with poisoned():
        result, again = gradients("triton"), gradients("triton")
    for a, b, c in zip(result, again, gradients("reference"), strict=True):
        assert torch.equal(a, b)
        assert relative_error(a, c) <= tolerance("swiglu_experts", torch.bfloat16)[1]


@pytest.mark.gpu
def test_a_graph_holds_the_call_whatever_the_routing() -> None:
    inputs = random_inputs(PUBLISHED._replace(tokens=16), torch.bfloat16, shared=True)
    with torch.no_grad():
        run("triton", inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run("triton", inputs)
        for _ in range(3):
            inputs.experts.copy_(torch.rand(16, 512).topk(10).indices)
            graph.replay()
            assert torch.equal(result, run("triton", inputs))
