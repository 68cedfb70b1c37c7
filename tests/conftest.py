"""Helpers shared by all tests."""

import os
import secrets
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported: they then run on the CPU

from qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM

torch.set_num_threads(1)  # models as small as those of the tests are slower with more, and far slower beside others


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sizes that only a GPU finishes in time wait for one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def tiny_config(**changes: Any) -> Qwen3NextConfig:
    """A model with every part of the family, small enough for a test."""
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "pad_token_id": None,
    }
    return Qwen3NextConfig(**(settings | changes))


def tiny_model(seed: int = 0, **changes: Any) -> Qwen3NextForCausalLM:
    """A random model whose every parameter is away from its resting value."""
    torch.manual_seed(seed)
    model = Qwen3NextForCausalLM(tiny_config(**changes)).eval()
    scramble(model)
    return model


@torch.no_grad()
def scramble(model: torch.nn.Module) -> None:
    """Move every parameter, norm weights included, so that none of them can hide behind a neutral value.

    Decays are kept moderate: with strong ones a sum of logarithms loses digits in fp32 that the comparisons need
    (tests/ops compares extreme decays with fp64). As in a trained model, embeddings are about 1 and what one layer adds
    to them is less: each layer renormalises a smaller stream, and thereby multiplies whatever rounding it carries.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.uniform_(-3.0, 0.0)
        elif name.endswith("embed_tokens.weight"):
            parameter.normal_()
        else:
            writes_to_stream = any(part in name for part in ("o_proj", "out_proj", "down_proj"))
            parameter.add_(torch.randn_like(parameter) * (0.05 if writes_to_stream else 0.1))


EVERY_EXPERT = {"num_experts": 4, "num_experts_per_tok": 4}
"""Each token uses all experts: no rounding difference can flip a choice, whatever the random weights."""


@pytest.fixture
def model() -> Qwen3NextForCausalLM:
    """A fresh tiny model."""
    return tiny_model()


@pytest.fixture
def fresh_seed() -> int:
    """Another seed on every run, printed by pytest where a test that used it fails."""
    return secrets.randbelow(2**31)
