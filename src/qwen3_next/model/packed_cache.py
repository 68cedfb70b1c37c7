"""A cache that many sequences share: pages of keys and values, slots of DeltaNet states.

Who owns which page and which slot is decided outside; here is the memory, and what a forward pass is told about it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.model.cache import StateSlots
from qwen3_next.model.delta_net import columns_of
from qwen3_next.ops.gated_delta_step import StepState
from qwen3_next.ops.pages import PAGE, KeyPages
from qwen3_next.ops.snapshots import Snapshots


@dataclass(frozen=True, eq=False)
class PackedMemory:
    """The memory behind the caches of all layers: A attention layers, L DeltaNet layers, P pages, M slots.

    A page has a place in every attention layer and a slot one in every DeltaNet layer, so that one number serves all.

    Attributes:
        layer_types: of all layers, in order.
        keys, values: the pages.
        recurrent, conv: the states after the tokens that count, see `StepState`.
        pending_qkv, pending_ba: Q tokens that await a verdict.
    """

    layer_types: tuple[str, ...]
    keys: Float[Tensor, "A P page Hkv Dh"]
    values: Float[Tensor, "A P page Hkv Dh"]
    recurrent: Float[Tensor, "L M Hv Dk Dv"]
    conv: Float[Tensor, "L M C W-1"]
    pending_qkv: Float[Tensor, "L M Q C"]
    pending_ba: Float[Tensor, "L M Q 2*Hv"]

    @classmethod
    def allocate(
        cls,
        config: Qwen3NextConfig,
        *,
        pages: int,
        slots: int,
        pending: int = 0,
        layer_types: Sequence[str] | None = None,
        page: int = PAGE,
        dtype: torch.dtype = torch.bfloat16,
        recurrent_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "PackedMemory":
        """Zeros: every slot is the state before the first token.

        Args:
            pending: Q, the most new tokens of a sequence in a call with `accepted`: drafts and the token before them.
            layer_types: of the layers that are to be served, if not those of `config`; the MTP layer, which has a
                memory of its own with the same pages, is `("full_attention",)`.
            dtype: what the model computes in.
        """
        types = tuple(config.layer_types if layer_types is None else layer_types)
        attention, delta_net = types.count("full_attention"), types.count("linear_attention")
        columns, taps = columns_of(config), config.linear_conv_kernel_dim
        kept = (attention, pages, page, config.num_key_value_heads, config.head_dim)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            types,
            zeros(*kept),
            zeros(*kept),
            zeros(
                *(delta_net, slots, columns.value_heads, columns.key_width, columns.value_width), dtype=recurrent_dtype
            ),
            zeros(delta_net, slots, columns.channels, taps - 1),
            zeros(delta_net, slots, pending, columns.channels),
            zeros(delta_net, slots, pending, 2 * columns.value_heads),
        )

    def clear_(self, slots: Int[Tensor, "S"]) -> None:
        """Make slots those of sequences without tokens. Pages need no such thing: what lies in them is overwritten."""
        for states in (self.recurrent, self.conv):
            states.index_fill_(1, slots.long(), 0)

    def place(self, layer: int) -> int:
        """The index of a layer among those of its type."""
        return self.layer_types[:layer].count(self.layer_types[layer])


@dataclass(frozen=True, eq=False)
class PackedCache:
    """What a forward pass over N packed sequences reads and writes, a `ModelCache` of pages and slots.

    Nothing here or behind it waits for the device. Of the host's knowledge a call depends on `Segments.lengths` alone,
    and on `known_lengths` and the positions of `snapshots` where they are given; so with one number of new tokens for
    every sequence a CUDA graph can hold it, filled up with null sequences: those have a negative slot and length 0.

    The first `steps` sequences bring at most `STEP_TOKENS` tokens each, which may be drafts: with `accepted` they
    become part of the states only when the next call accepts them. The tokens of the other sequences count at once, and
    their next `accepted` is 0. Keys and values need no such care: the next call's are written over rejected ones, whose
    `lengths` it does not count.

    Attributes:
        memory: of all layers.
        table: int32, the pages of each sequence in order.
        lengths: int32, the tokens of each sequence, the new ones of this call included; 0 for a null sequence.
        slots: int32, distinct, of each sequence; a new one's are to be cleared before.
        accepted: int32, how many of each sequence's pending tokens now count; None where calls bring no drafts.
        known_lengths: `lengths` as host integers, where they are known; makes long prompts faster.
        snapshots: DeltaNet states in the middle of this call that are copied into further slots; their positions count
            from the first token behind the steps.
        steps: see above; None: all sequences, where each brings at most `STEP_TOKENS` tokens, else none.
    """

    memory: PackedMemory
    table: Int[Tensor, "N M"]
    lengths: Int[Tensor, "N"]
    slots: Int[Tensor, "N"]
    accepted: Int[Tensor, "N"] | None = None
    known_lengths: tuple[int, ...] | None = None
    snapshots: Snapshots | None = None
    steps: int | None = None

    def attention(self, layer: int) -> KeyPages:
        """The keys and values of an attention layer."""
        memory, place = self.memory, self.memory.place(layer)
        return KeyPages(memory.keys[place], memory.values[place], self.table, self.lengths, self.known_lengths)

    def delta_net(self, layer: int) -> StateSlots:
        """The states of a Gated DeltaNet layer."""
        memory, place = self.memory, self.memory.place(layer)
        fields = (memory.recurrent, memory.conv, memory.pending_qkv, memory.pending_ba)
        state = StepState(*(field[place] for field in fields))
        return StateSlots(state, self.slots, self.accepted, self.snapshots, self.steps)
