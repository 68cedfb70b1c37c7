"""The classification heads: logits and losses of transformers' own, and how their checkpoints come and go."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import scramble, tiny_config, tiny_model
from tests.model.reference import relative_error
from torch import Tensor
from transformers.models import qwen3_next as theirs
from transformers.utils import logging as transformers_logging

from qwen3_next import (
    CheckpointError,
    Qwen3NextForCausalLM,
    Qwen3NextForQuestionAnswering,
    Qwen3NextForSequenceClassification,
    Qwen3NextForTokenClassification,
    Qwen3NextPreTrainedModel,
)

HEADS = [Qwen3NextForSequenceClassification, Qwen3NextForTokenClassification, Qwen3NextForQuestionAnswering]
PAD = 3
LABELS = 5


def head(cls: Any, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    model = cls(tiny_config(**({"pad_token_id": PAD, "num_labels": LABELS} | changes))).eval()
    scramble(model)
    return model


def peer_of_head(model: Qwen3NextPreTrainedModel) -> Any:
    settings = model.config.to_dict()
    config = theirs.Qwen3NextConfig(**{k: v for k, v in settings.items() if k not in ("model_type", "dtype")})
    peer = getattr(theirs.modeling_qwen3_next, type(model).__name__)(config).eval()
    peer.load_state_dict(model.state_dict())
    return peer


def padded_rows(side: str, lengths: tuple[int, ...] = (14, 9, 1)) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(PAD + 1, 97, (len(lengths), max(lengths)))
    columns = torch.arange(max(lengths))
    columns = columns.flip(0) if side == "left" else columns
    mask = (columns < torch.tensor(lengths)[:, None]).long()
    return tokens.masked_fill(mask == 0, PAD), mask


def body_of(model: Any) -> Any:
    return getattr(model, model.base_model_prefix)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cls", HEADS)
def test_logits_are_those_of_transformers_head_with_padding_on_either_side(cls: Any, side: str) -> None:
    model = head(cls, 1)
    tokens, mask = padded_rows(side)
    mine, peer = model(tokens, attention_mask=mask), peer_of_head(model)(tokens, attention_mask=mask)
    names = ["start_logits", "end_logits"] if cls is Qwen3NextForQuestionAnswering else ["logits"]
    kept = slice(None) if cls is Qwen3NextForSequenceClassification else mask.bool()
    for name in names:
        assert relative_error(mine[name][kept], peer[name][kept]) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_sequence_is_classified_as_it_is_alone(side: str) -> None:
    model = head(Qwen3NextForSequenceClassification, 2)
    tokens, mask = padded_rows(side)
    logits = model(tokens, attention_mask=mask).logits
    for row, kept, expected in zip(tokens, mask.bool(), logits, strict=True):
        assert relative_error(model(row[kept][None]).logits[0], expected) < 1e-5


def test_classifying_several_sequences_without_a_padding_token_is_refused() -> None:
    model = head(Qwen3NextForSequenceClassification, pad_token_id=None)
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1 if no padding token is defined"):
        model(torch.randint(0, 97, (2, 6)))
    assert model(torch.randint(0, 97, (1, 6))).logits.shape == (1, LABELS)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 4, 2])),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1, 0, 0]] * 3)),
        ("regression", torch.tensor([[0.5, -1, 2, 0, 1]] * 3)),
    ],
)
def test_the_loss_of_each_kind_of_sequence_label_is_that_of_transformers(problem: str, labels: Tensor) -> None:
    model = head(Qwen3NextForSequenceClassification, 3, problem_type=problem)
    tokens, mask = padded_rows("right")
    mine = model(tokens, attention_mask=mask, labels=labels).loss
    assert relative_error(mine, peer_of_head(model)(tokens, attention_mask=mask, labels=labels).loss) < 1e-5


def assert_loss_and_gradients_are_the_peers(model: Any, tokens: Tensor, mask: Tensor, **labels: Tensor) -> None:
    peer = peer_of_head(model)
    mine = model(tokens, attention_mask=mask, **labels).loss
    expected = peer(tokens, attention_mask=mask, **labels).loss
    assert relative_error(mine, expected) < 1e-5
    mine.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        if name == "qa_outputs.bias":  # a softmax over positions does not feel it: its gradient is 0 but for rounding
            assert parameter.grad.abs().max() < 1e-6
        else:
            assert relative_error(parameter.grad, gradients[name]) < 1e-4, name


def test_the_loss_of_token_labels_and_its_gradients_are_those_of_transformers() -> None:
    tokens, mask = padded_rows("right")
    labels = torch.randint(0, LABELS, tokens.shape).masked_fill(mask == 0, -100)
    assert_loss_and_gradients_are_the_peers(head(Qwen3NextForTokenClassification, 4), tokens, mask, labels=labels)


def test_the_loss_of_spans_and_its_gradients_are_those_of_transformers() -> None:
    # Without padding: a span's softmax runs over all columns, and either package leaves its own leftovers there.
    tokens, mask = padded_rows("right", (12, 12))
    span = {"start_positions": torch.tensor([2, 0]), "end_positions": torch.tensor([6, 3])}
    assert_loss_and_gradients_are_the_peers(head(Qwen3NextForQuestionAnswering, 4), tokens, mask, **span)


@pytest.mark.parametrize("cls", HEADS)
def test_a_saved_head_comes_back_bit_for_bit_and_transformers_reads_it(cls: Any, tmp_path: Path) -> None:
    model = head(cls, 5)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    peer = getattr(theirs.modeling_qwen3_next, cls.__name__).from_pretrained(tmp_path)
    for state in (loaded.state_dict(), peer.state_dict()):
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert loaded.config.num_labels == LABELS


@pytest.fixture
def notices(caplog: pytest.LogCaptureFixture) -> Any:
    """What a user reads while loading: transformers' logger does not reach pytest by itself."""
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("cls", HEADS)
def test_a_head_is_put_on_a_language_models_checkpoint_with_a_notice(cls: Any, tmp_path: Path, notices: Any) -> None:
    language_model = tiny_model(6, pad_token_id=PAD)
    language_model.save_pretrained(tmp_path)
    model = cls.from_pretrained(tmp_path, num_labels=LABELS)
    body = body_of(model).state_dict()
    assert all(torch.equal(body[name], tensor) for name, tensor in language_model.model.state_dict().items())
    fresh = {"score.weight", "score.bias", "qa_outputs.weight", "qa_outputs.bias"} & model.state_dict().keys()
    assert fresh
    for name in fresh:
        tensor = model.state_dict()[name]
        assert tensor.isfinite().all()
        assert (tensor.std() > 0) == name.endswith("weight")
        assert f"{name}" in notices.text
    assert "newly initialized" in notices.text
    assert "mtp." not in notices.text


@pytest.mark.parametrize("cls", HEADS)
def test_a_language_model_is_made_of_a_heads_checkpoint_without_mtp(cls: Any, tmp_path: Path, notices: Any) -> None:
    classifier = head(cls, 7)
    classifier.save_pretrained(tmp_path)
    model = Qwen3NextForCausalLM.from_pretrained(tmp_path)
    body = body_of(classifier).state_dict()
    assert all(torch.equal(tensor, body[name]) for name, tensor in model.model.state_dict().items())
    assert model.mtp is None
    assert "no multi-token prediction layer" in notices.text
    assert "lm_head.weight" in notices.text


def test_a_heads_own_checkpoint_must_hold_its_head(tmp_path: Path) -> None:
    model = head(Qwen3NextForTokenClassification, 8)
    state = model.state_dict()
    del state["score.bias"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"missing: score\.bias"):
        Qwen3NextForTokenClassification.from_pretrained(tmp_path)


def test_dropout_before_the_token_labels_is_the_configurations() -> None:
    assert head(Qwen3NextForTokenClassification, classifier_dropout=0.25).dropout.p == 0.25
    assert head(Qwen3NextForTokenClassification).dropout.p == 0.1
