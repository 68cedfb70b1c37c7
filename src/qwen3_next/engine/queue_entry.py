"""A request in the scheduler's queues: its rank, its calls in flight, and whose prompt it can share. No torch."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from qwen3_next.engine.plan import ScheduledSequence
from qwen3_next.engine.request import Request, Status, common_prefix

__all__ = ["Entry", "is_held_back_by", "rank_of"]


@dataclass(eq=False)
class Entry:
    """A request and what only the scheduler needs to know of it.

    Attributes:
        flights: its share of each call that is planned and not committed.
        snapshots: positions at which states are wanted.
        awaited: the entry whose prompt this one waits for, to share it up to a position.
        survives: whether the slot still holds the state of the committed tokens when the last flight has landed.
    """

    request: Request
    rank: tuple[int, int]
    flights: deque[ScheduledSequence] = field(default_factory=deque[ScheduledSequence])
    snapshots: set[int] = field(default_factory=set[int])
    awaited: "tuple[Entry, int] | None" = None
    survives: bool = True

    def next_start(self) -> tuple[int, int]:
        """Where the next call starts, if no draft in flight is accepted, and how much later if all are."""
        start, uncertain = self.request.computed, 0
        for flight in self.flights:
            if flight.awaits_verdict:
                start, uncertain = start + 1, uncertain + flight.drafts
            else:
                start = flight.end
        return start, uncertain

    @property
    def takes_a_step(self) -> bool:
        """Whether it runs, and all but its last token is computed or in flight."""
        return self.request.status is Status.RUNNING and self.next_start()[0] >= len(self.request.tokens) - 1

    @property
    def next_drafts(self) -> int:
        """How many proposals its next step can verify."""
        return self.flights[-1].next_drafts if self.flights else len(self.request.drafts)

    @property
    def has_pending(self) -> bool:
        """Whether tokens lie beside its state when its next call begins."""
        return self.flights[-1].leaves_pending if self.flights else self.request.pending > 0

    @property
    def is_computing_its_prompt(self) -> bool:
        """Whether it runs, and chunks remain to be planned."""
        return self.request.status is Status.RUNNING and self.next_start()[0] < len(self.request.tokens) - 1


def rank_of(entry: Entry) -> tuple[int, int]:
    """Sort by this."""
    return entry.rank


def is_held_back_by(entry: Entry, computing: Iterable[Entry], page_size: int) -> bool:
    """Whether a request does better to wait: one of an earlier rank is computing the beginning of its prompt.

    The other one is made to keep its state where the two part.
    """
    if entry.awaited is None:
        entry.awaited = _find_sharing(entry, computing, page_size)
    if entry.awaited is None:
        return False
    other, place = entry.awaited
    kept_by_calls = (order.position for flight in other.flights for order in flight.snapshots)
    is_coming = other.next_start()[0] < place or place in kept_by_calls
    if other.request.status is not Status.RUNNING or other.request.computed >= place or not is_coming:
        entry.awaited = None
    return entry.awaited is not None


def _find_sharing(entry: Entry, computing: Iterable[Entry], page_size: int) -> tuple[Entry, int] | None:
    tokens = entry.request.tokens
    for other in computing:
        start, theirs = other.next_start()[0], other.request.tokens
        if other.rank > entry.rank:
            continue
        # Worth the wait only for more than what is computed already: at least to the end of the next page.
        least = (other.request.computed // page_size + 1) * page_size
        if theirs[:least] == tokens[:least]:
            most = min(common_prefix(theirs, tokens), len(tokens) - 1, len(theirs) - 1)
            place = most // page_size * page_size
            if place > start:
                other.snapshots.add(place)
                return other, place
    return None
