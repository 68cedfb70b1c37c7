"""Loss of an interpolated Kneser-Ney 5-gram over the same training tokens: what the shipped model has to beat.

    python recipes/shipped_model/ngram_baseline.py runs/shipped

Modified Kneser-Ney smoothing (Chen and Goodman 1999, https://doi.org/10.1006/csla.1999.0128, equations 26 and 27 and
section 3.4): counts of the highest order, continuation counts (how many different tokens precede an n-gram) below it,
three discounts per order, interpolation down to the uniform distribution. n-grams are 12 bits per token in one uint64.
Documents are padded on the left with <|endoftext|>, so that their beginning is a context too; as for the model, the
first token of a document is not scored and the end token is.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prompts import load
from tqdm import tqdm

ORDER = 5
BITS = 12
PARTS = ("prose", "code", "dialog")
Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """One order n of the model, sorted by key.

    Attributes:
        keys: n-grams, the oldest token in the highest bits.
        mass: discounted relative frequency of the n-gram's last token after its context.
        contexts: the (n-1)-grams that occur as contexts.
        backoff: the share of each context that the discounts freed for the lower order.
    """

    keys: Keys
    mass: NDArray[np.float32]
    contexts: Keys
    backoff: NDArray[np.float32]


def load_padded(folder: Path, end: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """All documents in one stream, each behind ORDER - 1 end tokens, and True at the real tokens."""
    padding = np.full(ORDER - 1, end, dtype=np.uint16)
    documents = load(folder)
    stream = np.concatenate([piece for document in documents for piece in (padding, document)])
    real = np.concatenate([piece for document in documents for piece in (padding < 0, document >= 0)])
    return stream, real


def grams(stream: NDArray[np.uint16], order: int, ends: NDArray[np.int64]) -> Keys:
    """The n-grams that end at the given places."""
    keys = np.zeros(len(ends), dtype=np.uint64)
    for back in range(order - 1, -1, -1):
        keys = (keys << np.uint64(BITS)) | stream[ends - back].astype(np.uint64)
    return keys


def runs(keys: Keys) -> tuple[Keys, NDArray[np.int64]]:
    """Different values of sorted keys and how often each occurs."""
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.diff(np.append(starts, len(keys)))


def build_level(keys: Keys, counts: NDArray[np.int64]) -> Level:
    """Discount the counts of sorted n-grams."""
    amounts = discounts(counts)[np.minimum(counts, 3)]
    contexts = keys >> np.uint64(BITS)
    starts = np.flatnonzero(np.concatenate([[True], contexts[1:] != contexts[:-1]]))
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    freed = np.add.reduceat(amounts, starts) / totals
    lengths = np.diff(np.append(starts, len(keys)))
    mass = ((counts - amounts) / np.repeat(totals, lengths)).astype(np.float32)
    return Level(keys, mass, contexts[starts], freed.astype(np.float32))


def discounts(counts: NDArray[np.int64]) -> Floats:
    """Discounts of n-grams seen never, once, twice and more often, from the counts of counts."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == value)) for value in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array([0.0, 0.5, 0.75, 0.75])
    y = n1 / (n1 + 2 * n2)
    return np.clip([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0.0, [0.0, 1.0, 2.0, 3.0])


def train(folder: Path, end: int) -> list[Level]:
    """The levels 1 .. ORDER of the model."""
    stream, real = load_padded(folder, end)
    ends = np.flatnonzero(real)
    levels: list[Level] = []
    with tqdm(total=ORDER, desc="orders") as bar:
        keys = grams(stream, ORDER, ends)
        del stream, real, ends
        keys.sort()
        keys, counts = runs(keys)
        for order in range(ORDER, 0, -1):
            levels.append(build_level(keys, counts))
            bar.update()
            if order > 1:
                # Each different n-gram counts once for the (n-1)-gram it ends with.
                keys = keys & np.uint64((1 << BITS * (order - 1)) - 1)
                keys.sort()
                keys, counts = runs(keys)
    return levels[::-1]


def find(table: Keys, keys: Keys, values: NDArray[np.float32], missing: float) -> Floats:
    """Look up values by key; `missing` where the key is not in the table."""
    places = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[places] == keys, values[places], missing).astype(np.float64)


def nats(levels: list[Level], folder: Path, vocabulary: int, end: int) -> tuple[float, int]:
    """Summed loss of a packed folder and how many tokens were scored."""
    stream, real = load_padded(folder, end)
    scored = real.copy()
    scored[1:] &= real[:-1]
    ends = np.flatnonzero(scored)
    chance = np.full(len(ends), 1.0 / vocabulary)
    for order, level in enumerate(levels, start=1):
        keys = grams(stream, order, ends)
        # A context that was never seen leaves everything to the lower order.
        share = find(level.contexts, keys >> np.uint64(BITS), level.backoff, 1.0)
        chance = find(level.keys, keys, level.mass, 0.0) + share * chance
    return float(-np.log(chance).sum()), len(ends)


def check_sums(levels: list[Level], folder: Path, vocabulary: int, end: int) -> float:
    """Largest deviation from 1 of the summed probabilities after a few contexts of a packed folder."""
    stream, real = load_padded(folder, end)
    places = np.flatnonzero(real)[:: max(1, int(real.sum()) // 20)]
    worst = 0.0
    for place in places.tolist():
        window = np.tile(np.append(stream[place - ORDER + 1 : place], 0).astype(np.uint16), (vocabulary, 1))
        window[:, -1] = np.arange(vocabulary)
        ends = np.arange(vocabulary) * ORDER + ORDER - 1
        chance = np.full(vocabulary, 1.0 / vocabulary)
        for order, level in enumerate(levels, start=1):
            keys = grams(window.ravel(), order, ends)
            share = find(level.contexts, keys >> np.uint64(BITS), level.backoff, 1.0)
            chance = find(level.keys, keys, level.mass, 0.0) + share * chance
        worst = max(worst, abs(float(chance.sum()) - 1.0))
    return worst


def main() -> None:
    """Train on train/, score val_*/ and write ngram.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, help="folder that holds train, val_prose, val_code and val_dialog")
    folder: Path = parser.parse_args().packed
    started = time.perf_counter()
    meta = json.loads((folder / "train" / "meta.json").read_text(encoding="utf-8"))
    vocabulary, end = int(meta["vocab_size"]), int(meta["eos_token_id"])
    if vocabulary > 1 << BITS:
        raise ValueError(f"a vocabulary of {vocabulary} does not fit into {BITS} bits per token.")
    levels = train(folder / "train", end)
    results: dict[str, Any] = {"order": ORDER, "smoothing": "modified Kneser-Ney, interpolated", "parts": {}}
    results["ngrams"] = [len(level.keys) for level in levels]
    results["sum_error"] = check_sums(levels, folder / "val_prose", vocabulary, end)
    for part in tqdm(PARTS, desc="scoring"):
        size = json.loads((folder / f"val_{part}" / "meta.json").read_text(encoding="utf-8"))["bytes"]
        loss, tokens = nats(levels, folder / f"val_{part}", vocabulary, end)
        results["parts"][part] = {
            "tokens": tokens,
            "bytes": size,
            "nats_per_token": round(loss / tokens, 4),
            "nats_per_byte": round(loss / size, 4),
            "bits_per_byte": round(loss / size / math.log(2), 4),
        }
    results["seconds"] = round(time.perf_counter() - started, 1)
    (folder / "ngram.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    tqdm.write(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
