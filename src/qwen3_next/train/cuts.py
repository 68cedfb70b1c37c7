"""Tensors whose rows lie on several ranks: cut, gathered, measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from qwen3_next.train.ranks import Ranks


@dataclass(frozen=True, eq=False)
class Cut:
    """How the rows of a parameter lie on the ranks: cut over each group in turn, in parts of equal length.

    The last parts may be shorter or empty, as FSDP2 cuts them.
    """

    rows: int
    groups: tuple[dist.ProcessGroup, ...]

    def part(self, whole: Tensor) -> Tensor:
        """The rows of this rank, as a view."""
        for group in self.groups:
            size = -(-len(whole) // group.size())
            whole = whole[group.rank() * size : (group.rank() + 1) * size]
        return whole

    def whole(self, part: Tensor) -> Tensor:
        """All rows, on every rank; to be called on all of them."""
        lengths = [self.rows]
        for group in self.groups:
            lengths.append(-(-lengths[-1] // group.size()))
        for group, rows, size in reversed(list(zip(self.groups, lengths[:-1], lengths[1:], strict=True))):
            padded = part.new_zeros(size, *part.shape[1:])
            padded[: len(part)] = part
            part = gathered(padded, group)[:rows]
        return part


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks of a group, which have equally many; without a gradient."""
    return _wait(torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))


def summed_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over all ranks of a group, of which each gets its own, equally many rows; without a gradient."""
    return _wait(
        torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    )


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


class WholeTensors(Mapping[str, Tensor]):
    """Tensors by name, gathered from all ranks when the first one asks for them, one at a time."""

    def __init__(self, ranks: Ranks, parts: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> None:
        self.ranks, self.parts, self.cuts, self.names = ranks, parts, cuts, list(parts)

    def given_to(self, work: Callable[["WholeTensors"], None]) -> None:
        """Let the first rank work with them, while the others hand in their rows until it is done."""
        if self.ranks.is_first:
            try:
                work(self)
            finally:
                self.ranks.largest(len(self.names))
            return
        while (place := self.ranks.largest(-1)) < len(self.names):
            self._gathered(self.names[place])

    def __getitem__(self, name: str) -> Tensor:
        """To be asked on the first rank only, and only while it is given them."""
        if self.ranks.count > 1 and name in self.cuts:
            self.ranks.largest(self.names.index(name))
        return self._gathered(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _gathered(self, name: str) -> Tensor:
        cut = self.cuts.get(name)
        return self.parts[name] if cut is None else cut.whole(self.parts[name])


def total_norm(parts: Sequence[Tensor], whole: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """The 2-norm of all gradients: rows that lie on one rank each, and tensors that all ranks hold alike."""
    squares = ranks.sum_(_square(parts, ranks.device))
    return (squares + _square(whole, ranks.device)).sqrt()


def _square(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return get_total_norm(list(tensors)).to(device).square()
