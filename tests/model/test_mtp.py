"""Multi-token prediction: its loss, its gradient, its drafts, each against a plain restatement."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import tiny_model
from tests.model.reference import peer_of, relative_error
from torch import Tensor
from transformers import DynamicCache

from qwen3_next import InputError, Qwen3NextForCausalLM
from qwen3_next.model import PackedLosses
from qwen3_next.model.cache import TransformersCache, cached_length
from qwen3_next.model.inputs import PackedInputs, pack_rows
from qwen3_next.ops.segments import Segments


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight)


def restated_mtp_logits(model: Qwen3NextForCausalLM, tokens: Tensor) -> Tensor:
    """Logits for token i+2 at i = 0..n-2, written out from the published description of one document."""
    mtp, layer = model.mtp, model.mtp.layers[0]
    hidden = model.model(tokens).last_hidden_state[0, :-1]
    embedded = model.model.embed_tokens(tokens[0, 1:])
    x = (
        torch.cat([norm(embedded, mtp.pre_fc_norm_embedding.weight), norm(hidden, mtp.pre_fc_norm_hidden.weight)], -1)
        @ mtp.fc.weight.t()
    )
    n = x.shape[0]
    mixed = norm(x, layer.input_layernorm.weight)
    a = layer.self_attn
    q, gate = a.q_proj(mixed).view(n, 4, 32).split(16, dim=-1)
    q, k = norm(q, a.q_norm.weight), norm(a.k_proj(mixed).view(n, 2, 16), a.k_norm.weight)
    angles = torch.arange(n)[:, None] / 10000.0 ** (torch.arange(0, 4, 2) / 4)
    q, k = (rotate(t, angles) for t in (q, k))
    v = a.v_proj(mixed).view(n, 2, 16)
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,shd->hqs", q, k) / 4
    scores = scores + torch.full((n, n), float("-inf")).triu(1)
    out = torch.einsum("hqs,shd->qhd", scores.softmax(-1), v) * gate.sigmoid()
    x = x + a.o_proj(out.flatten(1))
    x = x + layer.mlp(norm(x, layer.post_attention_layernorm.weight))[0]
    return norm(x, mtp.norm.weight) @ model.lm_head.weight.t()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b, rest = x[..., :2], x[..., 2:4], x[..., 4:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def restated_loss(model: Qwen3NextForCausalLM, tokens: Tensor) -> Tensor:
    return F.cross_entropy(restated_mtp_logits(model, tokens)[:-1], tokens[0, 2:])


def test_mtp_loss_and_gradient_are_those_of_the_definition() -> None:
    tokens = torch.randint(0, 97, (1, 37))
    ours, restated = tiny_model(1).train(), tiny_model(1).train()
    output = ours(tokens, labels=tokens)
    expected = restated_loss(restated, tokens)
    assert relative_error(output.mtp_loss, expected) < 1e-5
    output.mtp_loss.backward()
    expected.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), restated.parameters(), strict=True):
        if theirs.grad is not None:
            assert relative_error(mine.grad, theirs.grad) < 1e-4, name


def test_the_total_loss_adds_mtp_in_training_mode_only() -> None:
    model = tiny_model(2, mtp_loss_weight=0.3)
    tokens = torch.randint(0, 97, (2, 20))
    evaluated = model(tokens, labels=tokens)
    assert evaluated.mtp_loss is None
    assert torch.equal(evaluated.loss, evaluated.lm_loss)
    trained = model.train()(tokens, labels=tokens)
    torch.testing.assert_close(trained.loss, trained.lm_loss + 0.3 * trained.mtp_loss)
    model.config.mtp_loss_weight = 0.0
    torch.testing.assert_close(model(tokens, labels=tokens).loss, trained.lm_loss)


@pytest.mark.parametrize("training", [True, False])
def test_lm_loss_is_the_loss_of_transformers_whatever_the_mode(training: bool) -> None:
    model = tiny_model(20, num_mtp_steps=2).train(training)
    tokens = torch.randint(0, 97, (2, 33))
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.2, -100)
    assert relative_error(model(tokens, labels=labels).lm_loss, peer_of(model)(tokens, labels=labels).loss) < 1e-5


def test_outputs_carry_every_part_of_the_loss() -> None:
    model = tiny_model(21, router_aux_loss_coef=0.5, mtp_loss_weight=0.2).train()
    tokens = torch.randint(0, 97, (2, 20))
    output = model(tokens, labels=tokens, output_router_logits=True)
    torch.testing.assert_close(output.loss, output.lm_loss + 0.2 * output.mtp_loss + 0.5 * output.aux_loss)
    assert {"loss", "lm_loss", "mtp_loss", "aux_loss"} <= output.keys()
    as_tuple = model(tokens, labels=tokens, return_dict=False)
    assert as_tuple[0].shape == ()
    assert as_tuple[1].shape == (2, 20, 97)


@pytest.mark.parametrize("training", [True, False])
def test_without_mtp_layers_the_loss_is_the_next_tokens(training: bool) -> None:
    model = tiny_model(22, num_nextn_predict_layers=0).train(training)
    tokens = torch.randint(0, 97, (2, 20))
    output = model(tokens, labels=tokens)
    assert output.mtp_loss is None
    assert torch.equal(output.loss, output.lm_loss)
    inputs = PackedInputs(tokens.flatten(), torch.arange(20).repeat(2), Segments.uniform(2, 20))
    losses = model.packed_losses(inputs, F.pad(tokens[:, 1:], (0, 1), value=-100).flatten())
    torch.testing.assert_close(losses.lm.sum() / 38, output.lm_loss)
    assert (losses.mtp, len(losses.targets), len(losses.routings)) == ((), 1, 4)


DOCUMENTS = (11, 1, 7, 2, 14)  # of which the shortest have no token after next, or no next one


@pytest.mark.parametrize("borders", ["position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("steps", [1, 3])
def test_targets_stay_inside_their_document(steps: int, borders: str) -> None:
    model = tiny_model(3, num_mtp_steps=steps).train()
    documents = [torch.randint(0, 97, (1, length)) for length in DOCUMENTS]
    row = torch.cat(documents, dim=1)
    if borders == "position_ids":
        options = {borders: torch.cat([torch.arange(length) for length in DOCUMENTS])[None]}
    else:
        options = {borders: torch.tensor([0, *accumulate(DOCUMENTS)])}
    packed = model(row, labels=row, **options)
    alone = [model.packed_losses(*alone_inputs(d)) for d in documents]
    torch.testing.assert_close(packed.lm_loss, mean_over(alone, lambda losses: losses.lm, 0))
    parts = [mean_over(alone, lambda losses, s=s: losses.mtp[s], s + 1) for s in range(steps)]
    torch.testing.assert_close(packed.mtp_loss, torch.stack(parts).mean())


def alone_inputs(document: Tensor) -> tuple[PackedInputs, Tensor]:
    length = document.shape[1]
    inputs = PackedInputs(document[0], torch.arange(length), Segments.from_lengths([length]))
    return inputs, F.pad(document[0, 1:], (0, 1), value=-100)


def mean_over(alone: list[PackedLosses], part: Callable[[PackedLosses], Tensor], step: int) -> Tensor:
    count = sum(max(0, length - 1 - step) for length in DOCUMENTS)
    return torch.stack([part(losses).sum() for losses in alone]).sum() / count


def test_ignored_labels_are_no_targets_of_any_step() -> None:
    model = tiny_model(23, num_mtp_steps=2).train()
    tokens = torch.randint(0, 97, (1, 30))
    labels = tokens.clone()
    labels[0, :20] = -100  # a prompt
    inputs, targets = alone_inputs(labels)
    losses = model.packed_losses(replace(inputs, token_ids=tokens[0]), targets)
    output = model(tokens, labels=labels)
    torch.testing.assert_close(output.lm_loss, losses.lm[19:].sum() / 10)
    steps = [losses.mtp[0][18:].sum() / 10, losses.mtp[1][17:].sum() / 10]
    torch.testing.assert_close(output.mtp_loss, torch.stack(steps).mean())


def test_shifted_labels_are_labels_shifted_by_the_caller() -> None:
    model = tiny_model(24, num_mtp_steps=2).train()
    tokens = torch.randint(0, 97, (2, 20))
    mine = model(tokens, shift_labels=F.pad(tokens[:, 1:], (0, 1), value=-100))
    expected = model(tokens, labels=tokens)
    torch.testing.assert_close((mine.lm_loss, mine.mtp_loss), (expected.lm_loss, expected.mtp_loss))


def test_a_left_padded_batch_has_the_losses_of_its_rows() -> None:
    model = tiny_model(25).train()
    tokens, mask = torch.randint(0, 97, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[0, :8] = 0
    padded = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))
    rows = [model.packed_losses(*alone_inputs(row)) for row in (tokens[:1, 8:], tokens[1:])]
    torch.testing.assert_close(padded.lm_loss, sum(r.lm.sum() for r in rows) / (11 + 19))
    torch.testing.assert_close(padded.mtp_loss, sum(r.mtp[0].sum() for r in rows) / (10 + 18))


def test_batches_of_an_accumulation_window_sum_to_the_one_large_batch() -> None:
    """With unequal counts of targets, and equal ones of tokens, of which the auxiliary loss is a mean."""
    model = tiny_model(26, num_mtp_steps=2, router_aux_loss_coef=0.0).train()
    tokens = torch.randint(0, 97, (4, 24))
    labels = tokens.clone()
    labels[1:3, :15] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = model(tokens, labels=labels, num_items_in_batch=count)
    whole.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    parts = [
        model(t, labels=x, num_items_in_batch=count) for t, x in zip(tokens[:, None], labels[:, None], strict=True)
    ]
    for part in parts:
        part.loss.backward()
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(whole.lm_loss, model(tokens, labels=labels).lm_loss)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 1e-4, name


def test_the_auxiliary_loss_counts_once_in_an_accumulation_window() -> None:
    model = tiny_model(27, router_aux_loss_coef=0.5, num_nextn_predict_layers=0)
    tokens = torch.randint(0, 97, (1, 24))
    parts = [model(tokens, labels=tokens, num_items_in_batch=4 * 23, output_router_logits=True) for _ in range(4)]
    torch.testing.assert_close(sum(part.loss for part in parts), parts[0].lm_loss * 4 + 0.5 * parts[0].aux_loss)


def test_packed_losses_are_the_losses_of_the_forward_pass() -> None:
    model = tiny_model(4, num_mtp_steps=2).train()
    tokens = torch.randint(0, 97, (1, 40))
    targets = F.pad(tokens[0, 1:], (0, 1), value=-100)
    inputs = PackedInputs(tokens[0], torch.arange(40), Segments.from_lengths([40]))
    losses = model.packed_losses(inputs, targets)
    output = model(tokens, labels=tokens)
    torch.testing.assert_close(losses.lm.sum() / 39, output.lm_loss)
    torch.testing.assert_close(
        torch.stack([losses.mtp[0].sum() / 38, losses.mtp[1].sum() / 37]).mean(), output.mtp_loss
    )
    assert [int((t != -100).sum()) for t in losses.targets] == [39, 38, 37]
    assert len(losses.routings) == 4 + 2


@torch.no_grad()
def drafting_logits(model: Qwen3NextForCausalLM, tokens: Tensor, committed: int, steps: int) -> list[Tensor]:
    """Step by step with a cache: read `committed` states, then one step at a time, fed with the true tokens."""
    states = model.model(tokens).last_hidden_state[:, :committed]
    cache, logits = DynamicCache(), list[Tensor]()
    following = tokens[:, 1 : committed + 1]
    for step in range(steps):
        inputs = pack_rows((1, following.shape[1]), tokens.device, past=cached_length(cache), token_ids=following)
        rotary = model.model.rotary_emb(states, inputs.positions)
        embedded = model.model.embed_tokens(inputs.token_ids)
        states = model.mtp(embedded, states[0], inputs, rotary, TransformersCache.of(cache, inputs)).hidden[None, -1:]
        logits.append(model.lm_head(states)[0, 0])
        following = tokens[:, committed + 1 + step :][:, :1]
    return logits


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_chained_training_steps_are_drafting_step_by_step_with_the_layers_cache(steps: int) -> None:
    model = tiny_model(5)
    tokens = torch.randint(0, 97, (1, 24))
    ahead = model.predict_ahead(alone_inputs(tokens)[0], steps)[1:]
    for committed in (1, 9, 24 - steps):
        for step, logits in enumerate(drafting_logits(model, tokens, committed, steps)):
            assert relative_error(ahead[step][committed - 1], logits) < 1e-5, (committed, step)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_drafts_are_the_greedy_choices_of_the_chain_that_they_continue(steps: int) -> None:
    model = tiny_model(5)
    tokens = torch.randint(0, 97, (1, 24))
    hidden = model.model(tokens).last_hidden_state
    drafted = model.draft(hidden[:, :-1], tokens[:, 1:], num_drafts=steps).token_ids
    assert drafted.shape == (1, steps)
    ahead = model.predict_ahead(alone_inputs(torch.cat([tokens, drafted], dim=1))[0], steps)[1:]
    # Step s of the chain begun at position 22 has read the true token 23 and the drafts before its own.
    assert [int(logits[22].argmax()) for logits in ahead] == drafted[0].tolist()


def test_a_draft_chain_feeds_each_step_with_the_one_before() -> None:
    """Without the chain the later drafts would repeat what a first step says: the comparisons above could not fail."""
    model = tiny_model(5)
    tokens = torch.randint(0, 97, (8, 24))
    hidden = model.model(tokens).last_hidden_state
    drafted = model.draft(hidden[:, :-1], tokens[:, 1:], num_drafts=4).token_ids
    assert (drafted[:, 1:] != drafted[:, :-1]).any()


def test_drafting_over_several_calls_equals_drafting_at_once() -> None:
    model = tiny_model(6)
    tokens = torch.randint(0, 97, (2, 30))
    hidden = model.model(tokens).last_hidden_state
    at_once = model.draft(hidden[:, :-1], tokens[:, 1:], num_drafts=3)
    first = model.draft(hidden[:, :17], tokens[:, 1:18], num_drafts=3)
    assert first.past_key_values.get_seq_length() == 17
    second = model.draft(hidden[:, 17:-1], tokens[:, 18:], num_drafts=3, past_key_values=first.past_key_values)
    assert torch.equal(second.token_ids, at_once.token_ids)
    assert second.past_key_values.get_seq_length() == 29
    committed, again = at_once.past_key_values.layers[0], second.past_key_values.layers[0]
    torch.testing.assert_close((again.keys, again.values), (committed.keys, committed.values))
    third = model.draft(hidden[:, 29:], tokens[:, :1], num_drafts=1, past_key_values=second.past_key_values)
    assert third.past_key_values is second.past_key_values
    assert third.past_key_values.get_seq_length() == 30


def test_padded_rows_draft_what_unpadded_rows_draft() -> None:
    model = tiny_model(7)
    tokens = torch.randint(0, 97, (2, 20))
    mask = torch.ones_like(tokens)
    mask[0, :8] = 0
    hidden = model.model(tokens, attention_mask=mask).last_hidden_state
    padded = model.draft(hidden[:, :-1], tokens[:, 1:], num_drafts=2, attention_mask=mask[:, :-1])
    alone = model.model(tokens[:1, 8:]).last_hidden_state
    assert torch.equal(padded.token_ids[:1], model.draft(alone[:, :-1], tokens[:1, 9:], num_drafts=2).token_ids)


def test_drafting_for_a_row_that_ends_in_padding_is_refused() -> None:
    model = tiny_model(7)
    tokens, mask = torch.randint(0, 97, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    hidden = model.model(tokens, attention_mask=mask).last_hidden_state
    with pytest.raises(InputError, match=r"ends in padding.*pad the rows to draft for on the left"):
        model.draft(hidden, tokens, attention_mask=mask)


@pytest.mark.parametrize(
    ("hidden", "tokens"), [((1, 3, 32), (1, 4)), ((2, 3, 32), (1, 3)), ((1, 3, 31), (1, 3)), ((1, 0, 32), (1, 0))]
)
def test_states_and_tokens_to_draft_from_that_do_not_belong_together_are_refused(
    hidden: tuple[int, ...], tokens: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match=r"do not belong together; \(B, S, 32\)"):
        tiny_model().draft(torch.randn(hidden), torch.zeros(tokens, dtype=torch.long))


def test_a_mask_to_draft_with_that_is_no_mask_of_rows_is_refused() -> None:
    with pytest.raises(InputError, match=r"attention_mask has shape \(3,\)"):
        tiny_model().draft(torch.randn(1, 3, 32), torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.ones(3))


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("shape", [(2, 5), (1, 8), (8,)])
def test_labels_of_another_shape_than_the_rows_are_refused(name: str, shape: tuple[int, ...]) -> None:
    tokens = torch.randint(0, 97, (2, 4))
    with pytest.raises(InputError, match=r"labels have shape .*\(2, 4\)"):
        tiny_model()(tokens, **{name: torch.zeros(shape, dtype=torch.long)})


def test_a_negative_number_of_logits_to_keep_is_refused() -> None:
    with pytest.raises(InputError, match=r"logits_to_keep=-2 must be 0"):
        tiny_model()(torch.randint(0, 97, (1, 4)), logits_to_keep=-2)


def test_attention_dropout_acts_on_every_chained_step_in_training_mode_only() -> None:
    model = tiny_model(29, attention_dropout=0.5)
    layer = model.mtp.layers[0].self_attn
    inputs = pack_rows((1, 12), torch.device("cpu"))
    x = torch.randn(12, 32)
    chain = [layer.project(x, model.model.rotary_emb(x, inputs.positions + step)) for step in range(2)]
    assert torch.equal(layer.attend_chain(chain, inputs), layer.attend_chain(chain, inputs))
    model.train()
    assert not torch.equal(layer.attend_chain(chain, inputs), layer.attend_chain(chain, inputs))


def test_every_mtp_parameter_gets_a_gradient_and_moves() -> None:
    model = tiny_model(8, num_experts=4, num_experts_per_tok=2).train()
    tokens = torch.randint(0, 97, (2, 60))
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.mtp.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    before = {name: parameter.clone() for name, parameter in model.mtp.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    for name, parameter in model.mtp.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_drafting_without_the_layer_is_refused() -> None:
    model = tiny_model(num_nextn_predict_layers=0)
    assert model.mtp is None
    with pytest.raises(InputError, match=r"0 MTP layers.*mtp\.\*"):
        model.draft(torch.zeros(1, 2, 32), torch.zeros(1, 2, dtype=torch.long))
