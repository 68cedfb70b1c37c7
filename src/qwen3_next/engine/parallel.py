"""Several processes that serve one model: all run the same engine in lock step, and the first one owns the requests.

Before each step the first rank tells the others what was added, what was aborted, and how many drafts it has chosen by
its own clock. Tokens are those of the first rank on all of them, so that no rounding can lead them apart.
"""

import atexit
import contextlib
import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwen3_next.engine.config import EngineConfig
from qwen3_next.engine.engine import Engine
from qwen3_next.engine.grammar import GrammarState
from qwen3_next.engine.loading import LoadedModel
from qwen3_next.engine.plan import Plan
from qwen3_next.engine.request import Request
from qwen3_next.engine.stream import Output
from qwen3_next.errors import CheckpointError, InputError, Qwen3NextError, RankError
from qwen3_next.model.bare import BareCausalLM
from qwen3_next.model.cuts import Cut
from qwen3_next.model.parallel import MESH, parallelize_, together

SILENCE = timedelta(minutes=2)
"""How long a rank that is alive may keep the others waiting in a step."""

_FOREVER = timedelta(days=365)
"""How long a server may have nothing to do; a rank that dies is noticed at once, since its connections close."""

T = TypeVar("T")


@dataclass(frozen=True)
class Orders:
    """What the first rank tells the others before a step.

    Attributes:
        added: requests with the seeds that the first rank gave them.
        aborted: ids.
        drafts: of the step.
        is_end: there will be no step any more.
    """

    added: tuple[tuple[Request, int], ...] = ()
    aborted: tuple[str, ...] = ()
    drafts: int = 0
    is_end: bool = False


@dataclass(frozen=True, eq=False)
class Ranks:
    """All processes that hold a part of a model.

    Attributes:
        control: their connections for what the host has to say.
    """

    mesh: DeviceMesh
    device: str
    control: dist.ProcessGroup

    @classmethod
    def join(cls, tp: int, ep: int, device: str) -> "Ranks":
        """Meet the others, whom torchrun or `qwen3-next serve --tp N --ep M` has started.

        Args:
            device: as of `LLM`; "auto" and "cuda" are the GPU with the number of the rank on its machine.

        Raises:
            InputError: there are not as many processes.
            RankError: one of them does not come.
        """
        kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        if not dist.is_initialized():
            backend = "nccl" if kind == "cuda" else "gloo"
            together(dist.init_process_group, backend, timeout=SILENCE)
        count = dist.get_world_size()
        if count != tp * ep:
            raise InputError(f"tp = {tp} and ep = {ep} need {tp * ep} processes, not {count}. Start so many.")
        if kind == "cuda":
            device = f"cuda:{dist.get_rank() % torch.cuda.device_count()}"
            torch.cuda.set_device(torch.device(device))
        control = dist.new_group(backend="gloo", timeout=_FOREVER)
        assert isinstance(control, dist.ProcessGroup)
        return cls(init_device_mesh(kind, (tp, ep), mesh_dim_names=MESH), device, control)

    @property
    def leads(self) -> bool:
        """Whether this is the first rank, which owns the requests."""
        return dist.get_rank() == 0

    def shard(self, model: BareCausalLM, fp8: bool) -> Mapping[str, Cut]:
        """Leave of a model what this rank holds."""
        return parallelize_(model, self.mesh, fp8)

    def agree(self, tokens: Tensor) -> Tensor:
        """The first rank's, on the device."""
        together(dist.broadcast, tokens, 0)
        return tokens

    def least(self, number: int) -> int:
        """The least of what the ranks say."""
        return min(self._say(number))

    def on_all(self, make: Callable[[], T]) -> T:
        """What each rank makes; what fails on one fails on all.

        Raises:
            RankError: it failed elsewhere.
        """
        made: list[T] = []
        error: Qwen3NextError | None = None
        try:
            made.append(make())
        except Qwen3NextError as failure:
            error = failure
        messages = self._say(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise RankError(f"rank {rank} cannot take part: {message}")
        return made[0]

    def require_same(self, directory: Path) -> None:
        """Insist that all ranks found the same checkpoint, by its configuration and the names and sizes of its files.

        Raises:
            CheckpointError: otherwise.
        """
        digest = hashlib.sha256()
        for file in sorted(directory.glob("*.json")):
            digest.update(file.name.encode() + file.read_bytes())
        for file in sorted(directory.glob("*.safetensors")):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
        found = self._say(digest.hexdigest()[:16])
        if len(set(found)) > 1:
            raise CheckpointError(
                f"{directory}: the ranks have found different checkpoints, {', '.join(found)} by rank. Allowed: one. "
                "Give all of them the same files."
            )

    def tell(self, orders: Orders) -> None:
        """Say to the others what comes next."""
        message = torch.frombuffer(bytearray(pickle.dumps(orders)), dtype=torch.uint8)
        together(dist.broadcast, torch.tensor([len(message)]), 0, self.control)
        together(dist.broadcast, message, 0, self.control)

    def hear(self) -> Orders:
        """What the first rank says comes next."""
        size = torch.zeros(1, dtype=torch.long)
        together(dist.broadcast, size, 0, self.control)
        message = torch.empty(int(size), dtype=torch.uint8)
        together(dist.broadcast, message, 0, self.control)
        return pickle.loads(message.numpy().tobytes())

    def _say(self, word: T) -> list[T]:
        words: list[T] = [word] * dist.get_world_size()
        together(dist.all_gather_object, words, word, self.control)
        return words


def engine_of_ranks(
    load: Callable[..., LoadedModel], directory: Path, tp: int, ep: int, device: str, config: EngineConfig | None
) -> "ParallelEngine":
    """The engine of this process among the `tp * ep` that all call this; the first one is used, the others `follow`.

    Raises:
        InputError: there are not so many processes, or the model cannot be cut so.
        CheckpointError: the ranks have found different checkpoints.
        RankError: one of them failed.
    """
    ranks = Ranks.join(tp, ep, device)
    ranks.require_same(directory)
    loaded = ranks.on_all(lambda: load(ranks.device, shard=ranks.shard))
    return ranks.on_all(lambda: ParallelEngine(loaded, config, ranks))


class ParallelEngine(Engine):
    """The engine of one of several ranks. The first one's is used like any other; the others `follow`.

    After a step that failed the ranks may no longer agree: none of them goes on.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None, ranks: Ranks) -> None:
        self.ranks = ranks
        self._added: list[tuple[Request, int]] = []
        self._aborted: list[str] = []
        self._failure: BaseException | None = None
        super().__init__(loaded, config, agree=ranks.agree, least=ranks.least)
        if ranks.leads:
            atexit.register(self.close)

    def add(self, request: Request, grammar: GrammarState | None = None, *, seed: int | None = None) -> None:
        """Queue a request on all ranks."""
        super().add(request, grammar, seed=seed)
        self._added.append((request, self._streams[request.request_id].seed))

    def abort(self, request_id: str) -> bool:
        """End a request on all ranks."""
        self._aborted.append(request_id)
        return super().abort(request_id)

    def reset(self) -> list[Output]:
        """End every request. After a step that failed that is not possible: the others cannot take it back."""
        self._require_whole()
        return super().reset()

    def advance(self, drafts: int) -> list[Output]:
        """A step, of which the first rank tells the others."""
        self._require_whole()
        try:
            if self.ranks.leads:
                self.ranks.tell(Orders(tuple(self._added), tuple(self._aborted), drafts))
                self._added, self._aborted = [], []
            return super().advance(drafts)
        except BaseException as error:
            self._failure = error
            raise

    def follow(self) -> None:
        """Do what the first rank says, until it ends.

        Raises:
            RankError: a rank is not there any more.
        """
        while not (orders := self.ranks.hear()).is_end:
            for request, seed in orders.added:
                super().add(request, seed=seed)
            for name in orders.aborted:
                super().abort(name)
            self.advance(orders.drafts)

    def close(self) -> None:
        """Let the others end."""
        atexit.unregister(self.close)
        if self._failure is None:
            with contextlib.suppress(RankError):
                self.ranks.tell(Orders(is_end=True))
        self._failure = RankError("the engine of several ranks is closed; start all of them again.")

    def _take_back(self, plan: Plan, error: torch.OutOfMemoryError) -> NoReturn:
        """No rank can try again alone: the others are in the middle of the call."""
        raise RankError(
            f"a call of {plan.token_count} tokens does not fit the memory of one of several ranks; start all again, "
            "with a lower token_budget or max_sequences."
        ) from error

    def _require_whole(self) -> None:
        if self._failure is not None:
            raise RankError(
                f"a step failed on one of several ranks ({self._failure}); start all again."
            ) from self._failure
