"""The limits that a scheduler keeps, and the figures that it reports. No torch."""

from dataclasses import dataclass

from qwen3_next.engine.plan import SequenceResult
from qwen3_next.engine.prefix_cache import Match, MatchEnd
from qwen3_next.engine.request import FinishReason, Request
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

    def most_tokens(self, request: Request) -> int:
        """The most tokens that prompt and output together may have."""
        output = request.params.max_tokens
        most = self.max_context
        return most if output is None else min(most, len(request.prompt) + output)

    def cut(self, request: Request, result: SequenceResult) -> tuple[tuple[int, ...], FinishReason | None]:
        """The tokens up to the first that ends the request, and why it does."""
        params = request.params
        stop = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)}
        room = self.most_tokens(request) - len(request.tokens)
        for count, token in enumerate(result.tokens, 1):
            if token in stop and request.output_length + count >= params.min_tokens:
                return result.tokens[:count], FinishReason.STOP
            if count == room and (result.finish is None or count < len(result.tokens)):
                return result.tokens[:count], FinishReason.LENGTH
        return result.tokens, result.finish

    def wanted_snapshots(self, request: Request, match: Match, page_size: int) -> set[int]:
        """Where other requests are likely to go on: before the last token of the prompt, where pages of others end, at
        the request's branch points, and at every stride. All at ends of pages, and behind what is cached."""
        if not self.prefix_cache:
            return set()
        last, size = len(request.prompt) - 1, page_size
        stride = range(self.snapshot_stride, len(request.tokens), self.snapshot_stride)
        places = (last, match.pages, *(min(last, place) for place in request.branch_points), *stride)
        return {place // size * size for place in places if place // size * size > match.position}


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
