"""The figures of the steps between two rows of the log."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from qwen3_next.train.loss import BatchLoss
from qwen3_next.train.ranks import Ranks

_PREFIX, _LOAD, _STEPS = "meter.", "load", "steps"
_PARTS = ("total", "lm", "mtp", "balance")


class Meter:
    """Sums figures on the device and fetches them when a row is due, so that no step has to wait for the device."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sums: dict[str, Tensor] = {}
        self.window: Tensor | None = None
        self.steps, self.lr, self.tokens = 0, 0.0, 0
        self.started = time.monotonic()

    def add(self, loss: BatchLoss) -> None:
        """Count a batch's share of its window."""
        parts = torch.stack([getattr(loss, name).detach() for name in _PARTS])
        self.window = parts if self.window is None else self.window + parts
        if loss.load is not None:
            self._sum(_LOAD, loss.load)

    def end_step(self, grad_norm: Tensor, lr: float, tokens: int) -> None:
        """Count a step of the optimiser over so many tokens, those of all ranks."""
        assert self.window is not None, "a step has batches"
        for name, part in zip(_PARTS, self.ranks.sum_(self.window), strict=True):
            self._sum(f"loss/{name}", part)
        self.window = None
        self._sum("grad_norm", grad_norm)
        self.steps, self.lr, self.tokens = self.steps + 1, lr, self.tokens + tokens

    def restart_clock(self) -> None:
        """Do not count the time of validation and checkpoints as training."""
        self.started, self.tokens = time.monotonic(), 0

    def read(self) -> dict[str, float]:
        """The means over the steps since the last row, and begin anew."""
        load = self.sums.pop(_LOAD, None)
        means = (torch.stack([value.float() for value in self.sums.values()]) / self.steps).tolist()
        row: dict[str, float] = dict(zip(self.sums, means, strict=True))
        if load is not None:
            share = load.float() / load.float().mean(dim=1, keepdim=True)
            for name, values in (("min", share.amin(dim=1)), ("max", share.amax(dim=1))):
                row |= {f"load/layer_{layer}_{name}": value for layer, value in enumerate(values.tolist())}
        # Only now, because the fetching above waited for the device.
        row |= {"lr": self.lr, "tokens_per_second": self.tokens / (time.monotonic() - self.started)}
        self.sums, self.steps = {}, 0
        self.restart_clock()
        return row

    def state(self) -> dict[str, Tensor]:
        """What has been summed so far, for a checkpoint between two rows."""
        tensors = {_PREFIX + name: value for name, value in self.sums.items()}
        return tensors | {_PREFIX + _STEPS: torch.tensor(self.steps)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        mine = {name.removeprefix(_PREFIX): tensors[name] for name in tensors if name.startswith(_PREFIX)}
        self.steps = int(mine.pop(_STEPS))
        self.sums = {name: value.to(self.ranks.device) for name, value in mine.items()}

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value
