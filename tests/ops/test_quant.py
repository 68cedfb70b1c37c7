"""Block-fp8 weights become what their definition says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_next.errors import InputError
from qwen3_next.ops.quant import block_scale_shape, dequantize_block_fp8

SIZES = st.sampled_from([1, 3, 64, 127, 128, 129, 256, 300])


def fp8(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns).to(torch.float8_e4m3fn)


@settings(max_examples=25, deadline=None)
@given(rows=SIZES, columns=SIZES, scale_dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_element_is_multiplied_by_the_scale_of_its_block(
    rows: int, columns: int, scale_dtype: torch.dtype
) -> None:
    weight, scale = fp8(rows, columns), torch.rand(block_scale_shape((rows, columns))).to(scale_dtype)
    row, column = torch.arange(rows) // 128, torch.arange(columns) // 128
    expected = weight.float() * scale.float()[row[:, None], column[None, :]]
    assert torch.equal(dequantize_block_fp8(weight, scale, torch.float32), expected)
    assert torch.equal(dequantize_block_fp8(weight, scale, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("codes", [range(256), [code for code in range(256) if code % 128 != 127]])
def test_every_e4m3_code_has_its_value(codes: list[int]) -> None:
    weight = torch.tensor(list(codes), dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(0)
    made = dequantize_block_fp8(weight, torch.ones(1, -(-len(codes) // 128)), torch.float32)
    expected = weight.float()
    assert torch.equal(made.isnan(), expected.isnan())  # of NaN the sign is nobody's business
    assert torch.equal(made.nan_to_num(0).view(torch.int32), expected.nan_to_num(0).view(torch.int32))


def test_an_empty_weight_stays_empty() -> None:
    assert dequantize_block_fp8(fp8(0, 5), torch.ones(0, 1), torch.float32).shape == (0, 5)


@pytest.mark.parametrize("shape", [(2, 2), (1, 1), (3,)])
def test_scales_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"needs \[2, 1\]"):
        dequantize_block_fp8(fp8(200, 100), torch.ones(shape), torch.float32)


def test_other_weights_are_refused() -> None:
    with pytest.raises(InputError, match="float8_e4m3fn"):
        dequantize_block_fp8(torch.ones(4, 4), torch.ones(1, 1), torch.float32)
    with pytest.raises(InputError, match=r"matrix \[O, I\]"):
        block_scale_shape((2, 3, 4))
