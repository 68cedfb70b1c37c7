"""Attention of new tokens to all tokens of their sequences, whose keys and values lie in pages."""

import torch
from jaxtyping import Float
from torch import Tensor

from qwen3_next.ops.attention import cached_attention
from qwen3_next.ops.backend import accelerated
from qwen3_next.ops.pages import KeyPages
from qwen3_next.ops.segments import Segments


@accelerated("paged_attention_triton")
@torch.no_grad()
def paged_attention(
    q: Float[Tensor, "T H Dh"],
    pages: KeyPages,
    segments: Segments,
    gate: Float[Tensor, "T H Dh"] | None = None,
) -> Float[Tensor, "T H Dh"]:
    """`softmax(q k^T / sqrt(Dh)) v`, causal, over pages; times `sigmoid(gate)` where there is a gate.

    Sequence n's queries are the last `segments.lengths[n]` of its `pages.lengths[n]` tokens, whose keys and values,
    those of the new tokens among them, `pages` holds. Query head h reads key/value head `h // (H / Hkv)`. A query that
    would come before the first token, as all those of a null sequence do, gives zeros. Has no gradient.
    (Kwon et al. 2023, arXiv:2309.06180, section 4.1; Qiu et al. 2025, arXiv:2505.06708, eq. 5 for the gate.)
    """
    output = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for n, (start, count) in enumerate(zip(segments.starts, segments.lengths, strict=True)):
        keys, values = pages.of_sequence(n) if count else (q[:0], q[:0])
        seeing = slice(start + max(0, count - len(keys)), start + count)
        if len(keys):
            output[seeing] = cached_attention(q[None, seeing], keys[None], values[None], None)[0]
    return output if gate is None else output * torch.sigmoid(gate)
