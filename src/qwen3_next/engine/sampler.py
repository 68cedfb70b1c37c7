"""From logits to tokens, for many sequences at once, each by its own parameters and its own random numbers."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qwen3_next.engine.request import Request, SamplingParams
from qwen3_next.ops.segments import to_device

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 2**64 - 1


@dataclass(frozen=True)
class Draw:
    """One row of logits and whose it is.

    Attributes:
        request: its tokens, and those `ahead`, are what penalties count.
        seed: of its random numbers.
        allowed: the only tokens that may come, on the host; None for all.
        ahead: tokens between the committed ones and the row: drafts before it.
    """

    request: Request
    seed: int
    allowed: Bool[Tensor, "V"] | None = None
    ahead: tuple[int, ...] = ()

    @property
    def position(self) -> int:
        """Of the token that is to be chosen."""
        return len(self.request.tokens) + len(self.ahead)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token comes, whatever it is; so it stays for tokens further on."""
        return self.request.params.temperature == 0 and self.allowed is None and self.may_end and not _changes(self)

    @property
    def may_end(self) -> bool:
        """Whether the output has its `min_tokens`."""
        return self.request.output_length + len(self.ahead) >= self.request.params.min_tokens


@dataclass(frozen=True)
class Drawn:
    """What came of a row.

    Attributes:
        token: None where the logits were not finite.
        logprob: of the token, by the model's own distribution; None where it was not asked for, and for the first token
            of a prompt, which has none.
        top_logprobs: of the likeliest tokens, the likeliest first.
    """

    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Choice:
    """What the device chooses, while the host may do something else.

    Attributes:
        draws: of each row.
        tokens: of each row; -1 where the logits are not finite.
        scores: of the rows that ask for log-probabilities, in their order: of the token, of the likeliest tokens, and
            which these are.
    """

    draws: Sequence[Draw]
    tokens: Int[Tensor, "R"]
    scores: tuple[Float[Tensor, "S"], Float[Tensor, "S K"], Int[Tensor, "S K"]] | None
    _copies: "tuple[Tensor, ...]"
    _is_copied: torch.cuda.Event | None

    @classmethod
    def of(cls, draws: Sequence[Draw], tokens: Int[Tensor, "R"], raw: Float[Tensor, "R V"]) -> "Choice":
        """Begin to copy it to the host."""
        rows = [row for row, one in enumerate(draws) if one.request.params.logprobs is not None]
        scores = None
        if rows:
            index = _integers(rows, raw.device)
            wanted = max(one.request.params.logprobs or 0 for one in draws)
            scores = _scores(raw[index], tokens[index].clamp(min=0), wanted)
        copies = tuple(tensor.to("cpu", non_blocking=True) for tensor in (tokens, *(scores or ())))
        event = None
        if raw.is_cuda:
            event = torch.cuda.Event()
            event.record()
        return cls(draws, tokens, scores, copies, event)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Where the token of each request is, by its id; where there are drafts, of the row behind them."""
        return {one.request.request_id: row for row, one in enumerate(self.draws)}

    def drawn(self) -> list[Drawn]:
        """Wait for it."""
        if self._is_copied is not None:
            self._is_copied.synchronize()
        ids, *scores = (copy.tolist() for copy in self._copies)
        told = iter(zip(*scores, strict=True))
        result: list[Drawn] = []
        for token, one in zip(ids, self.draws, strict=True):
            wanted = one.request.params.logprobs
            token = None if token < 0 else token
            if wanted is None:
                result.append(Drawn(token))
                continue
            own, values, likeliest = next(told)
            tops = tuple(zip(likeliest[:wanted], values[:wanted], strict=True))
            result.append(Drawn(None) if token is None else Drawn(token, own, tops))
        return result


@torch.no_grad()
def draw(
    logits: Float[Tensor, "R V"],
    draws: Sequence[Draw],
    known: int,
    ends: frozenset[int],
    agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> Choice:
    """One token for each row; a row's token depends on nothing but that row and its `Draw`.

    Args:
        known: ids from here on only fill up the head, and never come.
        ends: the model's own end tokens, which do not come before a request's `min_tokens`.
        agree: makes the tokens, on the device, those of all ranks.
    """
    raw = logits[:, :known].float()
    return Choice.of(draws, _chosen(raw, draws, ends, agree), raw)


@torch.no_grad()
def choose(
    logits: Float[Tensor, "R V"],
    draws: Sequence[Draw],
    known: int,
    ends: frozenset[int],
    agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> list[int | None]:
    """The tokens of `draw` alone."""
    tokens: list[int] = _chosen(logits[:, :known].float(), draws, ends, agree).tolist()
    return [None if token < 0 else token for token in tokens]


@torch.no_grad()
def likeliest(
    logits: Float[Tensor, "R V"], known: int, agree: Callable[[Tensor], Tensor] = lambda tokens: tokens
) -> Int[Tensor, "R"]:
    """What `choose` chooses of rows that are `is_plain`, on the device; -1 where the logits are not finite."""
    logits = logits[:, :known]
    return agree(logits.argmax(dim=1).where(logits.isfinite().all(dim=1), -1))


def uniform(seed: int, position: int) -> float:
    """A random number in [0, 1) that depends on the seed of a request and a position alone.

    Two rounds of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
    """
    return (_mixed(_mixed(seed & _WORD) ^ position) >> 11) / 2**53


def _mixed(word: int) -> int:
    word = (word + _GOLDEN) & _WORD
    word = ((word ^ (word >> 30)) * _FIRST) & _WORD
    word = ((word ^ (word >> 27)) * _SECOND) & _WORD
    return word ^ (word >> 31)


def _chosen(
    raw: Float[Tensor, "R V"], draws: Sequence[Draw], ends: frozenset[int], agree: Callable[[Tensor], Tensor]
) -> Int[Tensor, "R"]:
    """The token of each row; -1 where the logits are not finite."""
    is_sound = raw.isfinite().all(dim=1)
    adjusted = _adjusted(raw, draws, ends)
    chosen = adjusted.argmax(dim=1)
    rows = [row for row, one in enumerate(draws) if one.request.params.temperature > 0]
    if rows:
        index = _integers(rows, raw.device)
        chosen[index] = _drawn(adjusted[index], [draws[row] for row in rows])
    return agree(chosen.where(is_sound, -1))


def _adjusted(raw: Float[Tensor, "R V"], draws: Sequence[Draw], ends: frozenset[int]) -> Float[Tensor, "R V"]:
    """Penalties, biases, and -inf for what may not come; rows without any stay what they are."""
    adjusted = raw.clone() if any(_changes(one) for one in draws) else raw
    for row, one in enumerate(draws):
        params = one.request.params
        if not _changes(one):
            continue
        _penalize_(adjusted[row], one)
        biases = {token: bias for token, bias in params.logit_bias.items() if token < raw.shape[1]}
        if biases:
            ids = _integers(list(biases), raw.device)
            adjusted[row, ids] += to_device(torch.tensor(list(biases.values()), dtype=torch.float32), raw.device)
    masks = [_permitted(one, raw.shape[1], ends) for one in draws]
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if rows:
        index = _integers(rows, raw.device)
        forbidden = to_device(~torch.stack([mask for mask in masks if mask is not None]), raw.device)
        adjusted = adjusted.index_copy(0, index, adjusted[index].masked_fill(forbidden, -math.inf))
    return adjusted


def _changes(one: Draw) -> bool:
    params = one.request.params
    penalties = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    return bool(penalties or params.logit_bias)


def _permitted(one: Draw, size: int, ends: frozenset[int]) -> Bool[Tensor, "V"] | None:
    """What a grammar and `min_tokens` leave, None for all. Where together they leave nothing, the grammar decides."""
    params, is_early = one.request.params, not one.may_end
    # Who ignores ends goes on as long as the grammar lets them, and without one draws ends like any other token.
    are_ends_banned = one.allowed is not None if params.ignore_eos else is_early
    banned = {*(params.stop_token_ids if is_early else ()), *(ends if are_ends_banned else ())}
    if not banned:
        return one.allowed
    permitted = torch.ones(size, dtype=torch.bool) if one.allowed is None else one.allowed.clone()
    permitted[[token for token in banned if token < size]] = False
    return permitted if permitted.any() else one.allowed


def _penalize_(logits: Float[Tensor, "V"], one: Draw) -> None:
    """Repetition counts prompt and output, presence and frequency the output alone."""
    request, params = one.request, one.request.params
    if params.repetition_penalty != 1:
        seen = _integers(sorted({t for t in (*request.tokens, *one.ahead) if t < len(logits)}), logits.device)
        found = logits[seen]
        logits[seen] = torch.where(found > 0, found / params.repetition_penalty, found * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(t for t in (*request.output, *one.ahead) if t < len(logits))
        if counts:
            ids = _integers(list(counts), logits.device)
            times = to_device(torch.tensor(list(counts.values()), dtype=logits.dtype), logits.device)
            logits[ids] -= params.presence_penalty + params.frequency_penalty * times


def _drawn(logits: Float[Tensor, "R V"], draws: Sequence[Draw]) -> Int[Tensor, "R"]:
    """By the inverse of the distribution function, over tokens from the likeliest to the least likely."""
    params, device = [one.request.params for one in draws], logits.device
    # The largest becomes 0 first: beside it any temperature leaves something finite, and the least acts like none.
    scaled = logits.double() - logits.amax(dim=1, keepdim=True)
    scaled = scaled / _column([p.temperature for p in params], device)
    probabilities, tokens = scaled.softmax(dim=1).sort(dim=1, descending=True, stable=True)
    probabilities = torch.where(_kept(probabilities, params), probabilities, 0)
    sums = probabilities.cumsum(dim=1)
    chances = _column([uniform(one.seed, one.position) for one in draws], device)
    places = torch.searchsorted(sums, chances * sums[:, -1:], right=True)
    # Rounding never leads beyond what was kept. Of NaN nothing is: those rows are told apart later.
    last = ((probabilities > 0).sum(dim=1, keepdim=True) - 1).clamp(min=0)
    return tokens.gather(1, places.minimum(last))[:, 0]


def _kept(probabilities: Float[Tensor, "R V"], params: Sequence[SamplingParams]) -> Bool[Tensor, "R V"]:
    """What top-k, top-p and min-p leave of sorted probabilities; the likeliest token always."""
    size, device = probabilities.shape[1], probabilities.device
    places = torch.arange(size, device=device)
    before = probabilities.cumsum(dim=1) - probabilities
    kept = places < _column([p.top_k or size for p in params], device)
    kept &= before < _column([p.top_p for p in params], device)
    kept &= probabilities >= _column([p.min_p for p in params], device) * probabilities[:, :1]
    return kept | (places == 0)


def _column(values: Sequence[float], device: torch.device) -> Float[Tensor, "R 1"]:
    return to_device(torch.tensor(values, dtype=torch.float64), device)[:, None]


def _integers(values: Sequence[int], device: torch.device) -> Int[Tensor, "*N"]:
    return to_device(torch.tensor(values, dtype=torch.long), device)


def _scores(
    logits: Float[Tensor, "R V"], ids: Int[Tensor, "R"], wanted: int
) -> tuple[Float[Tensor, "R"], Float[Tensor, "R K"], Int[Tensor, "R K"]]:
    """Log-probabilities of one token for each row, -inf for an id beyond them; those of the likeliest, and which."""
    size = logits.shape[1]
    sums = logits.logsumexp(dim=1, keepdim=True)
    own = torch.where(ids < size, (logits.gather(1, ids.clamp(max=size - 1)[:, None]) - sums)[:, 0], -math.inf)
    values, likeliest = logits.topk(min(wanted, size), dim=1)
    return own, values - sums, likeliest


def logprobs_of(logits: Float[Tensor, "R V"], tokens: Sequence[int], wanted: int) -> list[Drawn]:
    """What fp32 logits say of one token for each row, and of the likeliest ones."""
    own, values, likeliest = _scores(logits, _integers(tokens, logits.device), wanted)
    tops = zip(likeliest.tolist(), values.tolist(), strict=True)
    return [
        Drawn(token, logprob, tuple(zip(*top, strict=True)))
        for token, logprob, top in zip(tokens, own.tolist(), tops, strict=True)
    ]
