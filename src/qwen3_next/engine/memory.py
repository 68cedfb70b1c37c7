"""The one owner of every KV page and every DeltaNet slot, in numbers: the tensors are elsewhere. No torch.

A page is free, private to one request, or the prefix cache's, where any number of requests may read it. A slot is free,
a request's, or a snapshot's. Page 0 and slot 0 belong to the null sequences that fill up a batch.

    page:  free -admit, grow-> private -publish (full and computed)-> cache -evict-> free
                               private -release (not full, no state)---------------> free
    slot:  free -admit-> request -release (a state worth keeping)-> snapshot -evict-> free
           free -reserve-> request -keep (its call is committed)--> snapshot

Pages and slots are given back only when no call that touches them is in flight, so that nothing here needs to know of
the order of events on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen3_next.engine.prefix_cache import Match, PageNode, PrefixCache, Snapshot
from qwen3_next.errors import CapacityError

__all__ = ["Copy", "Memory", "MemoryFigures"]


@dataclass(frozen=True)
class Copy:
    """Copy a page or a slot, before the call that it was planned for."""

    source: int
    target: int


@dataclass(frozen=True, kw_only=True)
class MemoryFigures:
    """How many pages and slots are where; the reserved ones are not counted.

    Attributes:
        idle_pages: of the cache, and nobody reads them: given back when needed.
        idle_slots: the same of slots.
    """

    free_pages: int
    idle_pages: int
    used_pages: int
    free_slots: int
    idle_slots: int
    used_slots: int


@dataclass(eq=False)
class Holding:
    """What one request owns or uses.

    Attributes:
        pages: its page table; the first `len(nodes)` are the cache's, the others its own.
        nodes: the cache's pages that it uses.
        slot: of its state.
        source: the snapshot that its state is about to be copied from.
        reserved: slots for states inside the calls in flight, by position.
    """

    pages: list[int]
    nodes: list[PageNode]
    slot: int
    source: Snapshot | None
    reserved: dict[int, int] = field(default_factory=dict[int, int])


class Memory:
    """Gives pages and slots to requests, takes them back, and lets the prefix cache live in what nobody needs."""

    def __init__(self, pages: int, slots: int, page_size: int) -> None:
        """Own pages 1 to `pages - 1` of `page_size` tokens each and slots 1 to `slots - 1`.

        Raises:
            CapacityError: fewer than 2 pages or 2 slots remain beside the reserved ones; a state is copied from one
                slot to another, and its last page too.
        """
        if pages < 3 or slots < 3 or page_size < 1:
            raise CapacityError(
                f"{pages=}, {slots=}, {page_size=} hold no request. Allowed: at least 3 pages and 3 slots (one of each "
                "is reserved) of at least 1 token. Free memory of the device, or load smaller weights."
            )
        self.page_count, self.slot_count, self.page_size = pages, slots, page_size
        self._free_pages = list(range(pages - 1, 0, -1))
        self._free_slots = list(range(slots - 1, 0, -1))
        self._holdings: dict[str, Holding] = {}
        self.cache = PrefixCache(page_size, self._free_pages.append, self._free_slots.append)

    def lookup(self, tokens: Sequence[int], limit: int) -> Match:
        """Find the longest prefix of `tokens`, at most `limit` of them, that `admit` can continue."""
        return self.cache.lookup(tokens, limit)

    def admit(self, request_id: str, match: Match, length: int) -> bool:
        """Give a request the pages of a match, own pages up to `length` tokens, and a slot. False: no room, no change.

        `state_copy` and `page_copy` tell what to copy before the first call, and `copied` must be called when that call
        is committed.
        """
        assert request_id not in self._holdings
        for node in match.nodes:
            self.cache.use(node)
        if match.snapshot is not None:
            self.cache.pin(match.snapshot)
        needed = self.pages_for(length) - len(match.nodes)
        if needed > self.available_pages or not self.available_slots:
            self._leave(match.nodes, match.snapshot)
            return False
        pages = [*(node.page for node in match.nodes), *(self._take_page() for _ in range(needed))]
        self._holdings[request_id] = Holding(pages, list(match.nodes), self._take_slot(), match.snapshot)
        return True

    def state_copy(self, request_id: str) -> Copy | None:
        """The slot to copy before the first call after `admit`, or None; then that slot starts from zeros."""
        holding = self._holdings[request_id]
        return None if holding.source is None else Copy(holding.source.slot, holding.slot)

    def page_copy(self, request_id: str) -> Copy | None:
        """The partly filled page to copy before the first call after `admit`, or None."""
        holding = self._holdings[request_id]
        if holding.source is None or holding.source.tail_page is None:
            return None
        return Copy(holding.source.tail_page, holding.pages[holding.source.node.depth])

    def copied(self, request_id: str) -> None:
        """The copies of a request's first call are made."""
        holding = self._holdings[request_id]
        if holding.source is not None:
            self.cache.unpin(holding.source)
            holding.source = None

    def grow(self, request_id: str, length: int) -> bool:
        """Let the pages of a request cover `length` tokens. False: no room, no change."""
        pages = self._holdings[request_id].pages
        needed = self.pages_for(length) - len(pages)
        if needed > self.available_pages:
            return False
        pages.extend(self._take_page() for _ in range(needed))
        return True

    def publish(self, request_id: str, tokens: Sequence[int], computed: int) -> None:
        """Hand the full pages among the first `computed` tokens to the cache. All of these must be committed.

        Where the cache has a page of the same content, the request uses that and its own becomes free.
        """
        holding, size = self._holdings[request_id], self.page_size
        for index in range(len(holding.nodes), computed // size):
            parent = holding.nodes[-1] if holding.nodes else self.cache.root
            content = tuple(tokens[index * size : (index + 1) * size])
            node = self.cache.child(parent, content)
            if node is None:
                node = self.cache.add_page(parent, content, holding.pages[index])
            else:
                self.cache.use(node)
                self._free_pages.append(holding.pages[index])
                holding.pages[index] = node.page
            holding.nodes.append(node)

    def reserve_snapshot(self, request_id: str, position: int) -> int | None:
        """A slot for the state at the end of a page, which the next call of the request will write. None: no room."""
        assert position % self.page_size == 0
        holding = self._holdings[request_id]
        if position in holding.reserved or not self.available_slots:
            return None
        holding.reserved[position] = self._take_slot()
        return holding.reserved[position]

    def keep_snapshot(self, request_id: str, position: int) -> None:
        """The reserved slot was written, and the tokens up to there are published: hand it to the cache."""
        holding = self._holdings[request_id]
        slot = holding.reserved.pop(position)
        if not self.cache.add_snapshot(holding.nodes[position // self.page_size - 1], (), None, slot, 0):
            self._free_slots.append(slot)

    def has_snapshot(self, request_id: str, position: int) -> bool:
        """Whether the state at the end of a published page of the request is kept."""
        nodes, index = self._holdings[request_id].nodes, position // self.page_size - 1
        return index < len(nodes) and self.cache.has_snapshot(nodes[index])

    def release(self, request_id: str, tokens: Sequence[int], computed: int, pending: int | None) -> None:
        """Take back everything of a request, and keep in the cache what others can use.

        Args:
            tokens: of the request, all committed.
            computed: how many of them are in its pages.
            pending: how many of those lie in the slot beside the state; None: the slot's state is of other tokens.
        """
        self.publish(request_id, tokens, computed)
        holding = self._holdings.pop(request_id)
        assert holding.source is None or pending is None
        tail = tuple(tokens[computed // self.page_size * self.page_size : computed])
        own = holding.pages[len(holding.nodes) :]
        node = holding.nodes[-1] if holding.nodes else self.cache.root
        tail_page = own[0] if tail else None
        if pending is not None and computed and self.cache.add_snapshot(node, tail, tail_page, holding.slot, pending):
            own = own[1:] if tail else own
        else:
            self._free_slots.append(holding.slot)
        self._free_pages.extend(own)
        self._free_slots.extend(holding.reserved.values())
        self._leave(holding.nodes, holding.source)

    def discard(self, request_id: str) -> None:
        """Take back everything of a request that failed, and forget its pages where nobody else uses them."""
        holding = self._holdings.pop(request_id)
        self._free_slots.extend((holding.slot, *holding.reserved.values()))
        self._free_pages.extend(holding.pages[len(holding.nodes) :])
        self._leave(holding.nodes, holding.source)
        if holding.nodes:
            self.cache.forget(holding.nodes[-1])

    def evict_all(self) -> None:
        """Empty the prefix cache of all that nobody uses: after new weights, and to measure without it."""
        while self.cache.evict_slot() or self.cache.evict_page():
            pass

    def page_table(self, request_id: str) -> tuple[int, ...]:
        """The pages of a request, in the order of its tokens."""
        return tuple(self._holdings[request_id].pages)

    def slot(self, request_id: str) -> int:
        """Where the state of a request is."""
        return self._holdings[request_id].slot

    def pages_for(self, length: int) -> int:
        """How many pages hold `length` tokens."""
        return -(-length // self.page_size)

    @property
    def available_pages(self) -> int:
        """Pages that are free, or would be after an eviction."""
        return len(self._free_pages) + self.cache.idle_pages

    @property
    def available_slots(self) -> int:
        """Slots that are free, or would be after an eviction."""
        return len(self._free_slots) + self.cache.idle_slots

    @property
    def figures(self) -> MemoryFigures:
        """How many pages and slots are where."""
        return MemoryFigures(
            free_pages=len(self._free_pages),
            idle_pages=self.cache.idle_pages,
            used_pages=self.page_count - 1 - self.available_pages,
            free_slots=len(self._free_slots),
            idle_slots=self.cache.idle_slots,
            used_slots=self.slot_count - 1 - self.available_slots,
        )

    def check(self) -> None:
        """Assert that every page and every slot has exactly one owner, and that the cache counts its users right."""
        self.cache.check()
        pages, slots = [0, *self._free_pages], [0, *self._free_slots]
        users: dict[PageNode, int] = {}
        pins: dict[Snapshot, int] = {}
        for holding in self._holdings.values():
            assert holding.pages[: len(holding.nodes)] == [node.page for node in holding.nodes]
            pages += holding.pages[len(holding.nodes) :]
            slots += (holding.slot, *holding.reserved.values())
            for parent, node in zip((self.cache.root, *holding.nodes), holding.nodes, strict=False):
                assert node.parent is parent
                users[node] = users.get(node, 0) + 1
            if holding.source is not None:
                pins[holding.source] = pins.get(holding.source, 0) + 1
        for node in self.cache.nodes():
            assert node.users == users.get(node, 0)
            pages += [node.page] if node is not self.cache.root else []
            for snapshot in node.snapshots.values():
                assert snapshot.users == pins.get(snapshot, 0)
                slots.append(snapshot.slot)
                pages += [] if snapshot.tail_page is None else [snapshot.tail_page]
        assert sorted(pages) == list(range(self.page_count)), "every page has exactly one owner"
        assert sorted(slots) == list(range(self.slot_count)), "every slot has exactly one owner"

    def _leave(self, nodes: Sequence[PageNode], source: Snapshot | None) -> None:
        if source is not None:
            self.cache.unpin(source)
        for node in reversed(nodes):
            self.cache.leave(node)

    def _take_page(self) -> int:
        if not self._free_pages:
            assert self.cache.evict_page(), "available_pages promised one"
        return self._free_pages.pop()

    def _take_slot(self) -> int:
        if not self._free_slots:
            assert self.cache.evict_slot(), "available_slots promised one"
        return self._free_slots.pop()
