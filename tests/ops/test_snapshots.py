"""The gated delta rule on states in slots, and copies of states in the middle of a call."""

import pytest
import torch
from torch import Tensor

from qwen3_next.errors import InputError
from qwen3_next.ops.gated_delta import gated_delta_rule, gated_delta_rule_
from qwen3_next.ops.segments import Segments
from qwen3_next.ops.snapshots import Snapshots

LENGTHS = (0, 70, 3, 0, 130)
SLOTS = (0, 4, 2, 0, 6)


@pytest.fixture
def inputs(fresh_seed: int) -> list[Tensor]:
    torch.manual_seed(fresh_seed)
    tokens = sum(LENGTHS)
    q, k = torch.randn(2, tokens, 2, 8, dtype=torch.float64)
    v = torch.randn(tokens, 4, 6, dtype=torch.float64)
    return [q, k, v, -torch.rand(tokens, 4, dtype=torch.float64), torch.rand(tokens, 4, dtype=torch.float64)]


def test_slots_hold_what_the_rule_returns(inputs: list[Tensor]) -> None:
    segments, slots = Segments.from_lengths(LENGTHS), torch.tensor(SLOTS, dtype=torch.int32)
    before = torch.randn(9, 4, 8, 6, dtype=torch.float64)
    states = before.clone()
    output = gated_delta_rule_(*inputs, segments, states, slots)
    expected = gated_delta_rule(*inputs, segments, before[slots])
    assert torch.equal(output, expected.output)
    for n in (1, 2, 4):
        assert torch.equal(states[SLOTS[n]], expected.final_state[n])
    untouched = [0, 1, 3, 5, 7, 8]
    assert torch.equal(states[untouched], before[untouched])


@pytest.mark.parametrize("position", [0, 1, 63, 64, 65, 69, 70, 71, 73, 74, 137, 202, 203])
def test_a_snapshot_is_the_state_after_its_token(inputs: list[Tensor], position: int) -> None:
    segments, slots = Segments.from_lengths(LENGTHS), torch.tensor(SLOTS, dtype=torch.int32)
    before = torch.randn(9, 4, 8, 6, dtype=torch.float64)
    states, plain = before.clone(), before.clone()
    output = gated_delta_rule_(*inputs, segments, states, slots, Snapshots.at([position, 100], [8, 7]))
    torch.testing.assert_close(output, gated_delta_rule_(*inputs, segments, plain, slots), rtol=0, atol=1e-12)
    torch.testing.assert_close(states[:7], plain[:7], rtol=0, atol=1e-12)
    start, slot = (0, 4) if position <= 70 else (70, 2) if position <= 73 else (73, 6)
    rows = slice(start, position)
    part = Segments.from_lengths([position - start])
    expected = gated_delta_rule(*(x[rows] for x in inputs), part, before[slot : slot + 1])
    torch.testing.assert_close(states[8], expected.final_state[0], rtol=0, atol=1e-12)


def test_several_snapshots_of_one_place_and_in_any_order(inputs: list[Tensor]) -> None:
    segments, slots = Segments.from_lengths(LENGTHS), torch.tensor(SLOTS, dtype=torch.int32)
    states = torch.randn(9, 4, 8, 6, dtype=torch.float64)
    gated_delta_rule_(*inputs, segments, states, slots, Snapshots.at([203, 40, 203], [1, 3, 5]))
    assert torch.equal(states[1], states[6])
    assert torch.equal(states[5], states[6])
    assert not torch.equal(states[3], states[4])


@pytest.mark.parametrize("arguments", [([1], []), ([-1], [0]), ([1], [-1])])
def test_snapshots_that_fit_nothing_are_refused(arguments: tuple[list[int], list[int]]) -> None:
    with pytest.raises(InputError, match="one slot per position"):
        Snapshots.at(*arguments)


def test_no_snapshots_are_none() -> None:
    assert Snapshots.at([], []).by_sequence(Segments.from_lengths([3])) == [[]]
