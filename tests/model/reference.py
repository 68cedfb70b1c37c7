"""transformers' own Qwen3-Next with the weights of one of ours: the peer that logits and losses are compared with."""

import torch
from transformers.models.qwen3_next import Qwen3NextConfig as PeerConfig
from transformers.models.qwen3_next import Qwen3NextForCausalLM as PeerModel

from qwen3_next import Qwen3NextForCausalLM


def peer_of(model: Qwen3NextForCausalLM) -> PeerModel:
    """The same weights in transformers' classes; the MTP layer is left out, which they do not have."""
    settings = model.config.to_dict()
    config = PeerConfig(**{key: value for key, value in settings.items() if key not in ("model_type", "dtype")})
    config._attn_implementation = "eager"
    peer = PeerModel(config).to(model.dtype)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == ([], [])
    return peer.train(model.training)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest value of the reference."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30)).item()
