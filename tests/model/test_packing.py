"""Packed = alone, split = whole, padded = unpadded."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import EVERY_EXPERT, tiny_model
from tests.model.reference import relative_error
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from qwen3_next.errors import InputError

TOLERANCE = 1e-5


def tokens_of(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (1, length), generator=generator) for length in lengths]


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_packed_documents_equal_the_documents_alone(lengths: list[int], seed: int) -> None:
    model = tiny_model(seed, **EVERY_EXPERT)
    documents = tokens_of(lengths, seed)
    alone = torch.cat([model(d).logits[0] for d in documents])
    row = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    assert relative_error(model(row, position_ids=positions).logits[0], alone) < TOLERANCE
    assert relative_error(model(row, cu_seq_lens_q=borders).logits[0], alone) < TOLERANCE


def test_documents_packed_into_several_padded_rows_do_not_leak() -> None:
    model = tiny_model(3)
    a, b, c = tokens_of([9, 14, 20])
    rows = torch.cat([torch.cat([torch.zeros(1, 2, dtype=torch.long), a, b], 1), torch.cat([c, c[:, :5]], 1)])
    mask = torch.ones_like(rows)
    mask[0, :2] = 0
    positions = torch.tensor([[1, 1, *range(9), *range(14)], [*range(20), *range(5)]])
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits = model(rows, attention_mask=mask, position_ids=positions).logits
        assert relative_error(logits[0, 2:11], model(a).logits[0]) < TOLERANCE
        assert relative_error(logits[0, 11:], model(b).logits[0]) < TOLERANCE
        assert relative_error(logits[1, 20:], model(c[:, :5]).logits[0]) < TOLERANCE


def test_a_token_changes_nothing_before_it_or_in_another_document() -> None:
    model = tiny_model(4)
    row = tokens_of([60])[0]
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    before = model(row, position_ids=positions).logits
    changed = row.clone()
    changed[0, 10] = (row[0, 10] + 1) % 97
    after = model(changed, position_ids=positions).logits
    same = (before == after).all(-1)[0]
    assert same[:10].all()
    assert same[25:].all()
    assert not same[10:25].any()


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 99), static=st.booleans())
def test_any_split_of_a_sequence_into_calls_equals_the_whole(cuts: list[int], seed: int, static: bool) -> None:
    model = tiny_model(seed, **EVERY_EXPERT)
    whole = torch.cat(tokens_of([sum(cuts)] * 2, seed))
    cache = StaticCache(model.config, max_cache_len=sum(cuts) + 3) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in whole.split(cuts, dim=1)]
        assert relative_error(torch.cat(parts, dim=1), model(whole).logits) < TOLERANCE


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_unpadded_rows_over_several_calls(side: str, implementation: str) -> None:
    model = tiny_model(7)
    model.set_attn_implementation(implementation)
    long, short = tokens_of([30, 19])
    pad = torch.zeros(1, 11, dtype=torch.long)
    rows = torch.cat([long, torch.cat([pad, short] if side == "left" else [short, pad], 1)])
    mask = torch.ones_like(rows)
    mask[1, slice(0, 11) if side == "left" else slice(19, 30)] = 0
    following = torch.cat(tokens_of([6, 6], seed=1))
    with torch.no_grad():
        first = model(rows, attention_mask=mask)
        kept = first.logits[1][mask[1].bool()]
        whole_mask = torch.cat([mask, torch.ones_like(following)], dim=1)
        second = model(following, attention_mask=whole_mask, past_key_values=first.past_key_values)
        alone = model(torch.cat([short, following[1:]], 1)).logits[0]
        # On the right, positions count the padding in between; the rotary embedding sees differences in a call only.
        if side == "left":
            assert relative_error(torch.cat([kept, second.logits[1]]), alone) < TOLERANCE
        else:
            assert relative_error(kept, alone[:19]) < TOLERANCE
        alone = model(torch.cat([long, following[:1]], 1)).logits[0]
        assert relative_error(torch.cat([first.logits[0], second.logits[0]]), alone) < TOLERANCE


def test_eager_and_sdpa_attention_agree_and_eager_returns_probabilities() -> None:
    model = tiny_model(8)
    rows = torch.cat(tokens_of([33, 33]))
    sdpa = model(rows).logits
    model.set_attn_implementation("eager")
    eager = model(rows, output_attentions=True)
    assert relative_error(eager.logits, sdpa) < TOLERANCE
    assert [w.shape for w in eager.attentions] == [(2, 4, 33, 33)]
    torch.testing.assert_close(eager.attentions[0].sum(-1), torch.ones(2, 4, 33))


def test_a_mask_over_pairs_of_tokens_is_refused_by_name() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match=r"attention_mask has shape \(1, 1, 5, 5\).*position_ids"):
        model(torch.zeros(1, 5, dtype=torch.long), attention_mask=torch.ones(1, 1, 5, 5))


def test_packed_documents_with_a_cache_are_refused() -> None:
    model = tiny_model()
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(InputError, match="use_cache=False"):
        model(torch.zeros(1, 5, dtype=torch.long), position_ids=positions, past_key_values=DynamicCache())
    assert model(torch.zeros(1, 5, dtype=torch.long), position_ids=positions).past_key_values is None


def test_a_document_that_begins_inside_a_row_that_continues_a_cache_is_refused() -> None:
    model = tiny_model()
    tokens = tokens_of([4, 3, 5])
    cache = model(tokens[0], use_cache=True).past_key_values
    model(tokens[1], past_key_values=cache, position_ids=torch.arange(4, 7)[None])
    with pytest.raises(InputError, match=r"fall back inside a row that continues 7 cached tokens.*use_cache=False"):
        model(tokens[2], past_key_values=cache, position_ids=torch.tensor([[7, 8, 0, 1, 2]]))


@pytest.mark.parametrize("kwargs", [{"return_seq_idx": True}, {"return_flash_attn_kwargs": True}], ids=str)
@pytest.mark.parametrize("lengths", [[7], [5, 1, 9]])
def test_what_transformers_collator_of_packed_documents_returns_separates_them(
    kwargs: dict[str, bool], lengths: list[int]
) -> None:
    model = tiny_model(9)
    documents = tokens_of(lengths)
    collate = DataCollatorWithFlattening(**kwargs)
    batch = collate([{"input_ids": d[0].tolist()} for d in documents], return_tensors="pt")
    alone = torch.cat([model(d).logits[0] for d in documents])
    assert relative_error(model(**batch).logits[0], alone) < TOLERANCE


def test_every_description_of_packed_documents_together_is_taken() -> None:
    model = tiny_model(10)
    a, b = tokens_of([4, 6])
    borders = torch.tensor([0, 4, 10], dtype=torch.int32)
    logits = model(
        torch.cat([a, b], 1),
        position_ids=torch.tensor([[*range(4), *range(6)]]),
        cu_seq_lens_q=borders,
        cu_seq_lens_k=borders,
        max_length_q=6,
        max_length_k=6,
        seq_idx=torch.tensor([[0] * 4 + [1] * 6], dtype=torch.int32),
    ).logits
    assert relative_error(logits[0, 4:], model(b).logits[0]) < TOLERANCE


@pytest.mark.parametrize(
    ("description", "found"),
    [
        ({"seq_idx": [[0, 0, 0, 1, 1]]}, "seq_idx"),
        ({"seq_idx": [[0, 0, 0, 1, 1]], "cu_seq_lens_q": [0, 2, 5]}, "seq_idx"),
        ({"seq_idx": [[0, 0, 0, 1]], "cu_seq_lens_q": [0, 3, 5]}, r"seq_idx of shape \(1, 4\)"),
        ({"cu_seq_lens_k": [0, 3, 5]}, r"cu_seq_lens_k=\[0, 3, 5\]"),
        ({"cu_seq_lens_k": [0, 3, 5], "cu_seq_lens_q": [0, 2, 5]}, r"cu_seq_lens_k=\[0, 3, 5\].*\[0, 2, 5\]"),
    ],
    ids=str,
)
def test_a_description_that_names_documents_which_nothing_separates_is_refused(
    description: dict[str, list[int]], found: str
) -> None:
    tensors = {name: torch.tensor(value) for name, value in description.items()}
    with pytest.raises(InputError, match=f"{found}.*restarting position_ids"):
        tiny_model()(tokens_of([5])[0], **tensors)


def test_contradicting_inputs_are_refused() -> None:
    model = tiny_model()
    tokens = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(InputError, match="exactly one"):
        model()
    with pytest.raises(InputError, match="cu_seq_lens_q"):
        model(tokens, cu_seq_lens_q=torch.tensor([0, 3, 4]))
    with pytest.raises(InputError, match="position_ids"):
        model(tokens, position_ids=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(InputError, match=r"position_ids are torch.float32.*long\(\)"):
        model(tokens, position_ids=torch.arange(5.0)[None])
    with pytest.raises(InputError, match=r"\[B, S, 32\]; got shape \(1, 5, 31\)"):
        model(inputs_embeds=torch.zeros(1, 5, 31))
    with pytest.raises(InputError, match=r"unknown argument.*atention_mask"):
        model(tokens, atention_mask=torch.ones(1, 5))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_call_that_holds_padding_only_leaves_the_cache_as_it_was(implementation: str) -> None:
    """The first part of left-padded rows whose prompt is given in parts may hold no token at all."""
    model = tiny_model(7, **EVERY_EXPERT)
    model.set_attn_implementation(implementation)
    tokens = torch.randint(0, 97, (2, 6))
    nothing = model(torch.zeros(2, 5, dtype=torch.long), attention_mask=torch.zeros(2, 5, dtype=torch.long))
    assert not nothing.logits.any()
    mask = torch.tensor([[0] * 5 + [1] * 6] * 2)
    following = model(tokens, attention_mask=mask, past_key_values=nothing.past_key_values)
    assert relative_error(following.logits, model(tokens).logits) < TOLERANCE


def test_a_cache_made_for_another_model_is_refused() -> None:
    model, other = tiny_model(), tiny_model(layer_types=["full_attention"] * 4)
    cache = DynamicCache(config=other.config)
    with pytest.raises(InputError, match=r"layer 0 is a Gated DeltaNet layer.*DynamicCache\(config="):
        model(torch.zeros(1, 4, dtype=torch.long), past_key_values=cache)
