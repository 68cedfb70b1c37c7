"""Checkpoints <-> parameters: one rule table, streamed, nothing missing and nothing left over.

    files --read_header--> StoredTensor by published name --EXPERT_RULES--> LazyTensor by name in memory
    model.state_dict() --EXPERT_RULES--> PublishedSlot by published name --write_checkpoint--> files

In memory every parameter has its published name, except that the experts of a layer are fused into two tensors.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from qwen3_next.errors import CheckpointError
from qwen3_next.model.checkpoint_files import StoredTensor, locate, read_header
from qwen3_next.model.completeness import compare, listing, mtp_layers_present
from qwen3_next.model.lazy_tensor import LazyTensor, Piece
from qwen3_next.model.shards import DEFAULT_SHARD_BYTES, Entry, Progress, write_checkpoint
from qwen3_next.ops.quant import block_scale_shape

__all__ = [
    "EXPERT_RULES",
    "Checkpoint",
    "ExpertRule",
    "Progress",
    "PublishedSlot",
    "compare",
    "mtp_layers_present",
    "open_checkpoint",
    "open_directory",
    "published_shapes",
    "published_slots",
    "published_tensors",
    "refuse_untied_head",
    "save_weights",
]


@dataclass(frozen=True)
class ExpertRule:
    """Expert e's `experts.{e}.<projection>.weight` is row block `block` of `blocks` in `experts.<fused>[e]`."""

    projection: str
    fused: str
    block: int
    blocks: int


EXPERT_RULES = (
    ExpertRule("gate_proj", fused="gate_up_proj", block=0, blocks=2),
    ExpertRule("up_proj", fused="gate_up_proj", block=1, blocks=2),
    ExpertRule("down_proj", fused="down_proj", block=0, blocks=1),
)
"""The whole difference between the published names and the names in memory."""

_PUBLISHED_EXPERT = re.compile(r"(.*\bmlp\.experts\.)(0|[1-9]\d{0,8})\.(gate_proj|up_proj|down_proj)\.weight")
_FUSED_EXPERTS = re.compile(r"(.*\bmlp\.experts\.)(gate_up_proj|down_proj)")
_SCALE = "_scale_inv"
_SCALE_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every header read and checked, no tensor read yet.

    Attributes:
        tensors: what the files hold, by the names in the files.
        parameters: what they become, by the names in memory; block-fp8 weights are bf16 here.
    """

    tensors: Mapping[str, StoredTensor]
    parameters: Mapping[str, LazyTensor]

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is block-fp8, so that a file's bytes cannot serve as a parameter."""
        return any(stored.dtype == torch.float8_e4m3fn for stored in self.tensors.values())

    def in_memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by its name in memory."""
        return {name: lazy.shape for name, lazy in self.parameters.items()}

    def lazy_state_dict(self, dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, LazyTensor]:
        """A state dict by the names in memory, whose values read themselves when asked.

        Args:
            dtypes: what each parameter is wanted in; it is read straight into that, without a second copy. The others
                keep the dtype they are stored in.
        """
        wanted = dtypes or {}
        return {name: replace(lazy, dtype=wanted.get(name, lazy.dtype)) for name, lazy in self.parameters.items()}

    def mtp_layers(self) -> int:
        """How many multi-token prediction layers the checkpoint holds; see `mtp_layers_present`."""
        return mtp_layers_present(self.parameters)


def open_checkpoint(files: Sequence[Path | str], weight_map: Mapping[str, str] | None = None) -> Checkpoint:
    """Read and check the headers of all files of a checkpoint; allocates nothing.

    Args:
        files: all its safetensors files, in any order.
        weight_map: the table of its index, tensor name -> file name, where it is sharded.

    Raises:
        CheckpointError: a file is not whole or not safetensors; a tensor stands twice, or where the index does not say;
            an expert is missing or has another shape; an fp8 weight and its scales do not fit.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in map(Path, files):
        for name, stored in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{name} stands twice, in {tensors[name].file} and in {file}; remove one of them."
                )
            tensors[name] = stored
    if weight_map is not None:
        _check_index(weight_map, tensors)
    return Checkpoint(tensors, _parameters_of(tensors))


def open_directory(directory: Path | str) -> Checkpoint:
    """Open a local checkpoint directory: `model.safetensors`, or the shards that its index names.

    Raises:
        CheckpointError: as `open_checkpoint`, and where the directory holds no safetensors checkpoint.
    """
    return open_checkpoint(*locate(Path(directory)))


def refuse_untied_head(parameters: Mapping[str, LazyTensor]) -> None:
    """Check that a stored head is the stored embedding, where a config ties them. Both are read, if both are there.

    Raises:
        CheckpointError: their shapes or values differ, so that either could be meant.
    """
    head = parameters.get("lm_head.weight")
    embedding = next((name for name in parameters if name.endswith("embed_tokens.weight")), None)
    if head is None or embedding is None:
        return
    dtype = torch.promote_types(head.dtype, parameters[embedding].dtype)
    if not torch.equal(replace(head, dtype=dtype).read(), replace(parameters[embedding], dtype=dtype).read()):
        raise CheckpointError(
            f"lm_head.weight differs from {embedding}, but tie_word_embeddings = true makes them one; only equal "
            "values are read. Set tie_word_embeddings to false in config.json, or remove lm_head.weight."
        )


def published_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that saving a state dict writes; its tensors may be on the meta device."""
    return {slot.name: slot.shape for slot in published_slots(state)}


def published_tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict under their published names, as views, in the state dict's order."""
    return ((slot.name, slot.view(state[slot.source])) for slot in published_slots(state))


def save_weights(
    state: Mapping[str, Tensor],
    directory: Path | str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    fetch: Callable[[str], Tensor] | None = None,
    on_progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write a model's parameters in the published layout; besides the model, one tensor is held at a time.

    Args:
        state: `model.state_dict()`, on any device. A head tied to the embedding is not written.
        directory: created if need be; the weights of an earlier save in it are replaced, other files left alone.
        dtype: of every tensor written, `torch.bfloat16` for the published layout; None keeps each tensor's own.
        max_shard_bytes: of tensors per file, headers aside; a single tensor above it gets a file of its own.
        fetch: gives the values of a parameter that `state` holds on the meta device, because it is offloaded.
        on_progress: called with the bytes written so far and in all, after every tensor.

    Returns:
        The weight files, in order.

    Raises:
        CheckpointError: the disk is full or not writable, and an earlier checkpoint is left as it was; a parameter is
            offloaded and there is no `fetch`; a dtype that no checkpoint holds.
    """
    values = _values_of(state, fetch)
    entries = [
        Entry(
            slot.name, slot.shape, dtype or state[slot.source].dtype, lambda slot=slot: slot.view(values(slot.source))
        )
        for slot in published_slots(state)
    ]
    return write_checkpoint(Path(directory), entries, max_shard_bytes, on_progress)


@dataclass(frozen=True)
class PublishedSlot:
    """One published tensor and where it lies in memory: all of `source`, or rows of one expert in it."""

    name: str
    source: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0

    def view(self, tensor: Tensor) -> Tensor:
        """This slot's part of the tensor called `source`."""
        if self.expert is None:
            return tensor
        return tensor[self.expert, self.first_row : self.first_row + self.shape[0]]


def published_slots(state: Mapping[str, Tensor]) -> Iterator[PublishedSlot]:
    """What is to be written, in the state dict's order; a head that is tied to the embedding is left out."""
    embedding = next((tensor for name, tensor in state.items() if name.endswith("embed_tokens.weight")), None)
    for name, tensor in state.items():
        if name == "lm_head.weight" and embedding is not None and _is_same_memory(tensor, embedding):
            continue
        fused = _FUSED_EXPERTS.fullmatch(name)
        if fused is None:
            yield PublishedSlot(name, name, tuple(tensor.shape))
        else:
            yield from _expert_slots(fused[1], fused[2], name, tuple(tensor.shape))


def _values_of(state: Mapping[str, Tensor], fetch: Callable[[str], Tensor] | None) -> Callable[[str], Tensor]:
    """Give a parameter's values; an offloaded one is fetched once for all the experts in it."""
    fetched: dict[str, Tensor] = {}

    def values(name: str) -> Tensor:
        if not state[name].is_meta:
            return state[name]
        if fetch is None:
            raise CheckpointError(
                f"{name} is offloaded or was never given values, so it cannot be saved; load it first."
            )
        if name not in fetched:
            fetched.clear()
            fetched[name] = fetch(name)
        return fetched[name]

    return values


def _expert_slots(prefix: str, fused: str, source: str, shape: tuple[int, ...]) -> Iterator[PublishedSlot]:
    experts, all_rows, columns = shape
    rules = [rule for rule in EXPERT_RULES if rule.fused == fused]
    for expert in range(experts):
        for rule in rules:
            rows = all_rows // rule.blocks
            name = f"{prefix}{expert}.{rule.projection}.weight"
            yield PublishedSlot(name, source, (rows, columns), expert, rule.block * rows)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.untyped_storage() is b.untyped_storage() and a.storage_offset() == b.storage_offset() and a.shape == b.shape
    )


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    absent = [f"{name} ({shard})" for name, shard in weight_map.items() if name not in tensors]
    if absent:
        raise CheckpointError(
            f"the index lists {len(absent)} tensors that its shards do not hold: {listing(absent)}; download it again."
        )
    astray = [name for name, shard in weight_map.items() if tensors[name].file.name != shard]
    if astray:
        raise CheckpointError(
            f"{len(astray)} tensors are in another shard than the index says: {listing(astray)}; download it again."
        )


def _parameters_of(tensors: Mapping[str, StoredTensor]) -> dict[str, LazyTensor]:
    plain: dict[str, LazyTensor] = {}
    experts: dict[str, dict[str, Piece]] = defaultdict(dict)
    for name, stored in tensors.items():
        if name.endswith(_SCALE):
            _check_scale_owner(name, tensors)
            continue
        piece = Piece(stored, _scale_of(name, stored, tensors))
        expert = _PUBLISHED_EXPERT.fullmatch(name)
        if expert is None:
            plain[name] = LazyTensor(stored.shape, _dtype_in_memory([piece]), (piece,))
        else:
            experts[expert[1]][f"{expert[2]}.{expert[3]}"] = piece
    for prefix, pieces in experts.items():
        for name, fused in _fuse(prefix, pieces).items():
            if name in plain:
                raise CheckpointError(f"the experts {prefix}* stand twice, fused and one by one; remove one of them.")
            plain[name] = fused
    _refuse_transposed(plain)
    return plain


def _dtype_in_memory(pieces: Iterable[Piece]) -> torch.dtype:
    """The widest dtype of the pieces; fp8 counts as bf16."""
    dtypes = {torch.bfloat16 if piece.scale is not None else piece.weight.dtype for piece in pieces}
    widest = dtypes.pop()
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _scale_of(name: str, stored: StoredTensor, tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    if stored.dtype != torch.float8_e4m3fn:
        return None
    scale = tensors.get(name + _SCALE)
    if scale is None:
        raise CheckpointError(f"{stored.file}: the fp8 weight {name} has no {name + _SCALE}; download it again.")
    if len(stored.shape) != 2:
        raise CheckpointError(
            f"{stored.file}: the fp8 weight {name} has the shape {list(stored.shape)}; only matrices are read from fp8 "
            "(experts one by one, as published)."
        )
    wanted = block_scale_shape(stored.shape)
    if scale.shape != wanted or scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.file}: {name + _SCALE} is {list(scale.shape)} in {scale.dtype}; a weight {list(stored.shape)} "
            f"needs {list(wanted)} in bf16 or fp32, one scale per 128 x 128 block."
        )
    return scale


def _check_scale_owner(name: str, tensors: Mapping[str, StoredTensor]) -> None:
    owner = tensors.get(name.removesuffix(_SCALE))
    if owner is None or owner.dtype != torch.float8_e4m3fn:
        raise CheckpointError(
            f"{tensors[name].file}: {name} scales no fp8 weight; the checkpoint is incomplete or mixed."
        )


def _fuse(prefix: str, pieces: Mapping[str, Piece]) -> dict[str, LazyTensor]:
    """The fused tensors of one layer's experts, each piece at its expert's rows."""
    count = 1 + max(int(key.split(".")[0]) for key in pieces)
    expected = (f"{expert}.{rule.projection}" for expert in range(count) for rule in EXPERT_RULES)
    missing_count = count * len(EXPERT_RULES) - len(pieces)
    if missing_count:
        first = [f"{prefix}{key}.weight" for key in islice((key for key in expected if key not in pieces), 8)]
        raise CheckpointError(
            f"{missing_count} tensors of {count} experts are missing: {listing(first, missing_count)}."
        )
    width, hidden = _expert_shape(prefix, pieces)
    shapes = {"gate_up_proj": (count, 2 * width, hidden), "down_proj": (count, hidden, width)}
    placed: dict[str, list[Piece]] = defaultdict(list)
    for expert in range(count):
        for rule in EXPERT_RULES:
            offset = (expert * rule.blocks + rule.block) * width * hidden
            placed[rule.fused].append(replace(pieces[f"{expert}.{rule.projection}"], offset=offset))
    return {
        prefix + name: LazyTensor(shapes[name], _dtype_in_memory(group), tuple(group)) for name, group in placed.items()
    }


def _expert_shape(prefix: str, pieces: Mapping[str, Piece]) -> tuple[int, int]:
    """Width F and hidden size D, which every expert of the layer must share."""
    first = pieces["0.gate_proj"].weight.shape
    if len(first) != 2:
        raise CheckpointError(f"{prefix}0.gate_proj.weight has the shape {list(first)}; [F, D] is expected.")
    for key, piece in pieces.items():
        wanted = first[::-1] if key.endswith("down_proj") else first
        if piece.weight.shape != wanted:
            raise CheckpointError(
                f"{prefix}{key}.weight has the shape {list(piece.weight.shape)}; {list(wanted)} is expected, "
                "as of the layer's first expert."
            )
    return first[0], first[1]


def _refuse_transposed(parameters: Mapping[str, LazyTensor]) -> None:
    # [E, 2F, D] beside [E, D, F] is right, [E, D, 2F] beside [E, F, D] is transposed; the pair cannot be both.
    for name, down in parameters.items():
        fused = _FUSED_EXPERTS.fullmatch(name)
        gate_up = parameters.get(fused[1] + "gate_up_proj") if fused and fused[2] == "down_proj" else None
        if gate_up is None or down.ndim != 3 or gate_up.ndim != 3:
            continue
        if gate_up.shape[1] == down.shape[2] and gate_up.shape[2] == 2 * down.shape[1]:
            raise CheckpointError(
                f"{name} {list(down.shape)} and its gate_up_proj {list(gate_up.shape)} are stored transposed; "
                "[E, D, F] and [E, 2F, D] are read. Transpose the last two dimensions, "
                "and check that gate stands before up."
            )
