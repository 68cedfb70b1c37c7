"""The configuration: every spelling in, all spellings out, exact figures, and what cannot be served refused by name."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from qwen3_next.errors import ConfigError, Qwen3NextError

TransformersConfig = transformers.Qwen3NextConfig

# The published config.json of Qwen3-Next-80B-A3B-Instruct.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
}
OWN_FIELDS = {"num_nextn_predict_layers", "num_mtp_steps", "mtp_loss_weight"}


def published(**changes: Any) -> Qwen3NextConfig:
    return Qwen3NextConfig(**copy.deepcopy({**PUBLISHED, **changes}))


def saved(config: Any, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@st.composite
def config_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Small, odd, valid configurations."""
    layers = draw(st.integers(1, 6))
    key_value_heads, key_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    experts = draw(st.integers(1, 9))
    fields: dict[str, Any] = {
        "vocab_size": draw(st.integers(8, 99)),
        "hidden_size": draw(st.integers(1, 33)),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": key_value_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": key_value_heads,
        "head_dim": 8 * draw(st.integers(1, 4)),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * draw(st.integers(1, 3)),
        "linear_key_head_dim": draw(st.integers(1, 20)),
        "linear_value_head_dim": draw(st.integers(1, 20)),
        "linear_conv_kernel_dim": draw(st.integers(2, 5)),
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "moe_intermediate_size": draw(st.integers(1, 40)),
        "shared_expert_intermediate_size": draw(st.integers(1, 40)),
        "decoder_sparse_step": draw(st.integers(1, 3)),
        "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), unique=True)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "rope_theta": draw(st.sampled_from([10_000.0, 5_000_000, 10_000_000])),
        "rope_scaling": draw(st.sampled_from([None, YARN, {"type": "linear", "factor": 2.0}])),
        "partial_rotary_factor": draw(st.sampled_from([0.25, 0.5, 1.0])),
    }
    if draw(st.booleans()):
        fields["layer_types"] = draw(
            st.lists(st.sampled_from(["linear_attention", "full_attention"]), min_size=layers, max_size=layers)
        )
    else:
        fields["full_attention_interval"] = draw(st.integers(1, 5))
    return fields


class TestReading:
    def test_the_published_config_is_read(self) -> None:
        config = published()
        assert config.rope_parameters == {
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        }
        assert config.rotary_dim == 64
        assert config.dtype == torch.bfloat16
        assert config.full_attention_interval == 4
        full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
        assert full == list(range(3, 48, 4))
        assert config.num_nextn_predict_layers == 1
        assert all(config.is_sparse_layer(i) for i in range(48))

    def test_the_defaults_are_those_of_transformers(self) -> None:
        ours, theirs = Qwen3NextConfig(), TransformersConfig()
        for name, value in theirs.to_dict().items():
            assert name == "transformers_version" or getattr(ours, name) == value, name
        assert (ours.num_nextn_predict_layers, ours.num_mtp_steps, ours.mtp_loss_weight) == (1, 1, 0.1)

    @pytest.mark.parametrize(
        "spelling",
        [
            {"rope_theta": 5e6, "partial_rotary_factor": 0.5, "rope_scaling": {"type": "yarn", "factor": 2.0}},
            {"rope_theta": 5e6, "partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 5e6, "partial_rotary_factor": 0.5}},
            {"rope_theta": 5e6, "rope_parameters": {"type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}},
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            },
        ],
    )
    def test_every_rotary_spelling_gives_the_same_config(self, spelling: dict[str, Any]) -> None:
        config = Qwen3NextConfig(**spelling)
        assert config.rope_parameters == {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32768,
            "rope_theta": 5e6,
            "partial_rotary_factor": 0.5,
        }

    def test_reading_leaves_the_callers_dictionaries_alone(self) -> None:
        fields = {"rope_parameters": {"type": "linear", "factor": 2.0}, "mlp_only_layers": [1]}
        before = copy.deepcopy(fields)
        config = Qwen3NextConfig(**fields)
        config.rope_parameters["factor"] = 3.0
        config.mlp_only_layers.append(2)
        assert fields == before
        Qwen3NextConfig.from_dict(fields, rope_theta=1e6, num_hidden_layers=3)
        assert fields == before

    def test_contradicting_spellings_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="rope_theta"):
            Qwen3NextConfig(rope_theta=5e6, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
        with pytest.raises(ConfigError, match="rope_scaling"):
            Qwen3NextConfig(rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_parameters=YARN)
        with pytest.raises(ConfigError, match="full_attention_interval"):
            published(layer_types=["full_attention"] * 48)

    def test_a_block_fp8_checkpoint_is_read_and_not_written_as_one(self, tmp_path: Path) -> None:
        config = published(quantization_config=FP8)
        assert not hasattr(config, "quantization_config")
        assert "quantization_config" not in saved(config, tmp_path)

    def test_a_users_request_to_quantise_is_left_to_transformers(self) -> None:
        config = published()
        config.quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        assert config.to_dict()["quantization_config"]["quant_method"] == "bitsandbytes"

    @pytest.mark.parametrize(
        ("overrides", "name", "value"),
        [
            ({"rope_theta": 5e6}, "rope_theta", 5e6),
            (
                {"rope_scaling": YARN},
                "rope_parameters",
                {"rope_theta": 10000000, "partial_rotary_factor": 0.25, **YARN},
            ),
            (
                {"num_hidden_layers": 5},
                "layer_types",
                ["linear_attention"] * 3 + ["full_attention", "linear_attention"],
            ),
            ({"num_hidden_layers": 2, "full_attention_interval": 1}, "layer_types", ["full_attention"] * 2),
            ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "full_attention_interval", 1),
            ({"dtype": torch.float32}, "dtype", torch.float32),
            ({"torch_dtype": "float16"}, "dtype", torch.float16),
            ({"dtype": "auto"}, "dtype", torch.bfloat16),
        ],
    )
    def test_arguments_of_from_pretrained_override_what_we_saved(
        self, tmp_path: Path, overrides: dict[str, Any], name: str, value: Any
    ) -> None:
        published().save_pretrained(tmp_path)
        config = Qwen3NextConfig.from_pretrained(tmp_path, **overrides)
        assert getattr(config, name) == value

    def test_arguments_of_from_pretrained_are_validated(self, tmp_path: Path) -> None:
        published().save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="num_experts_per_tok = 0"):
            Qwen3NextConfig.from_pretrained(tmp_path, num_experts_per_tok=0)
        _, unused = Qwen3NextConfig.from_pretrained(tmp_path, hidden_size=8, nonsense=1, return_unused_kwargs=True)
        assert unused == {"nonsense": 1}


class TestAssignment:
    """What transformers and its users do to a config after its construction."""

    def test_rotary_fields_assigned_later_stay_complete(self) -> None:
        config = published()
        config.rope_scaling = {"type": "linear", "factor": 10.0}
        linear = {"rope_type": "linear", "factor": 10.0, "rope_theta": 10000000, "partial_rotary_factor": 0.25}
        assert config.rope_parameters == linear
        config.rope_parameters = {"rope_type": "default", "partial_rotary_factor": 0.5}
        assert config.rope_parameters == {
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.5,
        }
        config.rope_theta = 1e4
        assert config.rope_parameters["rope_theta"] == config.to_dict()["rope_theta"] == 1e4

    def test_layer_types_assigned_later_change_the_interval_written(self) -> None:
        config = Qwen3NextConfig(num_hidden_layers=2)
        config.layer_types = ["full_attention", "linear_attention"]
        assert "full_attention_interval" not in config.to_dict()
        config.full_attention_interval = 2
        assert config.layer_types == ["linear_attention", "full_attention"]
        assert config.to_dict()["full_attention_interval"] == 2

    def test_a_bad_value_assigned_later_is_refused_before_it_is_saved(self, tmp_path: Path) -> None:
        config = Qwen3NextConfig()
        config.num_key_value_heads = 3
        with pytest.raises(ConfigError, match="num_attention_heads = 16"):
            config.save_pretrained(tmp_path)

    def test_copies_are_equal_and_independent(self) -> None:
        config = published()
        other = copy.deepcopy(config)
        assert other == config
        other.rope_theta = 1.5
        assert config.rope_theta == 10000000


class TestWriting:
    @settings(max_examples=40, deadline=None)
    @given(fields=config_fields())
    def test_a_written_config_is_read_equal(
        self, tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
    ) -> None:
        folder = tmp_path_factory.mktemp("config")
        config = Qwen3NextConfig(**copy.deepcopy(fields))
        saved(config, folder)
        assert Qwen3NextConfig.from_pretrained(folder).to_dict() == config.to_dict()
        assert Qwen3NextConfig(**config.to_dict()).to_dict() == config.to_dict()

    @settings(max_examples=40, deadline=None)
    @given(fields=config_fields())
    def test_transformers_reads_what_we_write_and_we_what_it_writes(
        self, tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
    ) -> None:
        folder = tmp_path_factory.mktemp("config")
        config = Qwen3NextConfig(**copy.deepcopy(fields))
        saved(config, folder)
        theirs = TransformersConfig.from_pretrained(folder)
        original = TransformersConfig(**copy.deepcopy(fields))
        ignored = OWN_FIELDS | {"full_attention_interval", "_name_or_path", "rope_parameters", "transformers_version"}
        for name in original.to_dict().keys() - ignored:
            assert getattr(theirs, name) == getattr(original, name) == getattr(config, name), name
        original.rope_parameters.pop("type", None)
        assert theirs.rope_parameters == original.rope_parameters == config.rope_parameters
        saved(original, folder)
        assert Qwen3NextConfig.from_pretrained(folder).to_dict() == config.to_dict()

    @settings(max_examples=40, deadline=None)
    @given(fields=config_fields())
    def test_readers_of_the_published_spelling_take_no_wrong_default(
        self, tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
    ) -> None:
        config = Qwen3NextConfig(**copy.deepcopy(fields))
        written = saved(config, tmp_path_factory.mktemp("config"))
        # transformers 4.57 and SGLang take these from the top level, each with a default of its own when absent.
        assert written["rope_theta"] == config.rope_parameters["rope_theta"]
        assert written["partial_rotary_factor"] == config.rope_parameters["partial_rotary_factor"]
        assert written["torch_dtype"] == written["dtype"] == str(config.dtype).removeprefix("torch.")
        if config.rope_parameters["rope_type"] == "default":
            assert written["rope_scaling"] is None
        else:
            shared = {"rope_theta", "partial_rotary_factor"}
            assert written["rope_scaling"].keys() == config.rope_parameters.keys() - shared
        interval = written.get("full_attention_interval")
        if interval is not None:
            pattern = [
                "linear_attention" if (i + 1) % interval else "full_attention" for i in range(len(config.layer_types))
            ]
            assert written["layer_types"] == pattern
        else:
            assert "full_attention_interval" not in fields
        assert written["layer_types"] == config.layer_types

    def test_every_field_of_transformers_is_written_even_at_its_default(self, tmp_path: Path) -> None:
        written = saved(Qwen3NextConfig(), tmp_path)
        expected = {*TransformersConfig.__annotations__, *PUBLISHED} - {
            "architectures",
            "torch_dtype",
            "use_sliding_window",
        }
        expected -= {"model_type", "base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan"}
        assert expected - {"keys_to_ignore_at_inference"} <= written.keys()
        assert written["model_type"] == "qwen3_next"

    def test_saving_the_published_config_keeps_every_value(self, tmp_path: Path) -> None:
        written = saved(published(), tmp_path)
        assert {name: written[name] for name in PUBLISHED if name != "transformers_version"} == {
            name: value for name, value in PUBLISHED.items() if name != "transformers_version"
        }

    def test_printing_and_saving_are_silent(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        config = published(rope_scaling=YARN)
        repr(config)
        config.save_pretrained(tmp_path)
        Qwen3NextConfig.from_pretrained(tmp_path)
        assert not caplog.records


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 0}, "hidden_size = 0"),
    ({"hidden_size": "2048"}, "hidden_size = '2048'"),
    ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
    ({"num_hidden_layers": True}, "num_hidden_layers = True"),
    ({"vocab_size": 1.5}, "vocab_size = 1.5"),
    ({"layer_types": ["full_attention"] * 47}, "not 47"),
    ({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "layer_types = 'sliding_attention'"),
    ({"full_attention_interval": 0}, "full_attention_interval = 0"),
    ({"num_key_value_heads": 3}, "num_attention_heads = 16"),
    ({"linear_num_key_heads": 5}, "linear_num_value_heads = 32"),
    ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim = 1"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0"),
    ({"num_experts_per_tok": 513}, "num_experts_per_tok = 513"),
    ({"num_experts": -1}, "num_experts = -1"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
    ({"mlp_only_layers": [48]}, "mlp_only_layers = 48"),
    ({"mlp_only_layers": [-1]}, "mlp_only_layers = -1"),
    ({"layer_types": 5}, "layer_types = 5"),
    ({"mlp_only_layers": 5}, "mlp_only_layers = 5"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type = \\['yarn'\\]"),
    ({"quantization_config": 5}, "quantization_config = 5"),
    ({"num_labels": "a"}, "num_labels = 'a'"),
    ({"id2label": 5}, "id2label = 5"),
    ({"eos_token_id": 151936}, "eos_token_id = 151936"),
    ({"eos_token_id": [3, -1]}, "eos_token_id = \\[3, -1\\]"),
    ({"eos_token_id": "2"}, "eos_token_id = '2'"),
    ({"bos_token_id": 151936}, "bos_token_id = 151936"),
    ({"bos_token_id": [1]}, "bos_token_id = \\[1\\]"),
    ({"pad_token_id": "a"}, "pad_token_id = 'a'"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"attention_dropout": 1.0}, "attention_dropout = 1.0"),
    ({"attention_dropout": -0.1}, "attention_dropout = -0.1"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps = nan"),
    ({"router_aux_loss_coef": math.nan}, "router_aux_loss_coef = nan"),
    ({"initializer_range": math.inf}, "initializer_range = inf"),
    ({"mtp_loss_weight": -1.0}, "mtp_loss_weight = -1.0"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers = -1"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers = 2"),
    ({"num_mtp_steps": 0}, "num_mtp_steps = 0"),
    ({"norm_topk_prob": 1}, "norm_topk_prob = 1"),
    ({"pad_token_id": 151936}, "pad_token_id = 151936"),
    ({"torch_dtype": "int8"}, "dtype = 'int8'"),
    ({"dtype": "float8_e4m3fn"}, "dtype = 'float8_e4m3fn'"),
    ({"rope_theta": 0}, "rope_theta = 0"),
    ({"rope_theta": math.nan}, "rope_theta = nan"),
    ({"partial_rotary_factor": 0.0}, "partial_rotary_factor = 0.0"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
    ({"head_dim": 6, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_type = 'llama3'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor = 0.5"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.0078125}}, "at least 4"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "factor = None"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor = 0.5"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor = None"),
    ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "type = 'yarn'"),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embeddings = 0"),
    ({"rope_scaling": {**YARN, "beta_fast": 0.5}}, "beta_fast = 0.5"),
    ({"rope_scaling": {**YARN, "mscale": 1.0}}, "mscale = 1.0"),
    ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate = 1"),
    ({"rope_scaling": {**YARN, "attention_factor": -1.0}}, "attention_factor = -1.0"),
    ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "rope_parameters.factor = 4.0"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method = 'gptq'"),
    ({"quantization_config": {**FP8, "weight_block_size": [1, 128]}}, "weight_block_size = \\[1, 128\\]"),
    ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size = None"),
    ({"quantization_config": {**FP8, "activation_scheme": "static"}}, "activation_scheme = 'static'"),
]


class TestRefusals:
    @pytest.mark.parametrize(("fields", "named"), REFUSED)
    def test_a_value_that_cannot_be_served_is_refused_with_field_value_and_remedy(
        self, fields: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(ConfigError, match=named) as caught:
            Qwen3NextConfig(**fields)
        assert "Allowed: " in str(caught.value)

    def test_a_config_error_is_a_value_error(self) -> None:
        with pytest.raises(ValueError, match="hidden_size") as caught:
            Qwen3NextConfig(hidden_size=0)
        assert isinstance(caught.value, Qwen3NextError)

    @pytest.mark.parametrize(
        "fields",
        [
            {"rope_scaling": {**YARN, "attention_factor": 1.0, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
            {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
            {"rope_scaling": {"rope_type": "default"}},
            {"num_experts": 0},
            {"num_experts": 0, "num_experts_per_tok": 0},
            {"num_nextn_predict_layers": 0},
            {"hidden_size": 37},
            {"eos_token_id": [0, 151935], "bos_token_id": 151935, "pad_token_id": 0},
            {"num_labels": 5},
            {"quantization_config": None},
        ],
    )
    def test_unusual_values_that_can_be_served_are_accepted(self, fields: dict[str, Any]) -> None:
        Qwen3NextConfig(**fields)


class TestContextLength:
    @pytest.mark.parametrize(
        ("scaling", "tokens"),
        [
            (None, 262_144),
            (YARN, 1_048_576),
            ({"rope_type": "yarn", "factor": 2.0}, 524_288),
            ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 262_144),
            ({"rope_type": "linear", "factor": 1.5}, 393_216),
            ({"rope_type": "dynamic", "factor": 2.0}, 524_288),
        ],
    )
    def test_a_scaled_rotary_embedding_lengthens_the_context(self, scaling: dict[str, Any] | None, tokens: int) -> None:
        assert published(rope_scaling=scaling).context_length() == tokens

    def test_a_length_that_already_counts_the_scaling_is_not_scaled_again(self) -> None:
        assert published(rope_scaling=YARN, max_position_embeddings=1_048_576).context_length() == 1_048_576


class TestFigures:
    def test_the_figures_of_the_published_model_are_exact(self) -> None:
        config = published()
        assert config.parameter_count() == 81_324_862_720
        assert config.mtp_parameter_count() == 1_650_471_424
        assert config.parameter_count() - config.mtp_parameter_count() == 79_674_391_296
        assert config.weight_bytes() == 162_649_725_440
        assert round(config.weight_bytes("fp8") / 1e9, 2) == 82.02
        assert round(config.active_parameter_count() / 1e9, 2) == 3.87
        assert round(config.active_parameter_count(include_embeddings=False) / 1e9, 2) == 3.25
        assert config.kv_bytes_per_token() == 24 * 1024
        assert config.kv_bytes_per_token(include_mtp=True) == 26 * 1024
        convolution = 36 * 8192 * 3 * 2
        assert config.state_bytes_per_sequence() == 72 * 2**20 + convolution
        assert config.state_bytes_per_sequence(torch.float32) == 72 * 2**20 + 2 * convolution

    def test_without_mtp_layers_nothing_is_counted_for_them(self) -> None:
        config = published(num_nextn_predict_layers=0)
        assert config.mtp_parameter_count() == 0
        assert config.parameter_count() == 79_674_391_296

    @settings(max_examples=12, deadline=None)
    @given(fields=config_fields())
    def test_the_parameter_count_is_that_of_transformers_model(self, fields: dict[str, Any]) -> None:
        fields["rope_scaling"] = None
        with torch.device("meta"):
            model = transformers.Qwen3NextForCausalLM(TransformersConfig(**copy.deepcopy(fields)))
        config = Qwen3NextConfig(**fields)
        assert config.parameter_count() - config.mtp_parameter_count() == model.num_parameters()

    @settings(max_examples=12, deadline=None)
    @given(fields=config_fields(), mtp_layers=st.integers(0, 1))
    def test_the_parameter_count_is_that_of_our_model(self, fields: dict[str, Any], mtp_layers: int) -> None:
        config = Qwen3NextConfig(**fields, num_nextn_predict_layers=mtp_layers)
        with torch.device("meta"):
            model = Qwen3NextForCausalLM(config)
        assert config.parameter_count() == model.num_parameters()

    def test_tied_embeddings_are_counted_once(self) -> None:
        difference = published().parameter_count() - published(tie_word_embeddings=True).parameter_count()
        assert difference == 151936 * 2048

    def test_a_dense_layer_is_named_by_list_by_step_and_by_having_no_experts(self) -> None:
        config = Qwen3NextConfig(num_hidden_layers=6, mlp_only_layers=[3], decoder_sparse_step=2)
        assert [config.is_sparse_layer(i) for i in range(6)] == [False, True, False, False, False, True]
        assert not any(Qwen3NextConfig(num_hidden_layers=6, num_experts=0).is_sparse_layer(i) for i in range(6))

    def test_with_every_expert_active_all_parameters_are_active(self) -> None:
        config = Qwen3NextConfig(num_experts=4, num_experts_per_tok=4)
        assert config.active_parameter_count() == config.parameter_count() - config.mtp_parameter_count()
