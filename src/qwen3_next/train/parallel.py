"""One model over several devices: FSDP2 shards every parameter, expert parallelism cuts the experts of a layer.

The layers stay as they are; what is different is put around them here (DESIGN: parallelism comes from outside).
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from qwen3_next.errors import ConfigError
from qwen3_next.model import Qwen3NextForCausalLM
from qwen3_next.model.moe import Experts, SparseMoE
from qwen3_next.ops.experts import SharedExpert, shared_update, swiglu_experts
from qwen3_next.ops.routing import Routing
from qwen3_next.train.cuts import Cut, gathered, summed_rows
from qwen3_next.train.optimizer import ALWAYS_FP32
from qwen3_next.train.ranks import Ranks


def shard_(model: Qwen3NextForCausalLM, ranks: Ranks, dtype: torch.dtype) -> dict[str, Cut]:
    """Leave of each parameter only this rank's rows, on its device, and gather what a layer needs while it computes.

    The parameters are the fp32 masters; FSDP2 gathers them in `dtype` and sums gradients over the ranks in fp32.
    `A_log` and `dt_bias` stay whole, in fp32, on every rank, and their gradients have to be summed by the caller.

    Returns:
        How each parameter was cut; those that are not named are whole.

    Raises:
        ConfigError: the experts cannot be dealt evenly.
    """
    sharing = ranks.sharing_experts
    everyone = init_device_mesh(ranks.device.type, (ranks.count,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    replicated = {p for name, p in model.named_parameters() if name.endswith(ALWAYS_FP32)}
    cuts = {n: Cut(len(p), (everyone.get_group(),)) for n, p in model.named_parameters() if p not in replicated}
    if sharing > 1:
        mesh = init_device_mesh(
            ranks.device.type, (ranks.count // sharing, sharing), mesh_dim_names=("readers", "experts")
        )
        cuts |= _cut_experts_(model, mesh, policy)
    for parameter in replicated:
        parameter.data = parameter.data.to(ranks.device)
    predictor = [] if model.mtp is None else [model.mtp]
    for module in (*model.model.layers, *predictor, cast("nn.Module", model)):
        fully_shard(module, mesh=everyone, mp_policy=policy, ignored_params=replicated)
    register_fsdp_forward_method(cast("nn.Module", model), "packed_losses")
    for module in predictor:
        register_fsdp_forward_method(module, "chain")
    for module in cast("nn.Module", model).modules():
        if isinstance(module, FSDPModule):
            # Losses are shares of the window's, whose sum is wanted and not the mean; gloo knows no other.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return cuts


def _cut_experts_(model: Qwen3NextForCausalLM, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> dict[str, Cut]:
    groups = (mesh["experts"].get_group(), mesh["readers"].get_group())
    sparse = {n: m for n, m in cast("nn.Module", model).named_modules() if isinstance(m, SparseMoE)}
    count = model.config.num_experts
    if not sparse or count % groups[0].size():
        raise ConfigError(
            f"parallel.experts={groups[0].size()} ranks cannot share {count if sparse else 'no'} experts evenly; "
            "choose a number that divides them, 1 for no expert parallelism."
        )
    cuts = dict[str, Cut]()
    for name, moe in sparse.items():
        part = ExpertsOfRank(moe.experts, groups[0])
        moe.register_module("experts", part)
        fully_shard(part, mesh=mesh["readers"], mp_policy=policy)
        cuts |= {f"{name}.experts.{own}": Cut(count, groups) for own, _ in part.named_parameters()}
    return cuts


class ExpertsOfRank(nn.Module):
    """One rank's share of a layer's experts; it stands in the place of `Experts`, under the same parameter names.

    The tokens of all ranks of the group are gathered, each rank computes what its experts add to them, and the sums go
    back to where the tokens came from. So it does not matter how unevenly tokens choose: every message has one size.
    """

    def __init__(self, experts: Experts, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, cut = group, Cut(len(experts.down_proj), (group,))
        self.gate_up_proj = nn.Parameter(cut.part(experts.gate_up_proj.detach()).clone())
        self.down_proj = nn.Parameter(cut.part(experts.down_proj.detach()).clone())

    def forward(
        self, x: Float[Tensor, "T D"], routing: Routing, shared: SharedExpert | None = None
    ) -> Float[Tensor, "T D"]:
        """As `Experts.forward`; T is the same on all ranks of the group."""
        experts = gathered(routing.experts, self.group)
        tokens, weights = _Gathered.apply(self.group, x, routing.weights)
        update = _Returned.apply(self.group, self._update(tokens, weights, experts).to(x.dtype))
        return update if shared is None else update + shared_update(x, shared)

    def _update(
        self, x: Float[Tensor, "GT D"], weights: Float[Tensor, "GT K"], experts: Int[Tensor, "GT K"]
    ) -> Float[Tensor, "GT D"]:
        """What this rank's experts add to the tokens of all, in fp32."""
        own = experts - self.group.rank() * len(self.down_proj)
        tokens, choices = ((own >= 0) & (own < len(self.down_proj))).nonzero(as_tuple=True)
        rows = x.index_select(0, tokens)
        if len(tokens):
            share, expert = weights[tokens, choices, None], own[tokens, choices, None]
            rows = swiglu_experts(rows, self.gate_up_proj, self.down_proj, share, expert)
        else:  # without a gradient, if of zeros, this rank would not take part in summing them
            rows = rows + self.gate_up_proj[:0].sum() + self.down_proj[:0].sum()
        return torch.zeros_like(x, dtype=torch.float32).index_add(0, tokens, rows.float())


class _Gathered(torch.autograd.Function):
    """The rows of all ranks, of several tensors at once: so its backward runs whichever of them were used."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(gathered(part, group) for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(summed_rows(grad, ctx.group) for grad in grads)


class _Returned(torch.autograd.Function):
    """The sum over all ranks, of which each gets its own rows."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return summed_rows(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, gathered(grads[0], ctx.group)
