"""Checkpoints written with the safetensors library itself, as others would write them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = Mapping[str, Tensor]


def write(folder: Path, tensors: Tensors, name: str = "model.safetensors") -> Path:
    """One file, without the metadata that transformers writes, as in the official shards."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / name)
    return folder / name


def unfused(state: Tensors) -> dict[str, Tensor]:
    """The published names, written out by hand: gate above up in `gate_up_proj`."""
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, (gate, up) in enumerate(each.chunk(2) for each in tensor):
                published |= {f"{prefix}.{e}.gate_proj.weight": gate, f"{prefix}.{e}.up_proj.weight": up}
        elif last == "down_proj":
            published |= {f"{prefix}.{e}.down_proj.weight": down for e, down in enumerate(tensor)}
        else:
            published[name] = tensor
    return published


def quantized(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in block-fp8, its scales, and what the two stand for, by plain loops over the blocks."""
    rows, columns = weight.shape
    values, meaning = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    scales = torch.empty(-(-rows // 128), -(-columns // 128), dtype=scale_dtype)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            block = weight[here].float()
            scales[i, j] = block.abs().max().clamp_min(1e-6) / 448
            values[here] = (block / scales[i, j].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            meaning[here] = values[here].float() * scales[i, j].float()
    return values, scales, meaning


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
