"""AdamW on fp32 master weights, in the groups that the publication describes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from qwen3_next.model.layers import ZeroCentredNorm
from qwen3_next.train.config import OptimizerSettings

_ALWAYS_FP32 = ("A_log", "dt_bias")
"""They steer an exponential, which the published model computes in fp32."""


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
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, ZeroCentredNorm)
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


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter of the model and what the optimiser keeps for it, all fp32 on the parameter's device.

    Attributes:
        parameter: what the model computes with: the master itself, or a copy of it in the dtype of computation.
        master: the weights.
        grad: the sum of the gradients of a window.
        mean, square: the moments, running means of gradient and squared gradient.
        step: how many steps the moments have seen.
    """

    parameter: nn.Parameter
    master: Tensor
    grad: Tensor
    mean: Tensor
    square: Tensor
    step: Tensor

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {"master": self.master, "mean": self.mean, "square": self.square, "step": self.step}


class MasterAdamW:
    """Takes a model's fp32 parameters as master weights and gives the model copies in the dtype of computation.

    Gradients of several batches are summed in fp32. A step whose gradient norm is not finite changes nothing; it is
    counted in `skipped`, on the device, so that the host can look when it likes instead of waiting at every step.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings, dtype: torch.dtype) -> None:
        self.settings = settings
        self.groups = parameter_groups(model)
        parameters = dict(model.named_parameters())
        self.slots = {
            name: _slot(parameters[name], torch.float32 if name.endswith(_ALWAYS_FP32) else dtype)
            for group in self.groups
            for name in group.parameters
        }
        self.device = next(iter(self.slots.values())).master.device
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the model's gradients to the fp32 sums and drop them."""
        pairs = [(slot.grad, slot.parameter.grad) for slot in self.slots.values() if slot.parameter.grad is not None]
        torch._foreach_add_([ours for ours, _ in pairs], [new for _, new in pairs])  # pyright: ignore[reportPrivateImportUsage]
        for slot in self.slots.values():
            slot.parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Clip, update, round into the model, clear the sums. Returns the gradient norm before clipping."""
        grads = [slot.grad for slot in self.slots.values()]
        norm = get_total_norm(grads)
        broken = ~norm.isfinite()
        self.skipped += broken
        # The fused kernel divides gradients by `grad_scale` and does nothing where `found_inf` is set.
        scale = (norm / self.settings.clip).clamp_min(1.0) if self.settings.clip else torch.ones_like(norm)
        for group in self.groups:
            self._update(group, lr, scale, broken.float())
        self._round()
        torch._foreach_zero_(grads)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def _round(self) -> None:
        """Copy the masters into the parameters that are of another dtype."""
        slots = [slot for slot in self.slots.values() if slot.parameter.dtype != torch.float32]
        if slots:
            parameters: list[Tensor] = [slot.parameter for slot in slots]
            torch._foreach_copy_(parameters, [slot.master for slot in slots])  # pyright: ignore[reportPrivateImportUsage]

    def _update(self, group: ParameterGroup, lr: float, grad_scale: Tensor, found_inf: Tensor) -> None:
        slots = [self.slots[name] for name in group.parameters]
        adamw(
            [slot.master for slot in slots],
            [slot.grad for slot in slots],
            [slot.mean for slot in slots],
            [slot.square for slot in slots],
            [],
            [slot.step for slot in slots],
            fused=True,
            grad_scale=grad_scale,
            found_inf=found_inf,
            amsgrad=False,
            beta1=self.settings.betas[0],
            beta2=self.settings.betas[1],
            lr=lr,
            weight_decay=self.settings.weight_decay if group.decayed else 0.0,
            eps=self.settings.eps,
            maximize=False,
        )

    def largest_norm_weight(self) -> float:
        """The largest zero-centred norm weight in magnitude, whose growth Qwen3-Next watches; waits for the device."""
        names = next(group.parameters for group in self.groups if group.name == "zero_centred_norms")
        return torch.stack([self.slots[name].master.abs().max() for name in names]).max().item()

    def state(self) -> dict[str, Tensor]:
        """Master weights, moments and step counts by name, for a checkpoint."""
        return {f"{key}.{name}": tensor for name, slot in self.slots.items() for key, tensor in slot.state().items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state` was taken."""
        for name, slot in self.slots.items():
            for key, tensor in slot.state().items():
                tensor.copy_(tensors[f"{key}.{name}"])
        self._round()


def _slot(parameter: nn.Parameter, dtype: torch.dtype) -> Slot:
    master = parameter.detach().float()
    parameter.data = master.to(dtype)
    grad, mean, square = (torch.zeros_like(master) for _ in range(3))
    return Slot(parameter, master, grad, mean, square, torch.zeros((), device=master.device))
