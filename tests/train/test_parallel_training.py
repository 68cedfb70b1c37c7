"""N ranks = 1: losses, gradients, steps, checkpoints and errors of a run that several processes share (gloo, CPU)."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.train.runs import forkserver, results, settings

from qwen3_next import ConfigError, Qwen3NextForCausalLM
from qwen3_next.errors import DataError, RankError
from qwen3_next.train import TrainConfig, train
from qwen3_next.train.config import OptimizerSettings
from qwen3_next.train.cuts import WholeTensors
from qwen3_next.train.optimizer import MasterAdamW
from qwen3_next.train.parallel import ExpertsOfRank, shard_
from qwen3_next.train.ranks import Ranks

CPU = torch.device("cpu")
CHANGES: dict[str, Any] = {
    "run": {"accumulate": 4, "dtype": "float32", "log_every": 2, "checkpoint_every": 0},
    "loss": {"balance_count_first": True, "balance_coefficient": 0.5, "mtp_weight": 0.3},
    "optimizer": {"lr": 1e-2, "eps": 1e-3},  # with a tiny eps, rounding of a gradient near 0 decides a whole step
}


def tables(folder: Path, experts: int = 1, **run: Any) -> dict[str, Any]:
    changes = CHANGES | {"run": CHANGES["run"] | run, "schedule": {"steps": 4}}
    return settings(folder, **changes, parallel={"experts": experts, "timeout": 60})


def trained(folder: Path, experts: int = 1, **run: Any) -> None:
    train(TrainConfig.from_dict(tables(folder, experts, **run)))


def assert_close(one: Path, other: Path) -> None:
    a, b = results(one), results(other)
    assert a["step"] == b["step"]
    for row, found in zip(a["rows"], b["rows"], strict=True):
        assert row == pytest.approx(found, rel=1e-5, abs=1e-6)
    for name, tensor in a["state"].items():
        if not name.startswith("rng."):
            torch.testing.assert_close(tensor, b["state"][name], rtol=1e-4, atol=1e-6, msg=name)


def work_of_two(folder: Path) -> None:
    trained(folder / "fsdp")
    trained(folder / "experts", experts=2, gradient_checkpointing=True)
    trained(folder / "part", experts=2, max_seconds=1e-9)  # stops after the first step
    compare_uneven_choices()
    check_dtypes()
    check_errors(folder)


def work_of_four(folder: Path) -> None:
    trained(folder / "both", experts=2)
    trained(folder / "part_on_four", experts=2)


def compare_uneven_choices() -> None:
    """All tokens to the experts of one rank: the same result and gradients as the whole layer's."""
    from tests.conftest import tiny_model

    layer = tiny_model(3).model.layers[0].mlp.float()
    part = ExpertsOfRank(layer.experts, dist.group.WORLD)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(5, 32, generator=generator)
    for chosen in (torch.tensor([0, 1, 2]), torch.tensor([6, 4, 5]), torch.tensor([1, 5, 7])):
        gradients: list[torch.Tensor] = []
        for experts in (layer.experts, part):
            own = x.clone().requires_grad_()
            output = experts(own, layer.gate(own, chosen.expand(5, 3)))
            experts.zero_grad()
            output.square().sum().backward()
            gradients += [output.detach(), own.grad, *(p.grad for p in experts.parameters())]
        output, grad, up, down = gradients[:4]
        for whole in (up, down):
            dist.all_reduce(whole)
        rows = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
        for expected, found in zip((output, grad, up[rows], down[rows]), gradients[4:], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def check_dtypes() -> None:
    from tests.conftest import tiny_model

    model, ranks = tiny_model(1).train(), Ranks(CPU, dist.get_rank(), 2)
    seen: set[tuple[str, torch.dtype]] = set()
    delta_net = model.model.layers[0].linear_attn
    delta_net.register_forward_pre_hook(lambda m, _: seen.update((n, p.dtype) for n, p in m.named_parameters()))
    cuts = shard_(model, ranks, torch.bfloat16)
    optimizer = MasterAdamW(model, OptimizerSettings(), torch.bfloat16, cuts, ranks)
    batch = torch.arange(12)
    losses = model.packed_losses(*packed(batch))
    losses.lm.sum().backward()
    optimizer.accumulate()
    assert optimizer.step(1e-3).isfinite()
    assert {d for n, d in seen if n in ("A_log", "dt_bias")} == {torch.float32}
    assert {d for n, d in seen if n not in ("A_log", "dt_bias")} == {torch.bfloat16}
    assert {t.dtype for t in optimizer.state().values()} == {torch.float32}


def packed(tokens: torch.Tensor) -> Any:
    from qwen3_next.train.data import Cursor, PackedBatch

    return PackedBatch(tokens, tokens.roll(-1), (len(tokens),), Cursor()).to(CPU)


def check_errors(folder: Path) -> None:
    rank = dist.get_rank()
    refused: list[tuple[dict[str, Any], str]] = [
        (tables(folder / "refused", accumulate=3), "accumulate=3"),
        (tables(folder / "refused", experts=3), "parallel.experts=3"),
        (tables(folder / "refused", seed=rank), "run.seed=.* on rank"),
    ]
    for one, message in refused:
        with pytest.raises(ConfigError, match=message):
            train(TrainConfig.from_dict(one))
    broken = tables(folder / "refused")
    ranks = Ranks(CPU, rank, 2)

    def fails_on_the_second() -> None:
        if rank:
            raise DataError("no documents")

    with pytest.raises(DataError if rank else RankError, match="no documents"):
        ranks.together(fails_on_the_second)
    tensors = WholeTensors(ranks, {}, {})
    with pytest.raises(RankError if rank else DataError, match="disk"):
        ranks.together(lambda: tensors.given_to(refuse))
    if rank:
        os._exit(9)  # dies: the other must say so, and soon
    started = time.monotonic()
    with pytest.raises(RankError, match="another process"):
        train(TrainConfig.from_dict(broken))
    assert time.monotonic() - started < 30  # half the timeout of its group


def refuse(tensors: object) -> None:
    raise DataError("disk")


def of_rank(rank: int, count: int, folder: str, work: Callable[[Path], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group{count}", rank=rank, world_size=count)
    work(Path(folder))
    if rank == 0:
        Path(folder, f"done{count}").touch()
    if count > 2:
        dist.destroy_process_group()
    os._exit(0)


def spawned(count: int, folder: Path, work: Callable[[Path], None]) -> None:
    context = forkserver()
    processes = [context.Process(target=of_rank, args=(rank, count, str(folder), work)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "a rank hangs"
    assert (folder / f"done{count}").exists(), "the first rank failed; see its traceback"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: of one process, of two, of four that go on from two, and of one that goes on from two."""
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "one")
    for name in ("fsdp", "experts", "both", "part", "refused"):
        tables(folder / name)  # writes the documents, once for all ranks
    spawned(2, folder, work_of_two)
    for copy in ("part_on_four", "part_on_one"):
        shutil.copytree(folder / "part", folder / copy)
    spawned(4, folder, work_of_four)
    trained(folder / "part_on_one")
    return folder


@pytest.mark.parametrize("name", ["fsdp", "experts", "both"])
def test_ranks_together_train_as_one(runs: Path, name: str) -> None:
    assert_close(runs / "one" / "run", runs / name / "run")


@pytest.mark.parametrize("name", ["part_on_four", "part_on_one"])
def test_a_checkpoint_of_two_ranks_goes_on_with_another_number(runs: Path, name: str) -> None:
    assert len(list((runs / name / "run" / "checkpoints").iterdir())) == 2
    assert_close(runs / "one" / "run", runs / name / "run")


def test_the_export_is_the_masters_in_the_published_layout(runs: Path) -> None:
    run = runs / "both" / "run"
    model = Qwen3NextForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    saved = load_file(run / "checkpoints" / "step-00000004" / "state.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[f"master.{name}"].bfloat16().float()), name
    assert "FSDP" not in (run / "model" / "config.json").read_text()
