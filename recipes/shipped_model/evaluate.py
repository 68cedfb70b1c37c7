"""Measure the shipped model: loss per token and byte, acceptance of its drafts, and its samples.

    python recipes/shipped_model/evaluate.py MODEL runs/shipped --output runs/shipped/evaluation.json

MODEL is a folder in the published layout with its tokenizer. `--tokens N` reads only the first documents of each
validation part, about N tokens (0: all).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prompts import load
from sampling import SETTINGS
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from whole_statements import judge

from qwen3_next import Qwen3NextForCausalLM
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.ops.segments import Segments

HERE = Path(__file__).parent
PARTS = ("prose", "code", "dialog")
STEPS = 3
BATCH_TOKENS = 4096
NEW_TOKENS = 128
ROWS = 50
SEED = 0
NGRAM = 20


@dataclass
class Tally:
    """Sums over documents: losses of each step, and drafts offered and accepted.

    Attributes:
        nats: summed losses: the main model's, then those of the MTP steps.
        targets: how many tokens each of them was summed over.
        offered: positions at which step k and the main model's choice can be compared.
        accepted: those at which step k agrees (whatever the steps before it did).
        chained: those at which the steps 1..k all agree.
        reached: those at which the steps 1..k-1 all agree and step k can be compared.
    """

    nats: list[float] = field(default_factory=lambda: [0.0] * (STEPS + 1))
    targets: list[int] = field(default_factory=lambda: [0] * (STEPS + 1))
    offered: list[int] = field(default_factory=lambda: [0] * STEPS)
    accepted: list[int] = field(default_factory=lambda: [0] * STEPS)
    chained: list[int] = field(default_factory=lambda: [0] * STEPS)
    reached: list[int] = field(default_factory=lambda: [0] * STEPS)

    def acceptance(self) -> dict[str, list[float]]:
        """Shares of accepted drafts per step: alone, given that all steps before agree, and all steps together."""
        return {
            "step": ratios(self.accepted, self.offered),
            "conditional": ratios(self.chained, self.reached),
            "cumulative": ratios(self.chained, self.offered),
        }


def ratios(parts: list[int], wholes: list[int]) -> list[float]:
    """Elementwise quotients, 0 where nothing was counted."""
    return [round(part / whole, 4) if whole else 0.0 for part, whole in zip(parts, wholes, strict=True)]


def batches(documents: list[NDArray[np.uint16]]) -> Iterator[list[NDArray[np.uint16]]]:
    """Whole documents, up to BATCH_TOKENS together."""
    batch: list[NDArray[np.uint16]] = []
    for document in documents:
        if batch and sum(map(len, batch)) + len(document) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


@torch.inference_mode()
def measure(
    model: Qwen3NextForCausalLM,
    documents: list[NDArray[np.uint16]],
    tally: Tally,
    generated_from: list[int] | None = None,
) -> None:
    """Teacher-force documents through the model in one packed pass and add to the tally.

    `generated_from[n]`, if given, is document n's number of prompt tokens: only drafts of tokens that the main model
    wrote after its first own token are compared then.
    """
    lengths = [len(document) for document in documents]
    tokens = torch.from_numpy(np.concatenate(documents).astype(np.int64)).to(model.device)
    segments = Segments.from_lengths(lengths, model.device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
    logits = model.predict_ahead(PackedInputs(tokens, positions, segments), STEPS)
    start = 0
    for index, length in enumerate(lengths):
        own = [step[start : start + length].float() for step in logits]
        first = generated_from[index] - 1 if generated_from else 0
        _add_losses(tally, own, tokens[start : start + length])
        _add_acceptance(tally, [step.argmax(-1) for step in own], max(first, 0))
        start += length


def _add_losses(tally: Tally, logits: list[Tensor], tokens: Tensor) -> None:
    """Step 0 predicts token t + 1 at position t, MTP step k token t + 1 + k."""
    for step, values in enumerate(logits):
        targets = tokens[1 + step :]
        if len(targets):
            loss = torch.nn.functional.cross_entropy(values[: len(targets)], targets, reduction="sum")
            tally.nats[step] += float(loss)
            tally.targets[step] += len(targets)


def _add_acceptance(tally: Tally, choices: list[Tensor], first: int) -> None:
    """A draft of token t + 1 + k made at position t is accepted when the main model chooses it at position t + k."""
    main, drafts = choices[0], choices[1:]
    agreed: Tensor | None = None
    for step, draft in enumerate(drafts, start=1):
        hits = (draft[first : len(main) - step] == main[first + step :]) if len(main) > first + step else main[:0] > 0
        before = hits | True if agreed is None else agreed[: len(hits)]
        agreed = hits & before
        tally.offered[step - 1] += len(hits)
        tally.accepted[step - 1] += int(hits.sum())
        tally.reached[step - 1] += int(before.sum())
        tally.chained[step - 1] += int(agreed.sum())


def validation(model: Qwen3NextForCausalLM, packed: Path, tokenizer: Tokenizer, limit: int) -> dict[str, Any]:
    """Losses and teacher-forced acceptance of each part.

    The first token of a document has no context and no loss; the end token counts as a prediction. Losses per byte
    divide by all UTF-8 bytes of the documents' text.
    """
    results: dict[str, Any] = {}
    for part in PARTS:
        documents = load(packed / f"val_{part}")
        ends = np.cumsum([len(document) for document in documents])
        documents = documents[: int(np.searchsorted(ends, limit)) + 1] if limit else documents
        size = sum(len(text_of(tokenizer, document[:-1]).encode()) for document in documents)
        tally = Tally()
        with tqdm(total=sum(map(len, documents)), desc=f"val_{part}", unit=" tokens", unit_scale=True) as bar:
            for batch in batches(documents):
                measure(model, batch, tally)
                bar.update(sum(map(len, batch)))
        results[part] = {
            "documents": len(documents),
            "tokens": sum(map(len, documents)),
            "bytes": size,
            "nats_per_token": [round(n / max(t, 1), 4) for n, t in zip(tally.nats, tally.targets, strict=True)],
            "lm_nats_per_byte": round(tally.nats[0] / size, 4),
            "lm_bits_per_byte": round(tally.nats[0] / size / float(np.log(2)), 4),
            "mtp_acceptance": tally.acceptance(),
        }
    return results


def text_of(tokenizer: Tokenizer, tokens: Any) -> str:
    """The text of tokens, control tokens included."""
    return tokenizer.decode(list(map(int, tokens)), skip_special_tokens=False)


@dataclass(frozen=True)
class Sample:
    """Token ids of a prompt and of what the model wrote after it, without the end token; `ended` by that token."""

    prompt: list[int]
    completion: list[int]
    ended: bool


@torch.inference_mode()
def complete(model: Qwen3NextForCausalLM, tokenizer: Tokenizer, prompts: list[str], **sampling: Any) -> list[Sample]:
    """Complete prompts in left-padded batches; a row ends at <|endoftext|> or <|im_end|>."""
    stops = [tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")]
    samples: list[Sample] = []
    for first in tqdm(range(0, len(prompts), ROWS), desc="sampling" if sampling["do_sample"] else "greedy"):
        encoded = [tokenizer.encode(text).ids for text in prompts[first : first + ROWS]]
        width = max(map(len, encoded))
        rows = torch.tensor([[stops[0]] * (width - len(ids)) + ids for ids in encoded], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=model.device)
        torch.manual_seed(SEED + first)
        output = model.generate(
            rows,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=stops,
            pad_token_id=stops[0],
            **sampling,
        )
        for ids, row in zip(encoded, output[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in stops), None)
            samples.append(Sample(ids, row[:end], end is not None))
    return samples


def greedy_acceptance(model: Qwen3NextForCausalLM, samples: list[Sample]) -> dict[str, list[float]]:
    """Draft acceptance inside greedily generated text: what speculative decoding would accept."""
    tally = Tally()
    written = [sample for sample in samples if len(sample.completion) > 1]
    for first in range(0, len(written), 16):
        group = written[first : first + 16]
        documents = [np.array(sample.prompt + sample.completion, dtype=np.uint16) for sample in group]
        measure(model, documents, tally, [len(sample.prompt) for sample in group])
    return tally.acceptance()


def repeats(tokens: list[int]) -> bool:
    """Whether any run of NGRAM tokens occurs twice."""
    runs = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return len(set(runs)) < len(runs)


def sample_figures(kind: str, samples: list[Sample], tokenizer: Tokenizer) -> dict[str, Any]:
    """Shares of samples that repeat themselves and, for code, that parse once cut to whole statements."""
    figures: dict[str, Any] = {
        "samples": len(samples),
        "repeat_20_gram": sum(repeats(sample.completion) for sample in samples) / len(samples),
        "ended_by_themselves": sum(sample.ended for sample in samples) / len(samples),
        "mean_tokens": sum(len(sample.completion) for sample in samples) / len(samples),
    }
    if kind == "code":
        verdicts = [judge(text_of(tokenizer, s.prompt + s.completion), s.ended) for s in samples]
        prompts = [text_of(tokenizer, sample.prompt) for sample in samples]
        figures["parses"] = sum(verdict.parses for verdict in verdicts) / len(samples)
        # A sample whose whole completion is one unfinished statement parses for its prompt's sake.
        bare = [len(v.text.strip()) <= len(p.strip()) for v, p in zip(verdicts, prompts, strict=True)]
        figures["nothing_left_of_completion"] = sum(bare) / len(samples)
        figures["parses_of_the_rest"] = round(
            sum(v.parses for v, b in zip(verdicts, bare, strict=True) if not b) / max(bare.count(False), 1), 4
        )
    return figures


def write_samples(path: Path, samples: dict[str, list[Sample]], tokenizer: Tokenizer, title: str) -> None:
    """Write every sample: prompt, completion, and the verdict on code."""
    blocks = [f"All samples, {title}, at most {NEW_TOKENS} new tokens, seed {SEED}.\n"]
    for kind, group in samples.items():
        for number, sample in enumerate(group, start=1):
            prompt, completion = text_of(tokenizer, sample.prompt), text_of(tokenizer, sample.completion)
            notes = ["ended" if sample.ended else "cut at the token limit"]
            if kind == "code":
                notes.append("parses" if judge(prompt + completion, sample.ended).parses else "does not parse")
            if repeats(sample.completion):
                notes.append("repeats itself")
            title = f"{kind} {number}: {', '.join(notes)}"
            blocks.append(f"{'=' * 20} {title} {'=' * 20}\n{prompt}\n{'-' * 8} completion {'-' * 8}\n{completion}\n")
    path.write_text("\n".join(blocks), encoding="utf-8")


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements."""
    model = Qwen3NextForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).to(arguments.device).eval()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    prompts = json.loads(arguments.prompts.read_text(encoding="utf-8"))
    texts = {kind: [entry["text"] for entry in entries] for kind, entries in prompts.items()}
    results: dict[str, Any] = {"validation": validation(model, arguments.packed, tokenizer, arguments.tokens)}
    results["samples"] = {}
    for name, sampling in SETTINGS.items():
        samples = {kind: complete(model, tokenizer, group, do_sample=True, **sampling) for kind, group in texts.items()}
        title = f"{name} settings ({', '.join(f'{key} {value}' for key, value in sampling.items())})"
        write_samples(arguments.samples / f"samples_{name}.txt", samples, tokenizer, title)
        results["samples"][name] = {kind: sample_figures(kind, group, tokenizer) for kind, group in samples.items()}
    results["greedy_mtp_acceptance"] = {
        kind: greedy_acceptance(model, complete(model, tokenizer, group, do_sample=False))
        for kind, group in texts.items()
    }
    return results


def main() -> None:
    """Read the arguments, evaluate, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder with tokenizer.json")
    parser.add_argument("packed", type=Path, help="folder that holds val_prose, val_code and val_dialog")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of figures to write")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.json")
    parser.add_argument("--samples", type=Path, default=HERE, help="folder for samples_shipped.txt, samples_plain.txt")
    parser.add_argument("--tokens", type=int, default=100_000, help="validation tokens per part, 0 for all")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    started = time.perf_counter()
    results = evaluate(arguments)
    results["seconds"] = round(time.perf_counter() - started, 1)
    results["settings"] = {"dtype": arguments.dtype, "device": arguments.device, "seed": SEED}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    tqdm.write(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
