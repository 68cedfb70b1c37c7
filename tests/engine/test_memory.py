"""Every page and slot has one owner; a prefix is found where pages and state both exist."""

import pytest

from qwen3_next.engine import Copy, MatchEnd, Memory
from qwen3_next.errors import CapacityError

PAGE = 4


def tokens(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def admit(memory: Memory, name: str, text: list[int]) -> int:
    """Admit a request with this prompt, and say how much of it was cached."""
    match = memory.lookup(text, len(text) - 1)
    assert memory.admit(name, match, len(text))
    memory.check()
    memory.copied(name)
    memory.check()
    return match.position


def run(memory: Memory, name: str, text: list[int], pending: int | None = 0) -> int:
    """A request that is admitted, computes all of `text` and ends."""
    cached = admit(memory, name, text)
    memory.release(name, text, len(text), pending)
    memory.check()
    return cached


def test_a_memory_too_small_for_anything_is_refused() -> None:
    for pages, slots, page_size in ((2, 3, 4), (3, 2, 4), (3, 3, 0)):
        with pytest.raises(CapacityError, match="at least 3 pages"):
            Memory(pages, slots, page_size)


def test_the_null_page_and_slot_are_never_given_away() -> None:
    memory = Memory(5, 4, PAGE)
    admit(memory, "a", tokens(16))
    assert sorted(memory.page_table("a")) == [1, 2, 3, 4]
    assert memory.slot("a") in (1, 2, 3)


def test_what_does_not_fit_changes_nothing() -> None:
    memory = Memory(5, 4, PAGE)
    admit(memory, "a", tokens(8))
    before = memory.figures
    assert not memory.admit("b", memory.lookup(tokens(12, 50), 11), 12)
    assert not memory.grow("a", 17)
    assert memory.figures == before
    assert memory.grow("a", 16)
    assert len(memory.page_table("a")) == 4
    memory.check()


def test_the_next_turn_continues_from_the_exact_end_of_the_last() -> None:
    memory = Memory(20, 8, PAGE)
    run(memory, "a", tokens(10), pending=3)
    match = memory.lookup(tokens(15), 14)
    assert (match.position, match.end) == (10, MatchEnd.NO_PAGES)
    assert match.snapshot is not None
    assert match.snapshot.pending == 3
    assert memory.admit("b", match, 15)
    state, page = memory.state_copy("b"), memory.page_copy("b")
    assert state == Copy(match.snapshot.slot, memory.slot("b"))
    assert page == Copy(match.snapshot.tail_page or 0, memory.page_table("b")[2])
    assert memory.page_table("b")[:2] == tuple(node.page for node in match.nodes)
    memory.check()
    memory.copied("b")
    assert memory.state_copy("b") is None
    memory.check()


def test_a_branch_in_the_middle_finds_pages_without_a_state() -> None:
    memory = Memory(20, 8, PAGE)
    run(memory, "a", tokens(12))
    match = memory.lookup([*tokens(9), 99, 99, 99], 11)
    assert (match.position, match.pages, match.end) == (0, 8, MatchEnd.NO_SNAPSHOT)


def test_a_state_inside_a_prompt_is_found_at_the_end_of_its_page() -> None:
    memory = Memory(20, 8, PAGE)
    admit(memory, "a", tokens(12))
    assert memory.reserve_snapshot("a", 8) is not None
    assert memory.reserve_snapshot("a", 8) is None
    memory.check()
    memory.publish("a", tokens(12), 12)
    memory.keep_snapshot("a", 8)
    memory.check()
    match = memory.lookup([*tokens(9), 99, 99, 99], 11)
    assert (match.position, len(match.nodes), match.end) == (8, 2, MatchEnd.WHOLE)
    assert memory.admit("b", match, 12)
    assert memory.page_copy("b") is None
    assert memory.page_table("b")[:2] == memory.page_table("a")[:2]
    memory.check()


def test_the_last_token_is_left_to_compute() -> None:
    memory = Memory(20, 8, PAGE)
    run(memory, "a", tokens(8))
    assert memory.lookup(tokens(8), 7).position == 0
    assert memory.lookup(tokens(9), 8).position == 8


def test_equal_pages_computed_twice_are_kept_once() -> None:
    memory = Memory(20, 8, PAGE)
    admit(memory, "a", tokens(8))
    admit(memory, "b", tokens(8))
    assert not set(memory.page_table("a")) & set(memory.page_table("b"))
    memory.publish("a", tokens(8), 8)
    memory.publish("b", tokens(8), 8)
    memory.check()
    assert memory.page_table("a") == memory.page_table("b")
    assert memory.figures.used_pages == 2


def test_equal_pages_behind_different_ones_are_different() -> None:
    memory = Memory(20, 8, PAGE)
    run(memory, "a", [1, 1, 1, 1, 5, 5, 5, 5])
    assert memory.lookup([2, 2, 2, 2, 5, 5, 5, 5, 6], 8).position == 0


def test_what_was_used_least_recently_goes_first() -> None:
    memory = Memory(20, 5, PAGE)
    for name, start in (("a", 0), ("b", 100), ("c", 200)):
        run(memory, name, tokens(8, start))
    run(memory, "a2", [*tokens(8), 50])  # uses a, and leaves a state of its own
    assert memory.figures.free_slots == 0
    admit(memory, "d", tokens(8, 300))
    assert memory.lookup([*tokens(8, 100), 1], 8).end is MatchEnd.EVICTED
    assert memory.lookup([*tokens(8), 1], 8).position == 8
    assert memory.lookup([*tokens(8, 200), 1], 8).position == 8


def test_pages_are_evicted_from_the_end() -> None:
    memory = Memory(6, 8, PAGE)
    run(memory, "a", tokens(16))
    admit(memory, "b", tokens(8, 100))
    assert memory.lookup(tokens(17), 16).pages == 12
    assert memory.lookup(tokens(17), 16).end is MatchEnd.EVICTED


def test_what_was_never_there_is_told_from_what_was_evicted() -> None:
    memory = Memory(20, 8, PAGE)
    run(memory, "a", tokens(10))
    assert memory.lookup(tokens(8, 100), 7).end is MatchEnd.NO_PAGES
    memory.evict_all()
    memory.check()
    assert memory.figures.free_pages == 19
    assert memory.figures.free_slots == 7
    assert memory.lookup(tokens(12), 11).end is MatchEnd.EVICTED


def test_pages_in_use_and_states_about_to_be_copied_are_not_evicted() -> None:
    memory = Memory(20, 8, PAGE)
    run(memory, "a", tokens(10))
    match = memory.lookup(tokens(12), 11)
    assert memory.admit("b", match, 12)
    memory.evict_all()
    memory.check()
    assert memory.state_copy("b") is not None
    assert memory.lookup(tokens(12), 11).position == 10
    memory.copied("b")
    memory.evict_all()
    memory.check()
    assert memory.lookup(tokens(12), 11).position == 0
    assert memory.page_table("b")[:2] == tuple(node.page for node in match.nodes)


def test_a_state_of_other_tokens_is_not_kept() -> None:
    memory = Memory(20, 8, PAGE)
    run(memory, "a", tokens(8), pending=None)
    assert memory.lookup(tokens(9), 8).end is MatchEnd.NO_SNAPSHOT
    assert memory.figures.idle_slots == 0


def test_the_same_state_is_kept_once() -> None:
    memory = Memory(20, 8, PAGE)
    for name in "abc":
        admit(memory, name, tokens(10))
    for name in "abc":
        memory.release(name, tokens(10), 10, 0)
        memory.check()
    assert memory.figures.idle_slots == 1
    assert memory.figures.idle_pages == 3


def test_a_failed_request_leaves_nothing_that_others_do_not_use() -> None:
    memory = Memory(20, 8, PAGE)
    run(memory, "a", tokens(4))
    admit(memory, "b", tokens(5))
    admit(memory, "c", tokens(14))
    memory.publish("c", tokens(14), 14)
    memory.discard("c")
    memory.check()
    assert memory.lookup(tokens(14), 13).pages == 4
    memory.release("b", tokens(5), 5, 0)
    memory.check()


def test_a_cache_that_never_fills_forgets_its_queue() -> None:
    memory = Memory(8, 4, PAGE)
    for number in range(3000):
        run(memory, f"r{number}", tokens(10))
    assert len(memory.cache._page_queue) < 1200
    memory.evict_all()
    memory.check()
    assert memory.figures.free_pages == 7
