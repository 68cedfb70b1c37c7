"""Values of a model that lies on several devices: what a rank reads of stored tensors, and keeps of drawn ones."""

from dataclasses import replace
from math import prod

from jaxtyping import Float
from torch import Tensor

from qwen3_next.model.checkpoint_files import StoredTensor
from qwen3_next.model.cuts import Cut, Range
from qwen3_next.model.lazy_tensor import LazyTensor, Piece
from qwen3_next.model.places import Place
from qwen3_next.ops.quant import FP8_BLOCK


def cut_pieces(whole: LazyTensor, cut: Cut | None) -> tuple[Piece, ...]:
    """What a rank reads of a tensor, for the place of its part.

    Of a cut through rows these are its bytes alone. Of a cut through columns whole rows are read, a few megabytes at a
    time, since a part of a row is often less than a disk reads at once.
    """
    if cut is None:
        return whole.pieces
    (first, end), width = cut.columns, whole.shape[-1]
    pieces: list[Piece] = []
    for piece in whole.pieces:
        start = piece.offset // width
        for (begin, stop), place in cut.kept(start, start + prod(piece.weight.shape) // width):
            rows, blocks = (begin - start, stop - start), None
            if piece.scale is not None:
                blocks = _rows(piece.scale, (rows[0] // FP8_BLOCK, -(-rows[1] // FP8_BLOCK)))
            columns = None if end - first == width else (first, end)
            pieces.append(Piece(_rows(piece.weight, rows), blocks, place * (end - first), columns))
    return tuple(pieces)


def whole_place(part: Place, cut: Cut) -> Place:
    """Without memory, the place of the tensor of which `part` is what a rank holds."""
    *_, height, width = (1, *cut.shape)
    kept = cut.ranges.get(len(cut.shape) - 2, ((0, height),))
    height = part.weight.shape[1] * height // sum(end - first for first, end in kept)
    nothing = part.weight.new_empty(1, dtype=part.dtype)
    return Place(nothing.expand(prod(cut.shape) // (height * width), height, width), None, part.dtype)


def put_cut(values: Float[Tensor, "M R C"], row: int, place: Place, cut: Cut) -> None:
    """Put into a rank's place what it holds of some values, the first of which are row `row` of the whole tensor."""
    (first, end), rows = cut.columns, values.flatten(0, 1)
    for (begin, stop), here in cut.kept(row, row + len(rows)):
        target = place.at(here * (end - first), (stop - begin) * (end - first))
        target.put(rows[begin - row : stop - row, first:end].reshape(target.weight.shape))


def _rows(stored: StoredTensor, rows: Range) -> StoredTensor:
    """Some rows of the last dimension, all leading ones flattened."""
    *_, width = stored.shape
    size = width * stored.dtype.itemsize
    start = stored.start
    return replace(stored, shape=(rows[1] - rows[0], width), start=start + rows[0] * size, end=start + rows[1] * size)
