"""AdamW in the published groups, on fp32 masters."""

import random
from typing import Any

import pytest
import torch
from tests.conftest import tiny_model
from torch import Tensor, nn

from qwen3_next.train.config import OptimizerSettings
from qwen3_next.train.optimizer import MasterAdamW, parameter_groups


def groups_of(model: nn.Module) -> dict[str, set[str]]:
    return {group.name: set(group.parameters) for group in parameter_groups(model)}


def test_groups_follow_the_publication() -> None:
    model = tiny_model(attention_bias=True)
    groups = groups_of(model)
    names = {name for name, _ in model.named_parameters()}
    assert set().union(*groups.values()) == names
    assert sum(map(len, groups.values())) == len(names)
    assert groups["not_decayed"] == {
        name for name in names if name.endswith(("A_log", "dt_bias", "linear_attn.norm.weight", ".bias"))
    }
    norms = ("layernorm.weight", "q_norm.weight", "k_norm.weight", "norm_embedding.weight", "norm_hidden.weight")
    assert groups["zero_centred_norms"] == {
        name for name in names if name.endswith(norms) or name in ("model.norm.weight", "mtp.norm.weight")
    }
    assert any(name.endswith("q_proj.bias") for name in groups["not_decayed"])
    assert [group.decayed for group in parameter_groups(model)] == [True, True, False]


def gradients_of(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in model.named_parameters()}


def give(model: nn.Module, gradients: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()


@pytest.mark.parametrize(("implementation", "tolerance"), [({"fused": True}, 0.0), ({}, 1e-6)])
def test_an_fp32_model_is_stepped_as_torch_steps_it(
    implementation: dict[str, bool], tolerance: float, fresh_seed: int
) -> None:
    settings = OptimizerSettings(clip=0.0, weight_decay=0.2, betas=(0.8, 0.9))
    mine, theirs = tiny_model(fresh_seed), tiny_model(fresh_seed)
    groups = groups_of(theirs)
    parameters = dict(theirs.named_parameters())
    peer = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in members], "weight_decay": 0.0 if kind == "not_decayed" else 0.2}
            for kind, members in groups.items()
        ],
        betas=(0.8, 0.9),
        eps=settings.eps,
        **implementation,
    )
    optimizer = MasterAdamW(mine, settings, torch.float32)
    for step in range(3):
        lr = random.uniform(1e-4, 1e-2)
        for group in peer.param_groups:
            group["lr"] = lr
        gradients = gradients_of(mine, fresh_seed + step)
        for model in (mine, theirs):
            give(model, gradients)
        optimizer.accumulate()
        optimizer.step(lr)
        peer.step()
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter, parameters[name], rtol=tolerance, atol=tolerance)


def test_gradients_are_clipped_to_the_global_norm(fresh_seed: int) -> None:
    clipped, scaled = tiny_model(fresh_seed), tiny_model(fresh_seed)
    gradients = gradients_of(clipped, fresh_seed)
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt().item()
    one = MasterAdamW(clipped, OptimizerSettings(clip=norm / 4, eps=0.1), torch.float32)
    other = MasterAdamW(scaled, OptimizerSettings(clip=0.0, eps=0.1), torch.float32)
    give(clipped, gradients)
    give(scaled, {name: g / 4 for name, g in gradients.items()})
    for optimizer in (one, other):
        optimizer.accumulate()
    assert one.step(1e-2).item() == pytest.approx(norm, rel=1e-5)
    other.step(1e-2)
    for a, b in zip(clipped.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(poison: float, fresh_seed: int) -> None:
    model = tiny_model(fresh_seed)
    optimizer = MasterAdamW(model, OptimizerSettings(), torch.bfloat16)
    give(model, gradients_of(model, fresh_seed))
    optimizer.accumulate()
    optimizer.step(1e-2)
    before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    weights = [p.detach().clone() for p in model.parameters()]
    give(model, gradients_of(model, fresh_seed + 1))
    next(model.parameters()).grad.view(-1)[3] = poison
    optimizer.accumulate()
    optimizer.step(1e-2)
    assert optimizer.skipped.item() == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state().items())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    give(model, gradients_of(model, fresh_seed + 2))
    optimizer.accumulate()
    assert optimizer.step(1e-2).isfinite()
    assert optimizer.skipped.item() == 1


def test_decay_rates_stay_fp32_and_the_rest_computes_in_bf16_on_fp32_masters(fresh_seed: int) -> None:
    model = tiny_model(fresh_seed)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MasterAdamW(model, OptimizerSettings(), torch.bfloat16)
    for name, parameter in model.named_parameters():
        fp32 = name.endswith(("A_log", "dt_bias"))
        assert parameter.dtype == (torch.float32 if fp32 else torch.bfloat16), name
        assert torch.equal(optimizer.slots[name].master, weights[name]), "the masters were rounded"


def test_steps_too_small_for_bf16_add_up_in_the_masters(fresh_seed: int) -> None:
    model = tiny_model(fresh_seed)
    optimizer = MasterAdamW(model, OptimizerSettings(weight_decay=0.0), torch.bfloat16)
    weight = model.lm_head.weight
    with torch.no_grad():
        optimizer.slots["lm_head.weight"].master.fill_(1.0)
    for _ in range(40):
        give(model, {name: torch.ones_like(p) for name, p in model.named_parameters()})
        optimizer.accumulate()
        optimizer.step(1e-4)
    assert weight.float().unique().tolist() == [0.99609375]  # 1 - 40e-4, rounded to bf16


def test_gradients_of_a_window_are_summed_in_fp32(fresh_seed: int) -> None:
    model = tiny_model(fresh_seed)
    optimizer = MasterAdamW(model, OptimizerSettings(), torch.bfloat16)
    for value in (256.0, 1.0, 1.0):
        give(model, {name: torch.full_like(p, value) for name, p in model.named_parameters()})
        optimizer.accumulate()
    assert all(slot.grad.unique().tolist() == [258.0] for slot in optimizer.slots.values())
    assert all(p.grad is None for p in model.parameters())


def test_state_continues_exactly(fresh_seed: int) -> None:
    models: list[Any] = [tiny_model(fresh_seed), tiny_model(fresh_seed + 1)]
    one, other = (MasterAdamW(model, OptimizerSettings(), torch.bfloat16) for model in models)

    def step(optimizer: MasterAdamW, model: nn.Module, number: int) -> None:
        give(model, gradients_of(model, fresh_seed + number))
        optimizer.accumulate()
        optimizer.step(1e-2)

    step(one, models[0], 0)
    other.load_state({name: tensor.clone() for name, tensor in one.state().items()})
    for number in (1, 2):
        step(one, models[0], number)
        step(other, models[1], number)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert all(torch.equal(tensor, other.state()[name]) for name, tensor in one.state().items())


def test_the_largest_norm_weight_looks_at_zero_centred_norms_alone(fresh_seed: int) -> None:
    model = tiny_model(fresh_seed)
    with torch.no_grad():
        model.model.layers[0].linear_attn.norm.weight.fill_(9.0)
        model.mtp.pre_fc_norm_hidden.weight[1] = -5.0
    assert MasterAdamW(model, OptimizerSettings(), torch.float32).largest_norm_weight() == 5.0
