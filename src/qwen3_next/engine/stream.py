"""The text of a request as it grows: whole characters, stop strings, the end of a grammar; and what is told of it."""

from dataclasses import dataclass, field

from qwen3_next.engine.grammar import GrammarState
from qwen3_next.engine.request import Request, RequestOutput
from qwen3_next.engine.sampler import Drawn
from qwen3_next.engine.speculative import Verdict
from qwen3_next.engine.text import Characters, StopStrings
from qwen3_next.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where the text of one step comes from.

    Attributes:
        lengths: of each new token, how many characters of the text became visible with it.
        accepted: how many of these tokens, from the first on, are drafts of the MTP layer that were accepted.
        rejected: drafts that came to nothing: wrong, behind a wrong one, or behind the end of the text.
    """

    lengths: tuple[int, ...]
    accepted: int
    rejected: int


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one step did for a request.

    Attributes:
        state: tokens, the reason of the end, counts.
        text: what may be shown now; nothing of a stop string, and no half of a character.
        step: which tokens brought this text; what was held back until the end of the answer is in none of its lengths.
        logprobs: of the new tokens, where they were asked for.
        prompt_logprobs: of every token of the prompt, where they were asked for: told once, in the first output. The
            first token has none.
    """

    state: RequestOutput
    text: str
    step: Step
    logprobs: tuple[Drawn, ...]
    prompt_logprobs: tuple[Drawn, ...]


@dataclass(eq=False)
class Stream:
    """What the engine knows of a request beside the scheduler."""

    seed: int
    characters: Characters
    stops: StopStrings
    grammar: GrammarState | None
    prompt_logprobs: list[Drawn]
    text: str = ""
    lengths: list[int] = field(default_factory=list[int])
    drafts: tuple[int, ...] = ()
    logprobs: list[Drawn] = field(default_factory=list[Drawn])
    error: InputError | None = None

    def push(self, request: Request, verdict: Verdict, ends: frozenset[int]) -> tuple[tuple[int, ...], bool]:
        """Add accepted tokens to the text, up to the one that ends it; return these, and whether one does.

        Args:
            ends: the model's own end tokens.

        Raises:
            InputError: the grammar needs more than a step may compute.
        """
        params = request.params
        ends = frozenset({*params.stop_token_ids, *(() if params.ignore_eos else ends)})
        for count, (token, drawn) in enumerate(zip(verdict.tokens, verdict.accepted, strict=True), 1):
            is_over = self._accept(token)
            self.logprobs.append(drawn)
            shown = len(self.text)
            if token not in ends:
                text = self.characters.push(token)
                may_stop = request.output_length + count >= params.min_tokens
                self.text += self.stops.push(text) if may_stop else text
            self.lengths.append(len(self.text) - shown)
            is_over |= self.stops.found
            if token in ends or is_over:
                return verdict.tokens[:count], is_over
        return verdict.tokens, False

    def _accept(self, token: int) -> bool:
        """Go on by the grammar, where there is one. True: it ends there."""
        if self.error is not None:
            raise self.error
        if self.grammar is None:
            return False
        self.grammar.accept(token)
        return self.grammar.is_finished
