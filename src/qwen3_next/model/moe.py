"""The sparse layer: many small experts of which each token uses a few, and one that every token uses."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.model.layers import DenseMLP, Linear
from qwen3_next.model.weights import published_slots
from qwen3_next.ops.experts import ExpertScales, SharedExpert, swiglu_experts
from qwen3_next.ops.routing import Routing, route


class Router(nn.Module):
    """Scores every expert and chooses the best `top_k`."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: Float[Tensor, "T D"], experts: Int[Tensor, "T K"] | None = None) -> Routing:
        """Where each token goes; `experts` repeats a choice made before."""
        return route(x, self.weight, self.top_k, self.normalize, experts)


class Experts(nn.Module):
    """The weights of all experts in two tensors: `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F].

    Where these are block-fp8, `gate_up_proj_scale_inv` and `down_proj_scale_inv` hold their scales, see `ExpertScales`.
    """

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.gate_up_proj_scale_inv: Float[Tensor, "E 2FB DB"] | None = None
        self.down_proj_scale_inv: Float[Tensor, "E DB FB"] | None = None
        self.register_load_state_dict_pre_hook(_take_single_experts)

    def forward(
        self, x: Float[Tensor, "T D"], routing: Routing, shared: SharedExpert | None = None
    ) -> Float[Tensor, "T D"]:
        """The weighted sum of each token's experts, plus the shared one where it is given."""
        gate_up, down = self.gate_up_proj_scale_inv, self.down_proj_scale_inv
        scales = None if gate_up is None or down is None else ExpertScales(gate_up, down)
        return swiglu_experts(x, self.gate_up_proj, self.down_proj, routing.weights, routing.experts, scales, shared)


@torch.no_grad()
def _take_single_experts(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: object,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Let `load_state_dict` take experts one by one, as checkpoints hold them and `Trainer` reads its own back.

    A shard may hold only some of a layer's experts: those it lacks keep their values. (torch's hook, by its names.)
    """
    parameters = {prefix + name: parameter for name, parameter in module.named_parameters()}
    fused: dict[str, Tensor] = {}
    for slot in published_slots(parameters):
        if slot.expert is None or slot.source in state_dict or slot.name not in state_dict:
            continue
        expert = state_dict.pop(slot.name)
        if tuple(expert.shape) != slot.shape:
            error_msgs.append(f"size mismatch for {slot.name}: {tuple(expert.shape)} found, {slot.shape} expected.")
            continue
        if slot.source not in fused:
            fused[slot.source] = parameters[slot.source].clone()
        slot.view(fused[slot.source]).copy_(expert)
    state_dict.update(fused)


class SparseMoE(nn.Module):
    """The chosen experts' weighted sum, plus the shared expert times its own sigmoid gate.

    (Dai et al. 2024, arXiv:2401.06066, section 3.2, for the shared expert; the gate on it is Qwen's.)
    """

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_expert = DenseMLP(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = Linear(config.hidden_size, 1)

    def forward(
        self, x: Float[Tensor, "T D"], experts: Int[Tensor, "T K"] | None = None
    ) -> tuple[Float[Tensor, "T D"], Routing]:
        """The update and the routing behind it; `experts` repeats a routing made before."""
        routing = self.gate(x, experts)
        shared = None if torch.is_grad_enabled() else self._shared_weights()
        if shared is not None:
            return self.experts(x, routing, shared), routing
        update = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return self.experts(x, routing) + update, routing

    def _shared_weights(self) -> SharedExpert | None:
        """The shared expert for one operation with the others; None where its modules do more than multiply."""
        expert = self.shared_expert
        gate, up, down, share = expert.gate_proj, expert.up_proj, expert.down_proj, self.shared_expert_gate
        if type(expert) is not DenseMLP or not all(type(x) is Linear and x.is_plain for x in (gate, up, down, share)):
            return None
        scales = [x.weight_scale_inv for x in (gate, up, down) if x.weight_scale_inv is not None]
        triple = (scales[0], scales[1], scales[2]) if scales else None
        return SharedExpert(gate.weight, up.weight, down.weight, share.weight, triple)
