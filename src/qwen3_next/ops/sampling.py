"""From logits to one token: the repetition penalty, the temperature, and the sets that a token may be drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The defaults draw from the model's own distribution.

    The steps come in transformers' order: penalty, temperature, top-k, top-p, min-p; each renormalises what is left.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens, and those as likely as the last of them; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities reach p (Holtzman et al. 2019,
            arXiv:1904.09751).
        min_p: drop what is less likely than min_p times the likeliest token (Nguyen et al. 2024, arXiv:2407.01082).
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that are already in the
            text, prompt included (Keskar et al. 2019, arXiv:1909.05858); 1 changes nothing.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or a number above")
        _require("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or a number of tokens")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1 (all tokens)")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "0 (all tokens) to 1")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 0 < penalty < float("inf"), "above 0; 1 changes nothing")


def sample(
    logits: Float[Tensor, "V"],
    seen: Sequence[int],
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> int:
    """Choose the next token.

    Args:
        logits: of the next token; -inf for one that must not come.
        seen: the tokens of the text so far, for the repetition penalty.
        generator: of the random numbers, on the logits' device; None takes torch's own.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        logits = penalize_repetition(
            logits, torch.tensor(seen, dtype=torch.long, device=logits.device), sampling.repetition_penalty
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(distribution(logits, sampling), 1, generator=generator))


def penalize_repetition(logits: Float[Tensor, "V"], seen: Int[Tensor, "T"], penalty: float) -> Float[Tensor, "V"]:
    """Make the tokens `seen` less likely for a penalty above 1: logits l > 0 become l / penalty, others l * penalty."""
    old = logits[seen]
    return logits.index_put((seen,), torch.where(old > 0, old / penalty, old * penalty))


def distribution(logits: Float[Tensor, "*B V"], sampling: Sampling) -> Float[Tensor, "*B V"]:
    """The probabilities to draw from, for a temperature above 0."""
    logits = logits.float()
    # The likeliest token first comes to 0, which no temperature, however low, divides into infinity.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return logits.softmax(dim=-1)


def keep_top_k(logits: Float[Tensor, "*B V"], k: int) -> Float[Tensor, "*B V"]:
    """Set everything below the k-th largest logit to -inf."""
    last = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < last, -torch.inf)


def keep_top_p(logits: Float[Tensor, "*B V"], p: float) -> Float[Tensor, "*B V"]:
    """Set to -inf every token whose likelier ones already reach the probability p."""
    probabilities, order = logits.softmax(dim=-1).sort(descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = (before >= p).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -torch.inf)


def keep_min_p(logits: Float[Tensor, "*B V"], min_p: float) -> Float[Tensor, "*B V"]:
    """Set every token less likely than `min_p` times the likeliest to -inf."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def _require(name: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:
        raise InputError(f"{name} = {value} cannot be served. Allowed: {allowed}.")
