"""The operations, as pure functions of tensors.

The shape alphabet, here and everywhere: T packed tokens, N sequences, D hidden, H / Hkv query / key-value heads and Dh
their width, Hk / Hv DeltaNet key / value heads and Dk / Dv their widths, C convolution channels and W taps, E experts,
K experts per token, F expert width, V vocabulary, B rows and S columns of
a padded batch, P pages of keys and values, M the most pages of a sequence.
"""

from qwen3_next.ops.attention import attention
from qwen3_next.ops.backend import use
from qwen3_next.ops.causal_conv import ProjectionColumns, causal_conv, causal_conv_
from qwen3_next.ops.cross_entropy import linear_argmax, linear_cross_entropy
from qwen3_next.ops.experts import ExpertScales, SharedExpert, swiglu_experts
from qwen3_next.ops.gate import sigmoid_gate, swiglu
from qwen3_next.ops.gated_delta import gated_delta_rule, gated_delta_rule_, gated_delta_rule_recurrent
from qwen3_next.ops.gated_delta_step import StepState, StepWeights, delta_net_step_
from qwen3_next.ops.linear import linear
from qwen3_next.ops.norm import AddedNorm, add_rms_norm, gated_rms_norm, rms_norm
from qwen3_next.ops.paged_attention import paged_attention
from qwen3_next.ops.pages import KeyPages, write_pages_
from qwen3_next.ops.quant import (
    ActivationFp8,
    BlockFp8,
    dequantize_block_fp8,
    quantize_activations,
    quantize_block_fp8,
)
from qwen3_next.ops.rotary import apply_rotary, rms_norm_rotary
from qwen3_next.ops.routing import Routing, route
from qwen3_next.ops.segments import Segments
from qwen3_next.ops.snapshots import Snapshots

__all__ = [
    "ActivationFp8",
    "AddedNorm",
    "BlockFp8",
    "ExpertScales",
    "KeyPages",
    "ProjectionColumns",
    "Routing",
    "Segments",
    "SharedExpert",
    "Snapshots",
    "StepState",
    "StepWeights",
    "add_rms_norm",
    "apply_rotary",
    "attention",
    "causal_conv",
    "causal_conv_",
    "delta_net_step_",
    "dequantize_block_fp8",
    "gated_delta_rule",
    "gated_delta_rule_",
    "gated_delta_rule_recurrent",
    "gated_rms_norm",
    "linear",
    "linear_argmax",
    "linear_cross_entropy",
    "paged_attention",
    "quantize_activations",
    "quantize_block_fp8",
    "rms_norm",
    "rms_norm_rotary",
    "route",
    "sigmoid_gate",
    "swiglu",
    "swiglu_experts",
    "use",
    "write_pages_",
]
