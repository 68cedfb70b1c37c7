"""Inputs that the tests of paged operations share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_next.ops.pages import KeyPages

BATCHES = [
    ([1, 1, 1], [5, 130, 64]),
    ([1], [0]),
    ([2, 2, 2, 2], [0, 65, 1, 63]),
    ([1] * 9, [1, 2, 3, 1, 16, 17, 1, 40, 1]),
    ([3, 0, 1, 8], [40, 7, 33, 70]),
    ([4, 2], [3, 1]),
    ([9, 1, 20], [40, 200, 20]),
    ([30, 12], [29, 90]),
]
"""New tokens and all tokens of each sequence."""


def empty_pages(
    lengths: Sequence[int], heads: int = 2, width: int = 16, page: int = 16, dtype: torch.dtype = torch.float32
) -> KeyPages:
    """Room for sequences of these lengths, in scattered pages full of NaN; the table's unused entries lie outside."""
    counts = [-(-length // page) for length in lengths]
    memory = [torch.full((sum(counts) + 3, page, heads, width), float("nan")).to(dtype) for _ in range(2)]
    table = torch.full((len(lengths), max(counts, default=0) + 2), 2**30, dtype=torch.int32)
    order = (torch.randperm(sum(counts)) + 2).to(table)
    for n, pages in enumerate(order.split(counts)):
        table[n, : len(pages)] = pages
    return KeyPages(memory[0], memory[1], table, torch.tensor(lengths, dtype=torch.int32))


def filled_pages(
    lengths: Sequence[int], heads: int = 2, width: int = 16, page: int = 16, dtype: torch.dtype = torch.float32
) -> KeyPages:
    """The same with random keys and values for every token; what lies behind the last one stays NaN."""
    pages = empty_pages(lengths, heads, width, page, dtype)
    for n, length in enumerate(lengths):
        for t in range(length):
            for memory in (pages.keys, pages.values):
                memory[pages.table[n, t // page], t % page] = torch.randn(heads, width).to(dtype)
    return pages


def widened(pages: KeyPages, dtype: torch.dtype = torch.float32) -> KeyPages:
    """The same numbers in another dtype."""
    return KeyPages(pages.keys.to(dtype), pages.values.to(dtype), pages.table, pages.lengths)


def query_and_gate(tokens: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Views of one tensor, as the query projection gives them: [query | gate] per head."""
    q, gate = torch.randn(tokens, heads, 2 * width).to(dtype).chunk(2, dim=-1)
    return q, gate
