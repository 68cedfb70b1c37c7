"""The engine: prompts in, text out. So far the part that decides and owns, without torch."""

from qwen3_next.engine.memory import Copy, Memory, MemoryFigures
from qwen3_next.engine.plan import Plan, ScheduledSequence, SequenceResult, SnapshotOrder
from qwen3_next.engine.prefix_cache import MatchEnd
from qwen3_next.engine.request import FinishReason, Request, RequestOutput, SamplingParams, Status, Structured
from qwen3_next.engine.scheduler import Scheduler
from qwen3_next.engine.scheduler_config import SchedulerConfig, SchedulerFigures

__all__ = [
    "Copy",
    "FinishReason",
    "MatchEnd",
    "Memory",
    "MemoryFigures",
    "Plan",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "ScheduledSequence",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerFigures",
    "SequenceResult",
    "SnapshotOrder",
    "Status",
    "Structured",
]
