"""Logits, loss and gradients are those of transformers' Qwen3-Next."""

import statistics
from typing import Any

import pytest
import torch
from tests.conftest import tiny_model
from tests.model.parity import (
    BF16_BOUND,
    CONFIGURATIONS,
    GRADIENTS_BOUND,
    LOGITS_BOUND,
    bf16_errors,
    gradient_errors,
    logits_error,
)
from tests.model.reference import peer_of, relative_error

from qwen3_next import Qwen3NextForCausalLM


def both(changes: dict[str, Any], seed: int) -> tuple[Qwen3NextForCausalLM, Any]:
    ours = tiny_model(seed, **changes)
    return ours, peer_of(ours)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_are_those_of_transformers(name: str, fresh_seed: int) -> None:
    assert logits_error(name, fresh_seed) < LOGITS_BOUND


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_loss_and_gradients_are_those_of_transformers(name: str, fresh_seed: int) -> None:
    errors = gradient_errors(name, fresh_seed)
    assert errors.pop("lm_loss") < 1e-6
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < GRADIENTS_BOUND, worst


def test_router_of_a_single_normalised_expert_gets_no_gradient(fresh_seed: int) -> None:
    ours = tiny_model(fresh_seed, num_experts_per_tok=1, norm_topk_prob=True)
    tokens = torch.randint(0, 97, (2, 30))
    ours(tokens, labels=tokens).lm_loss.backward()
    gradients = {name: p.grad.abs().max() for name, p in ours.named_parameters() if p.grad is not None}
    largest = max(gradients.values())
    routers = [gradient for name, gradient in gradients.items() if name.endswith("mlp.gate.weight")]
    assert max(routers) < 1e-6 * largest


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_bf16_logits_are_close_to_those_of_transformers_and_no_further_from_fp32(name: str, fresh_seed: int) -> None:
    """The largest error of one model depends on a few roundings; the median of five models is compared."""
    models = [bf16_errors(name, fresh_seed + offset) for offset in range(5)]
    ours_to_theirs, ours, theirs = (statistics.median(errors) for errors in zip(*models, strict=True))
    assert ours_to_theirs < BF16_BOUND
    assert ours < max(BF16_BOUND / 2, 1.5 * theirs)


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
