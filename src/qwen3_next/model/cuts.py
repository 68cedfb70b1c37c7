"""Which part of every parameter a rank holds, where one model lies on several devices: shapes alone, no device.

Heads of both mixers are cut over `tp`, experts over `ep` and their width over `tp`; the shared expert, dense layers and
the head over all ranks. What is cut along its outputs is followed by something that is cut along its inputs, whose
partial sums are added up.
"""

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.errors import InputError
from qwen3_next.model.quantize import QUANTIZED
from qwen3_next.ops.quant import FP8_BLOCK

Range = tuple[int, int]
"""From a number to below another."""

_MOST = 64
"""Up to so many ranks a message names those that are allowed."""


@dataclass(frozen=True)
class Cut:
    """What a rank holds of a tensor: along each dimension that is cut, ascending ranges put one behind the other.

    Attributes:
        shape: of the whole.
        ranges: by dimension.
    """

    shape: tuple[int, ...]
    ranges: Mapping[int, tuple[Range, ...]]

    @property
    def columns(self) -> Range:
        """Of the last dimension."""
        first, *others = self.ranges.get(len(self.shape) - 1, ((0, self.shape[-1]),))
        assert not others, "columns are one range"
        return first

    @cached_property
    def rows(self) -> list[Range]:
        """Which rows of the last dimension there are, all leading dimensions flattened."""
        count, height = prod(self.shape[:-2]), self.shape[-2] if len(self.shape) > 1 else 1
        inner = self.ranges.get(len(self.shape) - 2, ()) if len(self.shape) > 1 else ()
        outer = self.ranges.get(0, ()) if len(self.shape) > 2 else ()
        matrices = outer or ((0, count),)
        if not inner:
            return [(first * height, end * height) for first, end in matrices]
        each = [matrix * height for first, end in matrices for matrix in range(first, end)]
        return [(start + first, start + end) for start in each for first, end in inner]

    def kept(self, start: int, end: int) -> Iterator[tuple[Range, int]]:
        """Of the rows from `start` to `end`, which there are, and the number that the first of these has here."""
        place = bisect_right(self.rows, start, key=lambda rows: rows[1])
        while place < len(self.rows) and self.rows[place][0] < end:
            first, last = max(start, self.rows[place][0]), min(end, self.rows[place][1])
            yield (first, last), self._before[place] + first - self.rows[place][0]
            place += 1

    @cached_property
    def _before(self) -> list[int]:
        return list(accumulate((end - first for first, end in self.rows), initial=0))

    def of(self, whole: Tensor) -> Tensor:
        """The part of a tensor, copied."""
        for dimension, ranges in self.ranges.items():
            whole = torch.cat([whole.narrow(dimension, first, end - first) for first, end in ranges], dimension)
        return whole

    def of_scales(self, whole: Tensor) -> Tensor:
        """The scales of the part of a block-fp8 tensor, given those of the whole."""
        last = range(len(self.shape) - 2, len(self.shape))
        ranges = {
            dimension: tuple((first // FP8_BLOCK, -(-end // FP8_BLOCK)) for first, end in found)
            if dimension in last
            else found
            for dimension, found in self.ranges.items()
        }
        return Cut(tuple(whole.shape), ranges).of(whole)


@dataclass(frozen=True)
class Layout:
    """How many ranks share a model, and which of them this one is.

    Attributes:
        tp: over how many the heads are cut, and the width of the experts.
        ep: over how many the experts are cut.
    """

    tp: int = 1
    ep: int = 1
    tp_rank: int = 0
    ep_rank: int = 0

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.tp * self.ep

    @property
    def rank(self) -> int:
        """Of all ranks; those of one `tp_rank` stand together."""
        return self.tp_rank * self.ep + self.ep_rank

    def check(self, config: Qwen3NextConfig, shapes: Mapping[str, tuple[int, ...]], *, fp8: bool) -> None:
        """That the parts of a model are whole heads, experts and, with `fp8`, blocks of scales.

        Args:
            shapes: of the whole parameters, by name.

        Raises:
            InputError: otherwise; names what does not divide, and the counts that do.
        """
        kinds = {(_kind(name), shape) for name, shape in shapes.items()}
        if found := _obstacles(config, kinds, self.tp, self.ep, fp8):
            counts = range(1, _MOST + 1)
            tp = [str(n) for n in counts if not _obstacles(config, kinds, n, self.ep, fp8)]
            ep = [str(n) for n in counts if not _obstacles(config, kinds, self.tp, n, fp8)]
            raise InputError(
                f"tp = {self.tp} and ep = {self.ep} do not divide this model: {'; '.join(found)}. Allowed: with this "
                f"ep tp = {', '.join(tp) or 'none'}; with this tp ep = {', '.join(ep) or 'none'}."
            )

    def local(self, config: Qwen3NextConfig) -> Qwen3NextConfig:
        """The configuration with the head counts of one rank: what its mixers and caches are made for."""
        local = copy.deepcopy(config)
        local.num_attention_heads //= self.tp
        local.num_key_value_heads = max(1, config.num_key_value_heads // self.tp)
        local.linear_num_key_heads = max(1, config.linear_num_key_heads // self.tp)
        local.linear_num_value_heads //= self.tp
        return local

    def cuts(self, config: Qwen3NextConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Cut]:
        """The cuts of a model's parameters by their names; what is not among them lies on every rank.

        Args:
            shapes: of the whole parameters.
        """
        found = {name: Cut(shape, _ranges(self, config, name, shape)) for name, shape in shapes.items()}
        return {name: cut for name, cut in found.items() if cut.ranges}

    def heads(self, count: int, width: int = 1, start: int = 0) -> Range:
        """This rank's heads of `count`, as channels; with more ranks than heads several have the same one."""
        first = self.tp_rank * count // self.tp
        return start + first * width, start + (first + max(1, count // self.tp)) * width

    def experts(self, count: int) -> Range:
        """This rank's of the experts."""
        return _share(count, self.ep_rank, self.ep)

    def width(self, size: int, start: int = 0) -> Range:
        """This rank's channels of an expert."""
        first, end = _share(size, self.tp_rank, self.tp)
        return start + first, start + end

    def everywhere(self, size: int) -> Range:
        """This rank's part of what is cut over all of them."""
        return _share(size, self.rank, self.size)


def _share(size: int, rank: int, ranks: int) -> Range:
    return rank * size // ranks, (rank + 1) * size // ranks


_Shape = tuple[int, ...]
_Ranges = Mapping[int, tuple[Range, ...]]


def _kind(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _ranges(layout: Layout, config: Qwen3NextConfig, name: str, shape: _Shape) -> _Ranges:
    rule = _RULES.get(_kind(name))
    found = {} if rule is None else rule(layout, config, shape)
    return {d: parts for d, parts in found.items() if d < len(shape) and parts != ((0, shape[d]),)}


def _gate_up(layout: Layout, config: Qwen3NextConfig, shape: _Shape) -> _Ranges:
    width = shape[1] // 2
    return {0: (layout.experts(shape[0]),), 1: _joined(layout.width(width), layout.width(width, start=width))}


def _down(layout: Layout, config: Qwen3NextConfig, shape: _Shape) -> _Ranges:
    if len(shape) == 2:
        return {1: (layout.everywhere(shape[1]),)}
    return {0: (layout.experts(shape[0]),), 2: (layout.width(shape[2]),)}


def _grouped(layout: Layout, config: Qwen3NextConfig, shared: int, value_width: int) -> _Ranges:
    """Of rows that are grouped by key head: whole groups, or of one group the share of its value heads.

    Args:
        shared: rows of a group that belong to the key head; twice those of its value heads follow.
        value_width: rows of a value head, each time.
    """
    keys = config.linear_num_key_heads
    values = config.linear_num_value_heads // keys * value_width
    first, end = layout.heads(keys, shared + 2 * values)
    if layout.tp <= keys:
        return {0: ((first, end),)}
    ranks, start = layout.tp // keys, first + shared
    own, stop = _share(values, layout.tp_rank % ranks, ranks)
    parts = ((first, start), (start + own, start + stop), (start + values + own, start + values + stop))
    return {0: _joined(*(part for part in parts if part[0] < part[1]))}


def _convolution(layout: Layout, config: Qwen3NextConfig, shape: _Shape) -> _Ranges:
    keys, width, all_keys = config.linear_num_key_heads, config.linear_key_head_dim, config.linear_key_dim
    q, k = (layout.heads(keys, width, start) for start in (0, all_keys))
    return {0: _joined(q, k, layout.heads(config.linear_num_value_heads, config.linear_value_head_dim, 2 * all_keys))}


_RULES: Mapping[str, Callable[[Layout, Qwen3NextConfig, _Shape], _Ranges]] = {
    "q_proj": lambda y, c, _: {0: (y.heads(c.num_attention_heads, 2 * c.head_dim),)},
    "k_proj": lambda y, c, _: {0: (y.heads(c.num_key_value_heads, c.head_dim),)},
    "v_proj": lambda y, c, _: {0: (y.heads(c.num_key_value_heads, c.head_dim),)},
    "o_proj": lambda y, c, _: {1: (y.heads(c.num_attention_heads, c.head_dim),)},
    "in_proj_qkvz": lambda y, c, _: _grouped(y, c, 2 * c.linear_key_head_dim, c.linear_value_head_dim),
    "in_proj_ba": lambda y, c, _: _grouped(y, c, 0, 1),
    "conv1d": _convolution,
    "A_log": lambda y, c, _: {0: (y.heads(c.linear_num_value_heads),)},
    "dt_bias": lambda y, c, _: {0: (y.heads(c.linear_num_value_heads),)},
    "out_proj": lambda y, c, _: {1: (y.heads(c.linear_num_value_heads, c.linear_value_head_dim),)},
    "gate_up_proj": _gate_up,
    "gate_proj": lambda y, _, shape: {0: (y.everywhere(shape[0]),)},
    "up_proj": lambda y, _, shape: {0: (y.everywhere(shape[0]),)},
    "down_proj": _down,
    "lm_head": lambda y, _, shape: {} if shape[0] % y.size else {0: (y.everywhere(shape[0]),)},
}
"""By the names of modules and of lone parameters. `gate_proj` and `up_proj` are those of the shared expert and of dense
layers; a `down_proj` with three dimensions is that of the experts. A bias behind a sum over the ranks is not cut, nor a
head whose rows do not divide."""

_QUANTIZED = QUANTIZED | {"gate_up_proj"}


def _joined(*ranges: Range) -> tuple[Range, ...]:
    """Neighbours as one range."""
    borders = [ranges[0][0]]
    for (_, end), (first, _) in pairwise(ranges):
        borders += [end, first] * (end != first)
    borders.append(ranges[-1][1])
    return tuple(zip(borders[::2], borders[1::2], strict=True))


def _obstacles(config: Qwen3NextConfig, kinds: Set[tuple[str, _Shape]], tp: int, ep: int, fp8: bool) -> list[str]:
    """What keeps a model from being cut so."""
    names, found = {kind for kind, _ in kinds}, list[str]()
    for name, kind, ranks, may_repeat in (
        ("num_attention_heads", "q_proj", tp, False),
        ("num_key_value_heads", "k_proj", tp, True),
        ("linear_num_value_heads", "A_log", tp, False),
        ("linear_num_key_heads", "A_log", tp, True),
        ("num_experts", "gate_up_proj", ep, False),
        ("moe_intermediate_size", "gate_up_proj", tp, False),
    ):
        size = getattr(config, name)
        if kind in names and size % ranks and not (may_repeat and ranks % size == 0):
            found.append(f"{name} = {size} over {ranks}")
    for kind, shape in sorted(kinds):
        if kind == "gate_proj" and shape[0] % (tp * ep):
            found.append(f"{shape[0]} channels of a shared expert or dense layer over {tp * ep}")
        # All shares of a tensor are equal, so that the first one's borders tell.
        ranges = {} if not fp8 or kind not in _QUANTIZED else _ranges(Layout(tp, ep), config, kind, shape)
        borders = {b for d, cut in ranges.items() if d >= len(shape) - 2 for part in cut for b in part if b != shape[d]}
        if inside := sorted(border for border in borders if border % FP8_BLOCK):
            found.append(f"{kind} {list(shape)} at {inside[0]}, inside a block of {FP8_BLOCK} fp8 weights")
    return found
