"""Whole runs: what they learn, log, export and refuse."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.train.runs import MODEL, VOCABULARY, assert_same_results, results, run, settings, write_store

import qwen3_next
from qwen3_next import ConfigError, Qwen3NextConfig, Qwen3NextForCausalLM
from qwen3_next.errors import BackendError, DataError, DivergedError
from qwen3_next.train import TrainConfig, train, trainer
from qwen3_next.train.log import read_rows
from qwen3_next.train.loss import BatchLoss
from qwen3_next.train.tokens import TokenStore

ASSETS = Path(qwen3_next.__path__[0]) / "assets"


def test_a_repeated_text_is_learned_by_both_heads(tmp_path: Path) -> None:
    pattern = list(range(1, 9)) * 4
    store = write_store(tmp_path / "pattern", [pattern[i:] for i in range(8)])
    output = run(
        tmp_path,
        data={"train": [str(store)], "validation": {"same": str(store)}},
        schedule={"steps": 60, "warmup_steps": 5},
        optimizer={"lr": 3e-2},
        loss={"mtp_weight": 0.5},
        run={"accumulate": 1, "log_every": 30, "validate_every": 60, "checkpoint_every": 0},
    )
    last = read_rows(output)[-1]
    assert last["validation/same/lm"] < 0.3 < math.log(VOCABULARY)
    assert last["validation/same/mtp_1"] < 0.5


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the tokenizer known, though its vocabulary is another: only its files matter here."""
    return run(tmp_path_factory.mktemp("finished"), data={"tokenizer": str(ASSETS)})


def test_the_log_holds_settings_groups_and_every_figure(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    start, groups = (next(r for r in records if r.get("event") == name) for name in ("start", "parameter_groups"))
    assert start["settings"]["optimizer"]["lr"] == 1e-2
    assert start["tokens_per_epoch"] > 0
    assert [groups[name]["weight_decay"] for name in ("matrices", "zero_centred_norms", "not_decayed")] == [0.1, 0.1, 0]
    names = {n for group in ("matrices", "zero_centred_norms", "not_decayed") for n in groups[group]["names"]}
    assert "model.layers.0.linear_attn.A_log" in groups["not_decayed"]["names"]
    assert len(names) == len(list(Qwen3NextForCausalLM(Qwen3NextConfig(**MODEL)).named_parameters()))
    rows = read_rows(finished)
    trained = [row for row in rows if "lr" in row]
    assert [row["step"] for row in trained] == [4, 6]
    assert [row["tokens"] for row in trained] == [4 * 80, 6 * 80]
    layers = [f"load/layer_{i}_{kind}" for i in range(3) for kind in ("min", "max")]
    figures = {"loss/total", "loss/lm", "loss/mtp", "loss/balance", "grad_norm", "lr", "tokens_per_second"}
    for row in trained:
        assert set(row) == {"step", "tokens", "max_norm_weight", *figures, *layers}
        assert 0 <= row["load/layer_0_min"] <= 1 <= row["load/layer_0_max"] <= 2  # of a mean of 1; E/K is 2
        parts = row["loss/lm"] + 0.1 * row["loss/mtp"] + 0.001 * row["loss/balance"]
        assert row["loss/total"] == pytest.approx(parts, rel=1e-5)
    assert [row["step"] for row in rows if "validation/held_out/lm" in row] == [3, 6]
    assert set(rows[-1]) == {"step", "tokens", *(f"validation/held_out/{n}" for n in ("lm", "mtp_1", "lm_per_byte"))}


def test_tensorboard_has_the_same_figures_and_the_plot_is_there(finished: Path) -> None:
    board = EventAccumulator(str(finished / "tensorboard")).Reload()
    row = next(row for row in read_rows(finished) if row["step"] == 4)
    for name in row.keys() - {"step"}:
        assert [event.value for event in board.Scalars(name) if event.step == 4] == pytest.approx([row[name]])
    assert (finished / "loss.png").stat().st_size > 1000


def test_validation_is_the_mean_over_its_own_tokens(finished: Path) -> None:
    model = Qwen3NextForCausalLM.from_pretrained(finished / "model")
    documents = read_documents(finished.parent / "data" / "held_out")
    total = targets = 0.0
    for document in documents:
        ids = torch.tensor([document])
        loss = model(ids, labels=ids).lm_loss.item()
        total, targets = total + loss * (len(document) - 1), targets + len(document) - 1
    found = read_rows(finished)[-1]
    # Two documents are longer than sequence_length, whose later pieces see less: a bf16 model, compared loosely.
    assert found["validation/held_out/lm"] == pytest.approx(total / targets, rel=0.05)
    assert found["validation/held_out/lm_per_byte"] == pytest.approx(found["validation/held_out/lm"] * targets / 200)


def read_documents(path: Path) -> list[list[int]]:
    store = TokenStore.open(path, VOCABULARY)
    return [store.document(i).tolist() for i in range(store.documents)]


def test_the_exported_model_is_the_published_layout_in_bf16(finished: Path) -> None:
    with safe_open(finished / "model" / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "mtp.layers.0.mlp.experts.3.down_proj.weight" in tensors
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in tensors
    assert json.loads((finished / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_transformers_and_this_package_load_the_exported_model(finished: Path) -> None:
    ours = Qwen3NextForCausalLM.from_pretrained(finished / "model", dtype=torch.float32).eval()
    theirs = transformers.Qwen3NextForCausalLM.from_pretrained(finished / "model", dtype=torch.float32).eval()
    ids = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert ours.mtp is not None


def test_the_tokenizer_stands_beside_the_exported_model_and_every_checkpoint(finished: Path) -> None:
    folders = [finished / "model", *(path / "model" for path in (finished / "checkpoints").iterdir())]
    assert len(folders) == 3
    for folder in folders:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (ASSETS / name).read_bytes()


def test_a_checkpoint_is_fine_tuned_from_its_weights_with_its_tokenizer(tmp_path: Path, finished: Path) -> None:
    output = run(
        tmp_path,
        model={"path": str(finished / "model"), "config": {}},
        optimizer={"lr": 0.0, "weight_decay": 0.0},
        schedule={"steps": 2},
    )
    before, after = (results(path)["model"] for path in (finished, output))
    assert after["model.safetensors"] == before["model.safetensors"]
    assert after["tokenizer.json"] == before["tokenizer.json"]
    moved = run(tmp_path / "moved", model={"path": str(finished / "model"), "config": {}}, schedule={"steps": 2})
    assert results(moved)["model"]["model.safetensors"] != before["model.safetensors"]


def test_a_fine_tuned_run_resumes_without_the_checkpoint_that_it_began_with(tmp_path: Path, finished: Path) -> None:
    origin = tmp_path / "origin"
    (finished / "model").rename(origin)
    try:
        changes: dict[str, Any] = {"model": {"path": str(origin), "config": {}}, "data": {"validation": {}}}
        whole = run(tmp_path / "whole", **changes)
        tables = settings(tmp_path / "parts", **changes, run={"max_seconds": 1e-9})
        assert not train(TrainConfig.from_dict(tables)).finished
    finally:
        origin.rename(finished / "model")
    assert_same_results(run(tmp_path / "parts", **changes), whole)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"schedule": {"steps": 3}, "loss": {"balance_count_first": True}}
    without = run(tmp_path / "without", **changes)
    assert_same_results(run(tmp_path / "with", **changes, run={"gradient_checkpointing": True}), without)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig.from_dict(settings(tmp_path))
    batch_loss = trainer.batch_loss
    with monkeypatch.context() as patch:
        calls = 0

        def poisoned(*arguments: Any) -> BatchLoss:
            nonlocal calls
            calls += 1
            loss = batch_loss(*arguments)
            if calls == 6:  # the second batch of the third step
                loss.total.data.fill_(float("nan"))
                loss.total.register_hook(lambda gradient: gradient * float("nan"))
            return loss

        patch.setattr(trainer, "batch_loss", poisoned)
        with pytest.raises(DivergedError, match=r"1 step\(s\) up to step 4 .*model\.path"):
            train(config)
    saved = tmp_path / "run" / "checkpoints"
    assert [path.name for path in saved.iterdir()] == ["step-00000002"]
    train(config)
    assert_same_results(tmp_path / "run", run(tmp_path / "healthy"))


def test_poisoned_weights_stop_the_run_before_anything_is_saved(tmp_path: Path, finished: Path) -> None:
    model = Qwen3NextForCausalLM.from_pretrained(finished / "model")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "poisoned")
    with pytest.raises(DivergedError, match="not finite"):
        run(tmp_path, model={"path": str(tmp_path / "poisoned"), "config": {}})
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_bad_data_stops_before_training(tmp_path: Path) -> None:
    store = write_store(tmp_path / "strange", [[1, 2, VOCABULARY]])
    with pytest.raises(DataError, match=f"token id {VOCABULARY}"):
        run(tmp_path, data={"train": [str(store)]})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.device='{device}', but 0 CUDA devices"):
        run(tmp_path, run={"device": device})


def test_pieces_longer_than_the_context_of_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sequence_length=65.*at most 64"):
        run(tmp_path, data={"sequence_length": 65, "tokens_per_batch": 65})


def test_a_full_device_is_one_error_that_says_what_to_halve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> BatchLoss:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "batch_loss", full)
    with pytest.raises(BackendError, match=r"data\.tokens_per_batch=40; halve it"):
        run(tmp_path)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path='.*nowhere'"):
        run(tmp_path, model={"path": str(tmp_path / "nowhere"), "config": {}})


def test_tied_embeddings_and_a_model_without_mtp_train_and_resume(tmp_path: Path) -> None:
    model = {"config": MODEL | {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}}
    whole = run(tmp_path / "whole", model=model, schedule={"steps": 2})
    tables = settings(tmp_path / "parts", model=model, schedule={"steps": 2}, run={"max_seconds": 1e-9})
    assert train(TrainConfig.from_dict(tables)).step == 1
    assert train(TrainConfig.from_dict(tables)).finished
    assert_same_results(tmp_path / "parts" / "run", whole)
