"""The self-check knows every accelerated operation, finds what is wrong with one, and says why a twin does not run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3_next.errors import BackendError
from qwen3_next.ops import selfcheck
from qwen3_next.ops.backend import OPERATIONS, has_twin, use
from qwen3_next.ops.samples import PUBLISHED, TINY, Sample, samples
from qwen3_next.ops.selfcheck import DTYPES, Check, Finding, compare, self_check

CPU = torch.device("cpu")
SAMPLES = list(samples(TINY))


def named(operation: str) -> Sample:
    return next(sample for sample in SAMPLES if sample.operation == operation)


def finding(group: list[Sample], device: torch.device = CPU) -> Finding:
    return selfcheck._finding(group[0].operation, group, device)


def scaled(factor: float) -> Callable[..., Tensor]:
    """The norm of the sample, times a factor that fp64 does not know."""
    right = named("rms_norm").run

    def run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return right(x, weight, eps) * (1.0 if x.dtype is torch.float64 else factor)

    return run


def wrong_norm(factor: float) -> Sample:
    norm = named("rms_norm")
    return Sample(operation="rms_norm", make=norm.make, run=scaled(factor), gradients=norm.gradients)


def test_every_accelerated_operation_has_a_sample() -> None:
    names = [sample.operation for sample in SAMPLES]
    assert set(names) == OPERATIONS.keys()
    assert list(dict.fromkeys(names)) == [f.operation for f in self_check(CPU)], "samples of one operation are adjacent"
    assert [sample.operation for sample in samples(PUBLISHED)] == names


def test_the_definitions_of_this_machine_are_right() -> None:
    findings = list(self_check(CPU))
    assert [f.operation for f in findings if not f.passed] == []
    assert {(f.backend, f.reason) for f in findings} == {("definition", "no GPU")}
    for f in findings:
        kinds = {(check.dtype, check.kind) for check in f.checks}
        assert {("float32", "outputs"), ("bfloat16", "outputs")} <= kinds
        assert ("float32", "gradients") in kinds or f.operation.endswith("_") or not named(f.operation).gradients


@pytest.mark.gpu
def test_the_twins_of_this_machine_are_right(on_device: str) -> None:
    if on_device == "cpu":
        pytest.skip("the same as on the GPU")
    findings = list(self_check(torch.device("cuda")))
    assert [f for f in findings if not f.passed] == []
    assert [f.operation for f in findings if f.backend != "triton"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
@pytest.mark.skipif(not has_twin("causal_conv_triton"), reason="Triton is not installed")
@pytest.mark.parametrize("index", range(len(SAMPLES)), ids=lambda index: SAMPLES[index].operation)
def test_every_twin_takes_its_sample(index: int) -> None:
    """In the interpreter, in fp32; its bf16 differs from a GPU's."""
    try:
        checks = compare(SAMPLES[index], torch.float32, CPU, "triton")
    except BackendError as error:
        pytest.fail(str(error))
    assert [check for check in checks if not check.passed] == []


def test_a_sample_that_changes_an_input_would_show(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    for sample in SAMPLES:
        inputs = sample.make(torch.float32)
        before = [x.clone() for x in selfcheck.tensors_of(inputs)]
        with use("reference"), torch.no_grad():
            sample.run(*inputs)
        assert all(map(torch.equal, before, selfcheck.tensors_of(inputs))), sample.operation


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_wrong_operation_is_red(factor: float) -> None:
    found = finding([wrong_norm(factor)])
    assert not found.passed
    assert {(check.kind, check.passed) for check in found.checks} == {("outputs", False), ("gradients", False)}
    assert finding([wrong_norm(1.0)]).passed


def test_one_red_sample_of_several_is_enough() -> None:
    for group in ([wrong_norm(1.0), wrong_norm(1.1)], [wrong_norm(float("nan")), wrong_norm(1.0)]):
        assert not finding(group).passed


def test_an_operation_that_fails_is_red_with_its_complaint() -> None:
    def run(*inputs: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    found = finding([Sample(operation="rms_norm", make=named("rms_norm").make, run=run)])
    assert not found.passed
    assert found.fault == "torch.float32: RuntimeError: no kernel image"


def test_outputs_of_another_shape_are_red() -> None:
    def run(x: Tensor) -> Tensor:
        return x if x.dtype is torch.float64 else x[:1]

    found = finding([Sample(operation="rms_norm", make=lambda dtype: (torch.ones(3, dtype=dtype),), run=run)])
    assert [check.error for check in found.checks] == [float("inf"), float("inf")]
    assert not found.passed


def test_whole_numbers_have_to_be_equal() -> None:
    def run(x: Tensor) -> Tensor:
        return torch.tensor([1, 2, 3 if x.dtype is torch.float64 else 4])

    found = finding([Sample(operation="rms_norm", make=lambda dtype: (torch.ones(3, dtype=dtype),), run=run)])
    assert not found.passed


def test_a_twin_that_refuses_is_named_with_its_reason_and_the_definition_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = compare

    def refusing(sample: Sample, dtype: torch.dtype, device: torch.device, backend: Any) -> list[Check]:
        if backend == "triton" and dtype is torch.bfloat16:
            raise BackendError("it takes no bf16")
        return honest(sample, dtype, device, "reference")

    monkeypatch.setattr(selfcheck, "_reason_against_twin", lambda *_: "")
    monkeypatch.setattr(selfcheck, "compare", refusing)
    found = finding([named("rms_norm")])
    assert found.passed
    assert (found.backend, found.reason, len(found.checks)) == ("triton", "it takes no bf16", 2 * len(DTYPES))


def test_without_checks_nothing_has_passed() -> None:
    assert not Finding(operation="x", backend="triton", reason="", checks=(), fault="").passed
