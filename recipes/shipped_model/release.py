"""Put a trained model into the package: weights in shards under 15 MB, generation settings, model card.

    python recipes/shipped_model/release.py runs/shipped src/qwen3_next/assets

reads the exported model, the log and the settings of the run, and the figures of evaluate.py and ngram_baseline.py, all
below runs/shipped. Figures in the card come from there and from nowhere else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from sampling import SHIPPED
from transformers import GenerationConfig

from qwen3_next import Qwen3NextForCausalLM

SHARD_BYTES = 14_000_000
HERE = Path(__file__).parent


def release(folder: Path, assets: Path) -> None:
    """Write weights, configuration and generation settings into `assets`."""
    model = Qwen3NextForCausalLM.from_pretrained(folder / "run" / "model", dtype=torch.bfloat16)
    added = read(assets / "tokenizer_config.json")["added_tokens_decoder"]
    ids = {token["content"]: int(number) for number, token in added.items()}
    # Documents end with the first, turns of a chat with the second.
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config = GenerationConfig(
        bos_token_id=ends[1], pad_token_id=ends[1], eos_token_id=ends, do_sample=True, **SHIPPED
    )
    model.save_pretrained(assets, dtype=torch.bfloat16, max_shard_size=SHARD_BYTES)


def read(file: Path) -> dict[str, Any]:
    """A JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def card(folder: Path) -> str:
    """The model card: card.md with the figures filled in."""
    evaluation, ngram, summary, machine = (
        read(folder / name) for name in ("evaluation.json", "ngram.json", "summary.json", "run/machine.json")
    )
    config = read(folder / "run" / "model" / "config.json")
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    values = {
        "config": config,
        "sampling": SHIPPED,
        "training": training_figures(log, machine),
        "losses": loss_table(log, ngram["parts"]),
        "acceptance": acceptance_table(evaluation),
        "samples": sample_table(evaluation["samples"]),
        "data": data_table(summary),
    }
    return (HERE / "card.md").read_text(encoding="utf-8").format(**values)


def training_figures(log: list[dict[str, Any]], machine: dict[str, Any]) -> dict[str, Any]:
    """What the run's log says of its length and speed."""
    start = next(row for row in log if row.get("event") == "start")
    last = [row for row in log if "tokens_per_second" in row][-1]
    return {
        "tokens": last["tokens"],
        "epochs": last["tokens"] / start["tokens_per_epoch"],
        "steps": last["step"],
        "batch": start["settings"]["data"]["tokens_per_batch"],
        "lr": start["settings"]["optimizer"]["lr"],
        "mtp_weight": start["settings"]["loss"]["mtp_weight"],
        **machine,
    }


def loss_table(log: list[dict[str, Any]], ngrams: dict[str, Any]) -> str:
    """The last validation losses of the run, over all held-out text, beside those of the 5-gram model."""
    last = [row for row in log if any(key.startswith("validation/") for key in row)][-1]
    rows = [
        f"| {name} | {part['tokens']:,} | {last[f'validation/{name}/lm']:.3f} "
        f"| {last[f'validation/{name}/lm_per_byte']:.3f} | {part['nats_per_byte']:.3f} "
        f"| {last[f'validation/{name}/mtp_1']:.3f} |"
        for name, part in ngrams.items()
    ]
    head = "| part | tokens | nats per token | nats per byte | 5-gram, nats per byte | MTP, nats per token |"
    return "\n".join([head, "|---|---:|---:|---:|---:|---:|", *rows])


def acceptance_table(evaluation: dict[str, Any]) -> str:
    """Share of drafts that the main model would have chosen, by draft position."""
    forced = {f"{name}, true text": part["mtp_acceptance"] for name, part in evaluation["validation"].items()}
    greedy = {f"{name}, greedy generation": part for name, part in evaluation["greedy_mtp_acceptance"].items()}
    rows = [
        f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in part['conditional'])} |"
        for name, part in (forced | greedy).items()
    ]
    head = "| text | first draft | second, if the first is accepted | third, if both are |"
    return "\n".join([head, "|---|---:|---:|---:|", *rows])


def sample_table(samples: dict[str, Any]) -> str:
    """What the 100 samples of each kind show."""
    rows = [
        f"| {kind}, {settings} | {figures['samples']} | {percent(figures, 'repeat_20_gram')} "
        f"| {percent(figures, 'parses')} | {figures['mean_tokens']:.0f} |"
        for settings, kinds in samples.items()
        for kind, figures in kinds.items()
    ]
    head = "| kind, settings | samples | repeat a 20-gram | parse as Python | mean tokens |"
    return "\n".join([head, "|---|---:|---:|---:|---:|", *rows])


def percent(figures: dict[str, float], name: str) -> str:
    """A share as a percentage, a dash where it was not measured."""
    return f"{100 * figures[name]:.0f} %" if name in figures else "-"


def data_table(summary: dict[str, Any]) -> str:
    """Tokens, documents and licence of each part."""
    rows = [
        f"| {name} | {part['tokens']:,} | {part['documents']:,} | {LICENCES[name]} |"
        for name, part in summary["parts"].items()
    ]
    return "\n".join(["| part | tokens | documents | licence |", "|---|---:|---:|---|", *rows])


LICENCES = {
    "code": "permissive (MIT, BSD, Apache-2.0, ...), per package",
    "prose": "public domain (Project Gutenberg texts)",
    "dialog": "CC BY-SA 4.0 (Schema-Guided Dialogue), CC BY 4.0 (Taskmaster-4)",
    "kids": "CC BY 4.0 (African Storybook, Pratham Books)",
    "math": "MIT (GSM8K, training split)",
}


def main() -> None:
    """Write the model and its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the run, e.g. runs/shipped")
    parser.add_argument("assets", type=Path, help="folder of the shipped model, e.g. src/qwen3_next/assets")
    arguments = parser.parse_args()
    release(arguments.folder, arguments.assets)
    (arguments.assets / "README.md").write_text(card(arguments.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
