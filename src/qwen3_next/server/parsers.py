"""What a model writes into one answer, taken apart as it comes: its reasoning, its calls of tools, and the rest.

The text of an answer, after chat templates of the Qwen family:

    <think>\\n ... \\n</think>\\n\\n      reasoning, at the very beginning; the prompt may have opened it already
    <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>      a call, any number of times
    anything else                                                   content

How a text is cut into pieces changes nothing of what is found in it: every decision is made by the characters alone. A
call is given out when it is closed and known to be well formed, and not before; a text that breaks off could otherwise
have begun as a call and end as none, and a client cannot take a piece back.
"""

import json
import re
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"

_BLANK = re.compile(r"[ \t\n\r]*")
_BETWEEN = re.compile(f'"|{CALLED}')
_IN_STRING = re.compile(r'["\\\n]')


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a tool.

    Attributes:
        index: how many the answer had before.
        arguments: the JSON text of an object, as the model wrote it.
    """

    index: int
    name: str
    arguments: str


@dataclass(kw_only=True)
class Parsed:
    """What was found.

    Attributes:
        ends: how much of the content stands before each call.
    """

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list[Call])
    ends: list[int] = field(default_factory=list[int], compare=False)

    def __add__(self, later: "Parsed") -> "Parsed":
        """Both, in their order."""
        return Parsed(
            reasoning=self.reasoning + later.reasoning,
            content=self.content + later.content,
            calls=self.calls + later.calls,
            ends=self.ends + [len(self.content) + end for end in later.ends],
        )

    def parts(self) -> Iterator[tuple[Literal["reasoning", "message"], str] | Call]:
        """All of it in the order in which it was written; texts are not empty."""
        if self.reasoning:
            yield "reasoning", self.reasoning
        start = 0
        for call, end in zip([*self.calls, None], [*self.ends, len(self.content)], strict=True):
            if start < end:
                yield "message", self.content[start:end]
            if call is not None:
                yield call
            start = end


class AnswerParser:
    """Text in, parts out, held back while what it is to become is open."""

    def __init__(
        self, tools: Set[str] = frozenset(), *, most_calls: int | None = None, opened: bool | None = None
    ) -> None:
        """Nothing is found yet.

        Args:
            tools: names that may be called; a call of another is content. Without any, calls are not looked for.
            most_calls: what follows so many calls is left out; None: any number.
            opened: whether the prompt ends inside of the reasoning; None: it ends inside of the content.
        """
        self.tools, self.most_calls = tools, most_calls
        self.calls = 0
        self._held = ""
        self._blank = ""  # before a call that is open
        self._place, self._is_in_string = 0, False  # how far an open call was read
        self._is_after_call = False
        self._found = Parsed()
        self._step: Callable[[bool], bool] = self._thinking_begins if opened else self._beginning
        if opened is None:
            self._step = self._text

    def push(self, text: str) -> Parsed:
        """What is new."""
        return self._read(text, is_last=False)

    def finish(self) -> Parsed:
        """What was held back."""
        return self._read("", is_last=True)

    def _read(self, text: str, *, is_last: bool) -> Parsed:
        self._found = Parsed()
        self._held += text
        while self._step(is_last):
            pass
        return self._found

    # Each step reads what is held, and says whether another can go on now.

    def _beginning(self, is_last: bool) -> bool:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._held = text.removeprefix(THINK)
            self._step = self._thinking_begins
        elif not is_last and THINK.startswith(text):
            return False
        else:
            self._step = self._text
        return True

    def _thinking_begins(self, is_last: bool) -> bool:
        return self._skip_lines(self._thinking)

    def _thinking(self, is_last: bool) -> bool:
        text, tag, rest = self._held.partition(THOUGHT)
        if not tag and not is_last:  # line breaks before the end of the reasoning are no part of it
            text = text[: len(text) - _overlap(text, THOUGHT)].rstrip("\n")
        self._found.reasoning += text.rstrip("\n") if tag else text
        self._held = rest if tag else self._held[len(text) :]
        if tag:
            self._step = self._thinking_ends
        return bool(tag)

    def _thinking_ends(self, is_last: bool) -> bool:
        return self._skip_lines(self._text)

    def _skip_lines(self, step: Callable[[bool], bool]) -> bool:
        self._held = self._held.lstrip("\n")
        if self._held:
            self._step = step
        return bool(self._held)

    def _text(self, is_last: bool) -> bool:
        if not self.tools:
            self._show(len(self._held))
            return False
        end = self._held.find(CALL)
        if end < 0 and not is_last:
            self._show(len(self._held[: len(self._held) - _overlap(self._held, CALL)].rstrip()))
        elif end < 0:
            self._show(0 if self._is_after_call and self._held.isspace() else len(self._held))
        else:
            shown = len(self._held[:end].rstrip())
            self._show(shown)
            self._blank, self._held = self._held[: end - shown], self._held[end - shown + len(CALL) :]
            self._place, self._is_in_string, self._step = 0, False, self._call
        return end >= 0

    def _call(self, is_last: bool) -> bool:
        start = _end_of_blank(self._held, 0)
        if start == len(self._held) and not is_last:
            return False
        end = self._end_of_call() if self._held.startswith("{", start) else start
        if end is None and not is_last:
            return False
        text = self._held[: len(self._held) if end is None else end]
        self._step = self._text
        call = _read_call(text.removesuffix(CALLED)) if text.endswith(CALLED) else None
        if call is None or call[0] not in self.tools:
            self._found.content += self._blank + CALL + text
            self._is_after_call = False
        else:
            self._found.ends.append(len(self._found.content))
            self._found.calls.append(Call(index=self.calls, name=call[0], arguments=call[1]))
            self.calls += 1
            self._is_after_call = True
        self._held = self._held[len(text) :]
        if self.calls == self.most_calls:
            self._step = self._nothing_more
        return True

    def _end_of_call(self) -> int | None:
        """Where the first closing tag ends that is in no string of the JSON; a string ends with its line."""
        while found := (_IN_STRING if self._is_in_string else _BETWEEN).search(self._held, self._place):
            if found[0] == CALLED:
                return found.end()
            if found[0] == "\\" and found.end() == len(self._held):  # what it escapes is not here yet
                self._place = found.start()
                return None
            self._place = found.end() + (found[0] == "\\")
            self._is_in_string = found[0] == "\\" or not self._is_in_string
        self._place = len(self._held) - (0 if self._is_in_string else _overlap(self._held, CALLED))
        return None

    def _nothing_more(self, is_last: bool) -> bool:
        self._held = ""
        return False

    def _show(self, length: int) -> None:
        self._found.content += self._held[:length]
        self._held = self._held[length:]
        self._is_after_call &= not length


def _overlap(text: str, tag: str) -> int:
    """Length of the longest beginning of `tag` that `text` ends with."""
    place = text.rfind(tag[0], max(0, len(text) - len(tag) + 1))  # no tag has this character twice
    return len(text) - place if place >= 0 and tag.startswith(text[place:]) else 0


def _end_of_blank(text: str, place: int) -> int:
    found = _BLANK.match(text, place)
    assert found is not None  # an empty one is one too
    return found.end()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse)
"""Numbers stay texts: they are only passed over, and one of thousands of digits is no mistake."""


def _read_call(text: str) -> tuple[str, str] | None:
    """The name, and the JSON text of the arguments, of an object that has just these."""
    found: dict[Any, tuple[Any, str]] = {}
    place = _end_of_blank(text, 0) + 1
    try:
        while True:
            key, colon = _DECODER.raw_decode(text, _end_of_blank(text, place))
            colon = _end_of_blank(text, colon)
            start = _end_of_blank(text, colon + 1)
            value, end = _DECODER.raw_decode(text, start)
            if text[colon] != ":" or key in found:
                return None
            found[key] = value, text[start:end]
            place = _end_of_blank(text, end) + 1
            if text[place - 1] != ",":
                break
    except (ValueError, IndexError, TypeError, RecursionError):  # no JSON, cut off, a key that is no text, too deep
        return None
    if text[place - 1] != "}" or text[place:].strip() or found.keys() != {"name", "arguments"}:
        return None
    (name, _), (arguments, written) = found["name"], found["arguments"]
    return (name, written) if isinstance(name, str) and isinstance(arguments, dict) else None
