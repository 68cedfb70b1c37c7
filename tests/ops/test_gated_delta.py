"""The chunked gated delta rule against the recurrence, and the recurrence against its equations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen3_next.ops import gated_delta
from qwen3_next.ops.backend import use
from qwen3_next.ops.gated_delta import GatedDeltaOutput, gated_delta_rule, gated_delta_rule_recurrent
from qwen3_next.ops.segments import Segments

TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}
"""Largest difference between two ways to compute values of size about 1."""

HEADS = [(1, 1), (1, 3), (2, 2), (2, 4)]

lengths_of_sequences = st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 130]), min_size=1, max_size=3)
many_short_lengths = st.lists(st.integers(0, 5), min_size=4, max_size=20)
one_length = st.builds(lambda n, length: [length] * n, st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 64, 70]))


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor
    lengths: tuple[int, ...]
    state: Tensor | None

    def run(self, rule=gated_delta_rule) -> GatedDeltaOutput:
        tensors = self.q, self.k, self.v, self.log_decay, self.beta
        return rule(*tensors, Segments.from_lengths(self.lengths), self.state)

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.log_decay, self.beta, self.state) if x is not None]

    def part(self, start: int, lengths: Sequence[int], state: Tensor | None) -> "Case":
        rows = slice(start, start + sum(lengths))
        tensors = (x[rows] for x in (self.q, self.k, self.v, self.log_decay, self.beta))
        return Case(*tensors, tuple(lengths), state)

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(*(x.to(dtype) if isinstance(x, Tensor) else x for x in astuple(self)))


def random_case(
    lengths: Sequence[int],
    heads: tuple[int, int] = (2, 4),
    dtype: torch.dtype = torch.float64,
    with_state: bool = True,
    widths: tuple[int, int] = (8, 6),
) -> Case:
    torch.manual_seed(sum(lengths) + 7 * len(lengths) + heads[1])
    (key_heads, value_heads), (dk, dv), tokens = heads, widths, sum(lengths)
    return Case(
        q=torch.randn(tokens, key_heads, dk, dtype=dtype),
        k=torch.randn(tokens, key_heads, dk, dtype=dtype),
        v=torch.randn(tokens, value_heads, dv, dtype=dtype),
        log_decay=-2 * torch.rand(tokens, value_heads, dtype=dtype) ** 3,
        beta=torch.rand(tokens, value_heads, dtype=dtype),
        lengths=tuple(lengths),
        state=torch.randn(len(lengths), value_heads, dk, dv, dtype=dtype) if with_state else None,
    )


def assert_same(result: GatedDeltaOutput, expected: GatedDeltaOutput, tolerance: float) -> None:
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=tolerance)


@contextmanager
def scanned_as_on(device: str) -> Iterator[None]:
    """Computes on the CPU what a GPU would compute."""
    if device == "cpu":
        yield
        return
    with patch.object(gated_delta, "_scan_updates", gated_delta._scan_transitions):
        yield


def test_the_recurrence_is_the_equation() -> None:
    case = random_case([5], heads=(2, 6))
    outputs = torch.zeros_like(case.v)
    for h in range(6):
        state = case.state[0, h]
        for t in range(5):
            q, k = case.q[t, h // 3], case.k[t, h // 3]
            q, k = q / (q @ q + 1e-6).sqrt() / 8**0.5, k / (k @ k + 1e-6).sqrt()
            beta, decay = case.beta[t, h], case.log_decay[t, h].exp()
            state = decay * (torch.eye(8) - beta * torch.outer(k, k)) @ state + beta * torch.outer(k, case.v[t, h])
            outputs[t, h] = state.T @ q
    assert_same(case.run(gated_delta_rule_recurrent), GatedDeltaOutput(outputs, case.run().final_state), 1e-14)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths_of_sequences | many_short_lengths | one_length,
    st.sampled_from(HEADS),
    st.booleans(),
    st.sampled_from(list(TOLERANCE)),
)
def test_chunks_equal_the_recurrence(
    device: str, lengths: list[int], heads: tuple[int, int], with_state: bool, dtype: torch.dtype
) -> None:
    case = random_case(lengths, heads, dtype, with_state)
    with scanned_as_on(device):
        result = case.run()
    assert_same(result, case.run(gated_delta_rule_recurrent), TOLERANCE[dtype])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("decays", [[0.0], [-20.0], [-100.0], [0.0, 0.0, 0.0, -100.0], [-1e-3, -1e-3, -50.0]])
@pytest.mark.parametrize("repeated", [False, True])
def test_extremes(device: str, beta: float, decays: list[float], repeated: bool) -> None:
    """In fp32, against the recurrence in fp64: forgetting all, nothing, and both in turn; the same key throughout."""
    case = random_case([130, 65], heads=(1, 2), dtype=torch.float32)
    log_decay = torch.tensor(decays).repeat(195)[:195, None].expand(195, 2)
    key = torch.ones_like(case.k) if repeated else case.k
    case = replace(case, beta=torch.full_like(case.beta, beta), log_decay=log_decay, k=key)
    inputs = [x.requires_grad_() for x in (case.q, case.v)] + [case.state.requires_grad_()]
    with scanned_as_on(device):
        result = case.run()
    assert_same(result, case.to(torch.float64).run(gated_delta_rule_recurrent), TOLERANCE[torch.float32])
    grads = torch.autograd.grad(tuple(result), inputs, [torch.ones_like(x) for x in result])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("lengths", [[1, 1], [2, 2], [0, 65, 3, 130, 1]])
def test_gradients_equal_those_of_the_recurrence(device: str, lengths: list[int]) -> None:
    case = random_case(lengths, heads=(2, 4))
    inputs = [x.requires_grad_() for x in case.tensors()]
    with scanned_as_on(device):
        result = case.run()
    expected = case.run(gated_delta_rule_recurrent)
    directions = [torch.randn_like(x) for x in expected]
    grads = torch.autograd.grad(tuple(result), inputs, directions)
    for a, b in zip(grads, torch.autograd.grad(tuple(expected), inputs, directions), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_survive_extremes() -> None:
    """A decay of e^-100 and the same key everywhere: finite, and those of the recurrence."""
    case = random_case([100], heads=(1, 1))
    log_decay = torch.tensor([0.0, -100.0, -1e-3, -20.0], dtype=torch.float64).repeat(25)[:, None]
    case = replace(case, log_decay=log_decay, k=torch.ones_like(case.k), beta=torch.ones_like(case.beta))
    inputs = [x.requires_grad_() for x in case.tensors()]
    grads = [
        torch.autograd.grad(sum(x.sum() for x in case.run(rule)), inputs)
        for rule in (gated_delta_rule, gated_delta_rule_recurrent)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("parts", [[1, 1, 1], [64, 66], [3, 130, 0, 1], [63, 2, 65]])
def test_split_equals_whole(parts: list[int]) -> None:
    case = random_case([sum(parts)], dtype=torch.float32)
    outputs, state, start = [], case.state, 0
    for length in parts:
        piece = case.part(start, [length], state).run()
        outputs.append(piece.output)
        state, start = piece.final_state, start + length
    assert_same(GatedDeltaOutput(torch.cat(outputs), state), case.run(), TOLERANCE[torch.float32])


def test_packed_equals_alone() -> None:
    case = random_case([3, 70, 0, 1, 130], dtype=torch.float32)
    outputs, states, start = [], [], 0
    for n, length in enumerate(case.lengths):
        alone = case.part(start, [length], case.state[n : n + 1]).run()
        outputs.append(alone.output)
        states.append(alone.final_state)
        start += length
    assert_same(GatedDeltaOutput(torch.cat(outputs), torch.cat(states)), case.run(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("lengths", [[5, 3, 66, 130], [4, 4, 4, 4], [1, 1, 1, 1], [65, 65, 65, 65]])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_broken_sequence_does_not_leak(device: str, lengths: list[int]) -> None:
    case = random_case(lengths)
    case.v[lengths[0] : sum(lengths[:2])] = float("nan")
    case.state[1] = float("inf")
    with scanned_as_on(device):
        result = case.run()
    outputs = result.output.split(lengths)
    assert all(outputs[n].isfinite().all() and result.final_state[n].isfinite().all() for n in (0, 2, 3))


@pytest.mark.parametrize("lengths", [[1, 1], [3, 3], [130], [0, 2, 66]])
@pytest.mark.parametrize("rule", [gated_delta_rule, gated_delta_rule_recurrent])
def test_inputs_stay_and_a_second_run_is_identical(rule, lengths: list[int]) -> None:
    case = random_case(lengths, dtype=torch.float32)
    copies = [x.clone() for x in case.tensors()]
    with torch.no_grad():
        first, second = case.run(rule), case.run(rule)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    first.output.zero_()
    first.final_state.zero_()
    assert all(torch.equal(a, b) for a, b in zip(case.tensors(), copies, strict=True))


@pytest.mark.parametrize("lengths", [[1, 1], [70, 3]])
@pytest.mark.parametrize("rule", [gated_delta_rule, gated_delta_rule_recurrent])
def test_bf16_is_computed_in_fp32_and_rounded_once(rule, lengths: list[int]) -> None:
    case = random_case(lengths, dtype=torch.bfloat16)
    with use("reference"):  # of the definitions; twins round between their products
        result, exact = case.run(rule), case.to(torch.float32).run(rule)
    assert result.final_state.dtype == torch.float32
    assert torch.equal(result.final_state, exact.final_state)
    assert torch.equal(result.output, exact.output.bfloat16())


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("rule", [gated_delta_rule, gated_delta_rule_recurrent])
def test_no_tokens_keep_the_state(rule, lengths: list[int]) -> None:
    case = random_case(lengths, dtype=torch.float32)
    result = case.run(rule)
    assert result.output.shape == case.v.shape
    assert torch.equal(result.final_state, case.state)
    assert torch.equal(replace(case, state=None).run(rule).final_state, torch.zeros_like(case.state))
