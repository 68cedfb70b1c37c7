"""Log-probabilities of the tokens of prompts, from the hidden rows of their chunks, the logits of a few at a time."""

from collections.abc import Callable, Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from qwen3_next.engine.plan import Plan
from qwen3_next.engine.sampler import Drawn, logprobs_of

PIECE = 256
"""Rows whose logits are held at once; at the published vocabulary they take 156 MB."""


def prompt_scores(
    hidden: Float[Tensor, "T D"],
    plan: Plan,
    head: Callable[[Float[Tensor, "R D"]], Float[Tensor, "R V"]],
    known: int,
) -> dict[str, tuple[Drawn, ...]]:
    """By the ids of the requests that ask for them: what the chunks of a call say of the prompt's tokens.

    A chunk `[start, end)` says it of the tokens at `[start + 1, end + 1)`, as far as they belong to the prompt.

    Args:
        hidden: of all tokens of the plan, one sequence after the other.
        known: ids from here on only fill up the head; they have no probability.
    """
    scores: dict[str, tuple[Drawn, ...]] = {}
    first = 0
    for sequence in plan:
        request, wanted = sequence.request, sequence.request.params.prompt_logprobs
        # A request that starts again with some output has been told.
        if wanted is not None and request.output_length == 0:
            targets = request.prompt[sequence.start + 1 : sequence.end + 1]
            rows = hidden[first : first + len(targets)]
            pieces = _pieces(rows, targets, head, known, wanted)
            scores[request.request_id] = tuple(drawn for piece in pieces for drawn in piece)
        first += sequence.length
    return scores


def _pieces(
    hidden: Float[Tensor, "R D"],
    targets: Sequence[int],
    head: Callable[[Float[Tensor, "R D"]], Float[Tensor, "R V"]],
    known: int,
    wanted: int,
) -> Iterator[list[Drawn]]:
    for start in range(0, len(targets), PIECE):
        piece = slice(start, start + PIECE)
        yield logprobs_of(head(hidden[piece])[:, :known].float(), targets[piece], wanted)
