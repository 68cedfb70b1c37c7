"""How many drafts a step should try, from what was accepted and what steps cost. No torch."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from qwen3_next.engine.plan import Plan, SequenceResult

PERIOD, TRIAL = 256, 4
"""Every so many steps, a number of drafts is tried for so many: the first is on the way there, the others are timed."""

WORTH_IT = 1.03
"""Drafts must promise so much more than none, since both figures are measured."""

_MEMORY, _TIMES = 0.998, 5


@dataclass(frozen=True)
class Tally:
    """How many drafts were proposed, and how many of them were written."""

    proposed: int
    accepted: int

    def __str__(self) -> str:
        return f"{self.accepted:,} of {self.proposed:,} ({self.accepted / max(self.proposed, 1):.0%})"


@dataclass(frozen=True, kw_only=True)
class DraftFigures:
    """What became of drafts since the start.

    Attributes:
        by_position: of the first, second, ... draft of a step; one is accepted only after all before it.
        by_depth: by the tokens before the step, from this number to below its double.
    """

    by_position: tuple[Tally, ...]
    by_depth: Mapping[int, Tally]

    def __str__(self) -> str:
        places = ", ".join(f"draft {n} {tally}" for n, tally in enumerate(self.by_position, 1))
        depths = ", ".join(f"from {depth:,} tokens on {tally}" for depth, tally in self.by_depth.items())
        return f"accepted by position: {places or 'none'}; by depth: {depths or 'none'}"


@dataclass(eq=False)
class _Costs:
    """Of steps with about the same number of sequences: by drafts, the last few times, of which the middle one counts.

    Any of them may hold a compilation or a pause of the machine. When the machine slows down, the number in use looks
    worse than the others until these have been timed as well, and then all are compared anew.
    """

    steps: int = 0
    seconds: dict[int, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=_TIMES)))


@dataclass(eq=False)
class DraftPolicy:
    """Chooses the number of drafts whose steps write the most tokens per second, which may be none.

    A step with k drafts writes 1 + a_1 + ... + a_k tokens, where a_i is how often the i-th one is accepted; what it
    costs is measured for each k and each power of two of sequences. Each number is tried when such steps begin and
    again from time to time, which is what drafts can cost where they do not help.

    Attributes:
        most: drafts of a step.
        is_fixed: always choose `most`.
    """

    most: int
    is_fixed: bool
    _counts: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    _depths: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    _recent: dict[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])
    _costs: dict[int, _Costs] = field(default_factory=dict[int, _Costs])

    def choose(self, sequences: int) -> int:
        """Drafts per step for the next call with so many sequences."""
        if self.is_fixed:
            return self.most
        costs = self._costs.setdefault(sequences.bit_length(), _Costs())
        turn, place = divmod(costs.steps, PERIOD)
        if turn == 0 and place < TRIAL * (self.most + 1):
            return place // TRIAL
        if turn > 0 and place < TRIAL:
            return turn % (self.most + 1)
        if 0 not in costs.seconds:
            return 0
        speeds = {k: self._tokens(k) / median(times) / (WORTH_IT if k else 1) for k, times in costs.seconds.items()}
        return max(speeds, key=lambda k: (speeds[k], -k))

    def learn(self, plan: Plan, results: Sequence[SequenceResult], seconds: float) -> None:
        """What a call wrote, and how long it took."""
        steps = [(s, r) for s, r in zip(plan, results, strict=True) if s.awaits_verdict and r.error is None]
        for sequence, result in steps:
            for place in range(sequence.drafts):
                is_accepted = place + 1 < len(result.tokens)
                proposed, accepted = self._recent.get(place, (0.0, 0.0))
                self._recent[place] = proposed * _MEMORY + 1, accepted * _MEMORY + is_accepted
                for counts, key in ((self._counts, place), (self._depths, sequence.start.bit_length())):
                    counts["proposed", key] += 1
                    counts["accepted", key] += is_accepted
        if steps and len(steps) == len(plan):
            costs = self._costs.setdefault(len(plan).bit_length(), _Costs())
            costs.steps += 1
            # Ends of pages and of requests leave a few sequences with fewer.
            drafts = round(sum(sequence.drafts for sequence, _ in steps) / len(steps))
            if all(sequence.next_drafts == drafts for sequence, _ in steps):
                costs.seconds[drafts].append(seconds)

    @property
    def figures(self) -> DraftFigures:
        """Since the start."""
        depths = {2 ** (depth - 1) if depth else 0: tally for depth, tally in _tallies(self._depths)}
        return DraftFigures(by_position=tuple(tally for _, tally in _tallies(self._counts)), by_depth=depths)

    def _tokens(self, drafts: int) -> float:
        recent = (self._recent.get(place, (0.0, 0.0)) for place in range(drafts))
        return 1 + sum(accepted / max(proposed, 1) for proposed, accepted in recent)


def _tallies(counts: Counter[tuple[str, int]]) -> Iterator[tuple[int, Tally]]:
    for key in sorted({key for _, key in counts}):
        yield key, Tally(counts["proposed", key], counts["accepted", key])
