"""Tokens in, text out: whole characters only, and nothing behind a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Characters:
    """Tokens in, text out, held back while a character's bytes are not all there."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        self.pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        if text.endswith(INCOMPLETE):
            return ""
        self.pending.clear()
        return text

    def finish(self) -> str:
        """The rest, less a character that was cut."""
        return self.tokenizer.decode(self.pending).rstrip(INCOMPLETE)


class StopStrings:
    """Text in, text out, up to the first stop string; what could become one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would end every text at once"
        self.stops = stops
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may be shown now."""
        text = self.held + text
        ends = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        self.found = bool(ends)
        shown = min(ends) if ends else len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, where no stop string came of it."""
        return "" if self.found else self.held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
