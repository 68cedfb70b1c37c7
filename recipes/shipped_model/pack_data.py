"""Select, tokenise and pack the shipped model's data, and make one small archive of it to carry to a GPU.

    python recipes/shipped_model/pack_data.py pack DATA src/qwen3_next/assets runs/shipped
    python recipes/shipped_model/pack_data.py unpack runs/shipped/data.tar.xz runs/shipped

A packed folder holds tokens.bin (little-endian uint16, each document ended by <|endoftext|>), documents.bin (int64
start offsets, the token count last) and meta.json. `unpack` needs only numpy and the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 20
BATCH = 1024
MAX_TOKENS = 2000
TOKENS = {"code": 27_500_000, "prose": 20_500_000}  # the archive stays under 44 MB
TRAIN_PARTS = ("code", "prose", "dialog", "kids", "math")
VAL_PARTS = ("prose", "code", "dialog")
LZMA_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 27, "lc": 3, "lp": 1, "pb": 1}
]  # 16-bit symbols


@dataclass
class Documents:
    """Tokenised documents and the UTF-8 bytes of each."""

    arrays: list[NDArray[np.uint16]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Tokens, documents and bytes."""
        tokens = sum(array.size for array in self.arrays)
        return {"tokens": tokens, "documents": len(self.arrays), "bytes": sum(self.sizes)}


def texts(data: Path, split: str, part: str) -> Iterator[str]:
    """Yield the cleaned documents of one part, each once."""
    from corpus import rows, transcript
    from selection import book_rank, code_documents, kids_documents, prose_documents

    chosen: Any = rows(data, f"{part}.{split}*.jsonl.zst")
    if part == "prose" and split == "train":
        books = [book for book in chosen if book_rank(book) < 2]
        order = np.random.default_rng(SEED).permutation(len(books))
        chosen = sorted((books[i] for i in order), key=book_rank)
    seen: set[bytes] = set()
    cut = {"code": code_documents, "prose": prose_documents, "kids": kids_documents}.get(part)
    for row in chosen:
        for text in cut(row["text"]) if cut else [transcript(row["messages"])]:
            key = hashlib.sha256(text.encode()).digest()
            if key not in seen:
                seen.add(key)
                yield text


def tokenise(documents: Iterator[str], tokenizer: Any, limit: float, title: str) -> Documents:
    """Tokenise documents until `limit` tokens are reached; the few that do not fit the context are left out."""
    from tqdm import tqdm

    end = tokenizer.token_to_id("<|endoftext|>")
    result, total = Documents(), 0
    with tqdm(desc=title, unit=" tokens", unit_scale=True, total=None if limit == float("inf") else limit) as bar:
        for batch in batches(documents):
            for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch), strict=True):
                if len(encoding.ids) < MAX_TOKENS and total < limit:
                    result.arrays.append(np.array([*encoding.ids, end], dtype=np.uint16))
                    result.sizes.append(len(text.encode()))
                    total += len(encoding.ids) + 1
            bar.update(total - bar.n)
            if total >= limit:
                break
    return result


def batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Group documents into lists of BATCH."""
    batch: list[str] = []
    for text in documents:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def write_folder(target: Path, documents: Documents, tokenizer: Any, rule: str) -> dict[str, Any]:
    """Write one packed folder and return its meta.json."""
    target.mkdir(parents=True, exist_ok=True)
    np.concatenate(documents.arrays).astype("<u2").tofile(target / "tokens.bin")
    lengths = [array.size for array in documents.arrays]
    np.concatenate([[0], np.cumsum(lengths)]).astype("<i8").tofile(target / "documents.bin")
    meta = {
        "dtype": "uint16",
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        **documents.counts(),
        "sha256": {name: digest((target / name).read_bytes()) for name in ("tokens.bin", "documents.bin")},
        "rule": rule,
    }
    (target / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


def pack(data: Path, assets: Path, output: Path) -> None:
    """Write train, val_prose, val_code, val_dialog, the archive and summary.json."""
    from selection import RULE
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
    rule = f"{RULE} (seed {SEED})"
    summary: dict[str, Any] = {"tokenizer_sha256": digest((assets / "tokenizer.json").read_bytes()), "parts": {}}
    train = Documents()
    for part in TRAIN_PARTS:
        documents = tokenise(texts(data, "train", part), tokenizer, TOKENS.get(part, float("inf")), part)
        summary["parts"][part] = documents.counts()
        train.arrays += documents.arrays
        train.sizes += documents.sizes
    order = np.random.default_rng(SEED).permutation(len(train.arrays))
    shuffled = Documents([train.arrays[i] for i in order], [train.sizes[i] for i in order])
    summary["train"] = write_folder(output / "train", shuffled, tokenizer, rule)
    for part in VAL_PARTS:
        documents = tokenise(texts(data, "val", part), tokenizer, float("inf"), f"val_{part}")
        summary[f"val_{part}"] = write_folder(output / f"val_{part}", documents, tokenizer, rule)
    write_archive(output, output / "data.tar.xz")
    content = (output / "data.tar.xz").read_bytes()
    summary["archive"] = {"bytes": len(content), "sha256": digest(content)}
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def write_archive(folder: Path, archive: Path) -> None:
    """Write the packed folders as one .tar.xz."""
    from tqdm import tqdm

    files = [folder / name / file for name in folder_names() for file in ("meta.json", "documents.bin", "tokens.bin")]
    with (
        lzma.open(archive, "wb", filters=LZMA_FILTERS) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as tar,
    ):
        for file in tqdm(files, desc="archive", unit=" files"):
            content = file.read_bytes()
            entry = tarfile.TarInfo(f"{file.parent.name}/{file.name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def unpack(archive: Path, output: Path) -> None:
    """Restore the packed folders of an archive and check their SHA-256."""
    with tarfile.open(archive, mode="r:xz") as tar:
        for entry in tar:
            folder, _, file = entry.name.partition("/")
            stream = tar.extractfile(entry)
            if folder not in folder_names() or "/" in file or stream is None:
                raise ValueError(f"{archive} holds {entry.name}, which is no part of the packed data.")
            content = stream.read()
            (output / folder).mkdir(parents=True, exist_ok=True)
            (output / folder / file).write_bytes(content)
            sys.stderr.write(f"{entry.name}: {len(content):,} bytes\n")
    for folder in folder_names():
        check(output / folder)


def check(folder: Path) -> None:
    """Compare the files of a packed folder with the hashes in its meta.json."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for name, expected in meta["sha256"].items():
        if digest((folder / name).read_bytes()) != expected:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not {expected}. Copy the archive again.")


def folder_names() -> list[str]:
    """The packed folders."""
    return ["train", *(f"val_{part}" for part in VAL_PARTS)]


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    """Run the `pack` or the `unpack` command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="select, tokenise and pack")
    packing.add_argument("data", type=Path, help="folder with the .jsonl.zst files")
    packing.add_argument("assets", type=Path, help="folder with tokenizer.json")
    packing.add_argument("output", type=Path)
    unpacking = commands.add_parser("unpack", help="restore the packed folders from the archive")
    unpacking.add_argument("archive", type=Path)
    unpacking.add_argument("output", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "pack":
        pack(arguments.data, arguments.assets, arguments.output)
    else:
        unpack(arguments.archive, arguments.output)


if __name__ == "__main__":
    main()
