"""Keys and values in pages: the definition, and its kernel, against one token at a time."""

import pytest
import torch
from tests.ops.pages_cases import BATCHES, empty_pages
from torch import Tensor

from qwen3_next.errors import BackendError
from qwen3_next.ops.backend import Backend, use
from qwen3_next.ops.pages import KeyPages, write_pages_
from qwen3_next.ops.segments import Segments

BACKENDS: list[Backend] = ["reference", "triton"]


def write_one_by_one_(k: Tensor, v: Tensor, pages: KeyPages, counts: list[int]) -> None:
    lengths, row = pages.lengths.tolist(), 0
    for n, count in enumerate(counts):
        for t in range(lengths[n] - count, lengths[n]):
            if t >= 0:
                page = int(pages.table[n, t // pages.page])
                pages.keys[page, t % pages.page], pages.values[page, t % pages.page] = k[row], v[row]
            row += 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(2, 16), (1, 24), (3, 8)])
@pytest.mark.parametrize(("counts", "lengths"), BATCHES)
def test_new_tokens_are_stored_where_the_table_says(
    counts: list[int], lengths: list[int], heads: int, width: int, dtype: torch.dtype, backend: Backend, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    pages = empty_pages(lengths, heads, width, dtype=dtype)
    expected = KeyPages(pages.keys.clone(), pages.values.clone(), pages.table, pages.lengths)
    k, v = torch.randn(sum(counts), heads, 2 * width).to(dtype).chunk(2, dim=-1)
    with use(backend):
        write_pages_(k, v, pages, Segments.from_lengths(counts))
    write_one_by_one_(k, v, expected, counts)
    torch.testing.assert_close(pages.keys, expected.keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(pages.values, expected.values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_of_all_layers_may_be_one_tensor(backend: Backend) -> None:
    """A page of one layer is then far from its next page, and the values lie behind the keys."""
    tokens, layers = 20, 3
    memory = torch.full((4, layers, 2, 16, 2, 8), float("nan"))
    lengths, table = torch.tensor([tokens], dtype=torch.int32), torch.tensor([[3, 1]], dtype=torch.int32)
    pages = KeyPages(memory[:, 1, 0], memory[:, 1, 1], table, lengths)
    k, v = torch.randn(tokens, 2, 8), torch.randn(tokens, 2, 8)
    with use(backend):
        write_pages_(k, v, pages, Segments.from_lengths([tokens]))
    assert all(torch.equal(a, b) for a, b in zip(pages.of_sequence(0), (k, v), strict=True))
    assert memory.isfinite().sum() == 2 * tokens * 2 * 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_no_tokens_change_nothing(counts: list[int], backend: Backend) -> None:
    pages = empty_pages([3 for _ in counts])
    with use(backend):
        write_pages_(torch.zeros(0, 2, 16), torch.zeros(0, 2, 16), pages, Segments.from_lengths(counts))
    assert pages.keys.isnan().all()


def test_what_is_not_taken_is_said() -> None:
    pages, k = empty_pages([1]), torch.zeros(1, 2, 16)
    with use("triton"), pytest.raises(BackendError, match="write_pages_ does not take this: fp64"):
        write_pages_(k.double(), k, pages, Segments.from_lengths([1]))
