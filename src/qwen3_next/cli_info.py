"""What a model is and what it needs, as tables, from its configuration alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from rich.table import Table

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.engine.loading import ram_bytes
from qwen3_next.errors import InputError

WEIGHT_FORMATS: dict[str, torch.dtype | Literal["fp8"]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": "fp8",
}
SHORT_CONTEXT = 4096
USABLE = 0.9
"""Share of a memory that is counted on; the rest is for activations and whatever else runs."""


@dataclass(frozen=True)
class Memory:
    """One memory that could hold the model."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Capacity:
    """What fits a memory: nothing where the weights alone do not.

    Attributes:
        tokens: of context for a single sequence, at most what the model serves.
        short_sequences, long_sequences: at once, of `SHORT_CONTEXT` tokens (or the whole context where that is less)
            and of the whole context.
    """

    fits: bool
    tokens: int = 0
    short_sequences: int = 0
    long_sequences: int = 0


def capacity(config: Qwen3NextConfig, memory: int, weights: torch.dtype | Literal["fp8"]) -> Capacity:
    """What `memory` bytes hold besides the weights; cache and states are bf16 where the weights are fp8."""
    cache_dtype = torch.bfloat16 if isinstance(weights, str) else weights
    room = int(memory * USABLE) - config.weight_bytes(weights)
    state, per_token = config.state_bytes_per_sequence(cache_dtype), config.kv_bytes_per_token(cache_dtype)
    context = config.context_length()
    if room < state + per_token:
        return Capacity(fits=False)

    def sequences(tokens: int) -> int:
        return room // max(1, state + tokens * per_token)

    tokens = min(context, (room - state) // per_token) if per_token else context
    return Capacity(True, tokens, sequences(min(SHORT_CONTEXT, context)), sequences(context))


def memories() -> Iterator[Memory]:
    """The memories of this machine."""
    yield Memory("RAM", ram_bytes())
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield Memory(f"cuda:{index} {found.name}", found.total_memory)


def tables(config: Qwen3NextConfig, source: str, dtype_name: str) -> Iterator[Table]:
    """Architecture, memory, and what fits this machine.

    Raises:
        InputError: an unknown dtype.
    """
    if dtype_name not in WEIGHT_FORMATS:
        raise InputError(f"--dtype {dtype_name} is unknown. Allowed: {', '.join(WEIGHT_FORMATS)}.")
    yield two_columns(f"Qwen3-Next: {source}", _architecture(config))
    yield two_columns("Memory", _memory(config))
    yield _machine_table(config, dtype_name)


def _architecture(c: Qwen3NextConfig) -> Iterator[tuple[str, str]]:
    full = sum(c.is_full_attention_layer(i) for i in range(c.num_hidden_layers))
    sparse = sum(c.is_sparse_layer(i) for i in range(c.num_hidden_layers))
    yield "parameters", f"{c.parameter_count():,}"
    yield "  active per token", f"{c.active_parameter_count():,}"
    yield "  of these without embedding and head", f"{c.active_parameter_count(include_embeddings=False):,}"
    yield "  multi-token prediction", f"{c.mtp_parameter_count():,}"
    yield "vocabulary", f"{c.vocab_size:,}"
    yield "context", f"{c.context_length():,} tokens ({c.rope_parameters['rope_type']} rotary embedding)"
    yield "hidden size", f"{c.hidden_size:,}"
    yield "layers", f"{c.num_hidden_layers}: {c.num_hidden_layers - full} Gated DeltaNet, {full} attention"
    heads = f"{c.linear_num_key_heads} key x {c.linear_key_head_dim}, {c.linear_num_value_heads} value"
    yield "  Gated DeltaNet heads", f"{heads} x {c.linear_value_head_dim}"
    heads = f"{c.num_attention_heads} query, {c.num_key_value_heads} key/value"
    yield "  attention heads", f"{heads} x {c.head_dim}, {c.rotary_dim} dimensions rotated"
    if sparse:
        experts = f"{c.num_experts} x {c.moe_intermediate_size}, {c.num_experts_per_tok} per token"
        yield f"  experts in {sparse} layers", f"{experts}; shared expert {c.shared_expert_intermediate_size}"
    if sparse < c.num_hidden_layers:
        yield f"  dense in {c.num_hidden_layers - sparse} layers", f"{c.intermediate_size:,}"


def _memory(c: Qwen3NextConfig) -> Iterator[tuple[str, str]]:
    for name, weights in WEIGHT_FORMATS.items():
        if name != "float16":  # as large as bfloat16
            yield f"weights in {name}", in_bytes(c.weight_bytes(weights))
    yield "keys and values per token, bfloat16", in_bytes(c.kv_bytes_per_token())
    yield "DeltaNet states per sequence", in_bytes(c.state_bytes_per_sequence())


def _machine_table(config: Qwen3NextConfig, dtype_name: str) -> Table:
    table = Table(title=f"On this machine, weights in {dtype_name}, {USABLE:.0%} of the memory counted on")
    context = config.context_length()
    short = min(SHORT_CONTEXT, context)
    several = (f"sequences of {short:,}", f"sequences of {context:,}")
    for heading in ("memory", "size", "fits", "tokens, one sequence", *several):
        table.add_column(heading, justify="left" if heading == "memory" else "right")
    for memory in memories():
        room = capacity(config, memory.bytes, WEIGHT_FORMATS[dtype_name])
        figures = (room.tokens, room.short_sequences, room.long_sequences)
        answer = ("yes", *(f"{figure:,}" for figure in figures)) if room.fits else ("no", "-", "-", "-")
        table.add_row(memory.name, in_bytes(memory.bytes), *answer)
    return table


def two_columns(title: str, rows: Iterator[tuple[str, str]]) -> Table:
    """A table of names and values."""
    table = Table(title=title, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def in_bytes(count: int) -> str:
    """A number of bytes with the unit that keeps it short."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
