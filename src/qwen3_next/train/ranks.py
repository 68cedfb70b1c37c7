"""The processes that train one model together: how they begin, agree, wait for each other and fail together."""

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import get_node_local_rank

from qwen3_next.errors import ConfigError, Qwen3NextError, RankError
from qwen3_next.train.config import TrainConfig

R = TypeVar("R")

_LOST = re.compile(r"gloo|nccl|connection|timed out|timeout|socket", re.IGNORECASE)
"""What torch's messages say where a process of a group is gone; gloo raises them as plain `RuntimeError`s."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes of a run. Every method is to be called on all of them, in the same order.

    Attributes:
        device: where this process computes.
        rank, count: which process this is, of how many.
        sharing_experts: how many neighbouring ranks share one set of experts (expert parallelism).
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    sharing_experts: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and logs."""
        return self.rank == 0

    def together(self, work: Callable[[], R]) -> R:
        """Do what may fail on one rank alone, without a collective in it; where it fails, no rank goes on.

        Raises:
            RankError: the work failed on another rank; on that one its own error is raised.
        """
        if self.count == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Qwen3NextError as found:
            error = found
        for rank, message in enumerate(self._said(None if error is None else f"{type(error).__name__}: {error}")):
            if error is None and message is not None:
                raise RankError(f"rank {rank} cannot go on: {message}")
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]  without an error it is what `work` returned

    def one_after_the_first(self, work: Callable[[], R]) -> R:
        """`together`, the first rank alone and then the others, who find made what one has to make for all."""
        if self.count == 1:
            return work()
        made = self.together(lambda: work() if self.is_first else None)
        others = self.together(lambda: None if self.is_first else work())
        return made if self.is_first else others  # pyright: ignore[reportReturnType]

    def refuse_disagreement(self, what: str, mine: Mapping[str, Any]) -> None:
        """That all ranks say the same.

        Raises:
            ConfigError: on every rank, naming the first thing that differs.
        """
        for rank, theirs in enumerate(self._said(dict(mine))):
            for name in sorted(mine.keys() | theirs.keys()):
                if mine.get(name) != theirs.get(name):
                    raise ConfigError(
                        f"{what} differ between ranks: {name}={mine.get(name)!r} on rank {self.rank}, "
                        f"{theirs.get(name)!r} on rank {rank}; start every process with the same file and data."
                    )

    def largest(self, value: int) -> int:
        """The largest of all ranks' numbers, by way of the hosts: no device is waited for."""
        if self.count == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def sum_(self, x: Tensor) -> Tensor:
        """`x` becomes the sum over all ranks."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def largest_(self, x: Tensor) -> Tensor:
        """`x` becomes the largest of all ranks."""
        if self.count > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def shares(self, batches: Iterable[R]) -> Iterator[tuple[list[R], R, bool]]:
        """Go round: all batches of a round, the one this rank computes, and whether it is the one that counts it.

        Ranks that share experts compute the same batch, because their numbers of tokens must be equal; at the end of
        the batches, ranks without one repeat another's: whoever does not compute would leave the others waiting.
        """
        readers, reader = self.count // self.sharing_experts, self.rank // self.sharing_experts
        remaining = iter(batches)
        while found := list(islice(remaining, readers)):
            counts = reader < len(found) and self.rank % self.sharing_experts == 0
            yield found, found[min(reader, len(found) - 1)], counts

    def _said(self, mine: Any) -> list[Any]:
        """What each rank says."""
        if self.count == 1:
            return [mine]
        said: list[Any] = [None] * self.count
        dist.all_gather_object(said, mine)
        return said


@contextmanager
def joined(config: TrainConfig) -> Generator[Ranks]:
    """The processes that `torchrun` started, or those of torch's process group where there is one; else this one.

    Raises:
        ConfigError: ranks, batches or devices do not divide as the configuration asks.
        RankError: another process is gone, or has been silent for `parallel.timeout` seconds.
    """
    starts = dist.is_torchelastic_launched() and not dist.is_initialized()
    if not starts and not dist.is_initialized():
        _refuse_uneven(config, 1)
        yield Ranks(_device(config.run.device, 0))
        return
    try:
        if starts:
            _start(config)
        ranks = dist.get_world_size()
        _refuse_uneven(config, ranks)
        device = _device(config.run.device, ranks)
        yield Ranks(device, dist.get_rank(), ranks, config.parallel.experts)
    except RuntimeError as error:
        if isinstance(error, Qwen3NextError) or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        raise RankError(
            f"another process of the run is gone, or was silent for {config.parallel.timeout:g} s "
            f"({str(error).splitlines()[0][:200]}). Its own message says why; the same command goes on from the last "
            "checkpoint. Where a rank alone needs longer than that, raise parallel.timeout."
        ) from error
    if starts:  # after an error the others may never answer: the end of the process closes what is open
        dist.destroy_process_group()


def _start(config: TrainConfig) -> None:
    """Tensors on the host go by gloo, so that hosts can talk while their devices compute."""
    on_cuda = _device(config.run.device, 2).type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timedelta(seconds=config.parallel.timeout)
    )


def _refuse_uneven(config: TrainConfig, ranks: int) -> None:
    sharing, batches = config.parallel.experts, config.run.accumulate
    if ranks % sharing:
        raise ConfigError(
            f"parallel.experts={sharing}, but {ranks} process(es) train; it must divide them. `torchrun "
            "--nproc-per-node N` starts N."
        )
    if batches % ranks:
        raise ConfigError(
            f"run.accumulate={batches} batches a step cannot be dealt evenly to {ranks} processes; make it a multiple, "
            "or start as many processes as divide it."
        )


def _device(name: str, ranks: int) -> torch.device:
    """The device of this process; the n-th process of a host takes its n-th GPU."""
    count = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    number = re.search(r"\d+", name)
    if ranks > 1 and number:
        raise ConfigError(f"run.device={name!r} names one device for {ranks} processes; write 'auto', 'cuda' or 'cpu'.")
    index = int(number[0]) if number else get_node_local_rank(fallback_rank=0) if ranks > 1 else 0
    if index >= count:
        raise ConfigError(
            f"run.device={name!r}, but {count} CUDA devices are available and this process needs number {index}; use "
            "'cpu' or 'auto', and start at most one process for each."
        )
    if ranks > 1:
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(name if number else "cuda")
