"""The number of drafts that is chosen is the fastest by the table of costs, and none where drafts do not help."""

import dataclasses

import pytest

from qwen3_next.engine import Plan, Request, ScheduledSequence, SequenceResult, Tally
from qwen3_next.engine.draft_policy import PERIOD, TRIAL, DraftPolicy


def step(drafts: int, next_drafts: int, start: int = 10) -> ScheduledSequence:
    return ScheduledSequence(
        request=Request(request_id="a", prompt=(1,)),
        start=start,
        uncertain=0,
        length=1 + drafts,
        pages=(1,),
        slot=1,
        accepted=0,
        drafts=drafts,
        next_drafts=next_drafts,
        awaits_verdict=True,
        joins=True,
        samples=True,
        starts_empty=False,
        state_copy=None,
        page_copy=None,
        snapshots=(),
    )


def run(policy: DraftPolicy, accepted: int, costs: list[float], steps: int, sequences: int = 1) -> list[int]:
    """Steps of which the first drafts are right, each as long as the clock says; the numbers that were chosen."""
    chosen, drafts = list[int](), 0
    for _ in range(steps):
        chosen.append(policy.choose(sequences))
        plan = Plan(1, (step(drafts, chosen[-1]),) * sequences)
        written = SequenceResult(tokens=(7,) * (1 + min(drafts, accepted)))
        policy.learn(plan, [written] * sequences, costs[drafts])
        drafts = chosen[-1]
    return chosen


@pytest.mark.parametrize(
    ("accepted", "costs", "best"),
    [
        (0, [1, 1.01, 1.02, 1.03], 0),
        (3, [1, 1.2, 1.4, 1.6], 3),
        (1, [1, 1.2, 1.4, 1.6], 1),
        (3, [1, 1.2, 1.4, 2.5], 2),
        (3, [1, 2.1, 3.2, 4.3], 0),
        (1, [1, 1.95, 3, 4], 0),  # too little to be worth it
    ],
)
def test_the_fastest_number_is_chosen_and_the_others_are_tried_again(
    accepted: int, costs: list[float], best: int
) -> None:
    chosen = run(DraftPolicy(3, is_fixed=False), accepted, costs, 4 * PERIOD)
    trials = [number for number in range(4) for _ in range(TRIAL)]
    assert chosen[: len(trials)] == trials
    assert set(chosen[len(trials) : PERIOD]) == {best}
    for turn in (1, 2, 3):
        assert chosen[turn * PERIOD : turn * PERIOD + TRIAL] == [turn] * TRIAL
        assert set(chosen[turn * PERIOD + TRIAL : (turn + 1) * PERIOD]) == {best}


def test_what_drafts_cost_where_they_do_not_help_is_bounded() -> None:
    chosen, costs = run(DraftPolicy(3, is_fixed=False), 0, [1, 1.5, 2, 2.5], 20 * PERIOD), [1, 1.5, 2, 2.5]
    assert sum(costs[number] for number in chosen) < 1.02 * len(chosen)


def test_the_choice_follows_what_changes_and_each_batch_size_has_its_own() -> None:
    policy = DraftPolicy(1, is_fixed=False)
    assert run(policy, 1, [1, 1.2], PERIOD)[-1] == 1
    assert run(policy, 1, [1, 2.5], PERIOD, sequences=8)[-1] == 0
    assert run(policy, 1, [1, 1.2], 20)[-1] == 1
    assert run(policy, 0, [1, 1.2], 5 * PERIOD)[-1] == 0


def test_one_slow_call_does_not_decide() -> None:
    policy = DraftPolicy(1, is_fixed=False)
    run(policy, 1, [9, 9], 1)  # compiles
    assert run(policy, 1, [1, 1.5], 20)[-1] == 1
    policy.learn(Plan(1, (step(1, 1),)), [SequenceResult(tokens=(7, 7))], 1000)
    assert policy.choose(1) == 1


def test_a_machine_that_slows_down_is_measured_anew() -> None:
    policy = DraftPolicy(3, is_fixed=False)
    assert run(policy, 0, [1, 1.2, 1.4, 1.6], 60)[-1] == 0
    assert set(run(policy, 0, [3, 3.6, 4.2, 4.8], 60)[-40:]) == {0}
    assert set(run(policy, 0, [1, 1.2, 1.4, 1.6], 60)[-40:]) == {0}


def test_calls_with_chunks_and_failures_are_not_counted() -> None:
    policy = DraftPolicy(1, is_fixed=False)
    chunk = dataclasses.replace(step(0, 0), awaits_verdict=False, length=9)
    for _ in range(50):
        policy.learn(Plan(1, (step(0, 0), chunk)), [SequenceResult(tokens=(7,)), SequenceResult()], 1)
        assert policy.choose(2) == 0


def test_a_fixed_number_is_kept_and_figures_are_counted() -> None:
    policy = DraftPolicy(2, is_fixed=True)
    assert policy.choose(5) == 2
    assert str(policy.figures) == "accepted by position: none; by depth: none"
    plan = Plan(1, (step(2, 2, start=5), step(2, 2, start=1000), step(1, 2, start=0)))
    policy.learn(plan, [SequenceResult(tokens=(7,) * count) for count in (3, 2, 1)], 1)
    figures = policy.figures
    assert figures.by_position == (Tally(3, 2), Tally(2, 1))
    assert figures.by_depth == {0: Tally(1, 0), 4: Tally(2, 2), 512: Tally(2, 1)}
    assert "draft 1 2 of 3 (67%), draft 2 1 of 2 (50%)" in str(figures)
    assert "from 512 tokens on 1 of 2 (50%)" in str(figures)
