"""The one place where the implementation of an operation is chosen.

Every operation is written twice at most: its plain-PyTorch definition and, in the next file, a twin of the same name
and signature for the GPU. `@accelerated("<module of the twin>")` stands on the definition; `use(...)` selects.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
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


@contextmanager
def use(backend: Backend) -> Generator[None, None, None]:
    """Select the backend of all operations inside a `with` block.

    Args:
        backend: "auto" takes the twin where one exists and the tensors are on a CUDA device, "reference" always takes
            the definition, "triton" insists on the twin.

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
        @wraps(definition)
        def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
            implementation = _choose(definition, twin, on_gpu=any(_is_cuda(a) for a in (*args, *kwargs.values())))
            return implementation(*args, **kwargs)

        return chosen

    return decorate


def _choose(definition: Callable[P, R], twin: str, *, on_gpu: bool) -> Callable[P, R]:
    selected = _selected.get()
    if selected == "reference" or (selected == "auto" and not (on_gpu and _exists(twin))):
        return definition
    if not _exists(twin):
        raise BackendError(
            f"backend='triton' was requested, but {definition.__name__} has no Triton implementation in this version; "
            "select 'auto' or 'reference'."
        )
    if not on_gpu:
        raise BackendError(
            f"backend='triton' was requested, but {definition.__name__} got no CUDA tensor; "
            "move the model and its inputs to a GPU, or select 'auto' or 'reference'."
        )
    return cast(Callable[P, R], getattr(import_module(f"qwen3_next.ops.{twin}"), definition.__name__))


@cache
def _exists(twin: str) -> bool:
    return find_spec(f"qwen3_next.ops.{twin}") is not None


def _is_cuda(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda
