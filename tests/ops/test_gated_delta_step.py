"""Steps of a DeltaNet layer: equal to the whole prompt at once, and never disturbed by what was rejected."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_next.errors import InputError
from qwen3_next.ops.causal_conv import ProjectionColumns, causal_conv, causal_conv_
from qwen3_next.ops.gated_delta import gated_delta_rule, gated_delta_rule_
from qwen3_next.ops.gated_delta_step import StepState, StepWeights, delta_net_step_
from qwen3_next.ops.norm import gated_rms_norm
from qwen3_next.ops.segments import Segments

COLUMNS = ProjectionColumns(key_heads=2, value_heads=6, key_width=4, value_width=5)
SLOTS = 7
PENDING = 4


@pytest.fixture
def weights(fresh_seed: int) -> StepWeights:
    torch.manual_seed(fresh_seed)
    conv, norm = torch.randn(COLUMNS.channels, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    return StepWeights(conv, torch.randn(6), torch.randn(6), norm, 1e-6, COLUMNS)


def new_state(weights: StepWeights) -> StepState:
    """Zeros but for what nobody has any business reading."""
    state = StepState.allocate(SLOTS, weights, PENDING, torch.float64, torch.float64)
    state.pending_qkv.fill_(float("nan"))
    state.pending_ba.fill_(float("nan"))
    return state


def random_tokens(count: int) -> tuple[Tensor, Tensor]:
    width = COLUMNS.channels + COLUMNS.key_heads * COLUMNS.values
    return torch.randn(count, width, dtype=torch.float64), torch.randn(count, 12, dtype=torch.float64)


def at_once(qkvz: Tensor, ba: Tensor, weights: StepWeights) -> Tensor:
    """One sequence from its start, by the operations that a prompt goes through."""
    segments = Segments.from_lengths([qkvz.shape[0]])
    qkv = causal_conv(qkvz, weights.conv, segments, columns=COLUMNS).output
    output = gated_delta_rule(*COLUMNS.heads(qkv), *gates(ba, weights), segments).output
    z = COLUMNS.gate(qkvz)
    return gated_rms_norm(output.view(z.shape), z, weights.norm, weights.eps).flatten(1)


def gates(ba: Tensor, weights: StepWeights) -> tuple[Tensor, Tensor]:
    """log_decay and beta, head by head."""
    log_decay, beta = torch.empty(2, ba.shape[0], 6, dtype=torch.float64).unbind()
    for head in range(6):
        group, place = divmod(head, 3)
        beta[:, head] = ba[:, 6 * group + place].sigmoid()
        a = ba[:, 6 * group + 3 + place] + weights.dt_bias[head]
        log_decay[:, head] = -weights.A_log[head].exp() * F.softplus(a)
    return log_decay, beta


def slot_of(state: StepState, slot: int) -> list[Tensor]:
    return [getattr(state, field.name)[slot].clone() for field in dataclasses.fields(state)]


@pytest.mark.parametrize("lengths", [[1] * 9, [3, 1, 0, 5], [8, 1]])
def test_steps_equal_the_whole(lengths: Sequence[int], weights: StepWeights) -> None:
    state, slots = new_state(weights), torch.tensor([3])
    qkvz, ba = random_tokens(9)
    outputs = [
        delta_net_step_(x, y, weights, state, slots, Segments.from_lengths([length]))
        for length, x, y in zip(lengths, qkvz.split(lengths), ba.split(lengths), strict=True)
    ]
    torch.testing.assert_close(torch.cat(outputs), at_once(qkvz, ba, weights), rtol=1e-6, atol=1e-6)


def test_a_prompt_is_continued(weights: StepWeights) -> None:
    state, slots = new_state(weights), torch.tensor([5], dtype=torch.int32)
    qkvz, ba = random_tokens(8)
    segments = Segments.from_lengths([6])
    qkv = causal_conv_(qkvz[:6], weights.conv, segments, state.conv, slots, COLUMNS)
    gated_delta_rule_(*COLUMNS.heads(qkv), *gates(ba[:6], weights), segments, state.recurrent, slots)
    first = delta_net_step_(qkvz[6:7], ba[6:7], weights, state, slots, Segments.from_lengths([1]), torch.tensor([0]))
    second = delta_net_step_(qkvz[7:], ba[7:], weights, state, slots, Segments.from_lengths([1]), torch.tensor([1]))
    expected = at_once(qkvz, ba, weights)[6:]
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("accepted", [[4, 4, 4], [0, 0, 0], [1, 3, 2], [0, 4, 1]])
def test_what_was_rejected_was_never_seen(accepted: list[int], weights: StepWeights) -> None:
    """Each call tries four tokens; those after the accepted ones are replaced by others at the next call."""
    state, slots = new_state(weights), torch.tensor([2])
    kept = [random_tokens(0)]
    verdict = 0
    for count in [*accepted, 4]:
        qkvz, ba = random_tokens(4)
        segments = Segments.from_lengths([4])
        output = delta_net_step_(qkvz, ba, weights, state, slots, segments, torch.tensor([verdict]))
        seen = [torch.cat([old[i] for old in kept] + [new]) for i, new in enumerate((qkvz, ba))]
        torch.testing.assert_close(output, at_once(*seen, weights)[-4:], rtol=1e-6, atol=1e-6)
        kept.append((qkvz[:count], ba[:count]))
        verdict = count


def test_accepted_tokens_are_part_of_the_state_even_if_nothing_follows(weights: StepWeights) -> None:
    tried, plain, slots = new_state(weights), new_state(weights), torch.tensor([0])
    qkvz, ba = random_tokens(4)
    none = Segments.from_lengths([0])
    delta_net_step_(qkvz, ba, weights, tried, slots, Segments.from_lengths([4]), torch.tensor([0]))
    delta_net_step_(qkvz[:0], ba[:0], weights, tried, slots, none, torch.tensor([3]))
    delta_net_step_(qkvz[:3], ba[:3], weights, plain, slots, Segments.from_lengths([3]))
    torch.testing.assert_close(tried.recurrent, plain.recurrent)
    assert torch.equal(tried.conv, plain.conv)


@pytest.mark.parametrize("with_verdict", [False, True])
def test_together_equals_alone_and_other_slots_stay(with_verdict: bool, weights: StepWeights) -> None:
    lengths, places = [2, 0, 3, 1, 4], [5, 1, -1, 0, 3]
    verdict = [1, 2, 3, 0, 4] if with_verdict else None
    qkvz, ba = random_tokens(10)
    states = [
        StepState(*(torch.randn_like(getattr(new_state(weights), f.name)) for f in dataclasses.fields(StepState)))
    ]
    states += [StepState(*(getattr(states[0], f.name).clone() for f in dataclasses.fields(StepState)))]
    before = [slot_of(states[0], slot) for slot in range(SLOTS)]
    accepted = None if verdict is None else torch.tensor(verdict)
    slots, segments = torch.tensor(places), Segments.from_lengths(lengths)
    together = delta_net_step_(qkvz, ba, weights, states[0], slots, segments, accepted)
    for n, output in enumerate(together.split(lengths)):
        rows = slice(sum(lengths[:n]), sum(lengths[: n + 1]))
        one = None if accepted is None else accepted[n : n + 1]
        args = (weights, states[1], slots[n : n + 1], Segments.from_lengths(lengths[n : n + 1]), one)
        torch.testing.assert_close(output, delta_net_step_(qkvz[rows], ba[rows], *args), rtol=1e-6, atol=1e-6)
    assert torch.equal(together[2:5], torch.zeros_like(together[2:5]))  # the null sequence
    for slot in range(SLOTS):
        torch.testing.assert_close(slot_of(states[0], slot), slot_of(states[1], slot))
        if slot not in places:
            assert all(torch.equal(a, b) for a, b in zip(slot_of(states[0], slot), before[slot], strict=True))


def test_more_pending_tokens_than_room_are_refused(weights: StepWeights) -> None:
    state = new_state(weights)
    before = slot_of(state, 1)
    args = (weights, state, torch.tensor([1]), Segments.from_lengths([5]), torch.tensor([0]))
    with pytest.raises(InputError, match="room for 4"):
        delta_net_step_(*random_tokens(5), *args)
    assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(slot_of(state, 1), before, strict=True))


def test_bytes_of_a_slot_are_those_of_the_docstring() -> None:
    columns = ProjectionColumns(key_heads=16, value_heads=32, key_width=128, value_width=128)
    with torch.device("meta"):
        weights = StepWeights(torch.empty(8192, 4), torch.empty(32), torch.empty(32), torch.empty(128), 1e-6, columns)
        state = StepState.allocate(1, weights, 1, torch.bfloat16)
    assert state.recurrent.nbytes == 2 * 2**20
    assert state.conv.nbytes == 48 * 2**10
    assert state.pending_qkv.nbytes + state.pending_ba.nbytes == 16 * 2**10 + 128
