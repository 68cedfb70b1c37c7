"""Attention of long round chunks of new tokens over pages by cuDNN, with keys copied out of their pages.

cuDNN is up to 1.4 times as fast as the kernel of `paged_chunk_triton.py`, but plans every new shape for tens of
milliseconds and knows causal order only from the first key on. So the keys before a chunk are cut into parts whose
sizes are powers of two, which every query sees all of, and a square at the end, and what the parts give is joined by
the sums behind their softmaxes. However long sequences become, there is a handful of shapes for each size of chunk.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qwen3_next.ops.attention import PartialAttention, cudnn_attention
from qwen3_next.ops.pages import KeyPages

ROUND, WORTH = 2_048, 2**27
"""Chunks of a multiple of this many new tokens are taken, which is what schedulers cut long prompts into, but not their
ends; and only where new tokens times all tokens are enough to repay the copies. Measured on an H100."""

SMALLEST, LARGEST = 1_024, 65_536
"""Keys of a part."""


def takes_round_chunks(q: Float[Tensor, "T H Dh"], pages: KeyPages) -> bool:
    """Whether `attend_round_chunk` can take sequences of these tensors here; `is_round` says which it should."""
    if pages.known_lengths is None or not q.is_cuda or q.dtype == torch.float32 or SMALLEST % pages.page:
        return False
    works = torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(q.device)[0] == 9
    return works and q.shape[-1] in (64, 128, 256) and not torch.cuda.is_current_stream_capturing()


def is_round(new: int, length: int) -> bool:
    """Whether a sequence of this length with so many new tokens is for cuDNN."""
    return new > 0 and new % ROUND == 0 and new * length >= WORTH


def attend_round_chunk(q: Float[Tensor, "C H Dh"], pages: KeyPages, n: int) -> Float[Tensor, "C H Dh"]:
    """The attention of the last C tokens of sequence n, whose length is known."""
    assert pages.known_lengths is not None
    length, count = pages.known_lengths[n], len(q)
    before = length - count
    whole = before - before % SMALLEST
    result = _attend_square(q, *_keys_of(pages, n, whole, length), before - whole)
    first = 0
    for size in part_sizes(whole):
        keys, values = _keys_of(pages, n, first, first + size)
        result = _joined(result, attend_part(q[None], keys[None], values[None], is_causal=False))
        first += size
    return result.output[0]


def part_sizes(keys: int) -> list[int]:
    """Powers of two times SMALLEST, at most LARGEST, largest first."""
    sizes: list[int] = []
    while keys > 0:
        sizes.append(min(LARGEST, SMALLEST << (keys // SMALLEST).bit_length() - 1))
        keys -= sizes[-1]
    return sizes


def _keys_of(pages: KeyPages, n: int, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Copies of the keys and values of these tokens; `first` begins a page."""
    where = pages.table[n, first // pages.page : -(-end // pages.page)]
    return tuple(x.index_select(0, where).flatten(0, 1)[: end - first] for x in (pages.keys, pages.values))  # type: ignore[return-value]


def _attend_square(q: Tensor, keys: Tensor, values: Tensor, before: int) -> PartialAttention:
    """Causal, `before` keys ahead of the first query: with as many queries of zeros, and padded to a usual size."""
    count = len(q)
    if before:
        behind = SMALLEST - before
        q = F.pad(q, (0, 0, 0, 0, before, behind))
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, behind)) for x in (keys, values))
    output, log_sum = attend_part(q[None], keys[None], values[None], is_causal=True)
    return PartialAttention(output[:, before : before + count], log_sum[:, before : before + count])


def _joined(a: PartialAttention, b: PartialAttention) -> PartialAttention:
    """Attention to the keys of both."""
    share = torch.sigmoid(b.log_sum - a.log_sum)[..., None].to(a.output.dtype)
    return PartialAttention(torch.lerp(a.output, b.output, share), torch.logaddexp(a.log_sum, b.log_sum))


def attend_part(
    q: Float[Tensor, "N Q H Dh"], k: Float[Tensor, "N S Hkv Dh"], v: Float[Tensor, "N S Hkv Dh"], is_causal: bool
) -> PartialAttention:
    """`cudnn_attention`, on a CPU written out."""
    if q.is_cuda:
        return cudnn_attention(q, k, v, is_causal)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("nqhd,nshd->nqhs", q, k) * q.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(q.shape[1], k.shape[1]).triu(1).bool()[:, None], float("-inf"))
    return PartialAttention(torch.einsum("nqhs,nshd->nqhd", scores.softmax(-1), v), scores.logsumexp(-1))
