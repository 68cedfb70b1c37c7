"""Multi-token prediction: its loss, its gradient, its drafts, each against a plain restatement."""

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import tiny_model
from tests.model.reference import relative_error
from torch import Tensor

from qwen3_next import InputError, Qwen3NextForCausalLM
from qwen3_next.model.inputs import PackedInputs
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


def test_mtp_targets_stay_inside_their_document() -> None:
    model = tiny_model(3).train()
    a, b = torch.randint(0, 97, (1, 11)), torch.randint(0, 97, (1, 7))
    row, positions = torch.cat([a, b], 1), torch.tensor([[*range(11), *range(7)]])
    packed = model(row, labels=row, position_ids=positions).mtp_loss
    alone = [model(d, labels=d).mtp_loss * (d.shape[1] - 2) for d in (a, b)]
    torch.testing.assert_close(packed, sum(alone) / (9 + 5))


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


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_chained_training_steps_see_what_drafting_sees(steps: int) -> None:
    """Drafting step by step with its cache and the teacher-forced chain of training agree on every logit's argmax."""
    model = tiny_model(5)
    tokens = torch.randint(0, 97, (1, 24))
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        drafted = model.draft(hidden[:, :-1], tokens[:, 1:], num_drafts=steps).token_ids[0]
        extended = torch.cat([tokens, drafted[None]], 1)
        inputs = PackedInputs(extended[0], torch.arange(24 + steps), Segments.from_lengths([24 + steps]))
        ahead = model.predict_ahead(inputs, steps)[1:]
    # Step s of the chain begun at position 22 has read the true token 23 and the drafts before its own.
    assert [int(logits[22].argmax()) for logits in ahead] == drafted.tolist()


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


def test_padded_rows_draft_what_unpadded_rows_draft() -> None:
    model = tiny_model(7)
    tokens = torch.randint(0, 97, (2, 20))
    mask = torch.ones_like(tokens)
    mask[0, :8] = 0
    hidden = model.model(tokens, attention_mask=mask).last_hidden_state
    padded = model.draft(hidden[:, :-1], tokens[:, 1:], num_drafts=2, attention_mask=mask[:, :-1])
    alone = model.model(tokens[:1, 8:]).last_hidden_state
    assert torch.equal(padded.token_ids[:1], model.draft(alone[:, :-1], tokens[:1, 9:], num_drafts=2).token_ids)


def test_every_mtp_parameter_gets_a_gradient() -> None:
    model = tiny_model(8, num_experts=4, num_experts_per_tok=2).train()
    tokens = torch.randint(0, 97, (2, 60))
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.mtp.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_drafting_without_the_layer_is_refused() -> None:
    model = tiny_model(num_nextn_predict_layers=0)
    assert model.mtp is None
    with pytest.raises(InputError, match=r"0 MTP layers.*mtp\.\*"):
        model.draft(torch.zeros(1, 2, 32), torch.zeros(1, 2, dtype=torch.long))
