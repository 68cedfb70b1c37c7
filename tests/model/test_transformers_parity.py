"""Logits, loss and gradients are those of transformers' Qwen3-Next."""

from typing import Any

import pytest
import torch
from tests.conftest import EVERY_EXPERT, tiny_model
from tests.model.reference import peer_of, relative_error

from qwen3_next import Qwen3NextForCausalLM

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "small": {},
    "one key head": {"linear_num_key_heads": 1, "linear_num_value_heads": 3},
    "equal heads": {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "num_key_value_heads": 4},
    "wide values": {"linear_key_head_dim": 6, "linear_value_head_dim": 20, "linear_conv_kernel_dim": 3},
    "dense layers": {"mlp_only_layers": [1], "decoder_sparse_step": 2},
    "all experts": {"num_experts": 5, "num_experts_per_tok": 5, "norm_topk_prob": False},
    "one expert a token": {"num_experts": 7, "num_experts_per_tok": 1},
    "attention first": {"layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
    "odd layers": {"num_hidden_layers": 5, "head_dim": 24, "hidden_size": 40, "attention_bias": True},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 512},
    "linear rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5e6, "partial_rotary_factor": 1.0, "factor": 2.0}
    },
    "tied": {"tie_word_embeddings": True},
    "only attention": {"layer_types": ["full_attention"] * 4},
    "only delta net": {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "rms_norm_eps": 1e-5},
}
LENGTHS = (1, 7, 64, 65, 131)


def both(changes: dict[str, Any], seed: int) -> tuple[Qwen3NextForCausalLM, Any]:
    ours = tiny_model(seed, **changes)
    return ours, peer_of(ours)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_are_those_of_transformers(name: str) -> None:
    ours, theirs = both(CONFIGURATIONS[name], seed=len(name))
    for length in LENGTHS:
        tokens = torch.randint(0, 97, (2, length))
        assert relative_error(ours(tokens).logits, theirs(tokens).logits) < 1e-5


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    ours, theirs = both(CONFIGURATIONS[name], seed=len(name))
    tokens = torch.randint(0, 97, (2, 67))
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.1, -100)
    mine, peer = ours(tokens, labels=labels), theirs(tokens, labels=labels)
    assert relative_error(mine.lm_loss, peer.loss) < 1e-6
    mine.lm_loss.backward()
    peer.loss.backward()
    expected = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        if not parameter_name.startswith("mtp."):
            assert parameter.grad is not None, parameter_name
            assert relative_error(parameter.grad, expected[parameter_name].grad) < 1e-4, parameter_name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["small", "wide values", "yarn"])
def test_bf16_logits_are_close_to_those_of_transformers(name: str, seed: int) -> None:
    """In bf16 a rounding difference can flip a choice of experts, in either package; here every expert is chosen."""
    ours = tiny_model(seed, **(CONFIGURATIONS[name] | EVERY_EXPERT)).to(torch.bfloat16)
    theirs = peer_of(ours)
    tokens = torch.randint(0, 97, (2, 100))
    mine, peer = ours(tokens).logits.double(), theirs(tokens).logits.double()
    assert (mine - peer).norm() / peer.norm() < 2e-2


def test_left_padding_changes_no_logit() -> None:
    ours, theirs = both({}, seed=5)
    tokens = torch.randint(0, 97, (2, 70))
    mask = torch.ones_like(tokens)
    mask[0, :23] = 0
    padded, alone = ours(tokens, attention_mask=mask).logits, ours(tokens[:1, 23:]).logits
    assert relative_error(padded[0, 23:], alone[0]) < 1e-5
    assert relative_error(padded[0, 23:], theirs(tokens, attention_mask=mask).logits[0, 23:]) < 1e-5


def test_auxiliary_loss_is_that_of_transformers_for_one_sparse_layer() -> None:
    ours, theirs = both({"mlp_only_layers": [0, 1, 2]}, seed=6)
    tokens = torch.randint(0, 97, (2, 40))
    mask = torch.ones_like(tokens)
    mask[1, 30:] = 0
    mine = ours(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100), output_router_logits=True)
    peer = theirs(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100), output_router_logits=True)
    assert relative_error(mine.aux_loss, peer.aux_loss) < 1e-5
    assert relative_error(mine.loss, peer.loss) < 1e-5
