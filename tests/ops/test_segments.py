"""Borders of packed sequences, and the grid of chunks that they are cut into."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qwen3_next.ops.chunks import Chunks
from qwen3_next.ops.segments import Segments

lengths = st.lists(st.integers(0, 9), max_size=8)
some_tokens = st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any)


@hypothesis_settings(max_examples=60, deadline=None)
@given(lengths)
def test_every_token_knows_its_sequence_and_its_place(lengths: list[int]) -> None:
    segments = Segments.from_lengths(lengths)
    expected = [(n, i) for n, length in enumerate(lengths) for i in range(length)]
    assert list(zip(segments.sequence_ids.tolist(), segments.offsets.tolist(), strict=True)) == expected
    assert segments.cu_seqlens.tolist() == [0, *itertools.accumulate(lengths)]
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.starts == tuple(segments.cu_seqlens.tolist()[:-1])
    assert (segments.count, segments.total, segments.max_length) == (
        len(lengths),
        sum(lengths),
        max(lengths, default=0),
    )
    assert segments.is_uniform == (len(set(lengths)) == 1)


@pytest.mark.parametrize(("count", "length"), [(0, 3), (1, 0), (3, 1), (2, 7)])
def test_uniform_borders_are_those_of_equal_lengths(count: int, length: int) -> None:
    made, written = Segments.uniform(count, length), Segments.from_lengths([length] * count)
    assert torch.equal(made.cu_seqlens, written.cu_seqlens)
    assert made.lengths == written.lengths


def test_borders_go_to_the_device_asked_for(on_device: str) -> None:
    assert Segments.from_lengths([2, 3], on_device).device.type == on_device
    assert Segments.uniform(2, 3, on_device).device.type == on_device


@hypothesis_settings(max_examples=80, deadline=None)
@given(some_tokens, st.integers(1, 12))
def test_join_is_the_inverse_of_split(lengths: list[int], size: int) -> None:
    x = torch.randn(sum(lengths), 2, 3)
    chunks = Chunks.of(Segments.from_lengths(lengths), size)
    grid = chunks.split(x)
    assert grid.shape == (sum(chunks.active), 2, size, 3)
    assert torch.equal(chunks.join(grid, len(x)), x)


@hypothesis_settings(max_examples=80, deadline=None)
@given(some_tokens, st.integers(1, 12))
def test_chunks_hold_one_sequence_each_longest_first_and_zeros_where_no_token_is(lengths: list[int], size: int) -> None:
    tokens = torch.arange(1.0, sum(lengths) + 1)
    chunks = Chunks.of(Segments.from_lengths(lengths), size)
    sequences = sorted(tokens.split(lengths), key=len, reverse=True)
    expected = [
        part.tolist() + [0.0] * (size - len(part))
        for c in range(-(-max(lengths) // size))
        for sequence in sequences
        for part in [sequence[c * size : (c + 1) * size]]
        if len(part)
    ]
    assert chunks.split(tokens[:, None, None]).flatten(1).tolist() == expected
    assert list(chunks.active) == sorted(chunks.active, reverse=True)


@hypothesis_settings(max_examples=40, deadline=None)
@given(some_tokens)
def test_unsort_is_the_inverse_of_sort(lengths: list[int]) -> None:
    chunks = Chunks.of(Segments.from_lengths(lengths), 4)
    states = torch.randn(len(lengths), 2)
    assert torch.equal(chunks.unsort(chunks.sort(states)), states)
    by_length = chunks.sort(torch.tensor(lengths, dtype=torch.float32)[:, None])[:, 0].tolist()
    assert by_length == sorted(lengths, reverse=True)
