"""The keys and values that an attention layer keeps, in pages that sequences of any length share."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.backend import accelerated
from qwen3_next.ops.segments import Segments

PAGE = 64
"""Tokens of a page: at the published sizes 128 KiB a layer in bf16, and what a kernel multiplies at once."""


@dataclass(frozen=True, eq=False)
class KeyPages:
    """The memory of one attention layer, and where the tokens of N sequences are in it.

    Token t of sequence n is row `t % page` of page `table[n, t // page]`. The memory belongs to a layer; table and
    lengths are the same for all layers of a call. Which page is whose is decided elsewhere. What the table says behind
    the last token of a sequence is never looked at.

    Attributes:
        keys: P pages; fp32, fp16 or bf16.
        values: as many, of the same dtype.
        table: int32, the pages of each sequence in order; M * page is the most tokens that a sequence may have.
        lengths: int32, the tokens of each sequence including the new ones of this call; 0 marks a null sequence, which
            has no pages, is not written, and whose outputs are zero.
        known_lengths: the same numbers as host integers where the caller knows them, which lets long prompts be
            computed faster; those of sequences with few new tokens are not looked at.
    """

    keys: Float[Tensor, "P page Hkv Dh"]
    values: Float[Tensor, "P page Hkv Dh"]
    table: Int[Tensor, "N M"]
    lengths: Int[Tensor, "N"]
    known_lengths: tuple[int, ...] | None = None

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.keys.shape[1]

    def of_sequence(self, n: int) -> tuple[Float[Tensor, "S Hkv Dh"], Float[Tensor, "S Hkv Dh"]]:
        """A copy of all keys and values of a sequence; waits for the device to learn how many there are."""
        length = int(self.lengths[n])
        pages = self.table[n, : -(-length // self.page)].long()
        return self.keys[pages].flatten(0, 1)[:length], self.values[pages].flatten(0, 1)[:length]


@accelerated("pages_triton")
@torch.no_grad()
def write_pages_(
    k: Float[Tensor, "T Hkv Dh"], v: Float[Tensor, "T Hkv Dh"], pages: KeyPages, segments: Segments
) -> None:
    """Store the keys and values of the new tokens, which are the last `segments.lengths[n]` of `pages.lengths[n]`.

    A token that would come before the first one, as all those of a null sequence do, is not stored. Has no gradient.
    """
    ids = segments.sequence_ids
    counts = segments.cu_seqlens.diff()
    position = (pages.lengths - counts)[ids].long() + segments.offsets
    stored = position >= 0
    ids, position = ids[stored], position[stored]
    places = pages.table[ids, position // pages.page].long(), position % pages.page
    pages.keys[places] = k[stored].to(pages.keys.dtype)
    pages.values[places] = v[stored].to(pages.values.dtype)
