"""Does generated Python parse? Generated text stops in the middle of a statement, so that one is cut off first.

The rule, in order:
1. The text (prompt and completion) is cut at the end of its last complete logical line: the last line break outside of
   brackets and strings. Where generation ended by itself, the text is whole and nothing is cut.
2. A block header without a body at the end (`def f():`, `else:`, a decorator) and a `try` that has no `except` or
   `finally` yet are the rest of the unfinished statement: they go too, repeatedly, as such headers nest.
3. One `ast.parse` of what is left decides. No earlier line is ever removed.

Lines are cut off in step 1 only where they could have become Python: when an early bracket or string that is never
closed would swallow later lines that do not belong there, those lines stay and the text fails.
"""

from __future__ import annotations

import ast
import codeop
import io
import tokenize
import warnings
from dataclasses import dataclass

SKIPPED = {tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class LogicalLine:
    """A complete logical line: rows counted from 0, `end` exclusive."""

    start: int
    end: int
    indent: int
    first: str
    last: str


@dataclass(frozen=True)
class Verdict:
    """Whether a text parses once it is cut, and the text that was parsed."""

    parses: bool
    text: str


def judge(text: str, ended: bool) -> Verdict:
    """Cut a text and parse it; `ended` says that generation stopped by itself."""
    cut = cut_to_whole_statements(text, ended)
    return Verdict(_compiles(cut, ast.PyCF_ONLY_AST) == "", cut)


def cut_to_whole_statements(text: str, ended: bool) -> str:
    """Apply steps 1 and 2 of the rule."""
    if ended:
        return text
    lines = logical_lines(text)
    while lines:
        unfinished = _open_try(lines) if lines[-1].last != ":" and lines[-1].first != "@" else len(lines) - 1
        if unfinished is None:
            break
        lines = lines[:unfinished]
    return "".join(text.splitlines(keepends=True)[: lines[-1].end]) if lines else ""


def logical_lines(text: str) -> list[LogicalLine]:
    """Every complete logical line, up to the first place that cannot be split into tokens."""
    whole = text[: text.rfind("\n") + 1]
    found: list[LogicalLine] = []
    pending: list[tokenize.TokenInfo] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(whole).readline):
            if token.type == tokenize.NEWLINE and pending:
                first, last = pending[0], pending[-1]
                found.append(LogicalLine(first.start[0] - 1, token.end[0], first.start[1], first.string, last.string))
                pending = []
            elif token.type not in SKIPPED and token.type != tokenize.NEWLINE:
                pending.append(token)
    except (tokenize.TokenError, SyntaxError):
        # The end of the text inside a bracket or string, or a line that is no Python: in the second case it must stay,
        # so that ast.parse sees it.
        if not is_prefix(whole + "\n"):
            return [*found, _rest(whole, found)]
    return found


def _rest(whole: str, found: list[LogicalLine]) -> LogicalLine:
    return LogicalLine(found[-1].end if found else 0, whole.count("\n"), 0, "", "")


def _open_try(lines: list[LogicalLine]) -> int | None:
    """Index of the innermost `try:` whose block reaches the end of the text, or None."""
    deepest = lines[-1].indent
    for index in range(len(lines) - 1, -1, -1):
        line = lines[index]
        if line.indent < deepest:
            deepest = line.indent
            if line.first == "try" and line.last == ":":
                return index
    return None


def is_prefix(text: str) -> bool:
    """Whether the text without its last, broken line is Python or the beginning of Python."""
    whole = text[: text.rfind("\n") + 1]
    flags = ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT | codeop.PyCF_DONT_IMPLY_DEDENT
    return _compiles(whole, flags) in ("", "incomplete input")


def _compiles(text: str, flags: int) -> str:
    """The message of the error, "" when there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, "<generated>", "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return getattr(error, "msg", None) or str(error) or "error"
    return ""
