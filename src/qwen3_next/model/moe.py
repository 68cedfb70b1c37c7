"""The sparse layer: many small experts of which each token uses a few, and one that every token uses."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.model.layers import DenseMLP
from qwen3_next.ops.experts import Routing, route, swiglu_experts


class Router(nn.Module):
    """Scores every expert and chooses the best `top_k`."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: Float[Tensor, "T D"], experts: Int[Tensor, "T K"] | None = None) -> Routing:
        return route(x, self.weight, self.top_k, self.normalize, experts)


class Experts(nn.Module):
    """The weights of all experts in two tensors: `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F]."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        return swiglu_experts(x, self.gate_up_proj, self.down_proj, routing.weights, routing.experts)


class SparseMoE(nn.Module):
    """The chosen experts' weighted sum, plus the shared expert times its own sigmoid gate.

    (Dai et al. 2024, arXiv:2401.06066, section 3.2, for the shared expert; the gate on it is Qwen's.)
    """

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_expert = DenseMLP(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self, x: Float[Tensor, "T D"], experts: Int[Tensor, "T K"] | None = None
    ) -> tuple[Float[Tensor, "T D"], Routing]:
        """The update and the routing behind it; `experts` repeats a routing made before."""
        routing = self.gate(x, experts)
        shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return self.experts(x, routing) + shared, routing
