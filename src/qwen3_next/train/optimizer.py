"""AdamW on fp32 master weights, in the groups that the publication describes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen3_next.model.layers import RMSNorm
from qwen3_next.train.config import OptimizerSettings


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are treated alike.

    Attributes:
        name: as it appears in the log.
        decayed: whether weight decay pulls them to 0. For a zero-centred norm that is a scale of 1.
        parameters: names of the parameters.
    """

    name: str
    decayed: bool
    parameters: tuple[str, ...]


def parameter_groups(model: nn.Module) -> tuple[ParameterGroup, ...]:
    """Matrices and zero-centred norm weights are decayed; decay rates, plain norms and biases are not.

    Decay of the norm weights keeps them from growing without bound, which Qwen3-Next introduced for stability.
    """
    zero_centred = {
        f"{name}.weight" if name else "weight" for name, module in model.named_modules() if isinstance(module, RMSNorm)
    }
    names: dict[str, list[str]] = {"matrices": [], "zero_centred_norms": [], "not_decayed": []}
    for name, parameter in model.named_parameters():
        if name in zero_centred:
            names["zero_centred_norms"].append(name)
        elif parameter.dim() >= 2:
            names["matrices"].append(name)
        else:
            names["not_decayed"].append(name)
    return tuple(ParameterGroup(group, group != "not_decayed", tuple(members)) for group, members in names.items())


class MasterAdamW:
    """Keeps an fp32 copy of every parameter, steps it, and rounds the result into the model.

    Gradients of several batches are summed in fp32. A step whose gradient norm is not finite changes nothing; it is
    remembered in `skipped`, so that the host can look when it likes instead of waiting for the device at every step.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.groups = parameter_groups(model)
        parameters = dict(model.named_parameters())
        self.names = [name for group in self.groups for name in group.parameters]
        self.parameters = [parameters[name] for name in self.names]
        self.masters = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.device = self.masters[0].device
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.adam = self._adam(dict(zip(self.names, self.masters, strict=True)))

    def _adam(self, masters: Mapping[str, Tensor]) -> torch.optim.AdamW:
        s = self.settings
        groups = [
            {"params": [masters[n] for n in g.parameters], "weight_decay": s.weight_decay if g.decayed else 0.0}
            for g in self.groups
            if g.parameters
        ]
        return torch.optim.AdamW(groups, lr=s.lr, betas=s.betas, eps=s.eps, fused=True)

    def accumulate(self) -> None:
        """Add the model's gradients to the fp32 sums and drop them."""
        pairs = [(m.grad, p.grad) for m, p in zip(self.masters, self.parameters, strict=True) if p.grad is not None]
        torch._foreach_add_([sums for sums, _ in pairs], [grad for _, grad in pairs])
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, lr: float) -> Tensor:
        """Clip, update, round into the model, clear the sums. Returns the gradient norm before clipping."""
        sums = [master.grad for master in self.masters if master.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(sums)))
        broken = ~torch.isfinite(norm)
        self.skipped += broken
        clip = self.settings.clip or float("inf")
        # The fused kernel divides gradients by `grad_scale` and skips the update where `found_inf` is set.
        self.adam.grad_scale = (norm / clip).clamp_min(1.0)  # type: ignore[attr-defined]
        self.adam.found_inf = broken.float()  # type: ignore[attr-defined]
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
            torch._foreach_zero_(sums)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Master weights, moments and step counts by name, for a checkpoint."""
        tensors = {f"master.{name}": master for name, master in zip(self.names, self.masters, strict=True)}
        for name, master in zip(self.names, self.masters, strict=True):
            for key, value in self.adam.state[master].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state` was taken."""
        for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
            master.copy_(tensors[f"master.{name}"])
            parameter.copy_(master)
            self.adam.state[master] = {
                key: tensors[f"{key}.{name}"].to(self.device, copy=True) for key in ("step", "exp_avg", "exp_avg_sq")
            }
