"""Weights made block-fp8 in place: which, how near, and that the rest of the model is none the wiser."""

import re

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from tests.conftest import EVERY_EXPERT, tiny_model
from tests.model.reference import relative_error
from torch import Tensor

from qwen3_next import Qwen3NextForCausalLM
from qwen3_next.errors import CheckpointError, InputError
from qwen3_next.model.layers import Linear
from qwen3_next.model.moe import SparseMoE
from qwen3_next.model.quantize import quantize_
from qwen3_next.ops.quant import block_scale_shape, dequantize_block_fp8

# Of the published fp8 checkpoints, as their `modules_to_not_convert` has it.
KEPT = re.compile(
    r"(lm_head|model\.embed_tokens|model\.norm|mtp\.(fc|norm|pre_fc_norm_\w+)"
    r"|.*\.(input_layernorm|post_attention_layernorm|mlp\.gate|mlp\.shared_expert_gate)"
    r"|.*\.linear_attn\.(conv1d|in_proj_ba|norm)|.*\.self_attn\.[qk]_norm)\.weight|.*\.linear_attn\.(A_log|dt_bias)"
)


def wide_model(**changes: object) -> Qwen3NextForCausalLM:
    """More than one block in each direction, borders inside some."""
    sizes = {"hidden_size": 160, "moe_intermediate_size": 136, "shared_expert_intermediate_size": 144}
    return tiny_model(1, **(sizes | changes))


def dequantized(weight: Tensor, scales: Tensor) -> Tensor:
    """As `dequantize_block_fp8`, for the experts too: gate and up have blocks of their own."""
    if weight.dim() == 2:
        return dequantize_block_fp8(weight, scales, torch.float32)
    count, rows, columns = weight.shape
    halves = 1 if scales.shape[1] == -(-rows // 128) and rows % 256 else 2
    parts = zip(
        weight.reshape(count * halves, rows // halves, columns),
        scales.reshape(count * halves, -1, scales.shape[-1]),
        strict=True,
    )
    return torch.stack([dequantize_block_fp8(w, s, torch.float32) for w, s in parts]).view_as(weight)


def test_the_weights_that_the_published_checkpoint_quantises_are_quantised_and_no_others() -> None:
    model = wide_model()
    names = [name for name, _ in model.named_parameters()]
    quantize_(model)
    assert [name for name, _ in model.named_parameters()] == names
    for name, weight in model.named_parameters():
        assert (weight.dtype != torch.float8_e4m3fn) == bool(KEPT.fullmatch(name)), name


def test_every_quantised_weight_has_its_scales_under_the_published_name_and_is_near_what_it_was() -> None:
    model = wide_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    quantize_(model)
    after = model.state_dict()
    quantized = [name for name, weight in after.items() if weight.dtype == torch.float8_e4m3fn]
    assert after.keys() - before.keys() == {f"{name}_scale_inv" for name in quantized}
    for name in quantized:
        scales = after[f"{name}_scale_inv"]
        if after[name].dim() == 2:
            assert scales.shape == block_scale_shape(tuple(after[name].shape))
        weight = dequantized(after[name], scales)
        assert 1e-3 < relative_error(weight, before[name]) < 0.04, name


def uneven_(model: Qwen3NextForCausalLM) -> Qwen3NextForCausalLM:
    """Make rows and columns so unlike that a scale at the wrong block would show."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(
                    torch.linspace(0.2, 2, weight.shape[-1]) * torch.linspace(0.2, 2, weight.shape[-2])[:, None]
                )
    return model


@torch.no_grad()
def test_quantised_layers_compute_what_their_dequantised_weights_say() -> None:
    """Up to the rounding of activations, which signs do not suffer."""
    model, other = uneven_(wide_model(**EVERY_EXPERT)), wide_model(**EVERY_EXPERT)
    quantize_(model)
    state = model.state_dict()
    other.load_state_dict(
        {
            name: dequantized(weight, state[f"{name}_scale_inv"]) if f"{name}_scale_inv" in state else weight
            for name, weight in state.items()
            if not name.endswith("_scale_inv")
        }
    )
    signs = torch.randn(19, 160).sign()
    for ours, theirs in zip(model.modules(), other.modules(), strict=True):
        if isinstance(ours, Linear) and ours.in_features == 160:
            assert relative_error(ours(signs), theirs(signs)) < 1e-5
        elif isinstance(ours, SparseMoE):
            assert 1e-3 < relative_error(ours(signs)[0], theirs(signs)[0]) < 0.05


def test_quantising_twice_changes_nothing_more() -> None:
    model = wide_model()
    quantize_(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    quantize_(model)
    assert all(torch.equal(weight.float(), before[name].float()) for name, weight in model.state_dict().items())


def test_a_model_with_adapters_or_without_weights_is_refused_and_left_alone() -> None:
    adapted = wide_model(), wide_model()
    settings = {"target_modules": ["q_proj"]}, {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    for model, adapters in zip(adapted, settings, strict=True):
        get_peft_model(model, LoraConfig(**adapters))
        with pytest.raises(InputError, match=r"(q_proj|experts) is a .*peft.*before adapters"):
            quantize_(model)
    with torch.device("meta"):
        empty = Qwen3NextForCausalLM(tiny_model().config)
    with pytest.raises(InputError, match="load the whole model"):
        quantize_(empty)
    for some in (*adapted, empty):
        assert all(weight.dtype != torch.float8_e4m3fn for weight in some.parameters())


def test_saving_and_training_a_quantised_model_are_refused(tmp_path: object) -> None:
    model = wide_model()
    quantize_(model)
    with pytest.raises(CheckpointError, match=r"cannot be saved in torch\.float8_e4m3fn"):
        model.save_pretrained(str(tmp_path))
    tokens = torch.randint(0, 97, (1, 5))
    with pytest.raises(InputError, match="fp8 weights are for inference"):
        model.train()(tokens, labels=tokens)


def test_a_hook_or_an_adapter_of_the_shared_expert_is_not_passed_by() -> None:
    """In inference the shared expert's weights go straight into one operation with the others, if that is the same."""
    model, tokens = tiny_model(2), torch.randint(0, 97, (1, 5))
    with torch.no_grad():
        plain = model(tokens).logits
        layer = model.model.layers[1].mlp.shared_expert.up_proj
        assert isinstance(layer, Linear)
        calls: list[int] = []
        handle = layer.register_forward_hook(lambda *_: calls.append(1))
        assert relative_error(model(tokens).logits, plain) < 1e-6
        handle.remove()
        assert calls == [1]
        add_hook_to_module(layer, ModelHook())
        assert not layer.is_plain
        adapted = get_peft_model(model, LoraConfig(target_modules=["shared_expert_gate"], init_lora_weights=False))
        assert relative_error(adapted(tokens).logits, plain) > 1e-3
