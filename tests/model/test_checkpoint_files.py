"""A file that is not a whole, plain safetensors checkpoint is refused, by name and reason, before a tensor is made."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model.stored import write

from qwen3_next.errors import CheckpointError
from qwen3_next.model import lazy_tensor, places
from qwen3_next.model.checkpoint_files import read_header
from qwen3_next.model.weights import open_checkpoint, open_directory


@pytest.fixture(autouse=True)
def nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a checkpoint must not make a tensor, refused or not."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor was made while the checkpoint was still being checked")

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(lazy_tensor, "empty", refuse)
    monkeypatch.setattr(places, "empty", refuse)


def raw_file(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, valid or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return file


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(file: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint([file])
    for part in (file.name, *parts):
        assert part in str(caught.value)


def test_a_header_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).float(), "b": torch.ones(()).bfloat16(), "c": torch.ones(0, 4).half()}
    file = write(tmp_path, tensors)
    header = read_header(file)
    assert {name: (each.shape, each.dtype) for name, each in header.items()} == {
        name: (tuple(each.shape), each.dtype) for name, each in tensors.items()
    }


@pytest.mark.parametrize("cut", [1, 7, 300])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    file = write(tmp_path, {"weight": torch.ones(1000)})
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-cut])
    refused(file, "truncated", f"expected {size} bytes", f"found {size - cut}")


def test_a_file_that_is_too_long_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, {"weight": torch.ones(10)})
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"more")
    refused(file, "too long", f"expected {size} bytes", f"found {size + 4}")


@pytest.mark.parametrize(
    "content", [b"", b"1234", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"]
)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    refused(file, "truncated or no safetensors file", "git lfs pull")


@pytest.mark.parametrize("length", [2**63, 100_000_001, 40])
def test_an_insane_header_length_is_refused(tmp_path: Path, length: int) -> None:
    refused(raw_file(tmp_path, {}, length=length), str(length))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 50_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        ([], "not a table"),
        ({"a": 1}, "lacks dtype"),
        ({"a": {"dtype": "F32"}}, "lacks dtype"),
        ({"a": entry(offsets=(0, 4, 8))}, "lacks dtype"),
        ({"a": entry(dtype="I32")}, "'I32'"),
        ({"a": entry(dtype="F4")}, "bf16"),
        ({"a": {**entry(), "dtype": []}}, "has the dtype []"),
        ({"a": entry(shape=(-2,))}, "no counts"),
        ({"a": entry(shape=(True, 2))}, "no counts"),
        ({"a": entry(shape=(2.0,))}, "no counts"),
        ({"a": entry(shape=(3,))}, "takes 12 bytes"),
        ({"a": entry(shape=(2**40, 2**40))}, "the header gives it 8"),
        ({"a": entry(), "b": entry()}, "the tensor before it ends at"),
        ({"a": entry(offsets=(8, 16))}, "starts at byte"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: Any, reason: str) -> None:
    refused(raw_file(tmp_path, header, bytes(8)), reason)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.gguf"])
def test_other_formats_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    refused(tmp_path / name, "safetensors", "pickle")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "model.safetensors", "cannot be read")


def test_a_directory_of_pickles_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*save it as safetensors"):
        open_directory(tmp_path)
    with pytest.raises(CheckpointError, match="holds neither"):
        open_directory(tmp_path / "nowhere")


def sharded(folder: Path, weight_map: Any, metadata: Any = None) -> Path:
    write(folder, {"a": torch.ones(2)}, "model-00001-of-00002.safetensors")
    write(folder, {"b": torch.ones(3)}, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return folder


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_an_index_gathers_its_shards(tmp_path: Path) -> None:
    checkpoint = open_directory(sharded(tmp_path, {"a": ONE, "b": TWO}))
    assert checkpoint.in_memory_shapes() == {"a": (2,), "b": (3,)}


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": ONE, "b": "model-00003-of-00003.safetensors"}, "model-00003-of-00003.safetensors cannot be read"),
        ({"a": ONE, "b": TWO, "c": TWO}, r"1 tensors that its shards do not hold: c \(model-00002"),
        ({"a": ONE, "b": ONE}, "do not hold: b"),
        ({"a": TWO, "b": ONE}, "in another shard than the index says: a, b"),
        ({"a": "../model.safetensors"}, "not a plain file name"),
        ({"a": 3}, "not a plain file name"),
        ([], "not a table"),
        ({}, "an empty one"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path, weight_map: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_directory(sharded(tmp_path, weight_map))


def test_an_index_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a checkpoint index"):
        open_directory(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    files = [write(tmp_path, {"a": torch.ones(2)}, name) for name in (ONE, TWO)]
    with pytest.raises(CheckpointError, match=f"a stands twice, in .*{ONE} and in .*{TWO}"):
        open_checkpoint(files)
