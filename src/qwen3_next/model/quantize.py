"""The weights that the published fp8 checkpoints quantise, made block-fp8 in place."""

import torch
from torch import Tensor, nn

from qwen3_next.errors import InputError
from qwen3_next.model.layers import Linear
from qwen3_next.model.moe import Experts
from qwen3_next.ops.quant import BlockFp8, quantize_block_fp8

QUANTIZED = frozenset(
    {
        *("in_proj_qkvz", "out_proj"),
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
)
"""Names of the linear layers that are, besides all experts. Embedding, head, router, norms, convolution, `in_proj_ba`,
`shared_expert_gate` and `mtp.fc` are not: they are small, or their rounding would reach every expert or every token."""

_EXPERTS_AT_ONCE = 16


@torch.no_grad()
def quantize_(model: nn.Module) -> None:
    """Make a model fit for inference in block-fp8, the MTP layer included; half its size then, and without gradients.

    One weight after the other, so that besides the model only one weight is held twice. What is quantised already
    stays as it is.

    Raises:
        InputError: a weight is offloaded, or an adapter has taken the place of a layer; nothing is changed then.
    """
    chosen = [
        (name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in QUANTIZED | {"experts"}
    ]
    for name, module in chosen:
        if not isinstance(module, Linear | Experts):
            raise InputError(f"{name} is a {type(module)}; quantise the model before adapters are added.")
    if any(p.is_meta for p in model.parameters()):
        raise InputError("some weights are offloaded or have no values; load the whole model before quantising it.")
    for _, module in chosen:
        if isinstance(module, Linear) and module.weight_scale_inv is None:
            _replace_(module, "weight", quantize_block_fp8(module.weight))
        if isinstance(module, Experts) and module.gate_up_proj_scale_inv is None:
            _quantize_experts_(module)


def _quantize_experts_(module: Experts) -> None:
    count, rows, hidden = module.gate_up_proj.shape
    # Gate and up apart, so that no block lies across their border.
    values, scales = _in_turns(module.gate_up_proj.view(2 * count, rows // 2, hidden))
    gate_up = BlockFp8(values.view(count, rows, hidden), scales.view(count, -1, scales.shape[-1]))
    _replace_(module, "gate_up_proj", gate_up)
    _replace_(module, "down_proj", _in_turns(module.down_proj))


def _in_turns(weight: Tensor) -> BlockFp8:
    """Few experts at a time: in fp32, all of them would need several times the memory of the weight."""
    parts = [quantize_block_fp8(some) for some in weight.split(_EXPERTS_AT_ONCE)]
    return BlockFp8(torch.cat([p.values for p in parts]), torch.cat([p.scale_inv for p in parts]))


def _replace_(module: nn.Module, name: str, weight: BlockFp8) -> None:
    setattr(module, name, nn.Parameter(weight.values, requires_grad=False))
    delattr(module, f"{name}_scale_inv")  # None, as a plain attribute, which is quicker to look up than a buffer
    module.register_buffer(f"{name}_scale_inv", weight.scale_inv)
