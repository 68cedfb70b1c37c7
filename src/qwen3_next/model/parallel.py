"""One model on several devices, from outside: its modules are cut, and sum up between the ranks what each has computed.

Every rank sees all tokens and holds a part of the weights, see `Layout`. A mixer ends with one sum over the ranks of
`tp`, a channel mixer with one over all ranks: each computes the experts that it has and its part of the shared one. The
head's logits are gathered. Nothing here waits for the device, so that a CUDA graph can hold it. For inference alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from qwen3_next.errors import InputError, RankError
from qwen3_next.model.attention import GatedAttention
from qwen3_next.model.bare import BareCausalLM
from qwen3_next.model.cuts import Cut, Layout
from qwen3_next.model.decoder import DecoderLayer
from qwen3_next.model.delta_net import GatedDeltaNet, columns_of
from qwen3_next.model.layers import DenseMLP
from qwen3_next.model.moe import SparseMoE
from qwen3_next.ops.routing import Routing

MESH = ("tp", "ep")
"""The dimensions of a mesh, in order."""

P = ParamSpec("P")


def parallelize_(model: BareCausalLM, mesh: DeviceMesh, fp8: bool = False) -> dict[str, Cut]:
    """Leave of a model what this rank holds of it, with values or before it has any.

    Args:
        mesh: of all processes, with the dimensions `tp` and `ep`.
        fp8: weights are block-fp8, or will be, so that they are cut between blocks of scales.

    Returns:
        What is left of each parameter that is cut, by its name.

    Raises:
        InputError: the mesh is another one, or heads, experts or widths do not divide; nothing is changed then.
    """
    layout, config = layout_of(mesh), model.config
    parameters = dict(model.named_parameters())  # a head that is tied to the embedding is no parameter of its own
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    layout.check(config, shapes, fp8=fp8)
    if layout.size == 1:
        return {}
    cuts = layout.cuts(config, shapes)
    for name, cut in cuts.items():
        _cut_(model, name, cut)
    local = model.config = layout.local(config)
    of_heads, of_all = mesh.get_group("tp"), dist.group.WORLD
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            _sum_up_(module.mlp, of_all)
        elif isinstance(module, GatedAttention) and layout.tp > 1:
            module.config = local
            if layout.tp_rank:
                module.o_proj.register_parameter("bias", None)  # the first rank adds it
            _sum_up_(module.o_proj, of_heads)
        elif isinstance(module, GatedDeltaNet) and layout.tp > 1:
            module.columns = columns_of(local)
            _sum_up_(module.out_proj, of_heads)
        elif isinstance(module, SparseMoE):
            _renumber_(module, layout.experts(config.num_experts)[0])
    if config.vocab_size % layout.size == 0:
        own = layout.everywhere(config.vocab_size) if config.tie_word_embeddings else (0, None)
        model.lm_head = cast("nn.Linear", GatheredHead(model.lm_head.weight, slice(*own), layout.size))
    return cuts


def layout_of(mesh: DeviceMesh) -> Layout:
    """What this process is in a mesh.

    Raises:
        InputError: it is no mesh of all processes with the dimensions `tp` and `ep`.
    """
    if mesh.mesh_dim_names != MESH or mesh.size() != dist.get_world_size():
        raise InputError(
            f"the mesh {mesh.mesh_dim_names} of {mesh.size()} ranks cannot be served. Allowed: {MESH} over all "
            f"{dist.get_world_size()} processes."
        )
    tp, ep = mesh.shape
    return Layout(tp, ep, mesh.get_local_rank("tp"), mesh.get_local_rank("ep"))


def together(collective: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call what all ranks have to call.

    Raises:
        RankError: one of them is not there any more.
    """
    try:
        collective(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch has no narrower one for all backends
        raise RankError(
            f"a rank cannot be reached ({str(error).splitlines()[0]}); see what the others say, and start all again."
        ) from error


class GatheredHead(nn.Module):
    """The output head: each rank computes the logits of its rows of the weight, and all ranks get all of them.

    Attributes:
        rows: of the weight; all, where it was cut.
    """

    def __init__(self, weight: Tensor, rows: slice, ranks: int) -> None:
        super().__init__()
        self.weight, self.rows, self.ranks = weight, rows, ranks

    def forward(self, x: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """The logits of all ranks."""
        own = F.linear(x, self.weight[self.rows])
        gathered = own.new_empty(self.ranks, *own.shape)
        together(dist.all_gather, list(gathered.unbind()), own)
        return gathered.transpose(0, 1).flatten(1)


def _cut_(model: nn.Module, name: str, cut: Cut) -> None:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, key, nn.Parameter(cut.of(getattr(module, key).data), requires_grad=False))
    scales = getattr(module, f"{key}_scale_inv", None)
    if scales is not None:
        setattr(module, f"{key}_scale_inv", cut.of_scales(scales))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def _sum_up_(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Add up over a group what a module returns, or the first of it."""

    def add_up(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, Routing]) -> None:
        together(dist.all_reduce, output if isinstance(output, Tensor) else output[0], group=group)

    assert isinstance(module, nn.Linear | SparseMoE | DenseMLP)
    module.register_forward_hook(add_up)


def _renumber_(module: SparseMoE, first: int) -> None:
    """Count the chosen experts from the first one that is here: the others' numbers are then none of a weight."""

    def renumber(module: nn.Module, inputs: tuple[Tensor, Routing, *tuple[Any, ...]]) -> tuple[Any, ...]:
        x, routing, *others = inputs
        return x, replace(routing, experts=routing.experts - first), *others

    if first:
        module.experts.register_forward_pre_hook(renumber)
