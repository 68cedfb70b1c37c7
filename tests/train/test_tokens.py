"""Tokenised directories: made from JSON lines in every form, and refused where they are damaged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tests.train.runs import random_documents, write_store
from transformers import AutoTokenizer

import qwen3_next
from qwen3_next.errors import DataError, StorageError
from qwen3_next.train.tokens import TokenStore, tokenize_files

ASSETS = Path(qwen3_next.__path__[0]) / "assets"
CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here, in Łódź."}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSETS)


def texts_of(store: TokenStore, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(store.document(i).astype(int).tolist()) for i in range(store.documents)]


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def tokenized(tmp_path: Path, tokenizer: Any, content: bytes, name: str = "rows.jsonl") -> TokenStore:
    file = tmp_path / name
    file.write_bytes(content)
    tokenize_files([file], tokenizer, tmp_path / "out")
    return TokenStore.open(tmp_path / "out", 4096)


def test_text_rows_become_documents_that_end_with_the_end_of_text(tmp_path: Path, tokenizer: Any) -> None:
    store = tokenized(tmp_path, tokenizer, lines({"text": "A ship."}, {"text": "Zwei Schiffe: 船", "source": 3}))
    assert texts_of(store, tokenizer) == ["A ship.<|endoftext|>", "Zwei Schiffe: 船<|endoftext|>"]
    assert store.bytes == len("A ship.Zwei Schiffe: 船".encode())


def test_messages_are_rendered_by_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    store = tokenized(tmp_path, tokenizer, lines({"messages": CHAT}))
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert texts_of(store, tokenizer) == [rendered + "<|endoftext|>"]
    ids = store.document(0).tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_tools_of_a_row_reach_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "look_out", "parameters": {}}}
    store = tokenized(tmp_path, tokenizer, lines({"messages": CHAT, "tools": [tool]}))
    assert "look_out" in texts_of(store, tokenizer)[0]


def test_zst_files_of_several_frames_are_read_whole(tmp_path: Path, tokenizer: Any) -> None:
    compress = zstandard.ZstdCompressor().compress
    # The second frame begins in the middle of a row, and the last row has no line break.
    content = lines({"text": "one"}, {"text": "two"}) + b'{"text": "three"}'
    store = tokenized(tmp_path, tokenizer, compress(content[:20]) + compress(content[20:]), "rows.jsonl.zst")
    assert texts_of(store, tokenizer) == [f"{word}<|endoftext|>" for word in ("one", "two", "three")]


def test_blank_lines_are_no_rows(tmp_path: Path, tokenizer: Any) -> None:
    assert tokenized(tmp_path, tokenizer, b'\n{"text": "one"}\n  \n').documents == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{not json}", "not a JSON object"),
        (b'{"text": "\xff"}', "UTF-8"),
        (b'["text"]', "list instead of a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"text": ""}', "non-empty `text`"),
        (b'{"text": 7}', "non-empty `text`"),
        (b'{"content": "x"}', "`messages` list"),
        (b'{"messages": []}', "`messages` list"),
        (b'{"messages": [{"content": "x"}]}', "`role`"),
        (b'{"messages": [{"role": "user"}]}', "`content`"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": 3}', "chat template"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_row_is_named_by_file_and_row(tmp_path: Path, tokenizer: Any, row: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 3: .*{message}"):
        tokenized(tmp_path, tokenizer, lines({"text": "a"}) + b"\n" + row + b"\n" + lines({"text": "b"}))
    assert not list(tmp_path.glob("out*"))


def test_an_empty_file_among_others_is_named(tmp_path: Path, tokenizer: Any) -> None:
    good, empty = tmp_path / "good.jsonl", tmp_path / "empty.jsonl"
    good.write_bytes(lines({"text": "a"}))
    empty.write_bytes(b"\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no document"):
        tokenize_files([good, empty], tokenizer, tmp_path / "out")


def test_compressed_data_that_is_cut_off_or_no_zstd_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    content = zstandard.ZstdCompressor().compress(lines(*({"text": f"ship {i}"} for i in range(99))))
    with pytest.raises(DataError, match=r"rows\.zst.*ends too early"):
        tokenized(tmp_path, tokenizer, content[:-9], "rows.zst")
    with pytest.raises(DataError, match=r"cannot read .*rows\.zst"):
        tokenized(tmp_path, tokenizer, b"no zstd at all", "rows.zst")


def test_a_directory_that_cannot_be_written_is_a_storage_error(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows").write_bytes(lines({"text": "a"}))
    (tmp_path / "occupied").write_bytes(b"")
    with pytest.raises(StorageError, match="occupied"):
        tokenize_files([tmp_path / "rows"], tokenizer, tmp_path / "occupied" / "out")


@pytest.fixture
def store_path(tmp_path: Path, fresh_seed: int) -> Path:
    return write_store(tmp_path / "store", random_documents(fresh_seed, [3, 1, 9]))


def test_a_truncated_token_file_is_refused(store_path: Path) -> None:
    tokens = store_path / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"documents\.bin: .*12 tokens.*truncated"):
        TokenStore.open(store_path, 61)
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"tokens\.bin: its size"):
        TokenStore.open(store_path, 61)
    tokens.write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read .*tokens\.bin"):
        TokenStore.open(store_path, 61)


def test_a_token_above_the_vocabulary_is_refused(store_path: Path) -> None:
    highest = int(np.fromfile(store_path / "tokens.bin", dtype="<u2").max())
    assert TokenStore.open(store_path, highest + 1).documents == 3
    with pytest.raises(DataError, match=f"token id {highest} is not below .* {highest}"):
        TokenStore.open(store_path, highest)


def test_a_changed_file_is_found_by_its_checksum(tmp_path: Path, tokenizer: Any) -> None:
    path = tokenized(tmp_path, tokenizer, lines({"text": "one two three"})).path
    content = bytearray((path / "tokens.bin").read_bytes())
    content[0] ^= 1
    (path / "tokens.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"tokens\.bin: checksum"):
        TokenStore.open(path, 4096)


@pytest.mark.parametrize(
    "meta",
    ["", "[]", '{"dtype": "float32"}', '{"dtype": ["uint16"]}', "{}"]
    + [f'{{"dtype": "uint16", "bytes": {size}}}' for size in ('"x"', "null", "-5", "1.5")]
    + [f'{{"dtype": "uint16", "sha256": {checksums}}}' for checksums in ("5", "null", '{"tokens.bin": 5}')],
)
def test_a_broken_description_is_refused(store_path: Path, meta: str) -> None:
    (store_path / "meta.json").write_text(meta)
    with pytest.raises(DataError, match=r"meta\.json"):
        TokenStore.open(store_path, 61)


def test_the_checksum_tells_stores_apart_by_tokens_and_borders(tmp_path: Path) -> None:
    contents = [[1, 2], [3]], [[1], [2, 3]], [[1, 2], [4]], [[1, 2], [3]]
    stores = [TokenStore.open(write_store(tmp_path / str(i), c), 9) for i, c in enumerate(contents)]
    assert [store.checksum == stores[0].checksum for store in stores] == [True, False, False, True]
