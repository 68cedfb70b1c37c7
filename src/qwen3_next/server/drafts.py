"""An update of a stream, cut where accepted drafts and the network's own tokens meet: one sees which is which."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qwen3_next.engine import StreamUpdate


@dataclass(frozen=True)
class Origin:
    """Where the tokens of a piece come from: all of them are accepted drafts, or none is.

    Attributes:
        accepted: as many as tokens, or 0.
        rejected: drafts that came to nothing in the step that the piece ends.
    """

    tokens: int = 0
    accepted: int = 0
    rejected: int = 0


def cut(update: StreamUpdate) -> Iterator[tuple[StreamUpdate, Origin]]:
    """The same update in pieces.

    Text belongs to the token with which it became visible: one that completes a character brings the whole of it, one
    that shows a beginning to be no stop string brings that too. What was held back until the end goes with the last
    piece.
    """
    runs = list(_runs(update)) or [(0, Origin())]
    character, token = 0, 0
    for place, (length, origin) in enumerate(runs, 1):
        is_last = place == len(runs)
        tokens = slice(token, token + origin.tokens)
        piece = replace(
            update,
            text=update.text[character : None if is_last else character + length],
            token_ids=update.token_ids[tokens],
            logprobs=None if update.logprobs is None else update.logprobs[tokens],
            finish=update.finish if is_last else None,
        )
        yield piece, origin
        character, token = character + length, token + origin.tokens


def _runs(update: StreamUpdate) -> Iterator[tuple[int, Origin]]:
    """The characters of each run of tokens of one origin."""
    for step in update.steps:
        drafts, own = step.lengths[: step.accepted], step.lengths[step.accepted :]
        if drafts:
            yield sum(drafts), Origin(len(drafts), len(drafts), 0 if own else step.rejected)
        if own:
            yield sum(own), Origin(len(own), 0, step.rejected)
