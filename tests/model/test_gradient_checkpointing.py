"""Activations dropped and computed again: the same gradients, and the same experts for every token."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from tests.conftest import tiny_model
from tests.model.reference import relative_error
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from qwen3_next import Qwen3NextForCausalLM, Qwen3NextForSequenceClassification
from qwen3_next.model import moe
from qwen3_next.ops.routing import Routing

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
Gradients = dict[str, Tensor]


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def count_calls(model: Qwen3NextForCausalLM) -> list[int]:
    """How often each layer has run, counted from now on."""
    calls = [0] * len(model.model.layers)
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))
    return calls


def gradients(model: Any, tokens: Tensor, **options: Any) -> Gradients:
    model(tokens, **({"labels": tokens} | options)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(ours: Gradients, expected: Gradients, reentrant: bool) -> None:
    # A reentrant first pass keeps no gradients, and without them the experts' outputs are summed in another order.
    tolerance = 1e-5 if reentrant else 1e-6
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(ours[name], gradient) < tolerance, name


@REENTRANT
@pytest.mark.parametrize(
    "changes", [{}, {"num_mtp_steps": 3}, {"mlp_only_layers": [1]}, {"attention_bias": True}], ids=str
)
def test_gradients_are_those_of_kept_activations(changes: dict[str, Any], reentrant: bool) -> None:
    tokens = torch.randint(0, 97, (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    options = {"attention_mask": mask, "output_router_logits": True}
    kept = gradients(tiny_model(1, **changes).train(), tokens, **options)
    again = gradients(checkpointed(tiny_model(1, **changes).train(), reentrant), tokens, **options)
    assert kept["model.embed_tokens.weight"].abs().max() > 0
    assert_same(again, kept, reentrant)


@REENTRANT
def test_gradients_of_a_head_are_those_of_kept_activations(reentrant: bool) -> None:
    tokens, labels = torch.randint(4, 97, (3, 20)), torch.tensor([0, 1, 1])
    model = Qwen3NextForSequenceClassification(tiny_model(pad_token_id=3).config).train()
    kept = {k: v.clone() for k, v in gradients(model, tokens, labels=labels).items()}
    model.zero_grad()
    assert_same(gradients(checkpointed(model, reentrant), tokens, labels=labels), kept, reentrant)


@REENTRANT
def test_every_layer_is_computed_twice_in_training_and_once_otherwise(reentrant: bool) -> None:
    """Without this the comparisons above would hold for a switch that does nothing."""
    model, tokens = checkpointed(tiny_model(2).train(), reentrant), torch.randint(0, 97, (1, 12))
    calls = count_calls(model)
    gradients(model, tokens)
    assert calls == [2] * 4
    model.eval()(tokens)
    assert calls == [3] * 4
    model.train().gradient_checkpointing_disable()
    gradients(model, tokens)
    assert calls == [4] * 4


def test_only_every_nth_layer_is_computed_again_where_that_was_asked_for() -> None:
    model = tiny_model(2).train()
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        pytest.skip("this version of transformers has no every_n_layers")
    enable(every_n_layers=3)
    calls = count_calls(model)
    gradients(model, torch.randint(0, 97, (1, 12)))
    assert calls == [2, 1, 1, 2]


@contextmanager
def router_that_changes_its_mind(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Routing]]:
    """Scores tilt from call to call, as rounding tilts them: a choice made anew would fall on other experts."""
    route, routings = moe.route, list[Routing]()

    def tilted(x: Tensor, weight: Tensor, top_k: int, normalize: bool, experts: Tensor | None = None) -> Routing:
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(routings))) * 0.3
        routings.append(route(x, weight + noise, top_k, normalize, experts))
        return routings[-1]

    with monkeypatch.context() as patched:
        patched.setattr(moe, "route", tilted)
        yield routings


def passes(routings: list[Routing], layers: int) -> list[tuple[Routing, Routing]]:
    """The first and the second routing of each layer; the backward pass goes through them from last to first."""
    return list(zip(routings[:layers], reversed(routings[-layers:]), strict=True))


@REENTRANT
def test_a_token_keeps_its_experts_when_its_scores_change_in_the_recomputation(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(0, 97, (2, 30))
    model = checkpointed(tiny_model(3, num_nextn_predict_layers=0).train(), reentrant)
    with router_that_changes_its_mind(monkeypatch) as routings:
        gradients(model, tokens)
    assert len(routings) == 2 * 4
    flips = 0
    for first, second in passes(routings, 4):
        assert torch.equal(first.experts, second.experts)
        flips += int((second.probabilities.topk(3).indices.sort().values != first.experts.sort().values).sum())
    assert flips > 0, "the tilt must be large enough to flip a free choice"


@REENTRANT
def test_recomputation_that_chose_anew_would_send_tokens_elsewhere(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: with the memory of the first pass taken away, it fails."""
    model = checkpointed(tiny_model(3, num_nextn_predict_layers=0).train(), reentrant)
    forget_the_choice(monkeypatch)
    with router_that_changes_its_mind(monkeypatch) as routings, suppress(CheckpointError):  # torch may notice by shapes
        gradients(model, torch.randint(0, 97, (2, 30)))
    assert not torch.equal(routings[3].experts, routings[4].experts), "the last layer is the first to be recomputed"


def forget_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Callable[..., Any] = moe.Router.forward
    monkeypatch.setattr(moe.Router, "forward", lambda self, x, experts=None: forward(self, x))


def test_no_cache_is_made_while_activations_are_dropped() -> None:
    model = checkpointed(tiny_model(4).train(), False)
    tokens = torch.randint(0, 97, (1, 8))
    assert model(tokens, use_cache=True).past_key_values is None
    assert model.eval()(tokens, use_cache=True).past_key_values.get_seq_length() == 8


def test_packed_training_drops_activations_as_well() -> None:
    """`train` calls the packed network directly: the switch must work there."""
    model, tokens = tiny_model(5).train(), torch.randint(0, 97, (1, 40))
    borders = {"cu_seq_lens_q": torch.tensor([0, 11, 40])}
    kept = {k: v.clone() for k, v in gradients(model, tokens, **borders).items()}
    model.zero_grad()
    assert isinstance(checkpointed(model, False), Qwen3NextForCausalLM)
    assert_same(gradients(model, tokens, **borders), kept, reentrant=False)
