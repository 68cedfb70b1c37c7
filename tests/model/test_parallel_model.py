"""A model that lies on several ranks is the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import scramble, tiny_config
from tests.model.parallel_ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import qwen3_next
from qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from qwen3_next.errors import InputError
from qwen3_next.model.bare import BareCausalLM
from qwen3_next.model.cuts import Layout
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.model.packed_cache import PackedCache, PackedMemory
from qwen3_next.model.parallel import parallelize_
from qwen3_next.model.quantize import Quantization
from qwen3_next.ops.segments import Segments

CPU = torch.device("cpu")
ASSETS = Path(qwen3_next.__file__).parent / "assets"
LENGTHS, PAGES = (11, 3, 1), 6
GROUPED = {"num_attention_heads": 12, "num_key_value_heads": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 12}
REPEATED = {"num_key_value_heads": 1, "linear_num_key_heads": 1}
IN_BLOCKS = {
    "hidden_size": 160,
    "num_attention_heads": 4,
    "head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_hidden_layers": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 512,
    "num_experts": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {**GROUPED, "vocab_size": 96, "attention_bias": True},
    "repeated": {**REPEATED, "tie_word_embeddings": True, "vocab_size": 96},
    "dense": {**GROUPED, "mlp_only_layers": [1, 3], "vocab_size": 97},
    "blocks": {**IN_BLOCKS, "vocab_size": 96},
}


@dataclass(frozen=True)
class Case:
    tp: int
    ep: int
    name: str
    quantization: Quantization = "auto"


CASES = {
    2: [
        *(Case(tp, 3 - tp, name) for name in ("grouped", "repeated", "dense") for tp in (1, 2)),
        *(Case(tp, 3 - tp, "blocks", "fp8") for tp in (1, 2)),
        Case(1, 2, "shipped"),
        Case(2, 1, "shipped"),
    ],
    4: [
        *(Case(2, 2, name) for name in ("grouped", "repeated")),
        Case(4, 1, "repeated"),
        Case(2, 2, "blocks", "fp8"),
    ],
}


def outputs(model: BareCausalLM) -> Tensor:
    """Logits of packed prompts over pages and slots, then of a token more of each, and of the MTP layer behind both."""
    config, count = model.config, len(LENGTHS)
    memory = PackedMemory.allocate(config, pages=PAGES, slots=4, page=16, dtype=torch.float32)
    drafts = PackedMemory.allocate(
        config, pages=PAGES, slots=0, page=16, dtype=torch.float32, layer_types=("full_attention",)
    )
    table = torch.arange(PAGES, dtype=torch.int32).view(count, -1)
    found: list[Tensor] = []
    done = torch.zeros(count, dtype=torch.int32)
    for lengths in (LENGTHS, (1,) * count):
        segments = Segments.from_lengths(lengths)
        tokens = torch.arange(segments.total) * 7 % 90
        places = torch.cat([torch.arange(n) + int(start) for n, start in zip(lengths, done, strict=True)])
        done = done + torch.tensor(lengths, dtype=torch.int32)
        slots = torch.arange(count, dtype=torch.int32)
        inputs = PackedInputs(tokens, places, segments)
        hidden = model.model(inputs, PackedCache(memory, table, done, slots))
        assert model.mtp is not None
        embeddings, rotary = model.model.embed_tokens(tokens), model.model.rotary_emb(hidden, places)
        drafted = model.mtp(embeddings, hidden, inputs, rotary, PackedCache(drafts, table, done, slots)).hidden
        found += [model.lm_head(hidden), model.lm_head(drafted)]
    return torch.cat(found)


def load(case: Case, directories: dict[str, Path], mesh: Any = None) -> BareCausalLM:
    directory = directories[case.name]
    config = Qwen3NextConfig.from_pretrained(directory)

    def shard(model: BareCausalLM, fp8: bool) -> Any:
        return parallelize_(model, mesh, fp8)

    return BareCausalLM.from_directory(
        directory, config, torch.float32, CPU, quantization=case.quantization, mtp=True, shard=mesh and shard
    )


@torch.no_grad()
def on_a_rank(count: int, directories: dict[str, Path]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for case in CASES[count]:
        mesh = init_device_mesh("cpu", (case.tp, case.ep), mesh_dim_names=("tp", "ep"))
        read = load(case, directories, mesh)
        whole = load(case, directories)
        parallelize_(whole, mesh, fp8=case.quantization == "fp8")
        same = all(torch.equal(a, b) for a, b in zip(state(read), state(whole), strict=True))
        drawn = BareCausalLM.with_random_values(
            Qwen3NextConfig.from_pretrained(directories[case.name]),
            *(torch.float32, CPU),
            quantization=case.quantization,
            mtp=True,
            shard=lambda model, fp8, mesh=mesh: parallelize_(model, mesh, fp8),
        )
        size = sum(parameter.nbytes for parameter in read.parameters())
        results.append({"logits": outputs(read), "same": same, "drawn": outputs(drawn), "bytes": size})
    return results


def state(model: BareCausalLM) -> Iterator[Tensor]:
    return (tensor.view(torch.uint8) for tensor in model.state_dict().values())


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {"shipped": ASSETS}
    for name, changes in MODELS.items():
        torch.manual_seed(3)
        model = Qwen3NextForCausalLM(tiny_config(dtype="float32", **changes))
        scramble(model)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


def shapes_of(config: Qwen3NextConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in BareCausalLM(config, True).named_parameters()}


@pytest.mark.parametrize(
    ("tp", "ep", "fp8", "named"),
    [
        (3, 1, False, ["num_attention_heads = 16 over 3", "num_key_value_heads = 2 over 3", "tp = 1, 2, 4, 8, 16;"]),
        (1, 3, False, ["num_experts = 512 over 3", "ep = 1, 2, 4, 8, 16, 32, 64"]),
        (8, 1, True, ["gate_up_proj [512, 1024, 2048] at 64, inside a block of 128", "tp = 1, 2, 4;"]),
    ],
)
def test_counts_that_do_not_divide_are_refused_with_those_that_do(
    tp: int, ep: int, fp8: bool, named: list[str]
) -> None:
    config = Qwen3NextConfig(num_hidden_layers=4)
    with pytest.raises(InputError) as error:
        Layout(tp, ep).check(config, shapes_of(config), fp8=fp8)
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (4, 1), (16, 1), (1, 4), (2, 4)])
def test_the_published_model_can_be_cut_so(tp: int, ep: int) -> None:
    config = Qwen3NextConfig(num_hidden_layers=4)
    Layout(tp, ep).check(config, shapes_of(config), fp8=False)


@pytest.mark.parametrize("count", CASES)
@torch.no_grad()
def test_a_model_on_several_ranks_is_the_model(count: int, directories: dict[str, Path]) -> None:
    """Read or drawn, over heads and experts, in fp32 and in block-fp8, with keys and states that are cut too."""
    found = run_ranks(count, on_a_rank, count, directories)
    for number, case in enumerate(CASES[count]):
        whole = load(case, directories)
        config = Qwen3NextConfig.from_pretrained(directories[case.name])
        drawn = BareCausalLM.with_random_values(config, torch.float32, CPU, quantization=case.quantization, mtp=True)
        for rank in found:
            result = rank[number]
            assert result["same"], f"{case}: what is read is not what is cut from the whole"
            for key, model in (("logits", whole), ("drawn", drawn)):
                expected = outputs(model)
                difference = result[key] - expected
                if case.quantization == "fp8":  # an activation between two codes goes to either
                    assert difference.norm() < 2e-2 * expected.norm(), (case, key)
                else:
                    assert difference.abs().max() < 1e-5 * expected.abs().max(), (case, key)
            assert torch.equal(result["logits"], found[0][number]["logits"])
        assert found[0][number]["bytes"] < sum(parameter.nbytes for parameter in whole.parameters())
