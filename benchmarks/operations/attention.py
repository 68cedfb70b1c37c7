"""Attention: a few new tokens over pages, chunks of prompts over pages, and whole sequences with gradients."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.operations.case import Case, Inputs
from torch import Tensor

from qwen3_next.ops.attention import attention
from qwen3_next.ops.backend import use
from qwen3_next.ops.paged_attention import paged_attention
from qwen3_next.ops.pages import PAGE, KeyPages
from qwen3_next.ops.segments import Segments

HEADS, KV_HEADS, WIDTH = 16, 2, 256
TOKEN_BYTES = 2 * KV_HEADS * WIDTH * 2
ROW_BYTES = HEADS * WIDTH * 2


def cases() -> Iterator[Case]:
    """The floor of few tokens is the reading of keys and values; that of many the products, half of a square."""
    for sequences, context, new in (
        (1, 32_768, 1),
        (16, 32_768, 1),
        (64, 4_096, 1),
        (1, 262_144, 1),
        (16, 32_768, 3),
    ):
        yield Case(
            operation="attention over pages" if new == 1 else "attention over pages with 2 drafts",
            shape=f"{sequences} x {context:,}",
            make=lambda sequences=sequences, context=context, new=new: _paged(sequences, context, new),
            ours=_over_pages,
            definition=_definition,
            peers={"SDPA, keys in order": _sdpa_decode} if new == 1 else {},
            read_bytes=sequences * (context * TOKEN_BYTES + 2 * new * ROW_BYTES),
            written_bytes=sequences * new * ROW_BYTES,
            tolerance=1e-2,
            goal=1.2,
            graph=True,
        )
    for new, context in ((4_096, 4_096), (32_768, 32_768), (8_192, 32_768), (3_000, 30_000)):
        yield Case(
            operation="attention of a chunk over pages",
            shape=f"{new:,} new of {context:,}",
            make=lambda context=context, new=new: _paged(1, context, new),
            ours=_over_pages,
            definition=_definition,
            peers={"SDPA (cuDNN), keys in order": _cudnn} if new == context else {},
            read_bytes=context * TOKEN_BYTES + 2 * new * ROW_BYTES,
            written_bytes=new * ROW_BYTES,
            flops=4 * HEADS * WIDTH * new * (context - new / 2),
            tolerance=1e-2,
        )
    for lengths in ((4_096,), (32_768,), (1_024,) * 32, (3_000, 200, 900, 4_092)):
        yield Case(
            operation="attention with gradients",
            shape=f"{len(lengths)} x {lengths[0]:,}" if len(set(lengths)) == 1 else f"{lengths} packed",
            make=lambda lengths=lengths: _packed(lengths),
            ours=_gradients,
            definition=_defined_gradients,
            peers={"FlashAttention of torch": _flash_gradients},
            read_bytes=sum(lengths) * (2 * TOKEN_BYTES + 3 * ROW_BYTES),
            written_bytes=sum(lengths) * (TOKEN_BYTES + 2 * ROW_BYTES),
            flops=14 * HEADS * WIDTH * sum(length**2 / 2 for length in lengths),
            tolerance=1e-2,
        )


def _paged(sequences: int, context: int, new: int) -> Inputs:
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    each = -(-context // PAGE)
    keys, values = (torch.randn(sequences * each, PAGE, KV_HEADS, WIDTH, **options) for _ in range(2))
    table = torch.randperm(len(keys), device="cuda", dtype=torch.int32).view(sequences, each)
    lengths = torch.full((sequences,), context, device="cuda", dtype=torch.int32)
    q, gate = torch.randn(sequences * new, HEADS, 2 * WIDTH, **options).chunk(2, dim=-1)
    segments = Segments.uniform(sequences, new, "cuda")
    return q, KeyPages(keys, values, table, lengths, (context,) * sequences), segments, gate


def _packed(lengths: tuple[int, ...]) -> Inputs:
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    q, *kv = (torch.randn(sum(lengths), heads, WIDTH, **options) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, *kv, Segments.from_lengths(lengths, "cuda")


def _over_pages(*inputs: Any) -> Tensor:
    return paged_attention(*inputs)


def _definition(q: Tensor, pages: KeyPages, segments: Segments, gate: Tensor) -> Tensor:
    """Of long chunks some queries at a time, whose scores would not fit otherwise."""
    part = 512
    if segments.max_length <= part:
        with use("reference"):
            return paged_attention(q, pages, segments, gate)
    outputs: list[Tensor] = []
    for first in range(0, len(q), part):
        rows = slice(first, min(first + part, len(q)))
        seen = dataclasses.replace(pages, lengths=pages.lengths - (len(q) - rows.stop))
        with use("reference"):
            queries = Segments.from_lengths([rows.stop - first], "cuda")
            outputs.append(paged_attention(q[rows], seen, queries, gate[rows]))
    return torch.cat(outputs)


def _in_order(pages: KeyPages) -> list[Tensor]:
    """The pages as they lie in memory, taken for those of the sequences: as many bytes, and no table to follow."""
    count = len(pages.lengths)
    return [x.view(count, -1, KV_HEADS, WIDTH).transpose(1, 2) for x in (pages.keys, pages.values)]


def _sdpa_decode(q: Tensor, pages: KeyPages, segments: Segments, gate: Tensor) -> Tensor:
    queries = q.view(segments.count, -1, HEADS, WIDTH).transpose(1, 2)
    return F.scaled_dot_product_attention(queries, *_in_order(pages), enable_gqa=True)


def _cudnn(q: Tensor, pages: KeyPages, segments: Segments, gate: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        queries = q[None].transpose(1, 2)
        return F.scaled_dot_product_attention(queries, *_in_order(pages), is_causal=True, enable_gqa=True)


def _gradients(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    """Where every output has the gradient 1 / 64."""
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    output = attention(*tensors, segments, segments)
    return output.detach(), *torch.autograd.grad(output, tensors, torch.full_like(output, 1 / 64))


def _defined_gradients(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    """Some queries at a time."""
    part, output = 512, torch.empty_like(q)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for start, length in zip(segments.starts, segments.lengths, strict=True):
        for first in range(start, start + length, part):
            end = min(first + part, start + length)
            places = slice(first, end), slice(start, end), slice(start, end)
            parts = [x[place].detach().requires_grad_() for x, place in zip((q, k, v), places, strict=True)]
            ends = (Segments.from_lengths([end - begin], "cuda") for begin in (first, start))
            result = attention(*parts, *ends)
            output[first:end] = result.detach()
            found = torch.autograd.grad(result, parts, torch.full_like(result, 1 / 64))
            for grad, place, piece in zip(grads, places, found, strict=True):
                grad[place] += piece
    return output, *grads


def _flash_gradients(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    borders = segments.cu_seqlens, segments.cu_seqlens, segments.max_length, segments.max_length
    output = torch.ops.aten._flash_attention_forward(*tensors, *borders, 0.0, True, False)[0]
    return torch.autograd.grad(output, tensors, torch.full_like(output, 1 / 64))
