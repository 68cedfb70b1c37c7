"""Learning rates, against their closed forms."""

import math
from typing import Any

import pytest

from qwen3_next.train.config import ScheduleSettings
from qwen3_next.train.schedule import lr_factor


def factors(**fields: Any) -> list[float]:
    settings = ScheduleSettings(**fields)
    return [lr_factor(settings, step) for step in range(settings.steps)]


def test_cosine_rises_linearly_and_falls_by_half_a_cosine() -> None:
    found = factors(kind="cosine", steps=12, warmup_steps=4, final=0.2)
    expected = [0.25, 0.5, 0.75, 1.0] + [0.2 + 0.8 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert found == pytest.approx(expected)
    assert lr_factor(ScheduleSettings(steps=12, warmup_steps=4, final=0.2), 12) == pytest.approx(0.2)


def test_wsd_rises_stays_and_falls_linearly() -> None:
    found = factors(kind="wsd", steps=10, warmup_steps=2, decay=0.4, final=0.2)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1.0, 0.8, 0.6, 0.4])
    assert lr_factor(ScheduleSettings(kind="wsd", steps=10, decay=0.4, final=0.2), 10) == pytest.approx(0.2)


def test_wsd_without_decay_stays() -> None:
    assert factors(kind="wsd", steps=5, decay=0.0) == [1.0] * 5


def test_a_run_may_be_all_warm_up() -> None:
    assert factors(kind="cosine", steps=4, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]
