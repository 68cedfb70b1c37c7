"""What a layer reads from and writes to a cache, and how a transformers `Cache` is made to serve it.

A layer never owns state: it is handed one of the layer caches below, reads what earlier calls left there and leaves
what later calls need. Who allocates and frees the memory behind it is not the layer's business. There are two kinds:
rows that grow (`AttentionCache`, `DeltaNetCache`), and memory that many sequences share, in which the operations
themselves read and write (`KeyPages`, `StateSlots`; model/packed_cache.py has it for all layers).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.errors import InputError
from qwen3_next.model.inputs import PackedInputs, PaddedRows
from qwen3_next.ops.gated_delta_step import StepState
from qwen3_next.ops.pages import KeyPages
from qwen3_next.ops.snapshots import Snapshots


class CachedKeys(NamedTuple):
    """Keys and values of the earlier and the new tokens together, in padded rows.

    `mask` is True where a new token may look; None where the rows hold no padding and causal order is all there is.
    """

    keys: Float[Tensor, "N S Hkv Dh"]
    values: Float[Tensor, "N S Hkv Dh"]
    mask: Bool[Tensor, "N Q S"] | None


class DeltaNetState(NamedTuple):
    """What a Gated DeltaNet layer remembers of each sequence."""

    conv: Float[Tensor, "N C W-1"]
    recurrent: Float[Tensor, "N Hv Dk Dv"]


class AttentionCache(Protocol):
    """The cache of one attention layer."""

    def append(self, k: Float[Tensor, "T Hkv Dh"], v: Float[Tensor, "T Hkv Dh"]) -> CachedKeys:
        """Store the keys and values of the new tokens; hand back those of all tokens."""
        ...

    @property
    def is_empty(self) -> bool:
        """Whether no token came before the new ones."""
        ...


class DeltaNetCache(Protocol):
    """The cache of one Gated DeltaNet layer."""

    def read(self) -> DeltaNetState | None:
        """The state before the new tokens; None where nothing came before."""
        ...

    def write(self, state: DeltaNetState) -> None:
        """Keep the state after the new tokens."""
        ...


@dataclass(frozen=True, eq=False)
class StateSlots:
    """The states of a Gated DeltaNet layer in slots, and which of them the sequences of a call own.

    Attributes:
        state: the memory of the layer.
        slots: int32, of each sequence; negative for a null sequence, which has no state.
        accepted: int32, how many of the tokens that the last call left pending are now part of each sequence; None
            where tokens are not drafts. See `delta_net_step_`.
        snapshots: states inside the new tokens to be copied into further slots; their positions count from the first
            token behind the steps.
        steps: how many sequences, the first ones, bring tokens that await a verdict; None: all, where each brings but a
            few tokens and there are no snapshots, else none.
    """

    state: StepState
    slots: Int[Tensor, "N"]
    accepted: Int[Tensor, "N"] | None = None
    snapshots: Snapshots | None = None
    steps: int | None = None

    def split(self, count: int) -> "tuple[StateSlots, StateSlots]":
        """For the first `count` sequences, which are steps, and for the others."""
        accepted = (None, None) if self.accepted is None else (self.accepted[:count], self.accepted[count:])
        return (
            StateSlots(self.state, self.slots[:count], accepted[0]),
            StateSlots(self.state, self.slots[count:], accepted[1], self.snapshots),
        )


class ModelCache(Protocol):
    """The caches of all layers, for one forward pass."""

    def attention(self, layer: int) -> AttentionCache | KeyPages:
        """The cache of an attention layer."""
        ...

    def delta_net(self, layer: int) -> DeltaNetCache | StateSlots:
        """The cache of a Gated DeltaNet layer."""
        ...


@dataclass(frozen=True, eq=False)
class TransformersCache:
    """A transformers `Cache` (dynamic, static, from outside) behind the two protocols, for one forward pass.

    Attributes:
        cache: the transformers object; it holds padded rows `[B, Hkv, S, Dh]` and states per row.
        rows: where the packed tokens of this pass stand in those rows.
    """

    cache: Cache
    rows: PaddedRows

    @classmethod
    def of(cls, cache: Cache | None, inputs: PackedInputs) -> "TransformersCache | None":
        """The adapter for the rows of `inputs`; None without a cache."""
        if cache is None or inputs.rows is None:
            return None
        if inputs.rows.documents is not None:
            raise InputError(
                "several documents are packed into one row (position_ids restart, or cu_seq_lens_q), and a cache was "
                "given, which follows one document per row; pass past_key_values=None and use_cache=False."
            )
        return cls(cache, inputs.rows)

    def attention(self, layer: int) -> AttentionCache:
        """The keys and values of an attention layer."""
        return _AttentionLayer(self.cache, self.rows, layer)

    def delta_net(self, layer: int) -> DeltaNetCache:
        """The states of a Gated DeltaNet layer."""
        return _DeltaNetLayer(self.cache, layer)


class _AttentionLayer(NamedTuple):
    cache: Cache
    rows: PaddedRows
    layer: int

    @property
    def is_empty(self) -> bool:
        return self.rows.past == 0

    def append(self, k: Tensor, v: Tensor) -> CachedKeys:
        filled = self.rows.past + self.rows.length
        room = self.cache.get_max_length(self.layer)
        if 0 <= room < filled:
            raise InputError(
                f"{filled} tokens do not fit a static cache of {room}; make it with max_cache_len={filled} or more."
            )
        keys, values = (self.rows.unpack(x).transpose(1, 2) for x in (k, v))
        keys, values = self.cache.update(keys, values, self.layer)
        # A static cache hands back its empty tail as well.
        keys, values = (x[:, :, :filled].transpose(1, 2) for x in (keys, values))
        return CachedKeys(keys, values, None if self.rows.key_valid is None else self.rows.visibility(k.device))


class _DeltaNetLayer(NamedTuple):
    cache: Cache
    layer: int

    @property
    def _states(self) -> LinearAttentionLayer:
        states = self.cache.layers[self.layer]
        if not isinstance(states, LinearAttentionLayer):
            raise InputError(
                f"layer {self.layer} is a Gated DeltaNet layer, but the cache given was made for another model: it has "
                f"a {type(states).__name__} there. Make it with DynamicCache(config=model.config), or StaticCache."
            )
        return states

    def read(self) -> DeltaNetState | None:
        states = self._states
        conv, recurrent = states.conv_states[0], states.recurrent_states[0]
        if not states.has_previous_state[0] or conv is None or recurrent is None:
            return None
        return DeltaNetState(conv[..., 1:], recurrent)

    def write(self, state: DeltaNetState) -> None:
        states = self._states
        if states.record_past:
            raise InputError(
                f"the cache was told to record its past (`activate_past_recording`), but layer {self.layer} is a Gated "
                "DeltaNet layer, whose state cannot be rolled back; copy the cache before tokens that may be undone."
            )
        if not states.is_conv_states_initialized[0]:
            states.lazy_initialization(conv_states=F.pad(state.conv, (1, 0)))
        kept = states.conv_states[0]
        assert kept is not None
        kept[..., 1:].copy_(state.conv)  # transformers keeps a window of W inputs, of which W - 1 are ever read
        states.has_previous_state[0] = True
        self.cache.update_recurrent_state(state.recurrent, self.layer)


def complete_layers(cache: Cache, config: Qwen3NextConfig) -> None:
    """Give an empty `DynamicCache()`, which would grow attention layers only, the layers of this model."""
    if not cache.layers and cache.layer_class_to_replicate is not None:
        cache.layers.extend(DynamicCache(config=config).layers)


def cached_length(cache: Cache | None) -> int:
    """How many columns the rows of a transformers cache already hold."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    return int(length.item()) if isinstance(length, torch.Tensor) else length
