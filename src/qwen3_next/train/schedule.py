"""The learning rate of each step."""

import math

from qwen3_next.train.config import ScheduleSettings


def lr_factor(settings: ScheduleSettings, step: int) -> float:
    """The learning rate of step `step` (counted from 0) as a share of the peak."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.kind == "cosine":
        span = max(1, settings.steps - settings.warmup_steps)
        progress = min(1.0, (step - settings.warmup_steps) / span)
        return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * progress))
    length = max(1, round(settings.steps * settings.decay))
    progress = min(1.0, max(0.0, (step - (settings.steps - length)) / length))
    return 1 - (1 - settings.final) * progress
