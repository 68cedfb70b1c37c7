"""What the scheduler asks one call of the model to do, and what it is told of the outcome. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from qwen3_next.engine.memory import Copy
from qwen3_next.engine.request import FinishReason, Request
from qwen3_next.errors import Qwen3NextError

__all__ = ["Plan", "ScheduledSequence", "SequenceResult", "SnapshotOrder"]


@dataclass(frozen=True)
class SnapshotOrder:
    """Keep the state after `position` tokens of the sequence in `slot`."""

    position: int
    slot: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ScheduledSequence:
    """One sequence's share of a call: the tokens `[start, start + length)`.

    Two kinds share a call. A **chunk** reads committed tokens; they join the state at once. A **step** brings the last
    committed token and `drafts` proposals; they stay pending in the slot until the verdict, and the next call of the
    sequence lets the first `accepted` of them join before its own.

    A plan may be made while earlier calls are in flight, so that where a step starts is not known yet: `start` is the
    least it can be, and `uncertain` how much later it can be, which is how many drafts those calls may accept. Then
    `accepted` is the least as well; the device knows both, and the token ids, from the sequence's last call. `pages`
    has room for the most. With `uncertain` 0 all is as it stands here, but the ids where a call is in flight.

    Attributes:
        pages: page table of the sequence, for all tokens up to `start + uncertain + length`.
        slot: of its state.
        accepted: how many pending tokens in the slot join the state before the new ones do.
        drafts: proposals among the tokens, the last ones; of those that the last call of the sequence left.
        next_drafts: how many proposals to leave for the next call.
        awaits_verdict: it is a step, not a chunk.
        joins: its tokens become part of the state at once, since no step of the call brings drafts or has tokens
            pending from the call before.
        samples: the logits of its last `1 + drafts` tokens are needed.
        starts_empty: the slot is a fresh one: begin with a state of zeros and nothing pending.
        state_copy: copy this slot first, with what is pending there.
        page_copy: copy this page first.
        snapshots: states of the inside of a chunk to keep, ascending, each at the end of a page.
    """

    request: Request
    start: int
    uncertain: int
    length: int
    pages: tuple[int, ...]
    slot: int
    accepted: int
    drafts: int
    next_drafts: int
    awaits_verdict: bool
    joins: bool
    samples: bool
    starts_empty: bool
    state_copy: Copy | None
    page_copy: Copy | None
    snapshots: tuple[SnapshotOrder, ...]

    @property
    def end(self) -> int:
        """Position behind the last token; the least it can be."""
        return self.start + self.length

    @property
    def leaves_pending(self) -> bool:
        """Whether its tokens lie beside the state until the next call."""
        return self.awaits_verdict and not self.joins

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens, as far as the host knows them: all of a chunk and of a step with nothing in flight before it."""
        tokens = self.request.tokens[self.start : self.end]
        return (*tokens, *self.request.drafts[: self.drafts]) if self.awaits_verdict else tuple(tokens)


@dataclass(frozen=True, eq=False)
class Plan:
    """One call of the model. Copies come first, then zeros into the slots that start empty, then the call.

    Attributes:
        number: counts the plans of a scheduler.
        sequences: steps first, then chunks.
        joins: see there.
    """

    number: int
    sequences: tuple[ScheduledSequence, ...]
    joins: bool = True

    @property
    def token_count(self) -> int:
        """T of the call."""
        return sum(sequence.length for sequence in self.sequences)

    @property
    def has_drafts(self) -> bool:
        """Whether drafts are verified, or are to be made for the next call."""
        return any(sequence.drafts or sequence.next_drafts for sequence in self.sequences)

    def __iter__(self) -> Iterator[ScheduledSequence]:
        return iter(self.sequences)

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True, kw_only=True)
class SequenceResult:
    """What a call did for one sequence, in the place of its `ScheduledSequence`.

    Attributes:
        tokens: the accepted drafts and the one token sampled behind them; empty where nothing was sampled.
        drafts: proposals for the tokens after those.
        finish: the text ended inside `tokens`, which were cut there: at a stop string, at the end of a grammar.
        error: the sequence failed, alone.
    """

    tokens: tuple[int, ...] = ()
    drafts: tuple[int, ...] = ()
    finish: FinishReason | None = None
    error: Qwen3NextError | None = None
