"""Small fresh inputs of every operation that has a twin: what `selfcheck.py` runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from qwen3_next.ops.causal_conv import ProjectionColumns, causal_conv, causal_conv_
from qwen3_next.ops.cross_entropy import IGNORED, linear_argmax, linear_cross_entropy
from qwen3_next.ops.experts import ExpertScales, SharedExpert, swiglu_experts
from qwen3_next.ops.gate import sigmoid_gate, swiglu
from qwen3_next.ops.gated_delta import gated_delta_rule, gated_delta_rule_, gated_delta_rule_recurrent
from qwen3_next.ops.gated_delta_step import StepState, StepWeights, delta_net_step_
from qwen3_next.ops.linear import linear
from qwen3_next.ops.norm import add_rms_norm, gated_rms_norm, rms_norm
from qwen3_next.ops.paged_attention import paged_attention
from qwen3_next.ops.pages import PAGE, KeyPages, write_pages_
from qwen3_next.ops.quant import BlockFp8, dequantize_block_fp8, quantize_activations, quantize_block_fp8
from qwen3_next.ops.rotary import apply_rotary, rms_norm_rotary
from qwen3_next.ops.routing import route
from qwen3_next.ops.segments import Segments
from qwen3_next.ops.snapshots import Snapshots

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the inputs. Widths are what kernels are compiled for; the number of tokens is what an input needs to be small.

    Attributes:
        lengths: of the sequences of a call.
        rotated: pairs of dimensions that are rotated.
    """

    lengths: tuple[int, ...]
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    rotated: int
    columns: ProjectionColumns
    experts: int
    expert_width: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)


TINY = Sizes(
    lengths=(37, 0, 70, 1),
    hidden=48,
    heads=4,
    kv_heads=2,
    head_width=16,
    rotated=4,
    columns=ProjectionColumns(key_heads=2, value_heads=4, key_width=16, value_width=16),
    experts=6,
    expert_width=24,
    vocabulary=200,
)
"""For CPUs."""

PUBLISHED = Sizes(
    lengths=(150, 0, 70, 1),
    hidden=2048,
    heads=16,
    kv_heads=2,
    head_width=256,
    rotated=32,
    columns=ProjectionColumns(key_heads=16, value_heads=32, key_width=128, value_width=128),
    experts=16,
    expert_width=512,
    vocabulary=3000,
)
"""For GPUs: the widths of Qwen3-Next-80B-A3B, fewer experts and a smaller vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One way to call an operation.

    Attributes:
        make: fresh inputs whose tensors have the given dtype where a model's would, on the default device.
        run: the operation as a function that changes none of its inputs, of which it gets copies where it would.
        gradients: the indices of the inputs that it is differentiable in.
        oracle: what defines the result where that is not `run` by the definitions.
        rounds_hidden: to fp8, inside; the last bit of a sum decides now and then which way, in every dtype (a card
            adds products of fp8 with fewer bits than fp32 has), and among the few values of a small sample that shows.
    """

    operation: str
    make: Callable[[torch.dtype], tuple[Any, ...]]
    run: Callable[..., Any]
    gradients: tuple[int, ...] = ()
    oracle: Callable[..., Any] | None = None
    rounds_hidden: bool = False


def samples(sizes: Sizes) -> Iterator[Sample]:
    """Every operation that has a twin, each at least once."""
    attention = (_norms, _rotary, _gates, _pages)
    delta_net = (_convolution, _delta_rule, _delta_net_step)
    for family in (*attention, *delta_net, _fp8, _linear, _experts, _head):
        yield from family(sizes)


def converted(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested tuples, lists and dataclasses in which `convert` has been applied to every tensor."""
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, tuple | list):
        parts: list[Any] = [converted(part, convert) for part in cast("tuple[Any, ...] | list[Any]", value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: converted(getattr(value, part.name), convert) for part in fields(value)})
    return value


def _norms(s: Sizes) -> Iterator[Sample]:
    def row(dtype: torch.dtype) -> tuple[Any, ...]:
        return _normal(dtype, s.tokens, s.hidden), _normal(dtype, s.hidden) / 4, EPS

    def heads(dtype: torch.dtype) -> tuple[Any, ...]:
        shape = (s.tokens, s.columns.value_heads, s.columns.value_width)
        return _normal(dtype, *shape), _normal(dtype, *shape), _normal(dtype, shape[-1]), EPS

    def add(dtype: torch.dtype) -> tuple[Any, ...]:
        return _normal(dtype, s.tokens, s.hidden), *row(dtype)

    # The definition computes in fp32 whatever it is given.
    yield Sample(operation="rms_norm", make=row, run=rms_norm, gradients=(0, 1), oracle=_plain_norm)
    yield Sample(operation="add_rms_norm", make=add, run=add_rms_norm, gradients=(0, 1, 2), oracle=_plain_added_norm)
    yield Sample(operation="gated_rms_norm", make=heads, run=gated_rms_norm, gradients=(0, 1, 2))


def _rotary(s: Sizes) -> Iterator[Sample]:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        return _normal(dtype, s.tokens, s.heads, s.head_width), *_tables(dtype, s)

    def make_normed(dtype: torch.dtype) -> tuple[Any, ...]:
        x, *tables = make(dtype)
        return x, _normal(dtype, s.head_width) / 4, EPS, *tables

    def plain(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        return apply_rotary(_plain_norm(x, weight, eps), cos, sin)

    yield Sample(operation="apply_rotary", make=make, run=apply_rotary, gradients=(0,))
    yield Sample(operation="rms_norm_rotary", make=make_normed, run=rms_norm_rotary, gradients=(0, 1), oracle=plain)


def _gates(s: Sizes) -> Iterator[Sample]:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        return _normal(dtype, s.tokens, s.heads, s.head_width), _normal(dtype, s.tokens, s.heads, s.head_width)

    def make_wide(dtype: torch.dtype) -> tuple[Any, ...]:
        return _normal(dtype, s.tokens, s.expert_width), _normal(dtype, s.tokens, s.expert_width)

    yield Sample(operation="sigmoid_gate", make=make, run=sigmoid_gate, gradients=(0, 1))
    yield Sample(operation="swiglu", make=make_wide, run=swiglu, gradients=(0, 1))


def _convolution(s: Sizes) -> Iterator[Sample]:
    channels, taps = s.columns.channels, 4

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        state = _normal(dtype, len(s.lengths), channels, taps - 1)
        return _projected(dtype, s), _normal(dtype, channels, taps) / 2, _segments(s.lengths), state, s.columns

    def make_slots(dtype: torch.dtype) -> tuple[Any, ...]:
        x, weight, segments, _, columns = make(dtype)
        states = _normal(dtype, len(s.lengths) + 2, channels, taps - 1)
        return x, weight, segments, states, _slots(s), columns, _snapshots(s)

    yield Sample(operation="causal_conv", make=make, run=causal_conv, gradients=(0, 1, 3))
    yield Sample(operation="causal_conv_", make=make_slots, run=_on_copies(causal_conv_, 3))


def _delta_rule(s: Sizes) -> Iterator[Sample]:
    c = s.columns

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        log_decay, beta = -2 * torch.rand(s.tokens, c.value_heads) ** 3, torch.rand(s.tokens, c.value_heads)
        state = torch.randn(len(s.lengths), c.value_heads, c.key_width, c.value_width)
        heads = c.heads(_normal(dtype, s.tokens, c.channels))
        return *heads, log_decay, beta, _segments(s.lengths), state

    def make_slots(dtype: torch.dtype) -> tuple[Any, ...]:
        *fields, state = make(dtype)
        return *fields, torch.cat([state, state[:2]]), _slots(s), _snapshots(s)

    yield Sample(
        operation="gated_delta_rule",
        make=make,
        run=gated_delta_rule,
        gradients=(0, 1, 2, 3, 4, 6),
        oracle=gated_delta_rule_recurrent,
    )
    yield Sample(operation="gated_delta_rule_", make=make_slots, run=_on_copies(gated_delta_rule_, 6))


def _delta_net_step(s: Sizes) -> Iterator[Sample]:
    c, tokens, count = s.columns, 3, len(s.lengths)

    def make(dtype: torch.dtype, drafts: bool) -> tuple[Any, ...]:
        decay, bias = torch.randn(2, c.value_heads).unbind()
        weights = StepWeights(_normal(dtype, c.channels, 4), decay, bias, _normal(dtype, c.value_width), EPS, c)
        state = converted(StepState.allocate(count + 2, weights, tokens, dtype), lambda x: torch.randn_like(x))
        projected = _projected(dtype, s, count * tokens)
        accepted = torch.arange(count, dtype=torch.int32) % (tokens + 1) if drafts else None
        ba = _normal(dtype, count * tokens, 2 * c.value_heads)
        return projected, ba, weights, state, _slots(s), _segments([tokens] * count), accepted

    for drafts in (False, True):
        yield Sample(
            operation="delta_net_step_",
            make=lambda dtype, drafts=drafts: make(dtype, drafts),
            run=_on_copies(delta_net_step_, 3),
        )


def _pages(s: Sizes) -> Iterator[Sample]:
    """Prompts that go on from a cache, and a few tokens of each sequence, whose cache may be shorter than that."""
    few = tuple(min(3, length) for length in s.lengths)

    def memory(dtype: torch.dtype) -> KeyPages:
        each = 2 + max(s.lengths) // PAGE
        keys, values = (_normal(dtype, each * len(s.lengths), PAGE, s.kv_heads, s.head_width) for _ in range(2))
        table = torch.randperm(len(keys), dtype=torch.int32).view(len(s.lengths), each)
        before = torch.tensor([0, 3, PAGE, PAGE - 1][: len(s.lengths)], dtype=torch.int32)
        return KeyPages(keys, values, table, before + torch.tensor(s.lengths, dtype=torch.int32))

    def make(dtype: torch.dtype, lengths: tuple[int, ...]) -> tuple[Any, ...]:
        q, gate = _normal(dtype, sum(lengths), s.heads, 2 * s.head_width).chunk(2, dim=-1)
        return q, memory(dtype), _segments(lengths), gate

    def make_new(dtype: torch.dtype) -> tuple[Any, ...]:
        k, v = _normal(dtype, s.tokens, s.kv_heads, 2 * s.head_width).chunk(2, dim=-1)
        return k, v, memory(dtype), _segments(s.lengths)

    for lengths in (s.lengths, few):
        make_some = partial(make, lengths=lengths)
        yield Sample(operation="paged_attention", make=make_some, run=paged_attention)
    yield Sample(operation="write_pages_", make=make_new, run=_on_copies(write_pages_, 2))


def _fp8(s: Sizes) -> Iterator[Sample]:
    def rows(dtype: torch.dtype) -> tuple[Any, ...]:
        return (_normal(dtype, s.tokens, s.hidden + 8),)

    def stored(dtype: torch.dtype) -> tuple[Any, ...]:
        return *_block_fp8(s.hidden, s.hidden + 8), dtype

    yield Sample(operation="quantize_activations", make=rows, run=quantize_activations)
    yield Sample(operation="quantize_block_fp8", make=rows, run=quantize_block_fp8)
    yield Sample(operation="dequantize_block_fp8", make=stored, run=dequantize_block_fp8)


def _linear(s: Sizes) -> Iterator[Sample]:
    def make(dtype: torch.dtype, tokens: int) -> tuple[Any, ...]:
        weight = _normal(dtype, 2 * s.hidden, s.hidden) / s.hidden**0.5
        return _normal(dtype, tokens, s.hidden), weight, None, _normal(dtype, 2 * s.hidden)

    def make_fp8(dtype: torch.dtype, tokens: int) -> tuple[Any, ...]:
        return _normal(dtype, tokens, s.hidden), *_block_fp8(2 * s.hidden, s.hidden), _normal(dtype, 2 * s.hidden)

    yield Sample(operation="linear", make=lambda dtype: make(dtype, s.tokens), run=linear, gradients=(0, 1, 3))
    for tokens in (1, 9, s.tokens):
        yield Sample(operation="linear", make=lambda dtype, tokens=tokens: make(dtype, tokens), run=linear)
        yield Sample(operation="linear", make=lambda dtype, tokens=tokens: make_fp8(dtype, tokens), run=linear)


def _experts(s: Sizes) -> Iterator[Sample]:
    sizes, top_k = (s.experts, s.hidden, s.expert_width), 3

    def make_route(dtype: torch.dtype) -> tuple[Any, ...]:
        # Far apart, so that rounding cannot change which scores are the largest.
        gate = torch.linspace(-1, 1, s.experts)[:, None] * torch.ones(s.hidden) / s.hidden
        return (_normal(dtype, s.tokens, s.hidden) + 9).to(dtype), gate.to(dtype), top_k, True

    def make(dtype: torch.dtype, tokens: int) -> tuple[Any, ...]:
        e, d, f = sizes
        weights = _normal(dtype, e, 2 * f, d) / d**0.5, _normal(dtype, e, d, f) / f**0.5
        shared = SharedExpert(weights[0][0, :f], weights[0][0, f:], weights[1][0], _normal(dtype, 1, d) / d**0.5)
        experts = torch.rand(tokens, e).topk(top_k).indices
        return _normal(dtype, tokens, d), *weights, torch.rand(tokens, top_k).to(dtype), experts, None, shared

    def make_fp8(dtype: torch.dtype, tokens: int) -> tuple[Any, ...]:
        e, d, f = sizes
        x, _, _, weights, experts, _, _ = make(dtype, tokens)
        up, down = _block_fp8(2 * e, f, d), _block_fp8(e, d, f)
        scales = ExpertScales(up.scale_inv.view(e, -1, up.scale_inv.shape[-1]), down.scale_inv)
        own = up.scale_inv[0], up.scale_inv[1], down.scale_inv[0]
        shared = SharedExpert(up.values[0], up.values[1], down.values[0], _normal(dtype, 1, d) / d**0.5, own)
        return x, up.values.view(e, 2 * f, d), down.values, weights, experts, scales, shared

    yield Sample(operation="route", make=make_route, run=route, gradients=(0, 1))
    yield Sample(
        operation="swiglu_experts",
        make=lambda dtype: make(dtype, s.tokens)[:5],
        run=swiglu_experts,
        gradients=(0, 1, 2, 3),
    )
    for tokens in (2, s.tokens):
        for made in (make, make_fp8):
            yield Sample(
                operation="swiglu_experts",
                make=lambda dtype, made=made, tokens=tokens: made(dtype, tokens),
                run=swiglu_experts,
                rounds_hidden=made is make_fp8,
            )


def _head(s: Sizes) -> Iterator[Sample]:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        hidden, weight = _normal(dtype, s.tokens, s.hidden), _normal(dtype, s.vocabulary, s.hidden)
        targets = torch.randint(s.vocabulary, (s.tokens,))
        targets[::7] = IGNORED
        return hidden, weight / s.hidden**0.5, targets

    def make_clear(dtype: torch.dtype) -> tuple[Any, ...]:
        hidden, weight, _ = make(dtype)
        ids = torch.randint(s.vocabulary - 9, hidden.shape[:1])
        return hidden + 9 * weight[ids], weight, None, s.vocabulary - 9

    yield Sample(operation="linear_cross_entropy", make=make, run=linear_cross_entropy, gradients=(0, 1))
    yield Sample(operation="linear_argmax", make=make_clear, run=linear_argmax)


def _plain_added_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _plain_norm(x + residual, weight, eps), x + residual


def _plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * (1 + weight)


def _normal(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


def _block_fp8(*shape: int) -> BlockFp8:
    """A weight whose products are about as large as what it is multiplied with."""
    return quantize_block_fp8(torch.randn(shape) / shape[-1] ** 0.5)


def _projected(dtype: torch.dtype, s: Sizes, tokens: int | None = None) -> Tensor:
    width = s.columns.channels + s.columns.key_heads * s.columns.values
    return _normal(dtype, s.tokens if tokens is None else tokens, width)


def _segments(lengths: list[int] | tuple[int, ...]) -> Segments:
    return Segments.from_lengths(lengths)


def _slots(s: Sizes) -> Tensor:
    return torch.arange(len(s.lengths), dtype=torch.int32).flip(0)


def _snapshots(s: Sizes) -> Snapshots:
    """Inside the first sequence and at its end, in the two slots that no sequence owns."""
    count, first = len(s.lengths), s.lengths[0]
    return Snapshots.at([first // 2, first], [count, count + 1])


def _tables(dtype: torch.dtype, s: Sizes) -> tuple[Tensor, Tensor]:
    angles = torch.rand(s.tokens, 1, s.rotated) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _on_copies(run: Callable[..., Any], state: int) -> Callable[..., Any]:
    """Of an operation that writes to its input number `state`: what it returns, and what it leaves there."""

    def copied(*inputs: Any) -> tuple[Any, Any]:
        own = list(inputs)
        own[state] = converted(own[state], torch.clone)
        return run(*own), own[state]

    return copied
