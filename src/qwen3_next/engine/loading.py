"""Find a checkpoint by path or hub id, and load of it what a command needs."""

import json
import os
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qwen3_next.errors import BackendError, CheckpointError, InputError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress, TaskID
    from tokenizers import Tokenizer

    from qwen3_next.config import Qwen3NextConfig
    from qwen3_next.model.bare import BareCausalLM, Shard
    from qwen3_next.model.quantize import Quantization

SHIPPED = Path(__file__).parent.parent / "assets"
"""The model in the package."""

DTYPES = ("auto", "bfloat16", "float16", "float32")
QUANTIZATIONS = ("auto", "fp8", "none")

_LONG_LOAD_BYTES = 2**32
"""From so many on, a bar shows how much is read."""

_GENERATION_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "do_sample": ((bool,), "true or false"),
    "eos_token_id": ((int,), "a token id or a list of them"),
    "top_k": ((int,), "a whole number"),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), ((int, float), "a number")),
}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DESCRIPTION = ["*.json", "*.jinja"]
_EVERYTHING = [*_DESCRIPTION, "*.safetensors"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to write text.

    Attributes:
        tokenizer: the `tokenizers` object of its tokenizer.json.
        generation: its generation_config.json, empty where there is none.
        chat_template: the Jinja source, None where there is none.
    """

    model: "BareCausalLM"
    config: "Qwen3NextConfig"
    tokenizer: "Tokenizer"
    generation: Mapping[str, Any]
    chat_template: str | None
    device: "torch.device"

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a text."""
        found = self.generation.get("eos_token_id", self.config.eos_token_id)
        return frozenset([] if found is None else [found] if isinstance(found, int) else found)


def find_model(name: str | None, *, weights: bool = True) -> Path:
    """The directory of a checkpoint; one on the hub is downloaded first, showing progress.

    Args:
        name: a directory or a hub id; None for the shipped model.
        weights: download the weights as well.

    Raises:
        CheckpointError: there is no such directory and no such repository, or no way to the hub.
        InputError: an empty name.
    """
    if name is None:
        return SHIPPED
    if not name:
        raise InputError("model is empty; give a directory or a hub id, or leave it out for the model in the box.")
    if (path := Path(name).expanduser()).is_dir():
        return path
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"model {name}: no such directory; give a checkpoint's directory or a hub id (org/name).")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_EVERYTHING if weights else _DESCRIPTION))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"model {name}: no such directory, and the hub did not give it ({reason}); check the name."
        ) from error


def read_config(directory: Path) -> "Qwen3NextConfig":
    """The configuration alone.

    Raises:
        CheckpointError: no config.json, or that of another architecture.
        ConfigError: it holds a value that cannot be served.
    """
    from qwen3_next.config import Qwen3NextConfig

    fields = _read_json(directory / "config.json")
    if fields.get("model_type") != Qwen3NextConfig.model_type:
        raise CheckpointError(
            f"{directory / 'config.json'} describes a model of type {fields.get('model_type')!r}; this package serves "
            f"{Qwen3NextConfig.model_type!r} alone."
        )
    return Qwen3NextConfig.from_dict(fields)


def load_model(
    directory: Path,
    dtype_name: str,
    device_name: str,
    *,
    quantization: "Quantization" = "auto",
    random_weights: bool = False,
    mtp: bool = False,
    progress: bool = True,
    shard: "Shard | None" = None,
) -> LoadedModel:
    """Load model and tokenizer onto one device.

    Args:
        quantization: "auto" keeps what the checkpoint is, "fp8" quantises while it is read, "none" dequantises.
        random_weights: draw the weights, always the same ones, instead of reading any; config.json is enough then,
            "auto" is what its quantization_config says, and where there is no tokenizer, that of the model in the
            package is taken, with its chat template.
        mtp: load the layer that drafts too, if the checkpoint has one.
        shard: leaves of the model what one of several ranks holds.
        progress: show a bar, on the standard error, while more than a few seconds' worth is read.

    Raises:
        InputError: an unknown dtype, device or quantisation.
        BackendError: the device is not there or has not enough memory.
        CheckpointError, ConfigError: the checkpoint is missing, incomplete or not of this architecture.
    """
    import torch

    from qwen3_next.model.bare import BareCausalLM

    if quantization not in QUANTIZATIONS:
        raise InputError(f"quantization = {quantization!r} is unknown. Allowed: {', '.join(QUANTIZATIONS)}.")
    device = choose_device(device_name)
    config = read_config(directory)
    dtype = choose_dtype(dtype_name, config, device)
    says_fp8 = bool(_read_json(directory / "config.json").get("quantization_config"))
    fp8 = quantization == "fp8" or (quantization == "auto" and says_fp8)
    words = SHIPPED if random_weights and not (directory / "tokenizer.json").is_file() else directory
    tokenizer, generation = _tokenizer(words), _generation(directory / "generation_config.json")
    chat_template = _chat_template(words)
    try:
        if random_weights:
            chosen: Quantization = "fp8" if fp8 else "none"
            model = BareCausalLM.with_random_values(config, dtype, device, quantization=chosen, mtp=mtp, shard=shard)
        else:
            with _bar(progress) as on_progress:
                model = BareCausalLM.from_directory(
                    *(directory, config, dtype, device),
                    quantization=quantization,
                    mtp=mtp,
                    on_progress=on_progress,
                    shard=shard,
                )
    except (torch.OutOfMemoryError, MemoryError) as error:
        size = config.weight_bytes("fp8" if fp8 else dtype) / 2**30
        raise BackendError(f"{size:.1f} GiB of weights do not fit {device}; see `qwen3-next info`.") from error
    return LoadedModel(model, config, tokenizer, generation, chat_template, device)


@contextmanager
def _bar(wanted: bool) -> Generator[Callable[[int, int], None], None, None]:
    """What shows bytes read of bytes in all, once these are many."""
    with ExitStack() as stack:
        bars: list[tuple[Progress, TaskID]] = []

        def show(done: int, total: int) -> None:
            if not wanted or total < _LONG_LOAD_BYTES:
                return
            if not bars:
                from rich.console import Console
                from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

                columns = "loading", BarColumn(), DownloadColumn(), TransferSpeedColumn()
                bar = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
                bars.append((bar, bar.add_task("", total=total)))
            bars[0][0].update(bars[0][1], completed=done)

        yield show


def choose_device(name: str) -> "torch.device":
    """The device of a name; "auto" is the first GPU, or else the CPU.

    Raises:
        InputError: no such kind of device.
        BackendError: it is not in this machine.
    """
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if found is None:
        raise InputError(f"device {name} is unknown. Allowed: auto, cpu, cuda, cuda:N.")
    if name != "cpu" and int(found[1] or 0) >= count:
        raise BackendError(f"device {name}: this machine has {count} CUDA devices; use cpu or auto.")
    return torch.device(name)


def choose_dtype(name: str, config: "Qwen3NextConfig", device: "torch.device") -> "torch.dtype":
    """The dtype of a name; "auto" is the one of the checkpoint.

    A CPU with nothing above AVX2 has no instructions for bf16, and its products of bf16 matrices take many times as
    long as those of fp32: there "auto" computes a bf16 checkpoint in fp32, if its weights then take at most half of
    the memory.

    Raises:
        InputError: an unknown dtype.
    """
    import torch

    if name not in DTYPES:
        raise InputError(f"dtype {name} is unknown. Allowed: {', '.join(DTYPES)}.")
    if name != "auto":
        return getattr(torch, name)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    emulated = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if stored == torch.bfloat16 and emulated and 2 * config.weight_bytes(torch.float32) <= ram_bytes():
        return torch.float32
    return stored


def ram_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _tokenizer(directory: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{directory} holds no tokenizer.json; copy the model's tokenizer files there.")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file} is no tokenizer ({error}); download it again.") from error


def _generation(file: Path) -> dict[str, Any]:
    """What a generation_config.json says, with the types that choosing a token needs; empty where there is none."""
    found = _read_json(file) if file.is_file() else {}
    for name, (types, allowed) in _GENERATION_TYPES.items():
        values = cast("list[Any]", found[name]) if isinstance(found.get(name), list) else [found.get(name)]
        is_one = name == "eos_token_id" or not isinstance(found.get(name), list)
        if not is_one or not all(value is None or type(value) in types for value in values):
            raise CheckpointError(f"{file}: {name}={found[name]!r} must be {allowed}; correct it or leave it out.")
    return found


def _chat_template(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); download it again.") from error
    settings = directory / "tokenizer_config.json"
    return _read_json(settings).get("chat_template") if settings.is_file() else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist; a model is the directory of a whole checkpoint.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is not a JSON object; download it again.")
    return cast(dict[str, Any], found)
