"""Random values of a whole model where no checkpoint is, drawn on its device and quantised as they are drawn."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qwen3_next.model.cuts import Cut
from qwen3_next.model.layers import GatedRMSNorm, ZeroCentredNorm
from qwen3_next.model.moe import Router
from qwen3_next.model.parallel_weights import put_cut, whole_place
from qwen3_next.model.places import Place

DECAY_RATES = (0.01, 16.0)
"""Between which a DeltaNet head's rate of decay is drawn, uniformly; kept off 0 so that its logarithm is finite."""


def fill_randomly(
    model: nn.Module, places: Mapping[str, Place], std: float, seed: int, cuts: Mapping[str, Cut]
) -> None:
    """Give every parameter of a model the values of the initialisation.

    Args:
        places: of all its parameters, by their names, see `allocate_`.
        std: of the weights.
        seed: the values are a function of it, of the kind of device, and of the order and shapes of the parameters.
        cuts: of the parameters of which only a part is here. All of it is drawn, so that a model has the same values
            however many ranks share it.
    """
    device = next(iter(places.values())).weight.device
    generator = torch.Generator(device).manual_seed(seed)
    for name, place in places.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        cut, row = cuts.get(name), 0
        for part in (place if cut is None else whole_place(place, cut)).parts():
            empty = torch.empty(part.weight.shape, dtype=torch.float32, device=device)
            values = _drawn(module, key, empty, std, generator)
            if cut is None:
                part.put(values)
            else:
                put_cut(values, row, place, cut)
                row += values[..., 0].numel()


def rows_of_one_norm(rows: Float[Tensor, "*B D"], std: float) -> Float[Tensor, "*B D"]:
    """Random rows scaled to one length: no expert starts with larger scores than another.

    The publication says that router parameters are normalised at initialisation so that experts are chosen without
    bias early in training, but gives no formula; equal row norms are the plainest reading.
    """
    return rows / rows.norm(dim=-1, keepdim=True) * std * rows.shape[-1] ** 0.5


def _drawn(module: nn.Module, key: str, values: Tensor, std: float, generator: torch.Generator) -> Tensor:
    if isinstance(module, ZeroCentredNorm) or key == "bias":
        return values.zero_()
    if isinstance(module, GatedRMSNorm) or key == "dt_bias":
        return values.fill_(1)
    if key == "A_log":
        return values.uniform_(*DECAY_RATES, generator=generator).log_()
    if isinstance(module, Router):
        return rows_of_one_norm(values.normal_(generator=generator), std)
    return values.normal_(std=std, generator=generator)
