"""The limits of an engine, and how its memory is divided into pages of keys and slots of states."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.engine.loading import ram_bytes
from qwen3_next.engine.scheduler_config import SchedulerConfig
from qwen3_next.errors import CapacityError, InputError
from qwen3_next.model.delta_net import STEP_TOKENS
from qwen3_next.model.packed_cache import PackedMemory
from qwen3_next.ops.pages import PAGE

SHARE_OF_RAM, SHARE_OF_DEVICE = 0.25, 0.9
"""Of all RAM, and of what the weights have left free of a GPU, that pages and slots take by default."""

SHARE_OF_SLOTS = 0.5
"""The most of that memory that goes to slots."""

MOST_AUTOMATIC_DRAFTS = 3
"""One MTP layer proposes them one after the other, and each is right less often than the one before."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The limits of an engine; None is for the engine to choose (`resolved`).

    Attributes:
        max_sequences: requests that are computed at the same time.
        token_budget: tokens of a call of the network; longer prompts are read in several.
        max_context: tokens of a prompt and its output; None: what the model serves and the memory holds.
        memory_bytes: for keys, values and states; None: a share of what is free.
        prefix_cache: whether prompts that begin alike are computed once.
        snapshot_stride: keep a state every so many tokens of a long prompt.
        plan_ahead: whether the host plans the next call while the device computes; None: where the device is a GPU.
        drafts: tokens that the MTP layer proposes per step, up to 7, to be verified together; what is written stays the
            same. "auto" measures which number is fastest, none included; it drafts nothing where there is no MTP layer.
    """

    max_sequences: int = 64
    token_budget: int = 8192
    max_context: int | None = None
    memory_bytes: int | None = None
    prefix_cache: bool = True
    snapshot_stride: int = 8192
    plan_ahead: bool | None = None
    drafts: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("max_sequences", "token_budget", "max_context", "memory_bytes", "snapshot_stride"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{name} = {value!r} cannot be served. Allowed: a whole number of at least 1.")
        allowed = ("auto", *range(STEP_TOKENS))
        if self.drafts not in allowed or isinstance(self.drafts, bool):
            raise InputError(f"drafts = {self.drafts!r} cannot be served. Allowed: 'auto', or 0 to {allowed[-1]}.")

    def most_drafts(self, has_mtp: bool) -> int:
        """The most drafts of a step.

        Raises:
            InputError: drafts are asked for by number, and the model has no MTP layer.
        """
        if self.drafts not in (0, "auto") and not has_mtp:
            raise InputError(
                f"drafts = {self.drafts} cannot be served: the checkpoint has no MTP layer. Allowed: 0 or 'auto'. Load "
                "a checkpoint with mtp.* weights."
            )
        return 0 if not has_mtp else MOST_AUTOMATIC_DRAFTS if self.drafts == "auto" else self.drafts

    def divided(
        self, config: Qwen3NextConfig, dtype: torch.dtype, device: torch.device, has_mtp: bool = False
    ) -> "Division":
        """How many pages and slots there will be, and the limits that follow.

        Args:
            has_mtp: the model can draft.

        Raises:
            CapacityError: not even one sequence fits.
            InputError: see `most_drafts`.
        """
        drafts = self.most_drafts(has_mtp)
        page_bytes, slot_bytes = sizes(config, dtype, drafts)
        room = free_bytes(device) if self.memory_bytes is None else self.memory_bytes
        # A slot for each sequence and one for a state that others can go on from; one is reserved.
        slots = min(2 * self.max_sequences + 1, int(room * SHARE_OF_SLOTS) // max(slot_bytes, 1))
        longest = config.context_length() if self.max_context is None else self.max_context
        wanted = self.max_sequences * -(-longest // PAGE) + 2
        pages = min(wanted, (room - max(slots, 0) * slot_bytes) // max(page_bytes, 1))
        if slots < 3 or pages < 3:
            raise CapacityError(
                f"{room / 2**20:.0f} MiB for keys, values and states hold no sequence. Allowed: at least "
                f"{(3 * slot_bytes / SHARE_OF_SLOTS + 3 * page_bytes) / 2**20:.0f} MiB. Raise memory_bytes, or load "
                "smaller weights."
            )
        context = min(longest, (pages - 2) * PAGE)
        if self.max_context is not None and context < self.max_context:
            raise CapacityError(
                f"max_context = {self.max_context} does not fit the memory. Allowed: at most {context}. Lower it, or "
                "raise memory_bytes."
            )
        sequences = min(self.max_sequences, (slots - 1) // 2)
        budget = max(self.token_budget, sequences * (1 + drafts) + 1)
        limits = replace(
            self,
            max_sequences=sequences,
            token_budget=budget,
            max_context=context,
            memory_bytes=room,
            plan_ahead=device.type == "cuda" if self.plan_ahead is None else self.plan_ahead,
        )
        return Division(limits, pages, slots, page_bytes, slot_bytes, drafts)


@dataclass(frozen=True)
class Division:
    """Limits without None, and the memory behind them. A page holds `PAGE` tokens; `drafts` is the most of a step."""

    limits: EngineConfig
    pages: int
    slots: int
    page_bytes: int
    slot_bytes: int
    drafts: int = 0

    @property
    def pending(self) -> int:
        """The most tokens of a sequence that await a verdict."""
        return pending_of(self.drafts)

    @property
    def pages_of_a_sequence(self) -> int:
        """The most, with those of drafts behind its end."""
        assert self.limits.max_context is not None
        return -(-(self.limits.max_context + STEP_TOKENS) // PAGE)

    def scheduler(self, ends: frozenset[int]) -> SchedulerConfig:
        """The same limits for the scheduler."""
        limits = self.limits
        assert limits.max_context is not None
        return SchedulerConfig(
            max_sequences=limits.max_sequences,
            token_budget=limits.token_budget,
            max_context=limits.max_context,
            max_drafts=self.drafts,
            snapshot_stride=limits.snapshot_stride,
            prefix_cache=limits.prefix_cache,
            eos_token_ids=ends,
        )

    def __str__(self) -> str:
        """What a start-up message says."""
        keys, states = self.pages * self.page_bytes / 2**20, self.slots * self.slot_bytes / 2**20
        return (
            f"{self.pages:,} pages of {PAGE} tokens ({keys:,.0f} MiB) and {self.slots:,} slots ({states:,.0f} MiB): "
            f"{self.limits.max_sequences} sequences at a time, {self.limits.max_context:,} tokens of context, "
            f"{self.pages * PAGE:,} in all"
        )


def sizes(config: Qwen3NextConfig, dtype: torch.dtype, drafts: int = 0) -> tuple[int, int]:
    """Bytes of a page and of a slot in all layers, with drafts that of the MTP layer among them."""
    types = (*config.layer_types, *("full_attention",) * (drafts > 0))
    one = PackedMemory.allocate(
        config, pages=1, slots=1, pending=pending_of(drafts), layer_types=types, dtype=dtype, device="meta"
    )
    states = (one.recurrent, one.conv, one.pending_qkv, one.pending_ba)
    return one.keys.nbytes + one.values.nbytes, sum(state.nbytes for state in states)


def pending_of(drafts: int) -> int:
    """The most tokens of a sequence that await a verdict: the drafts and the token before them."""
    return 1 + drafts if drafts else 0


def free_bytes(device: torch.device) -> int:
    """What pages and slots take by default."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * SHARE_OF_DEVICE)
    return int(ram_bytes() * SHARE_OF_RAM)
