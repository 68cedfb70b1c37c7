"""How far this package's logits and gradients are from those of transformers' Qwen3-Next, on random weights."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tests.conftest import EVERY_EXPERT, tiny_model
from tests.model.reference import peer_of, relative_error
from torch import Tensor

from qwen3_next import Qwen3NextForCausalLM

LOGITS_BOUND, GRADIENTS_BOUND, BF16_BOUND = 1e-5, 1e-4, 2e-2
"""What the largest relative errors must stay below."""

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "factor": 4.0}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "small": {},
    "one key head": {"linear_num_key_heads": 1, "linear_num_value_heads": 3},
    "equal heads": {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "num_key_value_heads": 4},
    "wide values": {"linear_key_head_dim": 6, "linear_value_head_dim": 20, "linear_conv_kernel_dim": 3},
    "dense layers": {"mlp_only_layers": [1], "decoder_sparse_step": 2},
    "all experts": {"num_experts": 5, "num_experts_per_tok": 5, "norm_topk_prob": False},
    # With norm_topk_prob the weight of a single expert is 1 whatever its score, and the router's gradient is 0.
    "one expert a token": {"num_experts": 7, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "attention first": {"layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
    "odd layers": {"num_hidden_layers": 5, "head_dim": 24, "hidden_size": 40, "attention_bias": True},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 512},
    "linear rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5e6, "partial_rotary_factor": 1.0, "factor": 2.0}
    },
    "dynamic rope": {"rope_parameters": DYNAMIC, "max_position_embeddings": 64},
    "tied": {"tie_word_embeddings": True},
    "only attention": {"layer_types": ["full_attention"] * 4},
    "mostly delta net": {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "rms_norm_eps": 1e-5},
}

LENGTHS = (1, 7, 64, 65, 131)
"""A single token, less than a chunk of the delta rule, exactly one, one token more, and two and a bit."""

ROUTING_GAP = 2e-5
"""Scores of the last expert chosen and of the first one not chosen are at least this far apart in what is compared.

Closer than that, fp32 rounding alone may decide, in either package, which expert a token goes to: what follows is then
a comparison of two experts.
"""


class Bf16Errors(NamedTuple):
    """Largest relative errors of bf16 logits: between the two packages, and of each against fp32 arithmetic."""

    ours_to_theirs: float
    ours_to_fp32: float
    theirs_to_fp32: float


def logits_error(name: str, seed: int) -> float:
    """The largest over all `LENGTHS`, fp32."""
    ours = tiny_model(seed, **CONFIGURATIONS[name])
    theirs = peer_of(ours)
    drawn = (decisive_tokens(ours, length) for length in LENGTHS)
    with torch.no_grad():
        return max(relative_error(ours(tokens).logits, theirs(tokens).logits) for tokens in drawn)


def gradient_errors(name: str, seed: int) -> dict[str, float]:
    """Of `lm_loss` itself and of its gradient by each parameter that transformers has, fp32."""
    ours = tiny_model(seed, **CONFIGURATIONS[name])
    theirs = peer_of(ours)
    tokens = decisive_tokens(ours, 67)
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.1, -100)
    mine, peer = ours(tokens, labels=labels), theirs(tokens, labels=labels)
    mine.lm_loss.backward()
    peer.loss.backward()
    expected = dict(theirs.named_parameters())
    errors = {"lm_loss": relative_error(mine.lm_loss, peer.loss)}
    for parameter_name, gradient in _main_gradients(ours):
        errors[parameter_name] = relative_error(gradient, expected[parameter_name].grad)
    assert errors.keys() == {"lm_loss", *expected}
    return errors


def bf16_errors(name: str, seed: int) -> Bf16Errors:
    """With every expert chosen: a bf16 rounding would flip choices, in either package, whatever the gap.

    The referee is fp32 arithmetic with the same bf16 weights.
    """
    ours = tiny_model(seed, **(CONFIGURATIONS[name] | EVERY_EXPERT)).to(torch.bfloat16)
    theirs = peer_of(ours)
    tokens = torch.randint(0, ours.config.vocab_size, (2, 100))
    with torch.no_grad():
        mine, peer = ours(tokens).logits, theirs(tokens).logits
        exact = ours.float()(tokens).logits
    return Bf16Errors(relative_error(mine, peer), relative_error(mine, exact), relative_error(peer, exact))


def decisive_tokens(model: Qwen3NextForCausalLM, length: int) -> Tensor:
    """Fresh tokens `[2, length]` whose every choice of experts is clearer than `ROUTING_GAP`."""
    while True:
        tokens = torch.randint(0, model.config.vocab_size, (2, length))
        if _smallest_gap(model, tokens) > ROUTING_GAP:
            return tokens


def _smallest_gap(model: Qwen3NextForCausalLM, tokens: Tensor) -> float:
    chosen = model.config.num_experts_per_tok
    if chosen == model.config.num_experts:
        return float("inf")
    with torch.no_grad():
        scores = torch.cat(model(tokens, output_router_logits=True).router_logits)
    ranked = scores.sort(dim=-1, descending=True).values
    return (ranked[:, chosen - 1] - ranked[:, chosen]).min().item()


def _main_gradients(model: Qwen3NextForCausalLM) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if not name.startswith("mtp."):
            assert parameter.grad is not None, name
            yield name, parameter.grad
