"""The weights that the published fp8 checkpoints quantise: made block-fp8 in place, or before they have values."""

from typing import Literal

import torch
from torch import Tensor, nn

from qwen3_next.errors import InputError
from qwen3_next.model.layers import Linear
from qwen3_next.model.moe import Experts
from qwen3_next.model.places import Place, empty
from qwen3_next.model.weights import EXPERT_RULES
from qwen3_next.ops.quant import FP8_BLOCK

Quantization = Literal["auto", "fp8", "none"]
"""As the files are, block-fp8, or ordinary weights."""

QUANTIZED = frozenset(
    {
        *("in_proj_qkvz", "out_proj"),
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
)
"""Names of the linear layers that are, besides all experts. Embedding, head, router, norms, convolution, `in_proj_ba`,
`shared_expert_gate` and `mtp.fc` are not: they are small, or their rounding would reach every expert or every token."""

KEPT_IN_FP32 = frozenset({"A_log", "dt_bias"})
"""Names of the parameters that are fp32 in every model."""

_MATRICES = {rule.fused: rule.blocks for rule in EXPERT_RULES}
"""In each expert of a fused parameter. Gate and up are apart, so that no block lies across their border."""


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
        for key, parameter in list(module.named_parameters(recurse=False)):
            if _is_quantized(module, key) and parameter.dtype != torch.float8_e4m3fn:
                values = Place.of(parameter.data.contiguous(), None, parameter.dtype, _rows(key, parameter))
                place = _replace_(module, key, parameter, parameter.dtype, parameter.device, fp8=True)
                for ours, theirs in zip(place.parts(), values.parts(), strict=True):
                    ours.put(theirs.weight)


def allocate_(model: nn.Module, dtype: torch.dtype, device: torch.device, *, fp8: bool) -> dict[str, Place]:
    """Give a model on the meta device memory without values, fit for inference alone.

    Args:
        dtype: of the parameters, those apart that are kept in fp32 and, with `fp8`, those that are block-fp8.

    Returns:
        Where the values go, by the parameters' names; one that stands in several modules is there once.

    Raises:
        MemoryError, torch.OutOfMemoryError: the device has too little memory.
    """
    places, made = dict[str, Place](), dict[nn.Parameter, str]()
    for name, module in model.named_modules():
        quantized = fp8 and (isinstance(module, Experts) or name.rpartition(".")[2] in QUANTIZED)
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter in made:
                setattr(module, key, model.get_parameter(made[parameter]))
                continue
            full = made[parameter] = f"{name}.{key}".removeprefix(".")
            wanted = torch.float32 if key in KEPT_IN_FP32 else dtype
            places[full] = _replace_(module, key, parameter, wanted, device, quantized and _is_quantized(module, key))
    model.to(device)  # the buffers
    return places


def _is_quantized(module: nn.Module, key: str) -> bool:
    return isinstance(module, Experts) or (isinstance(module, Linear) and key == "weight")


def _replace_(module: nn.Module, key: str, old: Tensor, dtype: torch.dtype, device: torch.device, fp8: bool) -> Place:
    """A parameter without values in the place of one of the same shape, with scales where it is fp8."""
    weight, scales = empty(tuple(old.shape), torch.float8_e4m3fn if fp8 else dtype, device), None
    rows = _rows(key, old)
    if fp8:
        blocks = old.shape[-2] // rows * -(-rows // FP8_BLOCK), -(-old.shape[-1] // FP8_BLOCK)
        scales = empty((*old.shape[:-2], *blocks), torch.float32, device)
        delattr(module, f"{key}_scale_inv")  # None, as a plain attribute, which is quicker to look up than a buffer
        module.register_buffer(f"{key}_scale_inv", scales)
    setattr(module, key, nn.Parameter(weight, requires_grad=False))
    return Place.of(weight, scales, dtype, rows)


def _rows(key: str, parameter: Tensor) -> int:
    return parameter.shape[-2] // _MATRICES.get(key, 1) if parameter.dim() > 1 else 1
