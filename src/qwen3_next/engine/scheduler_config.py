"""The limits that a scheduler keeps, and the figures that it reports. No torch."""

from dataclasses import dataclass

from qwen3_next.engine.prefix_cache import MatchEnd
from qwen3_next.errors import InputError

__all__ = ["SchedulerConfig", "SchedulerFigures"]


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The limits of a scheduler.

    Attributes:
        max_sequences: sequences in a call, and requests that own memory.
        token_budget: tokens in a call; more than all steps can need, so that prompts always go on.
        max_context: tokens of prompt and output together.
        max_drafts: proposals per step.
        snapshot_stride: keep a state every so many tokens of a long prompt.
        aging: steps that one level of priority counts as.
        prefix_cache: whether requests share pages and states.
        eos_token_ids: the model's own end tokens.
    """

    max_sequences: int
    token_budget: int
    max_context: int
    max_drafts: int = 0
    snapshot_stride: int = 8192
    aging: int = 256
    prefix_cache: bool = True
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name, least in (("max_sequences", 1), ("max_context", 2), ("max_drafts", 0), ("snapshot_stride", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} = {getattr(self, name)} cannot be served. Allowed: at least {least}.")
        steps = self.max_sequences * (1 + self.max_drafts)
        if self.token_budget <= steps:
            raise InputError(
                f"token_budget = {self.token_budget} cannot be served. Allowed: above max_sequences * (1 + max_drafts) "
                f"= {steps}, or prompts would wait for ever. Raise it, or lower max_sequences."
            )


@dataclass(frozen=True, kw_only=True)
class SchedulerFigures:
    """Counts since the start, and the queues as they are.

    Attributes:
        matches: why lookups in the prefix cache ended where they did.
        cached_tokens: that lookups found, of `looked_up_tokens`.
    """

    waiting: int
    running: int
    preemptions: int
    looked_up_tokens: int
    cached_tokens: int
    matches: dict[MatchEnd, int]
