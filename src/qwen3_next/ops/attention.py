"""Causal grouped-query attention over packed sequences, with or without earlier keys."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from qwen3_next.ops.segments import Segments


class WeightedAttention(NamedTuple):
    """The attention output and the probabilities behind it."""

    output: Float[Tensor, "N Q H Dh"]
    weights: Float[Tensor, "N H Q S"]


def attention(
    q: Float[Tensor, "T H Dh"],
    k: Float[Tensor, "S Hkv Dh"],
    v: Float[Tensor, "S Hkv Dh"],
    segments: Segments,
    key_segments: Segments,
    dropout: float = 0.0,
) -> Float[Tensor, "T H Dh"]:
    """`softmax(q k^T / sqrt(Dh)) v` inside each sequence, causal.

    Sequence n's queries are the last `segments.lengths[n]` of its `key_segments.lengths[n]` keys: with equal lengths
    this is self-attention, with more keys than queries the earlier keys come from a cache. Query head h reads
    key/value head `h // (H / Hkv)`. (Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Ainslie et al. 2023,
    arXiv:2305.13245 for the grouping.)

    Args:
        dropout: probability that an attention weight is dropped (training only).
    """
    if segments.total == 0:
        return torch.zeros_like(q)
    if segments.lengths == key_segments.lengths and cudnn_pays(q, segments) and dropout == 0:
        q, k, v = (_batched(x, segments.count) for x in (q, k, v))
        return cudnn_attention(q, k, v, is_causal=True).output.flatten(0, 1)
    if segments.max_length > 1 and _flash_takes(q):
        return _attend_packed(q, k, v, segments, key_segments, dropout)
    if segments.is_uniform and key_segments.is_uniform:
        q, k, v = (_batched(x, segments.count) for x in (q, k, v))
        return _attend(q, k, v, dropout).flatten(0, 1)
    return _attend_each(q, k, v, segments, key_segments, dropout)


def cudnn_pays(q: Float[Tensor, "T H Dh"], segments: Segments) -> bool:
    """Whether cuDNN computes causal attention inside these sequences faster than torch's FlashAttention.

    It does at long sequences of one length, measured on an H100. But it plans every new shape (60 ms, 140 ms with
    gradients, and seconds for the first), so lengths that are not round, and may never come again, are not for it.
    """
    length, is_16_bit = segments.max_length, q.dtype in (torch.bfloat16, torch.float16)
    if not (q.is_cuda and is_16_bit and segments.is_uniform and length % 256 == 0 and q.shape[-1] in (64, 128, 256)):
        return False
    works = torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(q.device)[0] == 9
    return works and segments.count * length**2 >= 2**23 and not torch.cuda.is_current_stream_capturing()


class PartialAttention(NamedTuple):
    """Attention to some of the keys, and the logarithm of the sum behind its softmax: what joins it with other keys."""

    output: Float[Tensor, "N Q H Dh"]
    log_sum: Float[Tensor, "N Q H"]


def cudnn_attention(
    q: Float[Tensor, "N Q H Dh"], k: Float[Tensor, "N S Hkv Dh"], v: Float[Tensor, "N S Hkv Dh"], is_causal: bool
) -> PartialAttention:
    """`softmax(q k^T / sqrt(Dh)) v` by cuDNN, differentiable in its output.

    The operator behind `F.scaled_dot_product_attention`, which hides the sums.

    Args:
        is_causal: query i looks at the keys up to the i-th, counted from the first; else every query at all of them.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    kernel = cast(Callable[..., tuple[Tensor, ...]], torch.ops.aten._scaled_dot_product_cudnn_attention)
    output, log_sum = kernel(q, k, v, None, True, 0.0, is_causal, False)[:2]
    return PartialAttention(output.transpose(1, 2), log_sum.reshape(q.shape[:3]).transpose(1, 2))


def _flash_takes(q: Tensor) -> bool:
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, key_segments: Segments, dropout: float
) -> Tensor:
    """torch's own FlashAttention kernel over sequences of many lengths in one call, backward pass included.

    The operator behind `torch.nn.attention.varlen`, whose public function knows no grouped heads before torch 2.13.
    """
    lengths = segments.cu_seqlens, key_segments.cu_seqlens, segments.max_length, key_segments.max_length
    kernel = cast(Callable[..., tuple[Tensor, ...]], torch.ops.aten._flash_attention_forward)
    return kernel(q, k, v, *lengths, dropout, True, False)[0]


def _attend_each(q: Tensor, k: Tensor, v: Tensor, segments: Segments, key_segments: Segments, dropout: float) -> Tensor:
    parts = zip(q.split(segments.lengths), k.split(key_segments.lengths), v.split(key_segments.lengths), strict=True)
    outputs = [_attend(qn[None], kn[None], vn[None], dropout)[0] for qn, kn, vn in parts if qn.shape[0]]
    return torch.cat(outputs)


def _batched(x: Tensor, count: int) -> Tensor:
    return x.reshape(count, -1, *x.shape[1:])


def _attend(
    q: Float[Tensor, "N Q H Dh"], k: Float[Tensor, "N S Hkv Dh"], v: Float[Tensor, "N S Hkv Dh"], dropout: float
) -> Float[Tensor, "N Q H Dh"]:
    """Sequences of one length at once."""
    queries, keys = q.shape[1], k.shape[1]
    if queries == 1 and dropout == 0:
        return _attend_one(q, k, v)
    mask = None if queries in (1, keys) else causal_mask(queries, keys, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=queries == keys and queries > 1, enable_gqa=True
    )
    return output.transpose(1, 2)


def _attend_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query per sequence: the query heads of a group become the rows of one matrix product."""
    count, _, heads, width = q.shape
    grouped = q.view(count, k.shape[2], heads // k.shape[2], width)
    scores = torch.matmul(grouped, k.permute(0, 2, 3, 1)) * width**-0.5
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(weights, v.transpose(1, 2)).view(count, 1, heads, width)


def causal_mask(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "Q S"]:
    """True where the query may look: its own key is the one as far from the end as itself."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def cached_attention(
    q: Float[Tensor, "N Q H Dh"],
    k: Float[Tensor, "N S Hkv Dh"],
    v: Float[Tensor, "N S Hkv Dh"],
    mask: Bool[Tensor, "N Q S"] | None,
    dropout: float = 0.0,
) -> Float[Tensor, "N Q H Dh"]:
    """Attention of rows of one length to the keys of a padded cache.

    Args:
        mask: True where a query may look; None where the rows hold no padding: the Q queries are then the last of the
            S keys and causal order is all there is.
    """
    if mask is None:
        return _attend(q, k, v, dropout)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], dropout_p=dropout, enable_gqa=True)
    return output.transpose(1, 2)


def attention_with_weights(
    q: Float[Tensor, "N Q H Dh"],
    k: Float[Tensor, "N S Hkv Dh"],
    v: Float[Tensor, "N S Hkv Dh"],
    mask: Bool[Tensor, "N Q S"],
    dropout: float = 0.0,
) -> WeightedAttention:
    """`cached_attention` written out, softmax in fp32, handing back the probabilities as well."""
    heads = q.shape[2]
    scores = torch.einsum("nqhd,nshd->nhqs", q, _per_query_head(k, heads)) * q.shape[-1] ** -0.5
    hidden = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~mask[:, None], hidden).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, dropout)
    return WeightedAttention(torch.einsum("nhqs,nshd->nqhd", weights, _per_query_head(v, heads)), weights)


def _per_query_head(x: Float[Tensor, "*B Hkv Dh"], heads: int) -> Float[Tensor, "*B H Dh"]:
    return x.repeat_interleave(heads // x.shape[-2], dim=-2)


def chained_attention(
    q: Float[Tensor, "T H Dh"],
    keys: tuple[Float[Tensor, "T Hkv Dh"], ...],
    values: tuple[Float[Tensor, "T Hkv Dh"], ...],
    segments: Segments,
    dropout: float = 0.0,
) -> Float[Tensor, "T H Dh"]:
    """Attention of the last step of a draft chain that starts at every token at once.

    A chain begun at token i sees the committed keys `keys[0]` of tokens j <= i, and of every later step only its own
    key, `keys[s][i]`: what one query of a drafting layer finds in its cache when it drafts step by step.

    Args:
        dropout: probability that an attention weight is dropped (training only).
    """
    outputs: list[Tensor] = []
    borders = zip(segments.starts, segments.lengths, strict=True)
    for start, length in borders:
        part = slice(start, start + length)
        own = [k[part] for k in keys], [v[part] for v in values]
        outputs.append(_attend_chain(q[part], *own, dropout))
    return torch.cat(outputs) if outputs else torch.zeros_like(q)


def _attend_chain(q: Tensor, keys: list[Tensor], values: list[Tensor], dropout: float) -> Tensor:
    heads, length = q.shape[1], q.shape[0]
    committed = torch.einsum("qhd,shd->hqs", q, _per_query_head(keys[0], heads))
    committed = committed.masked_fill(~causal_mask(length, length, q.device), float("-inf"))
    own = [(q * _per_query_head(k, heads)).sum(-1).transpose(0, 1)[..., None] for k in keys[1:]]
    scores = torch.cat([committed, *own], dim=-1) * q.shape[-1] ** -0.5
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), dropout)
    output = torch.einsum("hqs,shd->qhd", weights[..., :length], _per_query_head(values[0], heads))
    for step, v in enumerate(values[1:]):
        output = output + weights[..., length + step].transpose(0, 1)[..., None] * _per_query_head(v, heads)
    return output
