"""Everything this package raises on purpose.

    Qwen3NextError                    anything below; catch this one to catch them all
    ├── ConfigError      ValueError   a configuration field holds a value that cannot be served
    ├── CheckpointError  ValueError,  a checkpoint is missing, truncated, incomplete or holds something else
    │                    RuntimeError
    ├── InputError       ValueError   the arguments of one call do not fit the model or each other
    │   └── CapacityError             a request, or a scheduler, that the engine's memory can never hold
    ├── BackendError     RuntimeError the requested kernels or device cannot run here
    ├── EngineError      RuntimeError the engine failed or is closed, through no fault of the request
    │   ├── DeadlineError             a request was not done in the time that it had
    │   ├── OverloadedError           too many requests wait already; try again later
    │   └── RankError                 another process of the same engine or run failed, ended or is silent
    └── TrainingError    RuntimeError a training run cannot start or go on
        ├── DataError                 the training data is missing, empty or malformed
        ├── DivergedError             the loss or the gradients stopped being finite
        ├── RankError                 the same
        └── StorageError              a checkpoint or a log could not be written

Every message says what was wrong, what is allowed, and what to do about it. Each class also derives from
the built-in exception that a caller would have caught without knowing this package.
"""

__all__ = [
    "BackendError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeadlineError",
    "DivergedError",
    "EngineError",
    "InputError",
    "OverloadedError",
    "Qwen3NextError",
    "RankError",
    "StorageError",
    "TrainingError",
]


class Qwen3NextError(Exception):
    """The root of every error that this package raises on purpose."""


class ConfigError(Qwen3NextError, ValueError):
    """A configuration field holds a value that cannot be served; the message names field, value and remedy."""


class CheckpointError(Qwen3NextError, ValueError, RuntimeError):
    """A checkpoint is missing, truncated, incomplete, or holds tensors that this architecture does not have.

    A `RuntimeError` as well: that is what torch and transformers raise where shapes do not fit.
    """


class InputError(Qwen3NextError, ValueError):
    """The arguments of one call do not fit the model or each other."""


class CapacityError(InputError):
    """What was asked for needs more pages, slots or context than the engine has, however long it waits."""


class BackendError(Qwen3NextError, RuntimeError):
    """The requested kernels or device cannot run on this machine."""


class EngineError(Qwen3NextError, RuntimeError):
    """The engine failed in the middle of a call, or is closed; the same request may work another time."""


class DeadlineError(EngineError):
    """A request was not done in the time that it had, and was ended."""


class OverloadedError(EngineError):
    """As many requests wait as the engine lets wait; none of them is affected, and this one was not begun."""


class TrainingError(Qwen3NextError, RuntimeError):
    """A training run cannot start or cannot go on."""


class DataError(TrainingError):
    """The training data is missing, empty or malformed."""


class DivergedError(TrainingError):
    """The loss or the gradients stopped being finite."""


class RankError(EngineError, TrainingError):
    """Another process that serves or trains the same model failed, ended or does not answer; restart all of them."""


class StorageError(TrainingError):
    """A checkpoint or a log could not be written; the last good checkpoint is intact."""
