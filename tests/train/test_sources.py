"""Documents found, tokenised once, and tokenised again when anything about them has changed."""

import json
import shutil
from pathlib import Path

import pytest
from tests.train.runs import random_documents, write_store

import qwen3_next
from qwen3_next import ConfigError
from qwen3_next.errors import DataError
from qwen3_next.train.config import DataSettings
from qwen3_next.train.sources import copy_tokenizer, open_documents

ASSETS = Path(qwen3_next.__path__[0]) / "assets"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"Ship {i}."}) + "\n" for i in range(9)), encoding="utf-8")
    return file


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    target = tmp_path / "tokenizer"
    copy_tokenizer(str(ASSETS), target)
    return target


def tokenized(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def test_files_and_directories_mix_and_validation_sets_have_names(tmp_path: Path, rows: Path, tokenizer: Path) -> None:
    ready = write_store(tmp_path / "ready", random_documents(1, [4, 5]))
    data = DataSettings(
        train=(str(rows), str(ready)), validation={"a": str(ready), "b": str(rows)}, tokenizer=str(tokenizer)
    )
    stores, validation = open_documents(data, tmp_path / "cache", 4096)
    assert [store.documents for store in stores] == [2, 9]
    assert [validation[name].tokens_per_epoch for name in "ab"] == [9, int(stores[1].tokens.size)]


def test_json_lines_are_tokenised_once_and_again_when_file_or_tokenizer_changed(
    tmp_path: Path, rows: Path, tokenizer: Path
) -> None:
    cache = tmp_path / "cache"
    data = DataSettings(train=(str(rows),), tokenizer=str(tokenizer))
    (first,), _ = open_documents(data, cache, 4096)
    written = (first.path / "tokens.bin").stat().st_mtime_ns
    (again,), _ = open_documents(data, cache, 4096)
    assert (again.path / "tokens.bin").stat().st_mtime_ns == written
    rows.write_text(rows.read_text() + '{"text": "more"}\n')
    (longer,), _ = open_documents(data, cache, 4096)
    assert longer.documents == first.documents + 1
    described = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (tokenizer / "tokenizer.json").write_text(json.dumps(described))
    (swapped,), _ = open_documents(data, cache, 4096)
    assert swapped.checksum != longer.checksum
    assert len(tokenized(cache)) == 3


def test_what_is_missing_is_named(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl is neither a file nor a tokenised directory"):
        open_documents(DataSettings(train=(str(tmp_path / "nowhere.jsonl"),)), tmp_path, 9)
    with pytest.raises(ConfigError, match=r"data\.tokenizer is empty"):
        open_documents(DataSettings(train=(str(rows),)), tmp_path, 9)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ConfigError, match=r"data\.tokenizer='.*bare' cannot be read"):
        open_documents(DataSettings(train=(str(rows),), tokenizer=str(tmp_path / "bare")), tmp_path, 9)
    with pytest.raises(ConfigError, match=r"data\.tokenizer='.*bare' holds no tokenizer\.json"):
        copy_tokenizer(str(tmp_path / "bare"), tmp_path / "copy")


def test_a_damaged_validation_set_is_found_before_training(tmp_path: Path, rows: Path, tokenizer: Path) -> None:
    data = DataSettings(train=(str(rows),), tokenizer=str(tokenizer))
    (store,), _ = open_documents(data, tmp_path / "cache", 4096)
    damaged = tmp_path / "damaged"
    shutil.copytree(store.path, damaged)
    content = bytearray((damaged / "tokens.bin").read_bytes())
    content[2] ^= 1
    (damaged / "tokens.bin").write_bytes(content)
    with pytest.raises(DataError, match="checksum"):
        open_documents(DataSettings(train=(str(store.path),), validation={"x": str(damaged)}), tmp_path / "cache", 4096)


def test_a_copied_tokenizer_is_the_same_files(tokenizer: Path) -> None:
    for file in tokenizer.iterdir():
        assert file.read_bytes() == (ASSETS / file.name).read_bytes()
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in tokenizer.iterdir()}
