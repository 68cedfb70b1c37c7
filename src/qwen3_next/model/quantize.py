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
    linears = [(name, m) for name, m in model.named_modules() if name.rpartition(".")[2] in QUANTIZED]
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    for name, module in linears:
        if not isinstance(module, Linear):
            raise InputError(f"{name} is a {type(module).__name__}; quantise the model before adapters are added.")
    if any(p.is_meta for p in model.parameters()):
        raise InputError("some weights are offloaded or have no values; load the whole model before quantising it.")
    for _, module in linears:
        if isinstance(module, Linear) and module.weight_scale_inv is None:
            module.weight, module.weight_scale_inv = _frozen(quantize_block_fp8(module.weight))
    for module in experts:
        if module.gate_up_proj_scale_inv is None:
            _quantize_experts_(module)


def _quantize_experts_(module: Experts) -> None:
    count, rows, hidden = module.gate_up_proj.shape
    # Gate and up apart, so that no block lies across their border.
    values, scales = _in_turns(module.gate_up_proj.view(2 * count, rows // 2, hidden))
    gate_up = BlockFp8(values.view(count, rows, hidden), scales.view(count, -1, scales.shape[-1]))
    module.gate_up_proj, module.gate_up_proj_scale_inv = _frozen(gate_up)
    module.down_proj, module.down_proj_scale_inv = _frozen(_in_turns(module.down_proj))


def _in_turns(weight: Tensor) -> BlockFp8:
    """Few experts at a time: in fp32, all of them would need several times the memory of the weight."""
    parts = [quantize_block_fp8(some) for some in weight.split(_EXPERTS_AT_ONCE)]
    return BlockFp8(torch.cat([p.values for p in parts]), torch.cat([p.scale_inv for p in parts]))


def _frozen(weight: BlockFp8) -> tuple[nn.Parameter, Tensor]:
    return nn.Parameter(weight.values, requires_grad=False), weight.scale_inv
