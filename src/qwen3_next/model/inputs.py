"""What enters the network: packed tokens, and how the rows of a padded batch lie in them."""

import itertools
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from qwen3_next.errors import InputError
from qwen3_next.ops.segments import Segments


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """Rows `[B, S]` of new tokens, some of them padding, and where each packed token stands in them.

    Attributes:
        batch: B.
        length: S, the columns of the new tokens.
        past: how many columns a cache already holds before them.
        kept: `[T]` flat indices into `B * S` of the packed tokens, in order; None where no token is padding.
        key_valid: `[B, past + S]`, False at padding; None where there is none.
        documents: `[B, S]` number of each token's document inside its row; None where a row is one document.
    """

    batch: int
    length: int
    past: int = 0
    kept: Int[Tensor, "T"] | None = None
    key_valid: Bool[Tensor, "B past_plus_S"] | None = None
    documents: Int[Tensor, "B S"] | None = None

    def pack(self, x: Tensor) -> Tensor:
        """`[B, S, ...]` -> `[T, ...]`, padding dropped."""
        flat = x.reshape(self.batch * self.length, *x.shape[2:])
        return flat if self.kept is None else flat[self.kept.to(x.device)]

    def unpack(self, x: Tensor) -> Tensor:
        """`[T, ...]` -> `[B, S, ...]`, zeros at padding."""
        if self.kept is None:
            return x.reshape(self.batch, self.length, *x.shape[1:])
        rows = x.new_zeros(self.batch * self.length, *x.shape[1:])
        return rows.index_copy(0, self.kept.to(x.device), x).view(self.batch, self.length, *x.shape[1:])

    def visibility(self, device: torch.device) -> Bool[Tensor, "B S past_plus_S"]:
        """True where a token may look: back, inside its document, never at padding (a padding token: at itself)."""
        keys = torch.arange(self.past + self.length, device=device)
        own = keys[self.past :, None]
        causal = (keys <= own).expand(self.batch, -1, -1)
        if self.key_valid is not None:
            causal = causal & (self.key_valid.to(device)[:, None] | (keys == own))
        if self.documents is not None:
            documents = self.documents.to(device)
            causal = causal & (documents[:, :, None] == documents[:, None, :])
        return causal


@dataclass(frozen=True, eq=False)
class PackedInputs:
    """T tokens of N sequences, one after the other.

    Attributes:
        token_ids: `[T]`; None where the caller embeds the tokens itself.
        positions: `[T]` position of each token for the rotary embedding.
        segments: the borders of the sequences.
        rows: the padded rows that the tokens came from; None where they never were in rows.
    """

    token_ids: Int[Tensor, "T"] | None
    positions: Int[Tensor, "T"]
    segments: Segments
    rows: PaddedRows | None = None
    _elsewhere: dict[torch.device, "PackedInputs"] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "PackedInputs":
        """The same inputs on a device, remembered, for models whose layers live on several devices."""
        target = torch.device(device)
        if target == self.positions.device or target.type == "meta":
            return self
        if target not in self._elsewhere:
            segments = Segments(self.segments.cu_seqlens.to(target, non_blocking=non_blocking), self.segments.lengths)
            tokens = None if self.token_ids is None else self.token_ids.to(target, non_blocking=non_blocking)
            positions = self.positions.to(target, non_blocking=non_blocking)
            self._elsewhere[target] = PackedInputs(tokens, positions, segments, self.rows)
        return self._elsewhere[target]

    @property
    def row_view(self) -> PaddedRows:
        """The rows of the batch, or else one row per sequence, padded on the right."""
        return self.rows or _row_per_sequence(self.segments)


def _row_per_sequence(segments: Segments) -> PaddedRows:
    length = segments.max_length
    if segments.is_uniform:
        return PaddedRows(segments.count, length)
    lengths = (segments.cu_seqlens[1:] - segments.cu_seqlens[:-1]).long()
    valid = torch.arange(length, device=segments.device) < lengths[:, None]
    return PaddedRows(segments.count, length, kept=segments.sequence_ids * length + segments.offsets, key_valid=valid)


def pack_rows(
    shape: tuple[int, int],
    device: torch.device,
    *,
    past: int = 0,
    token_ids: Int[Tensor, "B S"] | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Int[Tensor, "B S"] | None = None,
    document_borders: Int[Tensor, "N+1"] | None = None,
) -> PackedInputs:
    """Pack the rows of a Hugging Face batch.

    Args:
        shape: (B, S) of the new tokens.
        past: columns already in the cache.
        attention_mask: `[B, past + S]`, 0 at padding.
        position_ids: `[B, S]` or `[1, S]`; where they fall back inside a row, a new document begins.
        document_borders: cumulative lengths of the documents of a single row; they win over `position_ids`.

    Raises:
        InputError: a mask or position tensor of another shape or kind; borders that do not span the row; a document
            that begins inside a row that continues a cached one.
    """
    batch, length = shape
    valid = None if attention_mask is None else _valid_keys(attention_mask, batch, past, length)
    if valid is not None and bool(valid.all()):
        valid = None
    kept = None if valid is None else valid[:, past:].flatten().nonzero()[:, 0]
    rows = PaddedRows(batch, length, past, kept, valid)
    positions = rows.pack(_positions(position_ids, batch, length, past, device))
    starts = None
    if document_borders is not None:
        starts = _starts_at_borders(document_borders, rows, device)
    elif position_ids is not None:
        starts = _starts_at_restarts(positions, rows)
    tokens = None if token_ids is None else rows.pack(token_ids)
    if starts is None:
        return PackedInputs(tokens, positions, _row_segments(rows, device), rows)
    documents = starts.cumsum(0)
    segments = Segments.from_lengths(documents.unique_consecutive(return_counts=True)[1].tolist(), device)
    return PackedInputs(tokens, positions, segments, replace(rows, documents=rows.unpack(documents)))


def _valid_keys(attention_mask: Tensor, batch: int, past: int, length: int) -> Bool[Tensor, "B past_plus_S"]:
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < past + length:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; a 2-D mask of shape ({batch}, {past + length}) "
            "(cached plus new tokens, 0 at padding) is needed. Masks over pairs of tokens do not apply to the "
            "DeltaNet layers: use position_ids that restart, or cu_seq_lens_q, to separate documents."
        )
    return attention_mask[:, : past + length] != 0


def _positions(position_ids: Tensor | None, batch: int, length: int, past: int, device: torch.device) -> Tensor:
    if position_ids is None:
        return (torch.arange(length, device=device) + past).expand(batch, -1)
    if position_ids.shape not in ((batch, length), (1, length)):
        raise InputError(f"position_ids has shape {tuple(position_ids.shape)}; ({batch}, {length}) is needed.")
    if position_ids.is_floating_point():
        raise InputError(f"position_ids are {position_ids.dtype}; whole numbers are needed: convert with .long().")
    return position_ids.expand(batch, -1)


def _row_segments(rows: PaddedRows, device: torch.device) -> Segments:
    if rows.key_valid is None:
        return Segments.uniform(rows.batch, rows.length, device)
    return Segments.from_lengths(rows.key_valid[:, rows.past :].sum(dim=1).tolist(), device)


def _starts_at_restarts(positions: Int[Tensor, "T"], rows: PaddedRows) -> Bool[Tensor, "T"] | None:
    """True at the first token of each document, or None where every row is a single document."""
    if positions.numel() < 2 or rows.length < 2:
        return None
    places = torch.arange(positions.numel(), device=positions.device) if rows.kept is None else rows.kept
    new_row = (places // rows.length).diff() != 0
    falls_back = positions.diff() <= 0
    if not bool((falls_back & ~new_row).any()):
        return None
    if rows.past:
        raise InputError(
            f"position_ids fall back inside a row that continues {rows.past} cached tokens; there they must rise. "
            "Pack documents without past_key_values and with use_cache=False, or give each a row of its own."
        )
    return torch.nn.functional.pad(falls_back | new_row, (1, 0), value=True)


def _starts_at_borders(borders: Int[Tensor, "N+1"], rows: PaddedRows, device: torch.device) -> Bool[Tensor, "T"]:
    ends: list[int] = borders.tolist()
    rising = all(a <= b for a, b in itertools.pairwise(ends))
    if (
        rows.batch != 1
        or rows.kept is not None
        or rows.past
        or not rising
        or ends[:1] != [0]
        or ends[-1] != rows.length
    ):
        raise InputError(
            f"cu_seq_lens_q={ends} must rise from 0 to the length of a single row without padding and without a "
            f"cache; got {rows.batch} rows of {rows.length} tokens, {rows.past} of them cached before."
        )
    starts = torch.zeros(rows.length, dtype=torch.bool)
    starts[[start for start, end in itertools.pairwise(ends) if end > start]] = True
    return starts.to(device)


def refuse_other_documents(inputs: PackedInputs, cu_seq_lens_k: Tensor | None, seq_idx: Tensor | None) -> None:
    """Descriptions of packed documents that separate nothing by themselves must repeat what separates them.

    Args:
        inputs: the packed rows, their documents told by `cu_seq_lens_q` or by restarting positions.
        cu_seq_lens_k: cumulative lengths of the documents' keys; without a cache, those of their queries.
        seq_idx: `[B, S]` number of each token's document.

    Raises:
        InputError: either of them tells of other documents; every row would leak into documents that it names.
    """
    if cu_seq_lens_k is not None:
        told = list(dict.fromkeys(cu_seq_lens_k.tolist()))
        found = list(dict.fromkeys(itertools.accumulate(inputs.segments.lengths, initial=0)))
        if told != found:
            raise InputError(f"cu_seq_lens_k={told} names other documents than {found}, {_WHAT_SEPARATES}")
    if seq_idx is not None and not _same_documents(inputs.row_view, seq_idx):
        raise InputError(
            f"seq_idx of shape {tuple(seq_idx.shape)} names other documents than the "
            f"{inputs.segments.count} found in rows of shape ({inputs.row_view.batch}, {inputs.row_view.length}), "
            f"{_WHAT_SEPARATES}"
        )


_WHAT_SEPARATES = (
    "which cu_seq_lens_q or restarting position_ids tell; give either of these for the same documents as well."
)


def _same_documents(rows: PaddedRows, seq_idx: Tensor) -> bool:
    if seq_idx.shape != (rows.batch, rows.length):
        return False
    documents = torch.zeros_like(seq_idx) if rows.documents is None else rows.documents.to(seq_idx.device)
    row = torch.arange(rows.batch, device=seq_idx.device)[:, None].expand_as(seq_idx)
    told, found, of_row = (rows.pack(x).diff() != 0 for x in (seq_idx, documents, row))
    return bool((told == found)[~of_row].all())
