"""Saving: the published layout, to the bit, in shards of any size, without harm to the checkpoint before it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tests.conftest import tiny_model
from tests.model.stored import same_bits, unfused
from torch import Tensor

from qwen3_next.errors import CheckpointError
from qwen3_next.model import shards
from qwen3_next.model.weights import open_directory, save_weights

INDEX = "model.safetensors.index.json"


def state_of(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """A tiny model's parameters with fp32 `A_log` and `dt_bias`, as a training run holds them."""
    return {
        name: tensor if name.endswith(("A_log", "dt_bias")) else tensor.to(dtype)
        for name, tensor in tiny_model(seed).state_dict().items()
    }


def read_back(folder: Path) -> dict[str, Tensor]:
    return {name: lazy[...] for name, lazy in open_directory(folder).lazy_state_dict().items()}


def assert_holds(folder: Path, state: dict[str, Tensor]) -> None:
    read = read_back(folder)
    assert read.keys() == state.keys()
    assert [name for name in state if not same_bits(read[name], state[name])] == []


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_keeps_every_bit_in_the_dtype_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    state = state_of(dtype)
    assert save_weights(state, tmp_path / "new") == (tmp_path / "new" / "model.safetensors",)
    assert_holds(tmp_path / "new", state)
    assert any(name.startswith("mtp.") for name in state)
    assert state["model.layers.0.linear_attn.A_log"].dtype == torch.float32


def test_an_export_is_the_published_layout_in_one_dtype(tmp_path: Path) -> None:
    state = state_of(torch.float32)
    save_weights(state, tmp_path, dtype=torch.bfloat16)
    assert_holds(tmp_path, {name: tensor.bfloat16() for name, tensor in state.items()})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {name: file.get_tensor(name).shape for name in file.keys()} == {  # noqa: SIM118
            name: tensor.shape for name, tensor in unfused(state).items()
        }


@settings(max_examples=12, deadline=None)
@given(limit=st.integers(1, 400_000))
def test_shards_of_any_size_hold_the_same_model(tmp_path_factory: pytest.TempPathFactory, limit: int) -> None:
    folder, state = tmp_path_factory.mktemp("shards"), state_of()
    files = save_weights(state, folder, max_shard_bytes=limit)
    assert_holds(folder, state)
    published = unfused(state)
    for file in files:
        with safe_open(file, "pt") as shard:
            names = list(shard.keys())
            assert all(same_bits(shard.get_tensor(name), published[name]) for name in names)
        assert len(names) == 1 or sum(published[name].nbytes for name in names) <= limit
    if len(files) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
        assert index["weight_map"].keys() == published.keys()
        assert [file.name for file in files] == sorted(set(index["weight_map"].values()))


def test_a_shard_may_end_amid_the_experts_of_a_layer(tmp_path: Path) -> None:
    save_weights(state_of(), tmp_path, max_shard_bytes=5000)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    homes = {name: shard for name, shard in weight_map.items() if "layers.0.mlp.experts." in name}
    assert len(set(homes.values())) > 2


def test_every_tensor_is_aligned_to_its_width(tmp_path: Path) -> None:
    state = {"a": torch.ones(3).bfloat16(), "b": torch.ones(3), "c": torch.ones(1).half(), "d": torch.ones(1).double()}
    save_weights(state, tmp_path)
    for stored in open_directory(tmp_path).tensors.values():
        assert stored.start % stored.dtype.itemsize == 0


@pytest.mark.parametrize(("before", "after"), [(5_000, 60_000), (60_000, 10**9), (10**9, 60_000), (60_000, 60_000)])
def test_saving_over_an_older_checkpoint_leaves_nothing_of_it(tmp_path: Path, before: int, after: int) -> None:
    save_weights(state_of(seed=1), tmp_path, max_shard_bytes=before)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00007-of-00009.safetensors.partial").write_text("left by a killed save")
    new = save_weights(state_of(), tmp_path, max_shard_bytes=after)
    assert files_in(tmp_path) == {path.name for path in new} | {"config.json"} | ({INDEX} if len(new) > 1 else set())
    assert_holds(tmp_path, state_of())


@pytest.mark.parametrize("limit", [30_000, 10**9])
def test_a_full_disk_leaves_the_older_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    save_weights(state_of(seed=1), tmp_path, max_shard_bytes=limit)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    count, original = 0, shards.bytes_of

    def full(tensor: Tensor) -> memoryview:
        nonlocal count
        count += 1
        if count > 40:
            raise OSError(28, "No space left on device")
        return original(tensor)

    monkeypatch.setattr(shards, "bytes_of", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*intact"):
        save_weights(state_of(), tmp_path, max_shard_bytes=limit)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_renaming_is_refused_rather_than_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(save_weights(state_of(seed=1), tmp_path, max_shard_bytes=60_000))
    original = Path.replace
    done: list[Path] = []

    def killed(self: Path, target: Any) -> Path:
        if len(done) == count // 2:
            raise KeyboardInterrupt
        done.append(self)
        return original(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_weights(state_of(), tmp_path, max_shard_bytes=60_000)
    with pytest.raises(CheckpointError, match="holds neither"):
        open_directory(tmp_path)


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_weights(state_of(), tmp_path / "file")


def test_a_tied_head_is_not_written(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    state = model.state_dict()
    save_weights(state, tmp_path)
    assert read_back(tmp_path).keys() == state.keys() - {"lm_head.weight"}
    untied = {**state, "lm_head.weight": state["lm_head.weight"].clone()}
    save_weights(untied, tmp_path)
    assert "lm_head.weight" in read_back(tmp_path)


def test_offloaded_parameters_are_fetched_once_each(tmp_path: Path) -> None:
    state = state_of()
    away = {name: tensor.to("meta") if "layers.1." in name else tensor for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match=re.escape("model.layers.1.") + ".* is offloaded"):
        save_weights(away, tmp_path)
    asked: list[str] = []

    def fetch(name: str) -> Tensor:
        asked.append(name)
        return state[name]

    save_weights(away, tmp_path, fetch=fetch)
    assert_holds(tmp_path, state)
    assert sorted(asked) == sorted(name for name, tensor in away.items() if tensor.is_meta)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_a_dtype_that_no_checkpoint_holds_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match=r"weight cannot be saved in torch\."):
        save_weights({"weight": torch.ones(2).to(dtype)}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_progress_counts_the_bytes_of_the_whole_model(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    state = state_of()
    save_weights(state, tmp_path, max_shard_bytes=30_000, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in state.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert len(seen) == len(unfused(state))
