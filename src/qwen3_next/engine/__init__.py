"""The engine: prompts in, text out."""

from qwen3_next.engine.answers import Completion, StreamUpdate
from qwen3_next.engine.async_engine import AsyncEngine, AsyncFigures
from qwen3_next.engine.config import EngineConfig
from qwen3_next.engine.draft_policy import DraftFigures, Tally
from qwen3_next.engine.engine import Engine
from qwen3_next.engine.llm import LLM
from qwen3_next.engine.memory import Copy, Memory, MemoryFigures
from qwen3_next.engine.plan import Plan, ScheduledSequence, SequenceResult, SnapshotOrder
from qwen3_next.engine.prefix_cache import MatchEnd
from qwen3_next.engine.request import FinishReason, Request, RequestOutput, SamplingParams, Status, Structured
from qwen3_next.engine.scheduler import Scheduler
from qwen3_next.engine.scheduler_config import SchedulerConfig, SchedulerFigures
from qwen3_next.engine.stream import Output, Step

__all__ = [
    "LLM",
    "AsyncEngine",
    "AsyncFigures",
    "Completion",
    "Copy",
    "DraftFigures",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "MatchEnd",
    "Memory",
    "MemoryFigures",
    "Output",
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
    "Step",
    "StreamUpdate",
    "Structured",
    "Tally",
]
