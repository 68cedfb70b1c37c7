"""The engine beside transformers' own model and `generate`, on the model in the package: tokens per second.

    python -m benchmarks.serve [--streams 1 8] [--tokens 64] [--device cpu]

Greedy, fp32, the same prompts for both, padded to one length on transformers' side as it asks for. Each is run once to
warm up and then in turns; the median counts. Where the two do not write the same tokens no speed is printed. The
prompts are held-out text that both read in one call, and their reading is part of the time.

    python -m benchmarks.serve --device cuda [--layers 48] [--quantization fp8] [--rows prefill decode ...]
                               [--minutes M] [--json FILE]

On a GPU the engine is measured at the published shapes of 80B, with random weights, beside the floors of its own
calls; what fewer layers take is scaled to 48, and says so. Contexts of decoding are random keys that nobody read.
Nothing is timed where a text in a batch is another than alone.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from benchmarks.serving.main import NAMES, run
from benchmarks.serving.rows import Sizes
from benchmarks.serving.setting import LAYERS
from rich.console import Console
from transformers import AutoModelForCausalLM

from qwen3_next import LLM, EngineConfig, SamplingParams
from qwen3_next.engine.loading import SHIPPED

TEXTS = (
    "Once upon a time, in a small village by the sea,",
    "def add(a, b):\n    return",
    "The old man looked at the sky and said that",
    "import json\n\nclass Reader:\n    def",
    "When the winter came, nobody in the house",
    "for i in range(10):\n    if",
    "She opened the letter slowly, because",
    "On the third day they reached the river, and",
)
ROUNDS = 3
RED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or 1 where the two write different tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=LAYERS, help="on a GPU; 24 fit 80 GB in fp8")
    parser.add_argument("--quantization", choices=("fp8", "none"), default="fp8", help="on a GPU")
    parser.add_argument("--dtype", default="bfloat16", help="on a GPU")
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=list(NAMES), help="on a GPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="on a GPU: begin no further row after so many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="on a GPU: also write every figure there")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda"):
        return run(options, {}, Sizes())
    out = Console(highlight=False, markup=False)
    llm = LLM(dtype="float32", device=options.device, config=EngineConfig(max_sequences=max(options.streams)))
    peer = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).to(options.device).eval()
    out.print(f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32, greedy")
    for streams in options.streams:
        prompts = prompts_of(llm, streams)
        ours = lambda p=prompts: by_engine(llm, p, options.tokens)  # noqa: E731
        theirs = lambda p=prompts: by_generate(peer, p, options.tokens)  # noqa: E731
        if ours() != theirs():
            out.print(f"{streams} streams: the two do not write the same tokens; nothing is timed")
            return RED
        seconds = in_turns((ours, theirs))
        a, b = (streams * options.tokens / one for one in seconds)
        out.print(f"{streams} streams: engine {a:7.1f} tokens/s, transformers {b:7.1f}, {a / b:.2f} x")
    return 0


def prompts_of(llm: LLM, count: int) -> list[list[int]]:
    """Beginnings of one length, so that transformers needs no padding."""
    encoded = [llm.engine.loaded.tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    shortest = min(len(ids) for ids in encoded)
    return [encoded[n % len(encoded)][:shortest] for n in range(count)]


def by_engine(llm: LLM, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What the engine writes; its prefix cache is emptied before."""
    llm.engine.scheduler.memory.evict_all()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return [list(answer.token_ids) for (answer,) in llm.generate(prompts, params, progress=False)]


def by_generate(model: torch.nn.Module, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What transformers writes."""
    rows = torch.tensor(prompts, device=next(model.parameters()).device)
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "repetition_penalty": 1.0}
    found = model.generate(rows, attention_mask=torch.ones_like(rows), pad_token_id=0, **settings)  # type: ignore[operator]
    return found[:, rows.shape[1] :].tolist()


def in_turns(runs: Sequence[Callable[[], object]]) -> list[float]:
    """The median seconds of each."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for call, own in zip(runs, times, strict=True):
            begin = time.perf_counter()
            call()
            own.append(time.perf_counter() - begin)
    return [statistics.median(own) for own in times]


if __name__ == "__main__":
    sys.exit(main())
