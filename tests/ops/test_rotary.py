"""Rotary embedding against a rotation of single pairs, YaRN against transformers' own."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.checks import assert_pure, assert_same_gradients, relative_error
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_next import Qwen3NextConfig as PeerConfig

from qwen3_next import Qwen3NextConfig
from qwen3_next.model.layers import rotary_settings
from qwen3_next.ops.norm import rms_norm
from qwen3_next.ops.rotary import (
    YarnScaling,
    apply_rotary,
    rms_norm_rotary,
    rotary_frequencies,
    rotary_tables,
    yarn_attention_factor,
)


def by_complex_numbers(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Dimension i and i + R are the real and the imaginary part of a number that turns."""
    half = frequencies.shape[0]
    angles = positions[:, None, None].double() * frequencies.double()
    turned = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :].double()], dim=-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(1, 4), st.sampled_from([(16, 4), (16, 16), (10, 6), (64, 16), (5, 2)]))
def test_the_first_dimensions_turn_in_pairs_and_the_others_pass(
    tokens: int, heads: int, sizes: tuple[int, int]
) -> None:
    width, rotary_dim = sizes
    x, positions = torch.randn(tokens, heads, width), torch.randint(0, 1000, (tokens,))
    frequencies = rotary_frequencies(rotary_dim, 1e4)
    result = apply_rotary(x, *rotary_tables(positions, frequencies, 1.0, torch.float32))
    torch.testing.assert_close(
        result.double(), by_complex_numbers(x, positions, frequencies), rtol=0, atol=2e-4, check_device=True
    )
    assert torch.equal(result[..., rotary_dim:], x[..., rotary_dim:])


def test_position_zero_turns_nothing() -> None:
    x = torch.randn(3, 2, 12)
    tables = rotary_tables(torch.zeros(3, dtype=torch.long), rotary_frequencies(8, 1e4), 1.0, torch.float32)
    assert torch.equal(apply_rotary(x, *tables), x)


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 1, 32).double(), torch.randn(1, 1, 32).double()
    frequencies = rotary_frequencies(32, 1e4)

    def score(i: int, j: int) -> float:
        turned = [
            apply_rotary(x, *rotary_tables(torch.tensor([p]), frequencies, 1.0, torch.float64))
            for x, p in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert math.isclose(score(7, 3), score(107, 103), rel_tol=1e-4, abs_tol=1e-4)


@pytest.mark.parametrize("rotary_dim", [2, 6, 64])
def test_frequencies_are_a_geometric_series(rotary_dim: int) -> None:
    expected = [1e7 ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    torch.testing.assert_close(rotary_frequencies(rotary_dim, 1e7), torch.tensor(expected), rtol=1e-5, atol=0)


def test_linear_scaling_divides_every_frequency() -> None:
    torch.testing.assert_close(rotary_frequencies(16, 1e4, linear_factor=4.0) * 4, rotary_frequencies(16, 1e4))


YARNS: list[dict[str, Any]] = [
    {"factor": 4.0},
    {"factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0},
    {"factor": 8.0, "attention_factor": 1.25},
    {"factor": 3.5, "truncate": False},
    {"factor": 1.0},
    {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"factor": 1.0, "mscale": 2.0, "mscale_all_dim": 0.5},
    {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.25},
]


@pytest.mark.parametrize("settings_of_yarn", YARNS, ids=str)
@pytest.mark.parametrize(("theta", "share", "original"), [(1e7, 0.25, 262144), (1e4, 0.5, 128), (5e6, 1.0, 4096)])
def test_yarn_is_that_of_transformers(
    settings_of_yarn: dict[str, Any], theta: float, share: float, original: int
) -> None:
    rope = {"rope_type": "yarn", "rope_theta": theta, "partial_rotary_factor": share}
    rope |= {"original_max_position_embeddings": original} | settings_of_yarn
    longest = int(original * settings_of_yarn["factor"])
    config = PeerConfig(head_dim=256, rope_parameters=rope, max_position_embeddings=longest)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.get_default_device())
    yarn = YarnScaling(original_length=original, **settings_of_yarn)
    torch.testing.assert_close(rotary_frequencies(int(256 * share), theta, yarn=yarn), expected, rtol=1e-6, atol=0)
    assert math.isclose(yarn_attention_factor(yarn), factor, rel_tol=1e-12)


@pytest.mark.parametrize("scales", [{}, {"mscale": 1.0, "mscale_all_dim": 0.5}, {"attention_factor": 1.5}], ids=str)
def test_every_yarn_setting_of_a_configuration_reaches_the_tables(scales: dict[str, float]) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 128} | scales
    expected = ROPE_INIT_FUNCTIONS["yarn"](PeerConfig(head_dim=64, rope_parameters=rope), torch.get_default_device())
    frequencies, factor = rotary_settings(Qwen3NextConfig(head_dim=64, rope_parameters=rope))
    torch.testing.assert_close(frequencies, expected[0], rtol=1e-6, atol=0)
    assert math.isclose(factor, expected[1], rel_tol=1e-12)


def test_without_yarn_the_attention_factor_is_one() -> None:
    assert yarn_attention_factor(None) == 1.0


def test_tables_are_rounded_once_and_carry_the_attention_factor() -> None:
    positions, frequencies = torch.randint(0, 2000, (50,)), rotary_frequencies(16, 1e4)
    exact = rotary_tables(positions, frequencies, 1.2, torch.float32)
    rounded = rotary_tables(positions, frequencies, 1.2, torch.bfloat16)
    assert all(torch.equal(r, e.bfloat16()) and r.shape == (50, 1, 8) for r, e in zip(rounded, exact, strict=True))
    torch.testing.assert_close(exact[0].square() + exact[1].square(), torch.full((50, 1, 8), 1.44))


def test_bf16_stays_bf16_and_close() -> None:
    x, positions, frequencies = torch.randn(40, 3, 24), torch.arange(40), rotary_frequencies(16, 1e4)
    result = apply_rotary(x.bfloat16(), *rotary_tables(positions, frequencies, 1.0, torch.bfloat16))
    assert result.dtype == torch.bfloat16
    assert relative_error(result, by_complex_numbers(x, positions, frequencies)) < 6e-3


def test_the_rotation_after_a_norm_is_both_in_turn() -> None:
    x, weight = torch.randn(9, 3, 24).bfloat16(), torch.randn(24).bfloat16()
    tables = rotary_tables(torch.arange(9), rotary_frequencies(16, 1e4), 1.0, torch.bfloat16)
    expected = apply_rotary(rms_norm(x, weight, 1e-6), *tables)
    assert torch.equal(rms_norm_rotary(x, weight, 1e-6, *tables), expected)


def test_gradients_turn_back() -> None:
    positions, frequencies = torch.arange(7) * 3, rotary_frequencies(8, 1e4)
    tables = rotary_tables(positions, frequencies, 1.0, torch.float32)
    assert_same_gradients(
        lambda x: apply_rotary(x, *tables),
        lambda x: by_complex_numbers(x, positions, frequencies),
        [torch.randn(7, 2, 12)],
        1e-5,
    )


def test_inputs_stay_and_a_second_run_is_identical() -> None:
    tables = rotary_tables(torch.arange(5), rotary_frequencies(4, 1e4), 1.0, torch.float32)
    assert_pure(apply_rotary, (torch.randn(5, 2, 8), *tables))
