"""Packed batches: every token once an epoch, never across documents, from any cursor on the same."""

import itertools
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train.runs import write_store

from qwen3_next.model.mtp import targets_of_step
from qwen3_next.ops.cross_entropy import IGNORED
from qwen3_next.train.data import Cursor, PackedBatch, PackedDocuments, Prefetcher
from qwen3_next.train.tokens import TokenStore

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int, batch: int, seed: int = 0
) -> PackedDocuments:
    """Documents in two stores whose every token is unique."""
    numbers = itertools.count()
    contents = [[next(numbers) for _ in range(length)] for length in lengths]
    half = (len(contents) + 1) // 2
    parts = [part for part in (contents[:half], contents[half:]) if part]
    stores = [TokenStore.open(write_store(tmp_path_factory.mktemp("stores") / "store", part), 2**16) for part in parts]
    return PackedDocuments(stores, sequence_length, batch, seed)


def pieces_of(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    parts = zip(batch.token_ids.split(list(batch.lengths)), batch.targets.split(list(batch.lengths)), strict=True)
    return [(tokens.tolist(), targets.tolist()) for tokens, targets in parts]


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.integers(2, 20), st.integers(2, 40), st.integers(0, 2**31))
def test_every_token_and_every_target_comes_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int, batch: int, seed: int
) -> None:
    packed = documents(tmp_path_factory, lengths, sequence_length, batch, seed)
    total, epochs = sum(lengths), 3
    assert packed.tokens_per_epoch == total
    seen: Counter[int] = Counter()
    predicted: Counter[int] = Counter()
    stream = packed.batches(Cursor())
    tokens = itertools.chain.from_iterable(zip(b.token_ids.tolist(), b.targets.tolist(), strict=True) for b in stream)
    for token, target in itertools.islice(tokens, epochs * total):
        seen[token] += 1
        predicted[target] += 1
    assert seen == dict.fromkeys(range(total), epochs)
    firsts = set(itertools.accumulate(lengths[:-1], initial=0))
    assert predicted.pop(IGNORED) == epochs * len(lengths)
    assert predicted == {token: epochs for token in range(total) if token not in firsts}


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.integers(2, 20), st.integers(2, 40), st.integers(0, 2**31))
def test_pieces_are_runs_of_one_document_with_its_next_tokens_as_targets(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int, batch: int, seed: int
) -> None:
    packed = documents(tmp_path_factory, lengths, sequence_length, batch, seed)
    document_of = [index for index, length in enumerate(lengths) for _ in range(length)]
    for packed_batch in itertools.islice(packed.batches(Cursor()), 6):
        assert packed_batch.token_ids.numel() == batch == sum(packed_batch.lengths)
        for tokens, targets in pieces_of(packed_batch):
            assert len(tokens) <= sequence_length
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
            assert len({document_of[token] for token in tokens}) == 1
            last = tokens[-1]
            is_end = last + 1 == len(document_of) or document_of[last + 1] != document_of[last]
            assert targets == [*tokens[1:], IGNORED if is_end else last + 1]


@settings(deadline=None, max_examples=15)
@given(LENGTHS, st.integers(2, 20), st.integers(2, 40), st.integers(1, 9))
def test_resumed_at_any_cursor_the_batches_are_those_of_an_uninterrupted_run(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int, batch: int, stop: int
) -> None:
    packed = documents(tmp_path_factory, lengths, sequence_length, batch)
    whole = list(itertools.islice(packed.batches(Cursor()), 12))
    resumed = itertools.islice(packed.batches(whole[stop - 1].after), 12 - stop)
    for expected, found in zip(whole[stop:], resumed, strict=True):
        assert torch.equal(expected.token_ids, found.token_ids)
        assert torch.equal(expected.targets, found.targets)
        assert (expected.lengths, expected.after) == (found.lengths, found.after)


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    lengths = [3] * 40

    def epoch(seed: int, number: int) -> list[int]:
        return next(documents(tmp_path_factory, lengths, 3, 120, seed).batches(Cursor(epoch=number))).token_ids.tolist()

    assert epoch(1, 0) == epoch(1, 0)
    assert len({tuple(epoch(seed, number)) for seed in (1, 2) for number in (0, 1)}) == 4


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.integers(2, 20), st.integers(2, 40), st.integers(0, 4))
def test_targets_are_counted_as_the_model_makes_them(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int, batch: int, steps: int
) -> None:
    packed = documents(tmp_path_factory, lengths, sequence_length, batch)
    for packed_batch in itertools.islice(packed.batches(Cursor()), 3):
        inputs, targets = packed_batch.to(torch.device("cpu"))
        chained = [targets_of_step(targets, inputs.segments, step) for step in range(steps)]
        found = tuple(int((t != IGNORED).sum()) for t in (targets, *chained))
        assert packed_batch.target_counts(steps) == found


@settings(deadline=None, max_examples=15)
@given(LENGTHS, st.integers(2, 20), st.integers(0, 20))
def test_validation_reads_every_document_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int, room: int
) -> None:
    packed = documents(tmp_path_factory, lengths, sequence_length, sequence_length + room)
    batches = list(packed.once())
    assert torch.cat([batch.token_ids for batch in batches]).tolist() == list(range(sum(lengths)))
    assert all(batch.token_ids.numel() <= sequence_length + room for batch in batches)


def test_positions_restart_in_every_piece(tmp_path_factory: pytest.TempPathFactory) -> None:
    inputs, _ = next(documents(tmp_path_factory, [4, 2], 3, 6).batches(Cursor())).to(torch.device("cpu"))
    expected = [offset for length in inputs.segments.lengths for offset in range(length)]
    assert inputs.positions.tolist() == expected


def test_the_prefetcher_hands_on_every_batch_in_order(tmp_path_factory: pytest.TempPathFactory) -> None:
    packed = documents(tmp_path_factory, [7, 5, 11], 4, 6)
    prefetcher = Prefetcher(packed.batches(Cursor()), ahead=2)
    for expected in itertools.islice(packed.batches(Cursor()), 9):
        assert torch.equal(next(prefetcher).token_ids, expected.token_ids)
    prefetcher.close()


def test_the_prefetcher_raises_the_error_of_its_source(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    batches = documents(tmp_path_factory, [7, 5, 11], 4, 6).batches(Cursor())

    def failing() -> Iterator[PackedBatch]:
        yield next(batches)
        raise OSError("the disk is gone")

    before = threading.active_count()
    prefetcher = Prefetcher(failing())
    assert next(prefetcher).token_ids.numel() == 6
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(prefetcher)
    prefetcher.close()
    assert threading.active_count() == before


def test_the_prefetcher_ends_with_its_source_and_closes_its_thread_in_any_state(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    before = threading.active_count()
    packed = documents(tmp_path_factory, [7, 5, 11], 4, 6)
    assert len(list(Prefetcher(packed.once()))) == len(list(packed.once()))
    waiting = Prefetcher(packed.batches(Cursor()), ahead=1)
    waiting.close()
    assert threading.active_count() == before
