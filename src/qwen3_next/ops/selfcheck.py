"""Whether the operations compute here what they should: twins beside definitions, definitions beside fp64."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import groupby, product
from typing import Any, cast

import torch
from torch import Tensor

from qwen3_next.errors import BackendError
from qwen3_next.ops.backend import OPERATIONS, Backend, has_twin, use
from qwen3_next.ops.samples import PUBLISHED, TINY, Sample, converted, samples

DTYPES = (torch.float32, torch.bfloat16)

_TOLERANCES = {torch.float32: (2e-5, 2e-4), torch.bfloat16: (2e-2, 4e-2)}
"""Of outputs and gradients, as `|result - expected| / |expected|`: wide enough for every operation and every fresh
input, since this tells broken from whole; the tests hold each operation to its own."""

_TOLERANCE_OF_HIDDEN_FP8 = 8e-2
"""Of outputs whose hidden values are rounded to fp8 on the way: what 2,400 samples needed, and a third more."""

_WORKERS = 8
"""Operations that are compiled side by side for a GPU, which takes most of the time there."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison: `kind` is "outputs" or "gradients"; an error of NaN is never within the tolerance."""

    dtype: str
    kind: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is true of one operation on one device.

    Attributes:
        backend: what runs it: "triton" or "definition".
        reason: why not the twin; empty where that runs.
        checks: the worst of every dtype and kind.
        fault: the exception that ended the checks; empty where none did.
    """

    operation: str
    backend: str
    reason: str
    checks: tuple[Check, ...]
    fault: str

    @property
    def passed(self) -> bool:
        """Whether the operation ran and every check passed."""
        return not self.fault and bool(self.checks) and all(check.passed for check in self.checks)


def self_check(device: torch.device) -> Iterator[Finding]:
    """Run every operation that has a twin on small fresh inputs, forward and backward, in fp32 and bf16.

    What runs by default on the device is compared with the definition in fp64: the twin where there is one and it takes
    the inputs, else the definition itself in the dtype of the inputs. The gated delta rule, computed in chunks, is
    compared with its recurrence. Findings come in the order of the operations' families.
    """
    sizes = TINY if device.type == "cpu" else PUBLISHED
    by_operation = [(name, list(group)) for name, group in groupby(samples(sizes), lambda sample: sample.operation)]

    def find(operation: tuple[str, list[Sample]]) -> Finding:
        return _finding(*operation, device)

    if device.type == "cuda":
        find(by_operation[0])  # alone, so that what is set up once is set up by one thread
        with ThreadPoolExecutor(_WORKERS) as pool:
            list(pool.map(find, by_operation))  # compiles; what it finds is not told, since others computed beside it
    yield from map(find, by_operation)


def kernel_language() -> str:
    """The package that the twins are written in, with its version."""
    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError:
        return "triton not installed"


def _finding(operation: str, group: Sequence[Sample], device: torch.device) -> Finding:
    none = _reason_against_twin(operation, device)
    reasons: dict[str, None] = {none: None} if none else {}
    checks: list[Check] = []
    backends: set[Backend] = set()
    fault = ""
    for sample, dtype in product(group, DTYPES):
        try:
            backend, reason, found = _checked(sample, dtype, device, "reference" if none else "triton")
        except Exception as error:  # whatever a broken installation raises is what this is for
            fault = fault or f"{dtype}: {type(error).__name__}: {error}"
            continue
        checks.extend(found)
        backends.add(backend)
        reasons |= {reason: None} if reason else {}
    label = "triton" if "triton" in backends or (fault and not none) else "definition"
    return Finding(operation=operation, backend=label, reason="; ".join(reasons), checks=_worst(checks), fault=fault)


def _checked(
    sample: Sample, dtype: torch.dtype, device: torch.device, backend: Backend
) -> tuple[Backend, str, list[Check]]:
    """What ran, why it was not the twin that was asked for, and how well it did."""
    try:
        return backend, "", compare(sample, dtype, device, backend)
    except BackendError as error:
        return "reference", str(error), compare(sample, dtype, device, "reference")


def _reason_against_twin(operation: str, device: torch.device) -> str:
    if device.type == "cpu":
        return "no GPU"
    if not has_twin(OPERATIONS[operation]):
        return kernel_language() if find_spec("triton") is None else "no kernel in this version"
    return ""


def _worst(checks: Sequence[Check]) -> tuple[Check, ...]:
    worst: dict[tuple[str, str], Check] = {}
    for check in checks:
        known = worst.setdefault((check.dtype, check.kind), check)
        if known.passed and not check.error <= known.error:
            worst[check.dtype, check.kind] = check
    return tuple(worst.values())


def compare(sample: Sample, dtype: torch.dtype, device: torch.device, backend: Backend) -> list[Check]:
    """Run a sample once on a backend and once as its definition in fp64.

    Raises:
        BackendError: `backend` is "triton", and the twin does not exist or does not take the inputs.
    """
    with device:
        inputs = sample.make(dtype)
    wide = converted(inputs, _to_fp64)
    with use(backend):
        results = _Results.of(sample.run, inputs, sample.gradients)
    with use("reference"):
        expected = _Results.of(sample.oracle or sample.run, wide, sample.gradients, results)
    outputs, gradients = _TOLERANCES[dtype]
    name = str(dtype).removeprefix("torch.")
    outputs = _TOLERANCE_OF_HIDDEN_FP8 if sample.rounds_hidden else outputs
    checks = [_check(name, "outputs", results.outputs, expected.outputs, outputs)]
    if sample.gradients:
        checks.append(_check(name, "gradients", results.gradients, expected.gradients, gradients))
    return checks


@dataclass(frozen=True, eq=False)
class _Results:
    """Outputs, the directions they were multiplied with, and the gradients of that."""

    outputs: list[Tensor]
    directions: list[Tensor]
    gradients: list[Tensor]

    @classmethod
    def of(
        cls,
        run: Callable[..., Any],
        inputs: tuple[Any, ...],
        differentiable: Sequence[int],
        like: "_Results | None" = None,
    ) -> "_Results":
        own = [x.detach().requires_grad_() if i in differentiable else x for i, x in enumerate(inputs)]
        outputs = list(tensors_of(run(*own)))
        if not differentiable:
            return cls(outputs, [], [])
        smooth = [x for x in outputs if x.requires_grad]
        directions = [torch.randn_like(x) for x in smooth] if like is None else like.directions
        matching = [direction.to(x.dtype) for x, direction in zip(smooth, directions, strict=True)]
        gradients = torch.autograd.grad(smooth, [own[i] for i in differentiable], matching)
        return cls(outputs, directions, list(gradients))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in cast("tuple[Any, ...] | list[Any]", value):
            yield from tensors_of(part)
    elif is_dataclass(value):
        for part in fields(value):
            yield from tensors_of(getattr(value, part.name))


def _check(dtype: str, kind: str, results: list[Tensor], expected: list[Tensor], tolerance: float) -> Check:
    errors = [_error(a, b) for a, b in zip(results, expected, strict=True)]
    error = float("nan") if any(e != e for e in errors) else max(errors)
    return Check(dtype=dtype, kind=kind, error=error, tolerance=tolerance)


def _error(result: Tensor, expected: Tensor) -> float:
    """`|result - expected| / |expected|`; of whole numbers, the share that differs; infinite where shapes differ."""
    if result.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return (result != expected).double().mean().item() if result.numel() else 0.0
    difference = (result.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-300)).item()


def _to_fp64(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() and x.element_size() > 1 else x.clone()
