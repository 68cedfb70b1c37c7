"""Which implementation of an operation runs, and what happens where a request cannot be honoured."""

import pytest
import torch
from torch import Tensor

from qwen3_next.errors import BackendError
from qwen3_next.ops import attention, linear_cross_entropy, rms_norm, use
from qwen3_next.ops.backend import accelerated
from qwen3_next.ops.segments import Segments


@accelerated("no_such_twin")
def doubled(x: Tensor) -> Tensor:
    """An operation without a twin."""
    return 2 * x


@accelerated("causal_conv")
def causal_conv(x: Tensor) -> Tensor:
    """An operation whose twin, for the sake of the test, is the function of this name in ops/causal_conv.py."""
    return x


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_without_a_twin_the_definition_runs(backend: str) -> None:
    x = torch.randn(3)
    with use(backend):
        assert torch.equal(doubled(x), 2 * x)


def test_a_twin_that_does_not_exist_is_refused_by_the_operations_name() -> None:
    with use("triton"), pytest.raises(BackendError, match="doubled has no Triton implementation"):
        doubled(torch.randn(3))


def test_every_operation_without_a_twin_refuses_triton() -> None:
    x, segments = torch.randn(4, 2, 8), Segments.from_lengths([4])
    with use("triton"):
        with pytest.raises(BackendError, match="rms_norm"):
            rms_norm(x, torch.zeros(8), 1e-6)
        with pytest.raises(BackendError, match="attention"):
            attention(x, x, x, segments, segments)
        with pytest.raises(BackendError, match="linear_cross_entropy"):
            linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))


def test_a_twin_never_gets_tensors_of_a_cpu() -> None:
    x = torch.randn(3, device="cpu")
    assert causal_conv(x) is x
    with use("triton"), pytest.raises(BackendError, match="no CUDA tensor"):
        causal_conv(x)


def test_the_twin_runs_where_it_exists_and_the_tensors_are_on_a_gpu(on_device: str) -> None:
    if on_device == "cpu":
        pytest.skip("needs a GPU")
    with pytest.raises(TypeError, match="weight"):  # the twin's own complaint: the test's operation lacks its arguments
        causal_conv(torch.randn(3))
    with use("reference"):
        assert causal_conv(torch.ones(1)) == 1


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
