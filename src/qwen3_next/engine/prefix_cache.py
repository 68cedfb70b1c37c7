"""Which pages and DeltaNet states are kept for requests that begin with the same tokens. No torch.

A prefix can be continued only where both exist: the pages of all its tokens, and the state behind its last one.

    root -- page 7: "You are a" -- page 3: " helpful as" -- page 9: "sistant.\\nU"
                                       |                        `-- state after " How" (page 12 holds its tail)
                                       `-- state at the end of page 3

Pages hang in a tree and are found by their content: a page's key is the tokens in it, below the page before it. That is
a hash chain in which each link is compared as well, so that no two prompts can ever be taken for each other.

A state (snapshot) stands at an exact position. Inside a prompt only ends of pages are chosen: the state there costs no
page, and a prompt recomputes at most one page for it. The end of a turn falls anywhere; its last, partly filled page is
handed over by the request that ended, and whoever continues from there copies it first.
"""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

__all__ = ["Match", "MatchEnd", "PageNode", "PrefixCache", "Snapshot"]

REMEMBERED = 65_536
"""Evicted pages and snapshots that are still known by name, to say of a miss that it was one."""


class MatchEnd(Enum):
    """Why a lookup found no more than it did."""

    WHOLE = "whole"
    """Everything but the last token, which must be computed for its logits, or less than a page more."""
    NO_PAGES = "no pages"
    """The tokens behind the match were never computed."""
    NO_SNAPSHOT = "no snapshot"
    """Their pages are there, but no state was kept behind them."""
    EVICTED = "evicted"
    """Their pages or the state were there once."""


@dataclass(eq=False)
class PageNode:
    """A page full of tokens that nobody writes any more.

    Attributes:
        page: its number; 0 at the root, which stands for no tokens and is never evicted.
        depth: pages from the root; it ends at position `depth * page_size`.
        chain: hash of all tokens up to its end. Only statistics depend on it.
        users: requests that have it in their page table.
    """

    page: int
    parent: "PageNode | None"
    tokens: tuple[int, ...]
    depth: int
    chain: int
    used: int = 0
    users: int = 0
    children: dict[tuple[int, ...], "PageNode"] = field(default_factory=dict[tuple[int, ...], "PageNode"])
    snapshots: dict[tuple[int, ...], "Snapshot"] = field(default_factory=dict[tuple[int, ...], "Snapshot"])
    alive: bool = True


@dataclass(eq=False)
class Snapshot:
    """The state of the DeltaNet layers behind a prefix.

    Attributes:
        node: its last full page.
        tail: the tokens behind that, less than a page; empty at the end of a page.
        tail_page: holds them; None without a tail.
        slot: holds the state.
        pending: how many of the last tokens lie in the slot beside the state and have to join it.
        users: requests that are about to copy it; it is not evicted meanwhile.
    """

    node: PageNode
    tail: tuple[int, ...]
    tail_page: int | None
    slot: int
    pending: int
    position: int
    used: int = 0
    users: int = 0
    alive: bool = True


@dataclass(frozen=True, eq=False)
class Match:
    """The longest prefix that can be continued.

    Attributes:
        position: how many tokens it has; 0 where nothing can be used.
        nodes: its full pages.
        snapshot: its state; None at position 0.
        pages: position up to which pages exist; a state at its end would have been of use.
        end: why it is no longer.
    """

    position: int
    nodes: tuple[PageNode, ...]
    snapshot: Snapshot | None
    pages: int
    end: MatchEnd


class PrefixCache:
    """The tree. It decides what is kept and what goes first; pages and slots come from `Memory` and go back there."""

    def __init__(self, page_size: int, free_page: Callable[[int], None], free_slot: Callable[[int], None]) -> None:
        self.page_size = page_size
        self.root = PageNode(page=0, parent=None, tokens=(), depth=0, chain=0)
        self.idle_pages = 0
        """Pages that would come back if everything unused were evicted."""
        self.idle_slots = 0
        """The same for slots."""
        self._free_page, self._free_slot = free_page, free_slot
        self._clock = itertools.count(1)
        # Candidates of eviction, least recently used first; entries that are no longer true are dropped on the way.
        self._page_queue: list[tuple[int, int, PageNode | Snapshot]] = []
        self._slot_queue: list[tuple[int, int, Snapshot]] = []
        self._tickets = itertools.count()
        self._forgotten: OrderedDict[int, None] = OrderedDict()

    def lookup(self, tokens: Sequence[int], limit: int) -> Match:
        """Find the longest prefix of `tokens`, at most `limit` of them, whose pages and state both exist."""
        path = [self.root, *self._walk(tokens, limit)]
        for depth in range(len(path) - 1, -1, -1):
            snapshot = self._longest_snapshot(path[depth], tokens, limit)
            if snapshot is not None:
                break
        else:
            depth, snapshot = 0, None
        pages = path[-1].depth * self.page_size
        position = 0 if snapshot is None else snapshot.position
        end = self._why(path, depth, position, tokens, limit)
        return Match(position, tuple(path[1 : depth + 1]), snapshot, pages, end)

    def child(self, parent: PageNode, tokens: tuple[int, ...]) -> PageNode | None:
        """The page that holds these tokens behind `parent`, or None."""
        return parent.children.get(tokens)

    def add_page(self, parent: PageNode, tokens: tuple[int, ...], page: int) -> PageNode:
        """Take over a full page of a request, which becomes its first user."""
        node = PageNode(page, parent, tokens, parent.depth + 1, hash((parent.chain, tokens)), users=1)
        parent.children[tokens] = node
        self._forgotten.pop(node.chain, None)
        return node

    def add_snapshot(
        self, node: PageNode, tail: tuple[int, ...], tail_page: int | None, slot: int, pending: int
    ) -> bool:
        """Take over a slot and the page of its tail; False, and nothing is taken, if the state is there already."""
        if tail in node.snapshots:
            self._touch_snapshot(node.snapshots[tail])
            return False
        position = node.depth * self.page_size + len(tail)
        snapshot = Snapshot(node, tail, tail_page, slot, pending, position, used=next(self._clock))
        node.snapshots[tail] = snapshot
        self._forgotten.pop(self._name(node, tail), None)
        self._count(snapshot, 1)
        self._queue_snapshot(snapshot)
        return True

    def has_snapshot(self, node: PageNode, tail: tuple[int, ...] = ()) -> bool:
        """Whether the state behind this page and tail is kept."""
        return tail in node.snapshots

    def use(self, node: PageNode) -> None:
        """Count a request in that has the page in its table. The pages before it must be in use."""
        if node.users == 0:
            self.idle_pages -= 1
        node.users += 1

    def leave(self, node: PageNode) -> None:
        """Count a request out. Leave pages from the last to the first."""
        node.users -= 1
        if node.users == 0:
            self.idle_pages += 1
            node.used = next(self._clock)
            self._queue_page(node)

    def pin(self, snapshot: Snapshot) -> None:
        """Keep a snapshot until it is copied."""
        if snapshot.users == 0:
            self._count(snapshot, -1)
        snapshot.users += 1

    def unpin(self, snapshot: Snapshot) -> None:
        """The copy is made."""
        snapshot.users -= 1
        if snapshot.users == 0:
            self._count(snapshot, 1)
            self._touch_snapshot(snapshot)

    def evict_page(self) -> bool:
        """Give back the page that nobody needed for the longest time, and what hangs on it. False: all are in use."""
        while self._page_queue:
            entry = heapq.heappop(self._page_queue)
            if _is_candidate(entry):
                item = entry[2]
                self._drop_snapshot(item) if isinstance(item, Snapshot) else self._drop_page(item)
                return True
        return False

    def evict_slot(self) -> bool:
        """Give back the slot of the snapshot that nobody needed for the longest time. False: there is none."""
        while self._slot_queue:
            entry = heapq.heappop(self._slot_queue)
            if _is_candidate(entry):
                self._drop_snapshot(entry[2])
                return True
        return False

    def forget(self, node: PageNode) -> None:
        """Drop an unused page without children, those before it that thereby become so, and all their states."""
        while node.parent is not None and not node.users and not node.children:
            parent = node.parent
            self._drop_page(node)
            node = parent

    def nodes(self) -> Iterator[PageNode]:
        """Every page, the root first."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Assert that the tree is one, that users never lack a page before their own, and that the counts are right."""
        pages = slots = 0
        for node in self.nodes():
            assert node.alive
            for tokens, child in node.children.items():
                assert (child.parent, child.tokens, len(tokens)) == (node, tokens, self.page_size)
                assert child.depth == node.depth + 1
                assert node is self.root or node.users >= child.users
            pages += node is not self.root and node.users == 0
            for tail, snapshot in node.snapshots.items():
                assert (snapshot.alive, snapshot.node, snapshot.tail) == (True, node, tail)
                assert len(tail) < self.page_size
                assert (snapshot.tail_page is None) == (not tail)
                assert snapshot.position == node.depth * self.page_size + len(tail)
                assert snapshot.users == 0 or node is self.root or node.users > 0
                slots += snapshot.users == 0
                pages += snapshot.users == 0 and snapshot.tail_page is not None
        assert (pages, slots) == (self.idle_pages, self.idle_slots)

    def _walk(self, tokens: Sequence[int], limit: int) -> Iterator[PageNode]:
        node, size = self.root, self.page_size
        for start in range(0, limit - size + 1, size):
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                return
            node = child
            yield node

    def _longest_snapshot(self, node: PageNode, tokens: Sequence[int], limit: int) -> Snapshot | None:
        start = node.depth * self.page_size
        following = tuple(tokens[start : min(limit, start + self.page_size)])
        fitting = [one for tail, one in node.snapshots.items() if following[: len(tail)] == tail]
        return max(fitting, key=lambda one: one.position, default=None)

    def _why(self, path: list[PageNode], depth: int, position: int, tokens: Sequence[int], limit: int) -> MatchEnd:
        """Say what stood in the way of a longer match: first what was evicted, then what was never there."""
        last, size = path[-1], self.page_size
        start = last.depth * size
        following = tuple(tokens[start : min(limit, start + size)])
        tails = (following[:length] for length in range(len(following), max(position - start, -1), -1))
        names = (
            hash((last.chain, following)),
            *(self._name(last, tail) for tail in tails),
            *(self._name(node, ()) for node in path[depth + 1 :]),
        )
        if any(name in self._forgotten for name in names):
            return MatchEnd.EVICTED
        if depth < last.depth:
            return MatchEnd.NO_SNAPSHOT
        return MatchEnd.WHOLE if limit - position < size else MatchEnd.NO_PAGES

    def _touch_snapshot(self, snapshot: Snapshot) -> None:
        snapshot.used = next(self._clock)
        if not snapshot.users:
            self._queue_snapshot(snapshot)

    def _queue_page(self, node: PageNode) -> None:
        if node is not self.root and not node.users and not node.children:
            self._push(self._page_queue, node)

    def _queue_snapshot(self, snapshot: Snapshot) -> None:
        self._push(self._slot_queue, snapshot)
        if snapshot.tail_page is not None:
            self._push(self._page_queue, snapshot)

    def _push(self, queue: "list[tuple[int, int, _Item]]", item: "_Item") -> None:
        heapq.heappush(queue, (item.used, next(self._tickets), item))
        # A cache that never fills up never pops: forget entries that are no longer true before they are too many.
        if len(queue) > 2 * (self.idle_pages + self.idle_slots) + 1024:
            queue[:] = {id(entry[2]): entry for entry in queue if _is_candidate(entry)}.values()
            heapq.heapify(queue)

    def _drop_page(self, node: PageNode) -> None:
        for snapshot in list(node.snapshots.values()):
            self._drop_snapshot(snapshot)
        assert node.parent is not None
        assert node.users == 0
        del node.parent.children[node.tokens]
        node.alive = False
        self.idle_pages -= 1
        self._remember(node.chain)
        self._free_page(node.page)
        self._queue_page(node.parent)

    def _drop_snapshot(self, snapshot: Snapshot) -> None:
        assert snapshot.users == 0
        del snapshot.node.snapshots[snapshot.tail]
        snapshot.alive = False
        self._count(snapshot, -1)
        self._remember(self._name(snapshot.node, snapshot.tail))
        self._free_slot(snapshot.slot)
        if snapshot.tail_page is not None:
            self._free_page(snapshot.tail_page)

    def _count(self, snapshot: Snapshot, change: int) -> None:
        self.idle_slots += change
        self.idle_pages += change * (snapshot.tail_page is not None)

    def _name(self, node: PageNode, tail: tuple[int, ...]) -> int:
        return hash((node.chain, tail, "state"))

    def _remember(self, name: int) -> None:
        self._forgotten[name] = None
        if len(self._forgotten) > REMEMBERED:
            self._forgotten.popitem(last=False)


_Item = TypeVar("_Item", PageNode, Snapshot, PageNode | Snapshot)


def _is_candidate(entry: tuple[int, int, PageNode | Snapshot]) -> bool:
    """Whether an entry of a queue of eviction is still true."""
    used, _, item = entry
    if not item.alive or item.users or item.used != used:
        return False
    return isinstance(item, Snapshot) or not item.children
