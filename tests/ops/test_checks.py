"""The helpers of these tests can fail themselves."""

import pytest
import torch
from tests.ops.checks import TOLERANCES, poisoned, relative_error, tolerance

from qwen3_next.ops.backend import OPERATIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_poison_of_floating_point_is_nan(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, dtype=dtype)
    with poisoned():
        made = [
            torch.empty(2, 3, dtype=dtype),
            torch.empty_like(x.t()),
            x.new_empty(4),
            x.new_empty_strided((2, 2), (1, 2)),
        ]
    assert all(part.float().isnan().all() for part in made)
    assert [part.dtype for part in made] == [dtype] * 4


def test_poison_of_whole_numbers_is_the_largest() -> None:
    with poisoned():
        assert torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()
        assert torch.empty(3, dtype=torch.bool).all()


def test_poison_ends_with_the_block() -> None:
    make = torch.empty
    with pytest.raises(ZeroDivisionError), poisoned():
        _ = 1 / torch.empty(1, dtype=torch.bool).logical_not().int().item()
    assert torch.empty is make


def test_an_error_of_nan_is_within_no_tolerance() -> None:
    assert not relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) <= 1e9
    assert relative_error(torch.tensor([1.1]), torch.tensor([1.0])) == pytest.approx(0.1, rel=1e-5)


def test_tolerances_belong_to_operations() -> None:
    assert {operation for operation, _ in TOLERANCES} <= OPERATIONS.keys()
    for operation, name in TOLERANCES:
        forward, gradient = tolerance(operation, getattr(torch, name))
        assert forward >= 0
        assert gradient >= 0
