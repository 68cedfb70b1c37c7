"""Every form of attention against a naive softmax in fp64, one sequence and one head at a time."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.checks import assert_pure, assert_same_gradients, relative_error
from torch import Tensor

from qwen3_next.ops.attention import (
    attention,
    attention_with_weights,
    cached_attention,
    causal_mask,
    chained_attention,
    cudnn_pays,
)
from qwen3_next.ops.segments import Segments

HEADS = [(1, 1), (4, 4), (4, 2), (6, 1)]
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}

# (queries, keys before them) of each sequence
sequences = st.lists(st.tuples(st.sampled_from([0, 1, 2, 5, 17]), st.sampled_from([0, 0, 1, 9])), max_size=5)


def naive(q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int]) -> Tensor:
    """The oracle."""
    group = q.shape[1] // k.shape[1]
    outputs = [torch.zeros(0, *q.shape[1:], dtype=torch.float64)]
    for qn, kn, vn in zip(q.double().split(queries), k.double().split(keys), v.double().split(keys), strict=True):
        for i in range(len(qn)):
            seen = len(kn) - len(qn) + i + 1
            heads = [
                (kn[:seen, h // group] @ qn[i, h] / q.shape[-1] ** 0.5).softmax(0) @ vn[:seen, h // group]
                for h in range(q.shape[1])
            ]
            outputs.append(torch.stack(heads)[None])
    return torch.cat(outputs)


def random_qkv(
    queries: int, keys: int, heads: tuple[int, int] = (4, 2), width: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    key_shape = (keys, heads[1], width)
    q, k, v = torch.randn(queries, heads[0], width), torch.randn(key_shape), torch.randn(key_shape)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def packed(q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int]) -> Tensor:
    return attention(q, k, v, Segments.from_lengths(queries), Segments.from_lengths(keys))


@settings(max_examples=60, deadline=None)
@given(sequences, st.sampled_from(HEADS), st.sampled_from(list(DTYPES)))
def test_packed_is_the_naive_softmax_of_each_sequence(
    lengths: list[tuple[int, int]], heads: tuple[int, int], dtype: torch.dtype
) -> None:
    queries, keys = [n for n, _ in lengths], [n + before for n, before in lengths]
    q, k, v = random_qkv(sum(queries), sum(keys), heads, dtype=dtype)
    result = packed(q, k, v, queries, keys)
    assert (result.dtype, result.shape) == (dtype, q.shape)
    assert relative_error(result, naive(q, k, v, queries, keys)) <= DTYPES[dtype]


@pytest.mark.parametrize("lengths", [[7, 7, 7], [1, 1], [3, 0, 20, 1]])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("width", [64, 256])
def test_packed_equals_each_sequence_alone(lengths: list[int], dtype: torch.dtype, width: int) -> None:
    tensors = random_qkv(sum(lengths), sum(lengths), width=width, dtype=dtype)
    result = packed(*tensors, lengths, lengths)
    parts = zip(*(x.split(lengths) for x in tensors), strict=True)
    alone = torch.cat([packed(*part, [len(part[0])], [len(part[0])]) for part in parts])
    assert relative_error(result, alone) <= DTYPES[dtype]


@pytest.mark.parametrize(("queries", "keys"), [([1, 1], [9, 9]), ([4], [30]), ([1, 3], [8, 3])])
def test_cached_keys_give_what_the_whole_sequence_gives(queries: list[int], keys: list[int]) -> None:
    whole = random_qkv(sum(keys), sum(keys))
    last = torch.cat([x[len(x) - n :] for x, n in zip(whole[0].split(keys), queries, strict=True)])
    expected = packed(*whole, keys, keys).split(keys)
    expected = torch.cat([x[len(x) - n :] for x, n in zip(expected, queries, strict=True)])
    assert relative_error(packed(last, *whole[1:], queries, keys), expected) < 1e-6


@pytest.mark.parametrize("lengths", [[6, 6], [1, 1, 1], [2, 9, 0, 4]])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_gradients_are_those_of_the_naive_softmax(lengths: list[int], dtype: torch.dtype) -> None:
    tensors = random_qkv(sum(lengths), sum(lengths), (4, 2), 16, dtype)
    run, oracle = (partial(function, queries=lengths, keys=lengths) for function in (packed, naive))
    assert_same_gradients(run, oracle, tensors, 10 * DTYPES[dtype] if dtype == torch.float32 else 2e-2)


def test_a_broken_sequence_does_not_leak() -> None:
    lengths = [5, 3, 8]
    q, k, v = random_qkv(16, 16)
    for x in (q, k, v):
        x[5:8] = float("nan")
    outputs = packed(q, k, v, lengths, lengths).split(lengths)
    assert outputs[0].isfinite().all()
    assert outputs[2].isfinite().all()


@pytest.mark.parametrize("lengths", [[6, 6], [9, 4]])
def test_dropout_changes_the_result_and_keeps_its_mean(lengths: list[int]) -> None:
    q, k, v = random_qkv(sum(lengths), sum(lengths))
    segments = Segments.from_lengths(lengths)
    plain = attention(q, k, v, segments, segments)
    assert torch.equal(plain, attention(q, k, v, segments, segments, 0.0))
    dropped = [attention(q, k, v, segments, segments, 0.3) for _ in range(300)]
    assert not torch.equal(dropped[0], dropped[1])
    assert relative_error(torch.stack(dropped).mean(0), plain) < 0.15


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 3), (2, 5)])
def test_a_query_sees_its_own_key_and_those_before(queries: int, keys: int) -> None:
    expected = [[j <= keys - queries + i for j in range(keys)] for i in range(queries)]
    assert causal_mask(queries, keys, torch.get_default_device()).tolist() == expected


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 6), (6, 6), (2, 6)])
def test_rows_without_padding_need_no_mask(heads: tuple[int, int], queries: int, keys: int) -> None:
    q, k, v = random_qkv(3 * queries, 3 * keys, heads)
    rows = q.unflatten(0, (3, -1)), k.unflatten(0, (3, -1)), v.unflatten(0, (3, -1))
    expected = naive(q, k, v, [queries] * 3, [keys] * 3).unflatten(0, (3, -1))
    mask = causal_mask(queries, keys, q.device).expand(3, -1, -1)
    assert relative_error(cached_attention(*rows, None), expected) < 1e-6
    assert relative_error(cached_attention(*rows, mask), expected) < 1e-6


def test_padded_rows_see_nothing_of_the_padding() -> None:
    """Left padding: row n holds `lengths[n]` real keys, the last ones; poison stands before them."""
    lengths, width = [2, 7, 5], 7
    q, k, v = random_qkv(3, sum(lengths))
    rows = [torch.full((3, width, 2, 8), 1e4) for _ in range(2)]
    for n, parts in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
        for row, part in zip(rows, parts, strict=True):
            row[n, width - lengths[n] :] = part
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    expected = naive(q, k, v, [1] * 3, lengths)
    result = cached_attention(q[:, None], *rows, mask[:, None])[:, 0]
    assert relative_error(result, expected) < 1e-6
    written_out = attention_with_weights(q[:, None], *rows, mask[:, None])
    assert relative_error(written_out.output[:, 0], expected) < 1e-6
    assert (written_out.weights[:, :, 0][~mask[:, None].expand(-1, 4, -1)] == 0).all()
    torch.testing.assert_close(written_out.weights.sum(-1), torch.ones(3, 4, 1))


def chain_by_steps(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """The definition: a chain begun at token i has the committed keys up to i and its own later ones."""
    outputs = []
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for start, length in zip(starts, lengths, strict=False):
        for i in range(start, start + length):
            own_keys = torch.cat([keys[0][start : i + 1], *(k[i : i + 1] for k in keys[1:])])
            own_values = torch.cat([values[0][start : i + 1], *(v[i : i + 1] for v in values[1:])])
            outputs.append(naive(q[i : i + 1], own_keys, own_values, [1], [len(own_keys)]))
    return torch.cat(outputs)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[1], [5, 0, 3], [1, 1, 12]])
def test_chained_attention_is_its_definition_step_by_step(steps: int, lengths: list[int]) -> None:
    tokens, segments = sum(lengths), Segments.from_lengths(lengths)
    q, *first = random_qkv(tokens, tokens)
    later = [random_qkv(0, tokens)[1:] for _ in range(steps - 1)]
    keys, values = ((part, *(pair[i] for pair in later)) for i, part in enumerate(first))

    def run(q: Tensor, *chain: Tensor) -> Tensor:
        return chained_attention(q, chain[:steps], chain[steps:], segments)

    def oracle(q: Tensor, *chain: Tensor) -> Tensor:
        return chain_by_steps(q, chain[:steps], chain[steps:], lengths)

    inputs = (q, *keys, *values)
    assert relative_error(run(*inputs), oracle(*inputs)) < 1e-6
    assert_same_gradients(run, oracle, inputs, 1e-5)


def test_dropout_in_a_chain_changes_the_result_and_keeps_its_mean() -> None:
    q, *first = random_qkv(9, 9)
    keys, values = zip(first, random_qkv(0, 9)[1:], strict=True)
    segments = Segments.from_lengths([6, 3])
    plain = chained_attention(q, keys, values, segments)
    dropped = [chained_attention(q, keys, values, segments, 0.3) for _ in range(300)]
    assert not torch.equal(dropped[0], dropped[1])
    assert relative_error(torch.stack(dropped).mean(0), plain) < 0.15


@pytest.mark.parametrize("lengths", [[4, 4], [1, 1], [3, 0, 6]])
def test_inputs_stay_and_a_second_run_is_identical(lengths: list[int]) -> None:
    assert_pure(partial(packed, queries=lengths, keys=lengths), random_qkv(sum(lengths), sum(lengths)))


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens_give_no_output(lengths: list[int]) -> None:
    q, k, v = random_qkv(0, 0)
    segments = Segments.from_lengths(lengths)
    assert packed(q, k, v, lengths, lengths).shape == q.shape
    assert chained_attention(q, (k,), (v,), segments).shape == q.shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[4096], [2048, 2048], [3000], [700, 0, 100, 2300], [300] * 3])
def test_the_published_sizes_and_their_gradients(lengths: list[int], dtype: torch.dtype) -> None:
    """By cuDNN, and by torch's FlashAttention where the lengths are not round."""
    tensors, segments = random_qkv(sum(lengths), sum(lengths), (16, 2), 256, dtype), Segments.from_lengths(lengths)
    assert cudnn_pays(tensors[0], segments) == (lengths in ([4096], [2048, 2048]))
    wide = [x.float() for x in tensors]
    assert relative_error(packed(*tensors, lengths, lengths), packed(*wide, lengths, lengths)) <= 5e-3
    direction = torch.randn_like(wide[0])
    results = []
    for inputs in (tensors, wide):
        inputs = [x.requires_grad_() for x in inputs]
        results.append(torch.autograd.grad(packed(*inputs, lengths, lengths), inputs, direction.to(inputs[0].dtype)))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= 6e-3
