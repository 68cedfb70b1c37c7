"""The kernels of attention over pages against the definition."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from tests.ops.checks import assert_pure, relative_error, tolerance
from tests.ops.pages_cases import BATCHES, filled_pages, query_and_gate, widened
from torch import Tensor

from qwen3_next.errors import BackendError
from qwen3_next.ops import paged_chunk_cudnn, paged_chunk_triton
from qwen3_next.ops.backend import Backend, use
from qwen3_next.ops.paged_attention import paged_attention
from qwen3_next.ops.pages import KeyPages, write_pages_
from qwen3_next.ops.segments import Segments

NAME = "paged_attention"
BACKENDS: list[Backend] = ["triton", "reference"]


def assert_equals_the_definition(q: Tensor, pages: KeyPages, counts: Sequence[int], gate: Tensor | None) -> None:
    segments = Segments.from_lengths(counts)
    with use("triton"):
        result = paged_attention(q, pages, segments, gate)
    with use("reference"):
        wide = None if gate is None else gate.float()
        expected = paged_attention(q.float(), widened(pages), segments, wide)
    assert (result.shape, result.dtype) == (q.shape, q.dtype)
    assert relative_error(result, expected) <= tolerance(NAME, q.dtype)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("counts", "lengths"), BATCHES)
def test_equals_the_definition(counts: list[int], lengths: list[int], dtype: torch.dtype, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    q, gate = query_and_gate(sum(counts), 6, 16, dtype)
    assert_equals_the_definition(q, filled_pages(lengths, dtype=dtype), counts, gate)


@pytest.mark.parametrize(("heads", "kv_heads", "width", "page"), [(4, 4, 16, 16), (8, 1, 40, 32), (3, 1, 24, 64)])
def test_equals_the_definition_in_other_shapes(
    heads: int, kv_heads: int, width: int, page: int, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    for counts, lengths in (([2, 2], [70, 3]), ([1, 11], [65, 80])):
        q, _ = query_and_gate(sum(counts), heads, width, torch.float16)
        assert_equals_the_definition(q, filled_pages(lengths, kv_heads, width, page, torch.float16), counts, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", range(1, 10))
def test_any_number_of_queries(count: int, dtype: torch.dtype, fresh_seed: int) -> None:
    """With 8 heads a group, as published: the products have up to 64 rows."""
    torch.manual_seed(fresh_seed)
    q, gate = query_and_gate(2 * count, 8, 16, dtype)
    assert_equals_the_definition(q, filled_pages([50, count], 1, dtype=dtype), [count, count], gate)


@pytest.mark.parametrize("counts", [[1, 1], [9, 9]])
def test_large_scores_stay_finite(counts: list[int], fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    q, _ = query_and_gate(sum(counts), 2, 16, torch.float32)
    pages, segments = filled_pages([60, 20]), Segments.from_lengths(counts)
    results: list[Tensor] = []
    for backend in BACKENDS:
        with use(backend):
            results.append(paged_attention(q * 1e3, pages, segments))
    assert relative_error(*results) <= 1e-4  # scores are around 1,000


@pytest.mark.parametrize("counts", [[1, 1], [3, 10]])
def test_memory_of_all_layers_may_be_one_tensor(counts: list[int], fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    alone = filled_pages([33, 20])
    memory = torch.full((len(alone.keys), 3, 2, *alone.keys.shape[1:]), float("nan"))
    memory[:, 1, 0], memory[:, 1, 1] = alone.keys, alone.values
    q, gate = query_and_gate(sum(counts), 4, 16, torch.float32)
    with use("triton"):
        expected = paged_attention(q, alone, Segments.from_lengths(counts), gate)
        pages = KeyPages(memory[:, 1, 0], memory[:, 1, 1], alone.table, alone.lengths)
        assert torch.equal(paged_attention(q, pages, Segments.from_lengths(counts), gate), expected)


@pytest.mark.parametrize("counts", [[2, 2], [1, 12]])
def test_inputs_stay_and_a_second_run_is_identical(counts: list[int], fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    pages, segments = filled_pages([48, 16]), Segments.from_lengths(counts)

    def run(q: Tensor, gate: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return paged_attention(q, KeyPages(keys, values, pages.table, pages.lengths), segments, gate)

    with use("triton"):
        memory = pages.keys.nan_to_num(), pages.values.nan_to_num()
        assert_pure(run, (*query_and_gate(sum(counts), 4, 16, torch.float32), *memory))


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_no_tokens_give_no_output(counts: list[int]) -> None:
    q, gate = query_and_gate(0, 4, 16, torch.float32)
    pages, segments = filled_pages([5 for _ in counts]), Segments.from_lengths(counts)
    with use("triton"):
        assert paged_attention(q, pages, segments, gate).shape == q.shape


def test_what_is_not_taken_is_said() -> None:
    q, _ = query_and_gate(1, 2, 16, torch.float32)
    segments = Segments.from_lengths([1])
    with use("triton"):
        with pytest.raises(BackendError, match="of different dtypes"):
            paged_attention(q.half(), filled_pages([1]), segments)
        with pytest.raises(BackendError, match="float64 is not computed"):
            paged_attention(q.double(), filled_pages([1], dtype=torch.float64), segments)
        with pytest.raises(BackendError, match="pages of 24 tokens"):
            paged_attention(q, filled_pages([1], page=24), segments)
        with pytest.raises(BackendError, match="no multiple of 16 bytes"):
            paged_attention(torch.randn(1, 2, 17), filled_pages([1], width=17), segments)


PUBLISHED = [
    ([1] * 5, [1000, 63, 64, 65, 1]),
    ([1], [70_001]),
    ([3] * 4, [700, 128, 3, 0]),
    ([8, 8], [300, 64]),
    ([5, 1, 0, 8], [5, 9000, 64, 4097]),
    ([100, 20, 1], [100, 333, 5000]),
    ([257], [1025]),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("counts", "lengths", "dtype"),
    [*((*batch, torch.bfloat16) for batch in PUBLISHED), *((*batch, torch.float32) for batch in PUBLISHED[-3:])],
)
def test_the_published_sizes(counts: list[int], lengths: list[int], dtype: torch.dtype, fresh_seed: int) -> None:
    """In fp32 fewer, which compile for long."""
    torch.manual_seed(fresh_seed)
    q, gate = query_and_gate(sum(counts), 16, 256, dtype)
    assert_equals_the_definition(q, random_pages(lengths, dtype), counts, gate)


@pytest.mark.parametrize("before", [0, 16, 7, 32, 101])
def test_round_chunks_are_put_together_from_parts(
    before: int, monkeypatch: pytest.MonkeyPatch, on_device: str, fresh_seed: int
) -> None:
    """On a CPU with plain arithmetic in place of cuDNN, and small parts."""
    torch.manual_seed(fresh_seed)
    unit, dtype = (16, torch.float32) if on_device == "cpu" else (1024, torch.bfloat16)
    monkeypatch.setattr(paged_chunk_cudnn, "SMALLEST", unit)
    monkeypatch.setattr(paged_chunk_cudnn, "LARGEST", 2 * unit)
    before, count = before * unit // 16, 2 * unit
    pages = (filled_pages if on_device == "cpu" else random_pages)([5, before + count], dtype=dtype)
    pages = dataclasses.replace(pages, known_lengths=(0, before + count))
    q, _ = query_and_gate(count, 4, pages.keys.shape[-1], dtype)
    with use("reference"):
        expected = paged_attention(torch.cat([q[:1], q]).float(), widened(pages), Segments.from_lengths([1, count]))[1:]
    result = paged_chunk_cudnn.attend_round_chunk(q, pages, 1)
    assert relative_error(result, expected) <= tolerance(NAME, dtype)[0]


def test_parts_are_of_few_sizes() -> None:
    smallest, largest = paged_chunk_cudnn.SMALLEST, paged_chunk_cudnn.LARGEST
    assert paged_chunk_cudnn.part_sizes(0) == []
    assert paged_chunk_cudnn.part_sizes(7 * smallest) == [4 * smallest, 2 * smallest, smallest]
    assert paged_chunk_cudnn.part_sizes(2 * largest + smallest) == [largest, largest, smallest]


@pytest.mark.gpu
def test_round_chunks_beside_other_sequences(monkeypatch: pytest.MonkeyPatch, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    counts, lengths = [1, 2048, 100, 4096], [500, 2048, 300, 9000]
    assert [paged_chunk_cudnn.is_round(*pair) for pair in zip(counts, lengths, strict=True)] == [False] * 4
    for module in (paged_chunk_cudnn, paged_chunk_triton):
        monkeypatch.setattr(module, "WORTH", 4096 * 9000)
    assert [paged_chunk_cudnn.is_round(*pair) for pair in zip(counts, lengths, strict=True)] == [False] * 3 + [True]
    pages = dataclasses.replace(random_pages(lengths, torch.bfloat16), known_lengths=(0, 2048, 0, 9000))
    q, gate = query_and_gate(sum(counts), 16, 256, torch.bfloat16)
    assert_equals_the_definition(q, pages, counts, gate)
    assert_equals_the_definition(q, pages, counts, None)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3])
def test_a_graph_follows_table_and_lengths(count: int, fresh_seed: int) -> None:
    """Captured once, replayed for other sequences: longer, shorter, null."""
    torch.manual_seed(fresh_seed)
    pages, segments = random_pages([900, 10, 333], torch.bfloat16, 45), Segments.uniform(3, count, "cuda")
    q, gate = query_and_gate(3 * count, 16, 256, torch.bfloat16)
    k, v = query_and_gate(3 * count, 2, 256, torch.bfloat16)

    def step() -> Tensor:
        write_pages_(k, v, pages, segments)
        return paged_attention(q, pages, segments, gate)

    with use("triton"):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
    for lengths in ([901, 11, 334], [64, 0, 5], [65, 960, 128]):
        other = random_pages([960] * 3, torch.bfloat16, 45)
        pages.keys.copy_(other.keys)
        pages.values.copy_(other.values)
        pages.table.copy_(other.table[:, : pages.table.shape[1]])
        pages.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        with use("reference"):
            expected = paged_attention(q.float(), widened(pages), segments, gate.float())
        assert relative_error(result, expected) <= tolerance(NAME, torch.bfloat16)[0]


def random_pages(lengths: Sequence[int], dtype: torch.dtype, pages: int = 0) -> KeyPages:
    """Of the published sizes; pages of 64 tokens, all finite."""
    counts = [-(-length // 64) for length in lengths]
    memory = [torch.randn(max(pages, sum(counts)), 64, 2, 256).to(dtype) for _ in range(2)]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for n, part in enumerate(torch.randperm(sum(counts)).int().split(counts)):
        table[n, : len(part)] = part
    return KeyPages(memory[0], memory[1], table, torch.tensor(lengths, dtype=torch.int32))
