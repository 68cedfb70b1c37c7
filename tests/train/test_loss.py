"""The loss of a window: the same however its documents are cut into batches, packed, ordered and spread over ranks."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from tests.conftest import tiny_model
from tests.model.reference import relative_error
from tests.train.runs import forkserver
from torch import Tensor

from qwen3_next import Qwen3NextForCausalLM
from qwen3_next.model import PackedLosses
from qwen3_next.ops.cross_entropy import IGNORED
from qwen3_next.ops.routing import Routing
from qwen3_next.train.config import OptimizerSettings
from qwen3_next.train.data import Cursor, PackedBatch
from qwen3_next.train.loss import BatchLoss, LoadBuffer, LossWeights, Window, batch_loss, count_load
from qwen3_next.train.optimizer import MasterAdamW

WEIGHTS = LossWeights(mtp=0.3, balance=0.5)
CPU = torch.device("cpu")
CHANGES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_mtp_steps": 2,
}

Documents = list[list[int]]


def model_of(seed: int) -> Qwen3NextForCausalLM:
    """Choices of experts far apart, so that no rounding turns one."""
    model = tiny_model(seed, **CHANGES).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(20)
    return model


def random_documents(seed: int, count: int = 8) -> Documents:
    draw = random.Random(seed)
    return [[draw.randrange(97) for _ in range(draw.randint(1, 12))] for _ in range(count)]


def batch_of(documents: Documents) -> PackedBatch:
    targets = [[*document[1:], IGNORED] for document in documents]
    return PackedBatch(
        torch.tensor(list(itertools.chain(*documents))),
        torch.tensor(list(itertools.chain(*targets))),
        tuple(map(len, documents)),
        Cursor(),
    )


def window_of(documents: Documents) -> Window:
    batch = batch_of(documents)
    return Window(targets=batch.target_counts(2), tokens=batch.token_ids.numel())


def summed(
    model: Qwen3NextForCausalLM, batches: Sequence[Documents], window: Window, count_first: bool = False
) -> tuple[list[BatchLoss], dict[str, Tensor]]:
    """The losses of the batches and the gradients summed over them."""
    model.zero_grad()
    buffer = LoadBuffer()
    if count_first:
        for batch in batches:
            count_load(model, *batch_of(batch).to(CPU), buffer)
        buffer.preset = True
    losses = [batch_loss(model, *batch_of(batch).to(CPU), window, buffer, WEIGHTS) for batch in batches]
    for loss in losses:
        loss.total.backward()
    return losses, {name: cast(Tensor, p.grad).clone() for name, p in model.named_parameters()}


def assert_same(
    one: tuple[list[BatchLoss], dict[str, Tensor]], other: tuple[list[BatchLoss], dict[str, Tensor]]
) -> None:
    for part in ("total", "lm", "mtp", "balance"):
        torch.testing.assert_close(
            sum(getattr(loss, part) for loss in one[0]),
            sum(getattr(loss, part) for loss in other[0]),
            rtol=1e-5,
            atol=0,
        )
    for name, gradient in one[1].items():
        assert relative_error(other[1][name], gradient) < 1e-4, name


def test_the_order_of_documents_in_a_batch_changes_nothing(fresh_seed: int) -> None:
    model, documents = model_of(fresh_seed), random_documents(fresh_seed)
    shuffled = random.Random(fresh_seed).sample(documents, len(documents))
    window = window_of(documents)
    assert_same(summed(model, [documents], window), summed(model, [shuffled], window))


def test_accumulation_changes_nothing_when_the_load_is_counted_first(fresh_seed: int) -> None:
    model, documents = model_of(fresh_seed), random_documents(fresh_seed)
    window = window_of(documents)
    whole = summed(model, [documents], window)
    assert_same(whole, summed(model, [documents[:2], documents[2:3], documents[3:]], window, count_first=True))


def test_without_counting_first_each_batch_is_balanced_against_the_batches_so_far(fresh_seed: int) -> None:
    """The published form (arXiv:2501.11873): batch i sees the load of batches 1..i."""
    model, documents = model_of(fresh_seed), random_documents(fresh_seed)
    batches, window = [documents[:3], documents[3:5], documents[5:]], window_of(documents)
    losses, _ = summed(model, batches, window)
    for number, loss in enumerate(losses):
        so_far = [routings_of(model, batch) for batch in batches[: number + 1]]
        expected = torch.stack(
            [
                8 * (load(layers) / tokens(layers) * layers[-1].probabilities.sum(0) / window.tokens).sum()
                for layers in zip(*so_far, strict=True)
            ]
        ).mean()
        torch.testing.assert_close(loss.balance, expected, rtol=1e-5, atol=0)
    exact, _ = summed(model, batches, window, count_first=True)
    assert not torch.allclose(losses[0].balance, exact[0].balance, rtol=1e-4)


def routings_of(model: Qwen3NextForCausalLM, documents: Documents) -> tuple[Routing, ...]:
    with torch.no_grad():
        return model.packed_losses(*batch_of(documents).to(CPU)).routings


def load(routings: Sequence[Routing]) -> Tensor:
    return sum(torch.nn.functional.one_hot(r.experts, 8).sum((0, 1)) for r in routings)


def tokens(routings: Sequence[Routing]) -> int:
    return sum(r.experts.shape[0] for r in routings)


def test_the_balance_loss_is_the_mean_over_layers_of_experts_times_frequency_times_probability(
    fresh_seed: int,
) -> None:
    model, documents = model_of(fresh_seed), random_documents(fresh_seed)
    (loss,), _ = summed(model, [documents], window_of(documents))
    routings = routings_of(model, documents)
    assert len(routings) == 2 + 2  # two layers, two chained steps of the MTP layer
    expected = [8 * ((load([r]) / tokens([r])) * r.probabilities.mean(0)).sum() for r in routings]
    torch.testing.assert_close(loss.balance, torch.stack(expected).mean(), rtol=1e-5, atol=0)
    assert loss.load is not None
    assert torch.equal(loss.load, torch.stack([load([r]) for r in routings]))


def balance_of(experts: Tensor, probabilities: Tensor) -> float:
    """The balance loss of given choices `[layers, T, K]` and probabilities `[layers, T, E]`."""
    routings = tuple(Routing(p, p, p, e) for e, p in zip(experts, probabilities, strict=True))
    count = experts.shape[1]
    losses = PackedLosses(torch.zeros(count), (), (), routings)
    model = cast("Qwen3NextForCausalLM", SimpleNamespace(packed_losses=lambda inputs, targets: losses))
    batch = batch_of([[0] * count])
    return batch_loss(model, *batch.to(CPU), Window(targets=(1,), tokens=count), LoadBuffer(), WEIGHTS).balance.item()


def test_layers_that_collapse_onto_experts_of_their_own_cost_experts_over_top_k_times_the_balanced_value() -> None:
    layers, experts, top_k, count = 3, 12, 4, 24
    rolled = torch.stack([torch.arange(count * top_k).view(count, top_k) % experts] * layers)
    balanced = balance_of(rolled, torch.full((layers, count, experts), 1 / experts))
    own = torch.stack([torch.arange(top_k) + top_k * layer for layer in range(layers)])
    collapsed = own[:, None].expand(-1, count, -1)
    certain = torch.zeros(layers, count, experts).scatter_(2, collapsed, 1 / top_k)
    assert balanced == pytest.approx(top_k)
    assert balance_of(collapsed, certain) == pytest.approx(experts / top_k * balanced)


def test_packed_mtp_losses_are_those_of_each_document_alone(fresh_seed: int) -> None:
    model, documents = model_of(fresh_seed), random_documents(fresh_seed)
    window = window_of(documents)
    (loss,), _ = summed(model, [documents], window)
    with torch.no_grad():
        alone = [model.packed_losses(*batch_of([document]).to(CPU)) for document in documents]
    steps = [sum(losses.mtp[step].sum() for losses in alone) / window.targets[1 + step] for step in range(2)]
    torch.testing.assert_close(loss.mtp, torch.stack(steps).mean(), rtol=1e-5, atol=0)
    counts = [sum(int((losses.targets[1 + step] != IGNORED).sum()) for losses in alone) for step in range(2)]
    assert window.targets[1:] == tuple(counts)


def test_every_mtp_parameter_moves_in_a_step(fresh_seed: int) -> None:
    model = model_of(fresh_seed)
    documents = random_documents(fresh_seed, count=40)  # enough tokens for every expert
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MasterAdamW(model, OptimizerSettings(weight_decay=0.0), torch.float32)
    batch_loss(model, *batch_of(documents).to(CPU), window_of(documents), LoadBuffer(), WEIGHTS).total.backward()
    optimizer.accumulate()
    optimizer.step(1e-3)
    names = [name for name in before if name.startswith("mtp.")]
    assert len(names) == 19
    for name in names:
        assert not torch.equal(dict(model.named_parameters())[name], before[name]), name


def test_a_model_without_experts_or_mtp_has_only_the_next_token_loss(fresh_seed: int) -> None:
    model = tiny_model(fresh_seed, **CHANGES, num_experts=0, num_nextn_predict_layers=0)
    batch = batch_of(random_documents(fresh_seed))
    window = Window(targets=batch.target_counts(0), tokens=batch.token_ids.numel())
    loss = batch_loss(model, *batch.to(CPU), window, LoadBuffer(), WEIGHTS)
    assert torch.equal(loss.total, loss.lm)
    assert (loss.mtp.item(), loss.balance.item(), loss.load) == (0.0, 0.0, None)


def train_a_rank(rank: int, folder: str, seed: int) -> None:
    """Two batches of one rank of two, and the sum of both ranks' gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    documents = random_documents(seed)
    batches = [[documents[:1], documents[1:3]], [documents[3:6], documents[6:]]][rank]
    losses, gradients = summed(model_of(seed), batches, window_of(documents), count_first=True)
    totals = torch.stack([sum(getattr(loss, part) for loss in losses).detach() for part in ("lm", "mtp", "balance")])
    for tensor in (totals, *gradients.values()):
        dist.all_reduce(tensor)
    if rank == 0:
        torch.save((totals, gradients), f"{folder}/sums.pt")
    dist.destroy_process_group()


def test_losses_and_gradients_summed_over_ranks_are_those_of_a_single_process(tmp_path: Path, fresh_seed: int) -> None:
    forkserver()
    torch.multiprocessing.start_processes(
        train_a_rank, args=(str(tmp_path), fresh_seed), nprocs=2, start_method="forkserver"
    )
    totals, gradients = torch.load(tmp_path / "sums.pt")
    documents = random_documents(fresh_seed)
    (loss,), expected = summed(model_of(fresh_seed), [documents], window_of(documents))
    torch.testing.assert_close(totals, torch.stack([loss.lm, loss.mtp, loss.balance]), rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        assert relative_error(gradients[name], gradient) < 1e-4, name
