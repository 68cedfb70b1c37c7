"""Text in, text out, a token at a time: one sequence that grows, and the pieces of its text that are ready to show."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qwen3_next.engine.text import Characters, StopStrings
from qwen3_next.errors import BackendError, CheckpointError, InputError
from qwen3_next.model.bare import SequenceCache
from qwen3_next.ops.sampling import Sampling, sample

if TYPE_CHECKING:
    from qwen3_next.engine.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The options of the command line; None where nothing was said."""

    greedy: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def resolve(self, generation: Mapping[str, Any]) -> Sampling:
        """Complete the options from a generation_config.json. Any option that concerns drawing asks for drawing.

        Raises:
            InputError: a value outside its range, or an option that greedy choice would leave without effect.
        """
        drawing = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        given = {name: value for name, value in drawing.items() if value is not None}
        penalty = _or(self.repetition_penalty, generation.get("repetition_penalty"), 1.0)
        greedy = self.greedy or self.temperature == 0
        idle = [f"--{name.replace('_', '-')}" for name, value in given.items() if value != 0 or name != "temperature"]
        if greedy and idle:
            raise InputError(f"{', '.join(idle)} has no effect on greedy choice; leave it out, or draw.")
        if greedy or not (given or generation.get("do_sample", False)):
            return Sampling(temperature=0, repetition_penalty=penalty)
        defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        values = {name: _or(drawing[name], generation.get(name), default) for name, default in defaults.items()}
        return Sampling(**values, repetition_penalty=penalty)


@dataclass
class Speed:
    """When tokens came. Times are seconds of `time.perf_counter`."""

    prompt_tokens: int = 0
    tokens: int = 0
    first: float = field(default=0.0)
    last: float = field(default=0.0)

    def count(self) -> None:
        """A token has come."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first one over the time they took; 0 where there is no second token."""
        return (self.tokens - 1) / (self.last - self.first) if self.tokens > 1 else 0.0


class Writer:
    """One growing sequence: its tokens, and the cache of those that the model has read.

    A later `write` continues from the cache, so nothing is computed twice.
    """

    def __init__(self, loaded: "LoadedModel", sampling: Sampling, seed: int | None = None) -> None:
        self.loaded, self.sampling = loaded, sampling
        self.generator = torch.Generator(loaded.device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self.token_ids: list[int] = []
        self.cache = SequenceCache()
        self.speed = Speed()

    @property
    def context(self) -> int:
        """How many tokens the model serves, scaling of the rotary embedding included."""
        return self.loaded.config.context_length()

    def read(self, text: str) -> None:
        """Append text; the model reads it with the next `write`.

        Raises:
            CheckpointError: the tokenizer's ids are not below the model's vocab_size.
            InputError: nothing to read, text that is not Unicode, or no room for an answer in the context.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode ({error.reason}); give it in UTF-8.") from error
        added = self.loaded.tokenizer.encode(text, add_special_tokens=False).ids
        if not added:
            raise InputError("the prompt is empty; the model needs at least one token to continue.")
        if max(added) >= (vocab_size := self.loaded.config.vocab_size):
            raise CheckpointError(
                f"the tokenizer gives the id {max(added)}, which is not below the model's vocab_size {vocab_size}; put "
                "the model's own tokenizer.json into its directory."
            )
        total = len(self.token_ids) + len(added)
        if total >= self.context:
            raise InputError(
                f"{total} tokens leave no room in the context of {self.context} tokens; shorten the text"
                f"{', or begin anew with /reset' if self.token_ids else ''}."
            )
        self.token_ids += added
        self.speed = Speed(prompt_tokens=len(added))

    def drop_unread_end(self) -> None:
        """Take back the end token of the last `write`, so that the text can go on otherwise."""
        if len(self.token_ids) > self.cache.length and self.token_ids[-1] in self.loaded.eos_ids:
            self.token_ids.pop()

    def write(self, max_tokens: int, stops: Sequence[str] = ()) -> Iterator[str]:
        """Yield the text that follows in whole characters, up to an end token, a stop string or the context's end.

        Raises:
            InputError: a stop string is empty.
            BackendError: the device has not enough memory.
        """
        if not all(stops):
            raise InputError("--stop '' would end every text at once; give at least one character.")
        characters, held = Characters(self.loaded.tokenizer), StopStrings(stops)
        for token in self._tokens(max_tokens):
            if text := held.push(characters.push(token)):
                yield text
            if held.found:
                return
        if rest := held.push(characters.finish()) + held.finish():
            yield rest

    def _tokens(self, max_tokens: int) -> Iterator[int]:
        room = self.context - len(self.token_ids)
        for _ in range(min(max_tokens, room)):
            token = self._next_token()
            self.speed.count()
            self.token_ids.append(token)
            if token in self.loaded.eos_ids:
                return
            yield token

    def _next_token(self) -> int:
        try:
            unread = torch.tensor(self.token_ids[self.cache.length :], device=self.loaded.device)
            logits = self.loaded.model(unread, self.cache)
            # The rows of the head beyond the tokenizer only fill it up to a round size.
            known = logits[: self.loaded.tokenizer.get_vocab_size()]
            return sample(known, self.token_ids, self.sampling, self.generator)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"{len(self.token_ids)} tokens do not fit the memory of {self.loaded.device} beside the weights; "
                "shorten the text, or use --device cpu."
            ) from error


def _or(*values: Any) -> Any:
    """The first value that was given."""
    return next(value for value in values if value is not None)
