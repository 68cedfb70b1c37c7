"""Options of sampling into parameters, and text onto the terminal as it comes."""

import sys
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from qwen3_next.errors import InputError

if TYPE_CHECKING:
    from qwen3_next.engine import StreamUpdate


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The options of the command line; None where nothing was said."""

    greedy: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def changes(self, generation: Mapping[str, Any]) -> dict[str, Any]:
        """What changes in the parameters of a generation_config.json. Any option of drawing asks for drawing.

        Raises:
            InputError: an option that greedy choice would leave without effect.
        """
        drawing = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        given: dict[str, Any] = {name: value for name, value in drawing.items() if value is not None}
        greedy = self.greedy or self.temperature == 0
        idle = [f"--{name.replace('_', '-')}" for name, value in given.items() if value != 0 or name != "temperature"]
        if greedy and idle:
            raise InputError(f"{', '.join(idle)} has no effect on greedy choice; leave it out, or draw.")
        if greedy:
            given = {"temperature": 0}
        elif given and not generation.get("do_sample", False):
            stored = generation.get("temperature")
            given = {"temperature": 1.0 if stored is None else stored} | given
        penalty = self.repetition_penalty
        return given if penalty is None else given | {"repetition_penalty": penalty}


def write(updates: "Generator[StreamUpdate]", prompt: str = "") -> None:
    """Write text as it comes, on a terminal behind its prompt.

    Whatever happens, what was written stays, its line is ended, and stderr says how fast it came.
    """
    started = first = last = time.perf_counter()
    newest: StreamUpdate | None = None
    try:
        with closing(updates):
            for update in updates:
                last = time.perf_counter()
                if newest is None:
                    first = last
                    if sys.stdout.isatty():
                        Console().print(Text(prompt, "dim"), end="", soft_wrap=True)
                newest = update
                sys.stdout.write(update.text)
                sys.stdout.flush()
                if update.error is not None:
                    raise update.error
    finally:
        if newest is not None:
            sys.stdout.write("\n")
            sys.stdout.flush()
            _report(newest, first - started, last - first)


def _report(newest: "StreamUpdate", wait: float, seconds: float) -> None:
    cached = f" ({newest.cached_tokens} of them cached)" if newest.cached_tokens else ""
    speed = (newest.output_tokens - 1) / seconds if seconds else 0.0
    line = (
        f"{newest.prompt_tokens} prompt tokens{cached}, first token after {wait:.2f} s; "
        f"{newest.output_tokens} tokens, {speed:.1f} tokens/s"
    )
    Console(stderr=True, highlight=False).print(Text(line, "dim"), soft_wrap=True)
