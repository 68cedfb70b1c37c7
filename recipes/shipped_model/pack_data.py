"""Select, tokenise and pack the shipped model's data, and make one small file of it to carry to a GPU.

    python recipes/shipped_model/pack_data.py pack DATA src/qwen3_next/assets runs/shipped
    python recipes/shipped_model/pack_data.py unpack runs/shipped/data.tar.xz runs/shipped
"""

import hashlib
import io
import json
import lzma
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 0
TRAVEL_TOKENS = {"code": 21_000_000, "prose": 15_000_000}
"""Upper limits, so that the packed file stays under 45 MB."""


def documents(data: Path, split: str, part: str, tokenizer: Any) -> Iterator[str]:
    """The texts of one part, prepared."""
    from selection import code_pieces, prose_pieces, rows

    for row in rows(data, f"{part}.{split}*"):
        if part == "code":
            yield from code_pieces(row["text"])
        elif part in ("prose", "kids"):
            yield from prose_pieces(row["text"])
        else:
            messages = row.get("messages") or []
            text = tokenizer.apply_chat_template(messages, tokenize=False) if messages else row["text"]
            yield text.rstrip("\n") + "\n"


def tokenize(texts: Iterator[str], tokenizer: Any, limit: int) -> tuple[list[NDArray[np.uint16]], int]:
    """Token arrays, each ended by <|endoftext|>, and the bytes of their text."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    arrays: list[NDArray[np.uint16]] = []
    total = size = 0
    batch: list[str] = []
    for text in (*texts, None):
        if text is not None:
            batch.append(text)
            if len(batch) < 512:
                continue
        for source, ids in zip(batch, tokenizer(batch)["input_ids"] if batch else [], strict=True):
            if total < limit:
                arrays.append(np.asarray([*ids, end], dtype=np.uint16))
                total, size = total + len(ids) + 1, size + len(source.encode())
        batch = []
        if total >= limit:
            break
    return arrays, size


def write_store(target: Path, arrays: list[NDArray[np.uint16]], size: int, rule: str) -> dict[str, Any]:
    """One tokenised directory as `qwen3_next.train` reads it."""
    target.mkdir(parents=True, exist_ok=True)
    np.concatenate(arrays).astype("<u2").tofile(target / "tokens.bin")
    starts = np.concatenate([[0], np.cumsum([a.size for a in arrays])]).astype("<i8")
    starts.tofile(target / "documents.bin")
    meta = {"dtype": "uint16", "tokens": int(starts[-1]), "documents": len(arrays), "bytes": size, "rule": rule}
    meta["sha256"] = {name: digest((target / name).read_bytes()) for name in ("tokens.bin", "documents.bin")}
    (target / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


def pack(data: Path, tokenizer_path: Path, output: Path) -> None:
    """Write runs/shipped/{train,val_prose,val_code,val_dialog} and data.tar.xz."""
    from selection import RULE
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    everything: list[NDArray[np.uint16]] = []
    summary: dict[str, Any] = {}
    size = 0
    for part in ("code", "prose", "dialog", "kids", "math"):
        texts = documents(data, "train", part, tokenizer)
        arrays, part_bytes = tokenize(texts, tokenizer, TRAVEL_TOKENS.get(part, 10**12))
        everything += arrays
        size += part_bytes
        summary[part] = {"tokens": sum(a.size for a in arrays), "documents": len(arrays), "bytes": part_bytes}
        sys.stderr.write(f"{part}: {summary[part]}\n")
    order = np.random.default_rng(SEED).permutation(len(everything))
    summary["train"] = write_store(output / "train", [everything[i] for i in order], size, RULE)
    for part in ("prose", "code", "dialog"):
        arrays, part_bytes = tokenize(documents(data, "val", part, tokenizer), tokenizer, 10**12)
        summary[f"val_{part}"] = write_store(output / f"val_{part}", arrays, part_bytes, RULE)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    archive(output)


def archive(output: Path) -> None:
    """data.tar.xz: the directories, with each token stream split into its low and its high bytes."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    with (
        lzma.open(output / "data.tar.xz", "wb", filters=filters) as raw,
        tarfile.open(fileobj=raw, mode="w|") as tar,
    ):
        for path in sorted(output.glob("*/*")):
            if path.parent.name != "train" and not path.parent.name.startswith("val_"):
                continue
            content = path.read_bytes()
            if path.name == "tokens.bin":
                content = np.frombuffer(content, np.uint8).reshape(-1, 2).T.tobytes()
            entry = tarfile.TarInfo(f"{path.parent.name}/{path.name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    sys.stderr.write(f"data.tar.xz: {(output / 'data.tar.xz').stat().st_size / 1e6:.1f} MB\n")


def unpack(source: Path, output: Path) -> None:
    """Restore the directories and check them."""
    with lzma.open(source) as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
        for entry in tar:
            handle = tar.extractfile(entry)
            assert handle is not None
            content = handle.read()
            if entry.name.endswith("tokens.bin"):
                content = np.frombuffer(content, np.uint8).reshape(2, -1).T.tobytes()
            target = output / Path(entry.name).parent.name / Path(entry.name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    for meta in output.glob("*/meta.json"):
        for name, expected in json.loads(meta.read_text(encoding="utf-8")).get("sha256", {}).items():
            if digest((meta.parent / name).read_bytes()) != expected:
                raise SystemExit(f"{meta.parent / name} is damaged; carry the file again.")


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    {"pack": pack, "unpack": unpack}[command](*map(Path, paths))
