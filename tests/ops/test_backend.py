"""Which implementation of an operation runs, and what happens where a request cannot be honoured."""

import inspect
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

import qwen3_next.ops
from qwen3_next.errors import BackendError
from qwen3_next.ops import backend, use
from qwen3_next.ops.backend import OPERATIONS, accelerated, has_twin, refuses

# For the sake of the tests, twins of these stand in modules that do not exist as files; the registry forgets them.
with mock.patch.dict(OPERATIONS):

    @accelerated("no_such_twin")
    def doubled(x: Tensor) -> Tensor:
        """An operation without a twin."""
        return 2 * x

    @accelerated("twin_of_a_test")
    def tripled(x: Tensor, *, scale: float = 1.0) -> Tensor:
        """An operation whose twin answers a constant and takes no fp64."""
        return 3 * x * scale


TWINS_ANSWER = -7.0


@refuses(lambda x, *, scale=1.0: "fp64 is too wide for it" if x.dtype is torch.float64 else None)
def _twin_of_tripled(x: Tensor, *, scale: float = 1.0) -> Tensor:
    return torch.full_like(x, TWINS_ANSWER * scale)


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of `tripled` exists, whether or not Triton does."""
    functions = {"tripled": _twin_of_tripled}
    monkeypatch.setattr(backend, "has_twin", lambda module: module == "twin_of_a_test")
    monkeypatch.setattr(backend, "_twin", lambda module, name: functions.get(name))


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Whether kernels run on a CPU, as the test's parameter says."""
    monkeypatch.setattr(backend, "_interprets", lambda: request.param)


interpreted = pytest.mark.parametrize("interpreter", [True], indirect=True)
compiled = pytest.mark.parametrize("interpreter", [False], indirect=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_without_a_twin_the_definition_runs(backend: str) -> None:
    x = torch.randn(3)
    with use(backend):
        assert torch.equal(doubled(x), 2 * x)


def test_a_twin_that_does_not_exist_is_refused_by_the_operations_name() -> None:
    with use("triton"), pytest.raises(BackendError, match="doubled has no Triton implementation"):
        doubled(torch.randn(3))


def test_every_operation_refuses_triton_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "has_twin", lambda module: False)
    monkeypatch.setattr(backend, "_twin", lambda module, name: None)
    assert OPERATIONS
    for name in OPERATIONS:
        with use("triton"), pytest.raises(BackendError, match=f"{name} has no Triton implementation"):
            getattr(qwen3_next.ops, name)()


@pytest.mark.usefixtures("twin", "interpreter")
@compiled
def test_a_compiled_twin_never_gets_tensors_of_a_cpu() -> None:
    x = torch.randn(3, device="cpu")
    assert torch.equal(tripled(x), 3 * x)
    with use("triton"), pytest.raises(BackendError, match="tripled got no CUDA tensor"):
        tripled(x)


@pytest.mark.usefixtures("twin", "interpreter")
@interpreted
def test_in_the_interpreter_a_cpu_gets_the_twin_only_where_it_asks_for_it() -> None:
    x = torch.randn(3, device="cpu")
    assert torch.equal(tripled(x), 3 * x)
    with use("triton"):
        assert torch.equal(tripled(x), torch.full_like(x, TWINS_ANSWER))
        assert torch.equal(tripled(x, scale=2.0), torch.full_like(x, 2 * TWINS_ANSWER))


@pytest.mark.usefixtures("twin", "interpreter")
@interpreted
def test_what_a_twin_refuses_is_an_error_with_its_reason() -> None:
    x = torch.randn(3, dtype=torch.float64)
    with use("triton"), pytest.raises(BackendError, match="tripled does not take this: fp64 is too wide for it"):
        tripled(x)


@pytest.mark.usefixtures("twin", "interpreter")
@compiled
def test_on_a_gpu_auto_takes_the_twin_unless_it_refuses(on_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, wide = torch.randn(3), torch.randn(3, dtype=torch.float64)
    if on_device == "cpu":
        monkeypatch.setattr(backend, "_cuda_device", lambda args, kwargs: 0)
        monkeypatch.setattr(backend.torch.cuda, "device", lambda index: mock.MagicMock())
    assert torch.equal(tripled(x), torch.full_like(x, TWINS_ANSWER))
    assert torch.equal(tripled(wide), 3 * wide)
    with use("reference"):
        assert torch.equal(tripled(x), 3 * x)


def test_a_tensor_in_a_keyword_tells_the_device_too(on_device: str) -> None:
    x = torch.randn(3)
    found = backend._cuda_device((None, "text"), {"x": x})
    assert found == (None if on_device == "cpu" else x.device)


def test_the_interpreter_is_found_by_tritons_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in (True, False):
        triton = ModuleType("triton")
        triton.knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=setting))  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "triton", triton)
        assert backend._interprets.__wrapped__() is setting


def test_every_marked_operation_is_known_with_the_module_of_its_twin() -> None:
    assert OPERATIONS["rms_norm"] == "norm_triton"
    assert OPERATIONS.keys() <= set(qwen3_next.ops.__all__)
    assert "doubled" not in OPERATIONS, "the operations of this test must not be taken for the package's"


@pytest.mark.skipif(not has_twin("causal_conv_triton"), reason="Triton is not installed")
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_twin_of_this_version_has_the_parameters_of_its_definition(name: str) -> None:
    twin = backend._twin(OPERATIONS[name], name)
    assert twin is not None, f"{OPERATIONS[name]}.{name} does not exist"
    definition = inspect.signature(getattr(qwen3_next.ops, name)).parameters
    assert [(p.name, p.default) for p in inspect.signature(twin).parameters.values()] == [
        (p.name, p.default) for p in definition.values()
    ]


def test_without_triton_the_operations_run_and_its_twins_do_not_exist() -> None:
    """In a process of its own, in which Triton cannot be imported or found."""
    code = """
import importlib.util, sys
sys.modules["triton"] = None
found = importlib.util.find_spec
def without_triton(name, *rest):
    return None if name.split(".")[0] == "triton" else found(name, *rest)
importlib.util.find_spec = without_triton
import torch
from qwen3_next.errors import BackendError
from qwen3_next.ops import rms_norm, use
from qwen3_next.ops.backend import has_twin
assert not has_twin("norm_triton") and not has_twin("causal_conv_triton")
x = torch.randn(2, 8)
assert rms_norm(x, torch.zeros(8), 1e-6).shape == x.shape
try:
    with use("triton"):
        rms_norm(x, torch.zeros(8), 1e-6)
except BackendError as error:
    assert "Triton is not installed" in str(error)
else:
    raise AssertionError("the definition stood in for the twin")
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BackendError, match="'cuda' is unknown; choose one of auto, reference, triton"), use("cuda"):
        pass


def test_the_inner_choice_holds_inside_and_the_outer_one_comes_back() -> None:
    x = torch.randn(2)
    with use("triton"):
        with use("reference"):
            assert torch.equal(doubled(x), 2 * x)
        with pytest.raises(BackendError):
            doubled(x)
    assert torch.equal(doubled(x), 2 * x)


def test_an_error_inside_restores_the_choice() -> None:
    with pytest.raises(ZeroDivisionError), use("triton"):
        _ = 1 / 0
    assert doubled(torch.ones(1)) == 2


def test_the_marked_operation_keeps_name_and_docstring() -> None:
    assert (doubled.__name__, doubled.__doc__) == ("doubled", "An operation without a twin.")
