"""Which tokens a text of a given form may go on with: llguidance, with its errors as ours."""

import functools
import json
import re
import textwrap
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from qwen3_next.engine.request import Structured
from qwen3_next.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CACHED = 64
"""Compiled grammars that are kept."""

STACK = 512 * 2**20
"""Bytes for the compiler, which recurses as deeply as rules refer to each other. Only what it touches takes memory."""

FUEL = 100_000
"""Of the compiler, so that it takes no more than about a second. Enumerations of thousands of texts need less."""

WHITESPACE = r"[\x20\x09]{1,2}|\x0D?\x0A[\x20\x09]{0,32}"
"""Between the parts of a JSON text: what people write. Small models fill whole contexts with blanks where they may."""

_END = "<|end of the grammar|>"
_TEMPERATURE = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(\[[^\]\n]*\btemperature\b)')
"""Texts and regular expressions first, so that what stands in them is not taken for an attribute."""


class GrammarState:
    """Where a text stands in its grammar."""

    def __init__(self, matcher: LLMatcher, known: int, ends: Sequence[int]) -> None:
        self._matcher, self._known, self._ends = matcher, known, list(ends)
        self._mask: Tensor | None = None

    def copy(self) -> "GrammarState":
        """Another text that stands there."""
        return GrammarState(self._matcher.deep_copy(), self._known, self._ends)

    def allowed(self) -> Bool[Tensor, "V"]:
        """Which tokens may come next, the model's own ends among them where the text may end; at least one.

        Raises:
            InputError: the grammar needs more than a step may compute, or the model has no token to go on with.
        """
        mask = self._computed_mask()
        if not mask.any():
            raise InputError("the model has no token that its grammar lets follow. Allow more in the grammar.")
        return mask

    def accept(self, token: int) -> None:
        """Go on by a token that is allowed.

        Raises:
            InputError: the grammar needs more than a step may compute.
        """
        self._matcher.consume_token(token)
        self._mask = None
        self._require_sound()

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end may follow, or an end came.

        Raises:
            InputError: the grammar needs more than a step may compute.
        """
        if self._matcher.is_stopped() or not self._matcher.is_accepting():
            return self._matcher.is_stopped()
        rest = self._computed_mask().clone()
        rest[self._ends] = False
        return not rest.any()

    def masks_along(self, drafts: Sequence[int]) -> list[Bool[Tensor, "V"]]:
        """What may follow the text, and the text with each beginning of the drafts, up to the first forbidden draft.

        The text stays what it was.

        Raises:
            InputError: the grammar needs more than a step may compute.
        """
        masks = [self.allowed()]
        for token in drafts:
            if self._matcher.is_stopped() or not self._matcher.try_consume_tokens([token]):
                break
            masks.append(self._compute_mask())
        self._matcher.rollback(len(masks) - 1)
        return masks

    def _computed_mask(self) -> Bool[Tensor, "V"]:
        if self._mask is None:
            self._mask = self._compute_mask()
        return self._mask

    def _compute_mask(self) -> Bool[Tensor, "V"]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_sound()
        return torch.from_numpy(np.unpackbits(bits, count=self._known, bitorder="little").view(np.bool_))

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            reason = textwrap.shorten(self._matcher.get_error(), 200)
            raise InputError(f"the text cannot go on by its grammar ({reason}). Simplify the grammar.")


class GrammarCompiler:
    """Grammars for one tokenizer; many requests share one, so the last ones are kept. Threads may share it."""

    def __init__(self, tokenizer: "Tokenizer", known: int, eos_ids: frozenset[int]) -> None:
        """Nothing is built before the first grammar.

        Args:
            known: ids from here on never come.
            eos_ids: the model's own ends; they may come where the text may end.
        """
        self.tokenizer, self.known = tokenizer, known
        self.ends = sorted(token for token in eos_ids if token < known)
        self._lock = threading.Lock()
        self._compiled = functools.lru_cache(CACHED)(self._compile)

    def matcher(self, structured: Structured) -> GrammarState:
        """The beginning of a text.

        Raises:
            InputError: the grammar is wrong, too large, or lets nothing follow.
        """
        return GrammarState(self._compiled(structured).deep_copy(), self.known, self.ends)

    @functools.cached_property
    def _vocabulary(self) -> LLTokenizer:
        copy = type(self.tokenizer).from_str(self.tokenizer.to_str())
        copy.no_padding()
        copy.no_truncation()
        copy.add_special_tokens([_END])  # stands for the end where the model has none
        end = copy.token_to_id(_END)
        assert end is not None
        return LLTokenizer(copy.to_str(), eos_token=self.ends or [end])

    def _compile(self, structured: Structured) -> LLMatcher:
        with ThreadPoolExecutor(1) as thread:
            with self._lock:  # the size is one for all threads that begin
                previous = threading.stack_size(STACK)
                try:
                    compiling = thread.submit(self._checked, structured)
                finally:
                    threading.stack_size(previous)
            return compiling.result()

    def _checked(self, structured: Structured) -> LLMatcher:
        limits = LLParserLimits(verbose_errors=False, initial_lexer_fuel=FUEL)
        matcher = LLMatcher(self._vocabulary, _source(structured), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what can never be fulfilled shows here
        if matcher.is_error():
            raise _wrong(structured, matcher.get_error())
        if GrammarState(matcher, self.known, self.ends).is_finished:
            raise _wrong(structured, "it lets no text follow")
        return matcher


def _source(structured: Structured) -> str:
    text = structured.grammar
    if structured.kind == "json_schema":
        is_object = text.lstrip().startswith("{")  # `true` is a schema too, and takes no options
        try:
            return LLMatcher.grammar_from_json_schema(text, {"whitespace_pattern": WHITESPACE} if is_object else None)
        except ValueError as error:
            raise _wrong(structured, str(error)) from error
    if structured.kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if any(found[1] for found in _TEMPERATURE.finditer(text)):
        raise _wrong(structured, "a rule has a temperature, which belongs to the request")
    return json.dumps({"grammars": [{"lark_grammar": text}]})  # or else a text that begins with { would be no Lark


def _wrong(structured: Structured, reason: str) -> InputError:
    return InputError(
        f"structured.grammar = {textwrap.shorten(structured.grammar, 80)!r} cannot be served as {structured.kind} "
        f"({textwrap.shorten(reason, 300)}). Allowed: what llguidance compiles. Correct it."
    )
