"""AdamW on fp32 master weights, in the groups that the publication describes."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from qwen3_next.model.layers import ZeroCentredNorm
from qwen3_next.train.config import OptimizerSettings
from qwen3_next.train.cuts import Cut, total_norm
from qwen3_next.train.ranks import Ranks

ALWAYS_FP32 = ("A_log", "dt_bias")
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
        parameter: what the model computes with: the master itself, or a copy of it in the dtype of computation. Where
            the model is sharded it is the master itself, and all tensors here are this rank's rows.
        cut: which rows those are; None of a whole parameter.
        master: the weights.
        grad: the sum of the gradients of a window.
        mean, square: the moments, running means of gradient and squared gradient.
        step: how many steps the moments have seen.
    """

    parameter: nn.Parameter
    cut: Cut | None
    master: Tensor
    grad: Tensor
    mean: Tensor
    square: Tensor
    step: Tensor

    @property
    def size(self) -> int:
        """How many numbers the whole parameter has, on all ranks."""
        return self.master.numel() if self.cut is None else self.cut.rows * prod(self.master.shape[1:])

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {"master": self.master, "mean": self.mean, "square": self.square, "step": self.step}


class MasterAdamW:
    """Takes a model's fp32 parameters as master weights and gives the model copies in the dtype of computation.

    Gradients of several batches are summed in fp32. A step whose gradient norm is not finite changes nothing; it is
    counted in `skipped`, on the device, so that the host can look when it likes instead of waiting at every step.

    Args:
        dtype: of computation. A model that `shard_` has cut is given no copies: it makes them when it gathers.
        cuts: what `shard_` returned.
        ranks: the processes that the model is cut over; all of them call every method. None: this process alone.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        dtype: torch.dtype,
        cuts: Mapping[str, Cut] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.settings = settings
        cuts = cuts or {}
        self.groups = parameter_groups(model)
        parameters = dict(model.named_parameters())
        self.slots = {
            name: _slot(parameters[name], torch.float32 if name.endswith(ALWAYS_FP32) else dtype, cuts.get(name))
            for group in self.groups
            for name in group.parameters
        }
        self.device = next(iter(self.slots.values())).master.device
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.ranks = Ranks(self.device) if ranks is None else ranks

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the model's gradients to the fp32 sums and drop them."""
        pairs = [(slot.grad, _local(g)) for slot in self.slots.values() if (g := slot.parameter.grad) is not None]
        torch._foreach_add_([ours for ours, _ in pairs], [new for _, new in pairs])  # pyright: ignore[reportPrivateImportUsage]
        for slot in self.slots.values():
            slot.parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Clip, update, round into the model, clear the sums. Returns the gradient norm before clipping."""
        grads = [slot.grad for slot in self.slots.values()]
        norm = self._norm() if self.ranks.count > 1 else get_total_norm(grads)
        broken = ~norm.isfinite()
        self.skipped += broken
        # The fused kernel divides gradients by `grad_scale` and does nothing where `found_inf` is set.
        scale = (norm / self.settings.clip).clamp_min(1.0) if self.settings.clip else torch.ones_like(norm)
        for group in self.groups:
            self._update(group, lr, scale, broken.float())
        self._round()
        torch._foreach_zero_(grads)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def _norm(self) -> Tensor:
        """The norm over all ranks, after the gradients of whole parameters have been summed over them."""
        whole = [slot.grad for slot in self.slots.values() if slot.cut is None]
        if whole:
            summed = self.ranks.sum_(torch.cat([grad.flatten() for grad in whole]))
            for grad, values in zip(whole, summed.split([grad.numel() for grad in whole]), strict=True):
                grad.copy_(values.view_as(grad))
        return total_norm([slot.grad for slot in self.slots.values() if slot.cut is not None], whole, self.ranks)

    def _round(self) -> None:
        """Copy the masters into the parameters that are of another dtype."""
        slots = [slot for slot in self.slots.values() if slot.parameter.dtype != torch.float32]
        if slots:
            parameters: list[Tensor] = [slot.parameter for slot in slots]
            torch._foreach_copy_(parameters, [slot.master for slot in slots])  # pyright: ignore[reportPrivateImportUsage]

    def _update(self, group: ParameterGroup, lr: float, grad_scale: Tensor, found_inf: Tensor) -> None:
        slots = [self.slots[name] for name in group.parameters if self.slots[name].master.numel()]
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
        masters = [self.slots[name].master for name in names]
        return self.ranks.largest_(torch.stack([x.abs().max() for x in masters if x.numel()]).max()).item()

    def state(self) -> dict[str, Tensor]:
        """Master weights, moments and step counts by name, for a checkpoint; this rank's rows of what is cut."""
        return {f"{key}.{name}": tensor for name, slot in self.slots.items() for key, tensor in slot.state().items()}

    def cuts(self) -> dict[str, Cut]:
        """How the tensors of `state` are cut; those that are not named are whole."""
        cut = {name: slot.cut for name, slot in self.slots.items() if slot.cut is not None}
        return {f"{key}.{name}": where for name, where in cut.items() for key in ("master", "mean", "square")}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state` was taken, on however many ranks; the tensors given are whole."""
        cuts = self.cuts()
        for name, tensor in self.state().items():
            tensor.copy_(cuts[name].part(tensors[name]) if name in cuts else tensors[name])
        self._round()


def _slot(parameter: nn.Parameter, dtype: torch.dtype, cut: Cut | None) -> Slot:
    master = _local(parameter.detach()).float()
    if cut is None:
        parameter.data = master.to(dtype)
    grad, mean, square = (torch.zeros_like(master) for _ in range(3))
    return Slot(parameter, cut, master, grad, mean, square, torch.zeros((), device=master.device))


def _local(x: Tensor) -> Tensor:
    """The rows of a sharded tensor that lie on this rank, in the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x
