"""Attention over pages, by its definition, against a naive softmax in fp64."""

import pytest
import torch
from tests.ops.checks import relative_error
from tests.ops.pages_cases import BATCHES, filled_pages, query_and_gate
from torch import Tensor

from qwen3_next.ops.attention import attention
from qwen3_next.ops.backend import use
from qwen3_next.ops.paged_attention import paged_attention
from qwen3_next.ops.pages import KeyPages, write_pages_
from qwen3_next.ops.segments import Segments


def naive(q: Tensor, pages: KeyPages, counts: list[int], gate: Tensor | None) -> Tensor:
    """One query and one head at a time."""
    output, row, group = torch.zeros(q.shape, dtype=torch.float64), 0, q.shape[1] // pages.keys.shape[2]
    for n, count in enumerate(counts):
        keys, values = (x.double() for x in pages.of_sequence(n))
        for seen in range(len(keys) - count + 1, len(keys) + 1):
            for h in range(q.shape[1]):
                if seen > 0:
                    scores = keys[:seen, h // group] @ q[row, h].double() / q.shape[-1] ** 0.5
                    output[row, h] = scores.softmax(0) @ values[:seen, h // group]
            row += 1
    return output if gate is None else output * gate.double().sigmoid()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.2e-2)])
@pytest.mark.parametrize(("counts", "lengths"), BATCHES)
def test_is_the_naive_softmax_of_each_sequence(
    counts: list[int], lengths: list[int], dtype: torch.dtype, tolerance: float, gated: bool
) -> None:
    pages = filled_pages(lengths, dtype=dtype)
    q, gate = query_and_gate(sum(counts), 6, 16, dtype)
    with use("reference"):
        result = paged_attention(q, pages, Segments.from_lengths(counts), gate if gated else None)
    assert result.dtype == dtype
    assert relative_error(result, naive(q, pages, counts, gate if gated else None)) <= tolerance


@pytest.mark.parametrize("parts", [[40], [1] * 40, [17, 3, 1, 19]])
def test_split_is_whole(parts: list[int]) -> None:
    """A sequence that comes in parts gets what it gets when it comes at once without pages."""
    q, k, v = torch.randn(40, 4, 16), torch.randn(40, 2, 16), torch.randn(40, 2, 16)
    whole = Segments.from_lengths([40])
    memory, outputs, length = filled_pages([40]), [], 0
    for count in parts:
        part, length = slice(length, length + count), length + count
        pages = KeyPages(memory.keys, memory.values, memory.table, torch.tensor([length], dtype=torch.int32))
        write_pages_(k[part], v[part], pages, Segments.from_lengths([count]))
        outputs.append(paged_attention(q[part], pages, Segments.from_lengths([count])))
    assert relative_error(torch.cat(outputs), attention(q, k, v, whole, whole)) <= 2e-6
