"""The one place where the implementation of an operation is chosen.

Every operation is written twice at most: its plain-PyTorch definition and, in the next file, a twin of the same name
and signature for the GPU. `@accelerated("<module of the twin>")` stands on the definition; `use(...)` selects. What a
twin cannot take it says itself (`@refuses`): "auto" then takes the definition, "triton" raises that reason.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, ParamSpec, TypeVar, cast, get_args

import torch

from qwen3_next.errors import BackendError

Backend = Literal["auto", "reference", "triton"]

_selected: ContextVar[Backend] = ContextVar("qwen3_next_backend", default="auto")

P = ParamSpec("P")
R = TypeVar("R")

OPERATIONS: dict[str, str] = {}
"""Every operation that was marked `@accelerated`, and the module of its twin."""


@contextmanager
def use(backend: Backend) -> Generator[None, None, None]:
    """Select the backend of all operations inside a `with` block.

    Args:
        backend: "auto" takes the twin where one exists, takes the arguments and the tensors are on a CUDA device,
            "reference" always takes the definition, "triton" insists on the twin (on a CPU: in Triton's
            interpreter).

    Raises:
        BackendError: an unknown name; inside the block, an operation that cannot honour "triton".
    """
    if backend not in get_args(Backend):
        raise BackendError(f"backend={backend!r} is unknown; choose one of {', '.join(get_args(Backend))}.")
    token = _selected.set(backend)
    try:
        yield
    finally:
        _selected.reset(token)


def accelerated(twin: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a definition as having its GPU twin in the module `qwen3_next.ops.<twin>`, under the same name."""

    def decorate(definition: Callable[P, R]) -> Callable[P, R]:
        OPERATIONS[definition.__name__] = twin

        @wraps(definition)
        def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
            selected = _selected.get()
            if selected == "reference":
                return definition(*args, **kwargs)
            device = _cuda_device(args, kwargs)
            if selected == "auto" and (device is None or not has_twin(twin)):
                return definition(*args, **kwargs)
            implementation = _twin(twin, definition.__name__)
            reason = _reason_against(implementation, definition.__name__, device, args, kwargs)
            if reason is None:
                with nullcontext() if device is None else torch.cuda.device(device):
                    return cast(Callable[P, R], implementation)(*args, **kwargs)
            if selected == "auto":
                return definition(*args, **kwargs)
            raise BackendError(f"backend='triton' was requested, but {reason}")

        return chosen

    return decorate


def refuses(reason: Callable[..., str | None]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a twin as unable to take some arguments.

    Args:
        reason: called with the twin's arguments; says why they are not taken ("fp64 has no tensor cores"), or None.
    """

    def decorate(twin: Callable[P, R]) -> Callable[P, R]:
        twin.refusal = reason  # type: ignore[attr-defined]
        return twin

    return decorate


@cache
def has_twin(twin: str) -> bool:
    """Whether this version has the module and this machine the package that it is written in."""
    return find_spec(f"qwen3_next.ops.{twin}") is not None and find_spec("triton") is not None


def _reason_against(
    twin: Callable[..., object] | None,
    name: str,
    device: torch.device | None,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> str | None:
    if twin is None:
        return (
            f"{name} has no Triton implementation in this version or Triton is not installed; "
            "select 'auto' or 'reference'."
        )
    if device is None and not _interprets():
        return f"{name} got no CUDA tensor; move the model and its inputs to a GPU, or select 'auto' or 'reference'."
    refusal = getattr(twin, "refusal", None)
    reason = None if refusal is None else refusal(*args, **kwargs)
    return None if reason is None else f"{name} does not take this: {reason}; select 'auto' or 'reference'."


@cache
def _twin(module: str, name: str) -> Callable[..., object] | None:
    return getattr(import_module(f"qwen3_next.ops.{module}"), name, None) if has_twin(module) else None


@cache
def _interprets() -> bool:
    return bool(import_module("triton").knobs.runtime.interpret)


def _cuda_device(args: tuple[object, ...], kwargs: dict[str, object]) -> torch.device | None:
    if not torch.cuda.is_initialized():  # so there is no such tensor, and small models on a CPU feel every microsecond
        return None
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return value.device
    return None
