"""Speculative decoding: the MTP layer proposes tokens, the network's own choice at each of them is the verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile, zip_longest

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.engine.batch import copy_pages_, integers, page_table
from qwen3_next.engine.config import Division
from qwen3_next.engine.graphs import Call, Graphs
from qwen3_next.engine.plan import Plan, ScheduledSequence
from qwen3_next.engine.runner import Computed
from qwen3_next.engine.sampler import Draw, Drawn
from qwen3_next.model.bare import BareCausalLM
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.model.packed_cache import PackedCache, PackedMemory
from qwen3_next.ops.pages import PAGE
from qwen3_next.ops.segments import Segments

MOST_LATE_TOKENS = 8192
"""How many tokens may wait for the MTP layer while nobody wants drafts; it reads them together, which is cheaper."""

Choose = Callable[[Float[Tensor, "R V"], Sequence[Draw]], list[int | None]]
"""The token of each row of logits; None where they are not finite."""


@dataclass(frozen=True)
class Verdict:
    """What a sequence that sampled commits.

    Attributes:
        draw: of its first row.
        accepted: empty where that row's logits were not finite.
    """

    draw: Draw
    accepted: tuple[Drawn, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of what was accepted."""
        return tuple(one.token for one in self.accepted if one.token is not None)


def verify(rows: Sequence[Drawn], drafts: Sequence[int]) -> tuple[Drawn, ...]:
    """The tokens that a step commits: drafts as far as they are what was drawn in their place, and one token more.

    Args:
        rows: one more than drafts; row i was drawn from the model's distribution given the drafts before it.

    This is rejection sampling of a proposal that is certain (Leviathan, Kalman, Matias 2023, arXiv:2211.17192, section
    2.3, with q one at the draft): a draft x is accepted with probability p(x), for the draw is x so often; otherwise
    the token is the draw given that it is not x, which is the residual distribution. So tokens have the model's
    distribution whatever is proposed. More than that, each is the very token that would have been drawn without drafts,
    since random numbers are a function of seed and position.

    Rows whose logits are not finite end the run; the result is empty where the first one is such.
    """
    accepted: list[Drawn] = []
    for one, draft in zip_longest(rows, drafts):
        if one.token is None:
            break
        accepted.append(one)
        if one.token != draft:
            break
    return tuple(accepted)


@dataclass(frozen=True, eq=False)
class _Reading:
    """What the MTP layer reads of a sequence: each pair of a state and the token that follows it.

    Attributes:
        start: position of the first state.
        hidden: the states, piece by piece, each rows of what a call computed; the network's, or in a chain the layer's.
        following: as many tokens.
        draw: of the token behind the last one that follows; None where nothing was sampled, and nothing is drafted.
        drafts: those made so far.
    """

    sequence: ScheduledSequence
    start: int
    hidden: tuple[Float[Tensor, "s D"], ...]
    following: tuple[int, ...]
    draw: Draw | None
    drafts: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.sequence.request.request_id

    @property
    def end(self) -> int:
        """Position behind the last state."""
        return self.start + len(self.following)

    @property
    def most_drafts(self) -> int:
        """How many more are wanted, where the sequence has pages for the keys of the pairs before them."""
        room = len(self.sequence.pages) * PAGE - self.end + 1
        return 0 if self.draw is None else max(0, min(self.sequence.next_drafts - len(self.drafts), room))

    @property
    def may_draft(self) -> bool:
        """Whether a further one is."""
        return self.most_drafts > 0

    def behind(self, late: "_Reading | None") -> "_Reading":
        """This one behind the one that was left for later, if it goes on from there and did not start again since."""
        if late is None or late.end != self.start or self.sequence.state_copy is not None:
            return self
        following = late.following + self.following
        return replace(self, start=late.start, hidden=late.hidden + self.hidden, following=following)

    def chained(self, hidden: Float[Tensor, "D"], token: int) -> "_Reading":
        """The next link: the layer's own state, and the token that it proposed."""
        assert self.draw is not None
        draw = replace(self.draw, ahead=(*self.draw.ahead, token))
        return _Reading(self.sequence, self.end, (hidden[None],), (token,), draw, (*self.drafts, token))


@dataclass(eq=False)
class Drafter:
    """The MTP layer behind the network, with keys and values of its own in pages of the same numbers.

    The pair at position p is the network's state of token p and the embedding of token p + 1. It is read once token
    p + 1 is committed, and written over what a draft left there; so the first draft sees committed pairs alone, and
    each further one those and its own chain, as in training (`chained_attention`).

    The pair at the last position of a page that sequences share belongs to whoever wrote it, who may have gone on with
    another token; and what a request left for later when it ended is never written. Both can make drafts worse, or not
    finite, which makes none; what is written stays the same, since a draft is never believed.

    Attributes:
        choose: as the verdict will, with the same random numbers: so they agree more often.
        most_few: pairs of a sequence that a graph holds: those of a step.
        greedy: the same of rows that are plain, which stays on the device.
        graphs: of a few pairs for each sequence; None on a CPU.
    """

    model: BareCausalLM
    memory: PackedMemory
    choose: Choose
    greedy: Callable[[Float[Tensor, "R V"]], Int[Tensor, "R"]]
    most_few: int
    graphs: Graphs | None = None
    _late: dict[str, _Reading] = field(default_factory=dict[str, _Reading])

    @classmethod
    def allocate(
        cls,
        model: BareCausalLM,
        division: Division,
        choose: Choose,
        greedy: Callable[[Float[Tensor, "R V"]], Int[Tensor, "R"]],
    ) -> "Drafter":
        """With memory for all pages."""
        weight = model.lm_head.weight
        memory = PackedMemory.allocate(
            model.config,
            pages=division.pages,
            slots=0,
            layer_types=("full_attention",),
            dtype=weight.dtype,
            device=weight.device,
        )
        drafter = cls(model, memory, choose, greedy, 1 + division.drafts)
        if weight.is_cuda:
            limits, width = division.limits, model.config.hidden_size
            pages = division.pages_of_a_sequence
            drafter.graphs = Graphs(drafter._compute, memory, most=limits.max_sequences, pages=pages, width=width)
        return drafter

    @torch.inference_mode()
    def draft(self, plan: Plan, computed: Computed, verdicts: Mapping[str, Verdict]) -> dict[str, tuple[int, ...]]:
        """Read what a call commits, and propose what follows; fewer than the plan says where there is no room.

        Args:
            verdicts: by request, of those that sampled.
        """
        copy_pages_(plan, self.memory)
        readings = self._readings(plan, computed, verdicts)
        waiting = {**self._late, **{reading.name: reading for reading in readings}}
        tokens = sum(len(reading.following) for reading in waiting.values())
        if not any(reading.may_draft for reading in readings) and tokens <= MOST_LATE_TOKENS:
            self._late = waiting
            return {}
        for reading in readings:
            self._late.pop(reading.name, None)
        return self._chain(readings)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._late.pop(request_id, None)

    def _readings(self, plan: Plan, computed: Computed, verdicts: Mapping[str, Verdict]) -> list[_Reading]:
        readings: list[_Reading] = []
        for sequence, row in zip(plan, computed.batch.inputs.segments.starts, strict=True):
            verdict = verdicts.get(sequence.request.request_id)
            drawn = () if verdict is None else verdict.tokens
            if sequence.samples and not drawn:
                continue  # it failed
            count = len(drawn) if sequence.awaits_verdict else sequence.length
            known = sequence.request.tokens[sequence.start + 1 : sequence.start + 1 + count]
            hidden, following = (computed.hidden[row : row + count],), (*known, *drawn)[:count]
            draw = None if verdict is None else replace(verdict.draw, ahead=drawn, allowed=None)
            reading = _Reading(sequence, sequence.start, hidden, following, draw)
            readings.append(reading.behind(self._late.get(reading.name)))
        return readings

    def _chain(self, readings: list[_Reading]) -> dict[str, tuple[int, ...]]:
        """Read, propose, and read what was proposed, until nobody wants more."""
        drafts: dict[str, tuple[int, ...]] = {}
        if all(one.draw is not None and one.draw.is_plain for one in readings):
            return self._chain_greedily(readings)
        while readings:
            states, logits = self._read(readings)
            going = [(row, one, one.draw) for row, one in enumerate(readings) if one.may_draft and one.draw is not None]
            is_whole, readings = len(going) == len(readings), []
            if going:
                rows = logits if is_whole else logits[integers([row for row, _, _ in going], logits.device).long()]
                for (row, one, _), token in zip(going, self.choose(rows, [draw for *_, draw in going]), strict=True):
                    if token is not None:
                        link = one.chained(states[row], token)
                        drafts[one.name] = link.drafts
                        readings += [link] * link.may_draft
        return drafts

    def _chain_greedily(self, readings: list[_Reading]) -> dict[str, tuple[int, ...]]:
        """The same where the host need not look at each token: it waits once for all of them.

        All chains are as long as the longest; what one writes beyond its own pages goes to the reserved one.
        """
        most = max(one.most_drafts for one in readings)
        states, logits = self._read(readings)
        tokens = [self.greedy(logits)]
        device, ends = self.memory.keys.device, [one.end for one in readings]
        segments, positions = Segments.uniform(len(readings), 1, device), integers(ends, device)
        table = page_table([one.sequence for one in readings], device, max(ends) + most)
        rows, slots = torch.arange(len(readings), device=device), torch.zeros_like(positions)
        for link in range(most - 1):
            inputs = PackedInputs(tokens[-1].clamp(min=0), (positions + link).long(), segments)
            cache = PackedCache(self.memory, table=table, lengths=positions + link + 1, slots=slots)
            call = Call(inputs, cache, states, rows)
            states, logits = self._compute(call) if self.graphs is None else self.graphs.run(call)
            tokens.append(self.greedy(logits))
        chains: list[list[int]] = torch.stack(tokens, dim=1).tolist()
        return {
            one.name: tuple(takewhile(lambda token: token >= 0, chain[: one.most_drafts]))
            for one, chain in zip(readings, chains, strict=True)
            if one.most_drafts
        }

    def _read(self, readings: list[_Reading]) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N V"]]:
        """One call of the layer: its states and their logits at the last pair of each sequence."""
        device, counts = self.memory.keys.device, [len(one.following) for one in readings]
        lengths, is_few = counts, max(counts) <= self.most_few
        if self.graphs is not None and is_few:  # pairs behind the last one are written over before they are read
            lengths = [1 if max(counts) == 1 else self.most_few] * len(counts)
        segments = Segments.from_lengths(lengths, device)
        ends = [one.start + length for one, length in zip(readings, lengths, strict=True)]
        places = [place for one, end in zip(readings, ends, strict=True) for place in range(one.start, end)]
        spare = list(
            zip(readings, (length - count for length, count in zip(lengths, counts, strict=True)), strict=True)
        )
        following = integers([token for one, more in spare for token in (*one.following, *(0,) * more)], device)
        hidden = torch.cat(
            [piece for one, more in spare for piece in (*one.hidden, one.hidden[0][:1].expand(more, -1))]
        )
        cache = PackedCache(
            self.memory,
            table=page_table([one.sequence for one in readings], device, max(ends)),
            lengths=integers(ends, device),
            slots=integers([0] * len(readings), device),
            known_lengths=tuple(ends),
        )
        rows = [start + count - 1 for start, count in zip(segments.starts, counts, strict=True)]
        inputs = PackedInputs(following.long(), integers(places, device).long(), segments)
        call = Call(inputs, cache, hidden, integers(rows, device).long())
        return self._compute(call) if self.graphs is None or not is_few else self.graphs.run(call)

    def _compute(self, call: Call) -> tuple[Tensor, Tensor]:
        assert self.model.mtp is not None
        assert call.hidden is not None
        assert call.inputs.token_ids is not None
        network = self.model.model
        embeddings = network.embed_tokens(call.inputs.token_ids)
        rotary = network.rotary_emb(call.hidden, call.inputs.positions)
        states = self.model.mtp(embeddings, call.hidden, call.inputs, rotary, call.cache).hidden[call.rows]
        return states, self.model.lm_head(states)
