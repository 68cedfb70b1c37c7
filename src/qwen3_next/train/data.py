"""From tokenised documents to packed batches: every token once an epoch, resumable to the token."""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from qwen3_next.model.inputs import PackedInputs
from qwen3_next.ops.cross_entropy import IGNORED
from qwen3_next.ops.segments import Segments
from qwen3_next.train.tokens import TokenStore


@dataclass(frozen=True)
class Cursor:
    """Where reading stands: `offset` tokens into the document at `place` of the epoch's order."""

    epoch: int = 0
    place: int = 0
    offset: int = 0


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Pieces of documents, one after the other, as host tensors.

    Attributes:
        token_ids, targets: `[T]`; the target is the document's next token, `IGNORED` at its end.
        lengths: of the pieces; attention and state never cross from one to the next.
        after: where reading stands once this batch is done with.
    """

    token_ids: Int[Tensor, "T"]
    targets: Int[Tensor, "T"]
    lengths: tuple[int, ...]
    after: Cursor

    def target_counts(self, mtp_steps: int) -> tuple[int, ...]:
        """How many tokens have a target: the next token first, then each chained MTP step."""
        ends = np.cumsum(self.lengths) - 1
        open_ended = self.targets.numpy()[ends] != IGNORED
        counts = [int((self.targets != IGNORED).sum())]
        for step in range(1, mtp_steps + 1):
            inside = np.maximum(np.asarray(self.lengths) - step, 0)
            counts.append(int((inside - ((inside > 0) & ~open_ended)).sum()))
        return tuple(counts)

    def to(self, device: torch.device) -> tuple[PackedInputs, Tensor]:
        """The network's inputs and the targets on a device; positions restart in each piece."""
        segments = Segments.from_lengths(self.lengths, device)
        tokens, targets = (_move(x, device) for x in (self.token_ids, self.targets))
        return PackedInputs(tokens, segments.offsets, segments), targets


class PackedDocuments:
    """An endless, shuffled sequence of batches of exactly `tokens_per_batch` tokens.

    Documents come in a new order each epoch, in pieces of at most `sequence_length`. A piece that does not fit into a
    batch is cut; its rest opens the next batch as a piece of its own. The order depends only on the seed and the
    epoch, so that a cursor says all there is to say.
    """

    def __init__(self, stores: Sequence[TokenStore], sequence_length: int, tokens_per_batch: int, seed: int) -> None:
        self.stores = tuple(stores)
        self.sequence_length, self.tokens_per_batch, self.seed = sequence_length, tokens_per_batch, seed
        self.borders = np.cumsum([0, *(store.documents for store in self.stores)])

    @property
    def tokens_per_epoch(self) -> int:
        """The tokens of all documents."""
        return sum(int(store.tokens.size) for store in self.stores)

    def batches(self, cursor: Cursor) -> Iterator[PackedBatch]:
        """Batches from the cursor on, without end."""
        order = self._order(cursor.epoch)
        while True:
            pieces: list[NDArray[np.int64]] = []
            room = self.tokens_per_batch
            while room:
                document = self._document(int(order[cursor.place]))
                length = min(room, self.sequence_length, document.size - cursor.offset)
                pieces.append(_piece(document, cursor.offset, length))
                room -= length
                cursor = replace(cursor, offset=cursor.offset + length)
                if cursor.offset == document.size:
                    cursor = replace(cursor, place=cursor.place + 1, offset=0)
                if cursor.place == order.size:
                    cursor = Cursor(epoch=cursor.epoch + 1)
                    order = self._order(cursor.epoch)
            yield _batch(pieces, cursor)

    def once(self) -> Iterator[PackedBatch]:
        """Every document once, in its own order, whole pieces only: for validation."""
        pieces: list[NDArray[np.int64]] = []
        for index in range(int(self.borders[-1])):
            document = self._document(index)
            for offset in range(0, document.size, self.sequence_length):
                pieces.append(_piece(document, offset, min(self.sequence_length, document.size - offset)))
                if sum(p.shape[1] for p in pieces) + self.sequence_length > self.tokens_per_batch:
                    yield _batch(pieces, Cursor())
                    pieces = []
        if pieces:
            yield _batch(pieces, Cursor())

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self.seed, epoch)).permutation(int(self.borders[-1]))

    def _document(self, index: int) -> NDArray[np.int64]:
        store = int(np.searchsorted(self.borders, index, side="right")) - 1
        return self.stores[store].document(index - int(self.borders[store]))


def _piece(document: NDArray[np.int64], offset: int, length: int) -> NDArray[np.int64]:
    """`[2, length]`: tokens and what each must predict."""
    piece = np.full((2, length), IGNORED, dtype=np.int64)
    piece[0] = document[offset : offset + length]
    following = document[offset + 1 : offset + 1 + length]
    piece[1, : following.size] = following
    return piece


def _batch(pieces: Sequence[NDArray[np.int64]], after: Cursor) -> PackedBatch:
    tokens, targets = torch.from_numpy(np.concatenate(pieces, axis=1))
    return PackedBatch(tokens, targets, tuple(piece.shape[1] for piece in pieces), after)


def _move(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Prefetcher(Iterator[PackedBatch]):
    """Prepares batches in a thread, a few ahead of their use; an error in it is raised where the batch is wanted."""

    def __init__(self, batches: Iterator[PackedBatch], ahead: int = 4) -> None:
        self._queue: queue.Queue[PackedBatch | Exception] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(batches,), daemon=True)
        self._thread.start()

    def __next__(self) -> PackedBatch:
        item = self._queue.get()
        if isinstance(item, Exception):
            self._queue.put(item)  # it is the last thing that comes, and is raised as often as one asks
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        self._stopped.set()
        self._thread.join()

    def _fill(self, batches: Iterator[PackedBatch]) -> None:
        try:
            for batch in batches:
                if not self._put(batch):
                    return
            self._put(StopIteration())
        except Exception as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: PackedBatch | Exception) -> bool:
        """Wait for room; False where nobody wants more."""
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
