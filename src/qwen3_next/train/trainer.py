"""The training loop."""

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.errors import ConfigError, DivergedError
from qwen3_next.model import Qwen3NextForCausalLM
from qwen3_next.train import checkpoint as ckpt
from qwen3_next.train.config import TrainConfig
from qwen3_next.train.data import PackedBatch, PackedDocuments, Prefetcher
from qwen3_next.train.log import RunLog, plot_losses
from qwen3_next.train.loss import BatchLoss, LoadBuffer, LossWeights, Window, batch_loss, count_load
from qwen3_next.train.optimizer import MasterAdamW
from qwen3_next.train.schedule import lr_factor
from qwen3_next.train.sources import open_documents
from qwen3_next.train.validation import validate


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        finished: all steps are done; otherwise it stopped early (time limit, signal) and continues when run again.
        step, tokens, seconds: done so far, earlier parts of a resumed run included.
        model: directory of the exported model.
    """

    finished: bool
    step: int
    tokens: int
    seconds: float
    model: Path


def train(config: TrainConfig | Path | str) -> TrainResult:
    """Train on one device, continuing from the newest checkpoint in the output directory where there is one.

    Args:
        config: the settings, or the path of a TOML file with them.

    Raises:
        ConfigError: a setting cannot be honoured, or differs from those of the run to continue.
        DataError: the documents cannot be read.
        DivergedError: loss or gradients are no longer finite; the last good checkpoint is intact.
        StorageError: the disk refused a checkpoint; earlier ones are intact.
    """
    settings = config if isinstance(config, TrainConfig) else TrainConfig.from_toml(config)
    return _Run(settings).run()


class _Run:
    """One process of training: model, optimiser, documents, log."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.run.output)
        self.device = _device(config.run.device)
        saved = ckpt.load_latest(self.output / "checkpoints")
        if saved is not None:
            _refuse_other_settings(saved.settings, config)
        self.model = _model(config, self.device)
        self.optimizer = MasterAdamW(self.model, config.optimizer)
        self.progress = ckpt.Progress()
        if saved is not None:
            self.progress = saved.progress
            self.optimizer.load_state(saved.tensors)
            ckpt.set_generator_states(saved.tensors, self.device)
        vocab_size = self.model.config.vocab_size
        stores, self.validation = open_documents(config.data, self.output / "tokens", vocab_size)
        self.documents = PackedDocuments(
            stores, config.data.sequence_length, config.data.tokens_per_batch, config.run.seed
        )
        self.weights = _weights(config, self.model.config)
        self.meter = _Meter(self.progress)
        self.checked_skips = 0

    def run(self) -> TrainResult:
        started, earlier = time.monotonic(), self.progress.seconds
        prefetcher = Prefetcher(self.documents.batches(self.progress.cursor))
        with _stop_signals() as stop, RunLog(self.output, self.progress.step) as log, _progress_bar() as bar:
            self._introduce(log)
            task = bar.add_task("training", total=self.config.schedule.steps, completed=self.progress.step, loss="")
            try:
                while self.progress.step < self.config.schedule.steps and not stop.is_set():
                    self._step([prefetcher.next() for _ in range(self.config.run.accumulate)])
                    self.progress = replace(self.progress, seconds=earlier + time.monotonic() - started)
                    self._report(log, bar, task)
                    limit = self.config.run.max_seconds
                    if limit and time.monotonic() - started > limit:
                        break
            finally:
                prefetcher.close()
            self._finish(log)
        finished = self.progress.step >= self.config.schedule.steps
        p = self.progress
        return TrainResult(finished, p.step, p.tokens, p.seconds, self.output / "model")

    def _introduce(self, log: RunLog) -> None:
        if self.progress.step:
            return
        sizes = dict(zip(self.optimizer.names, (p.numel() for p in self.optimizer.parameters), strict=True))
        groups = {
            g.name: {
                "parameters": sum(sizes[n] for n in g.parameters),
                "tensors": len(g.parameters),
                "weight_decay": self.config.optimizer.weight_decay if g.decayed else 0.0,
            }
            for g in self.optimizer.groups
        }
        log.note("start", {"settings": self.config.as_dict(), "tokens_per_epoch": self.documents.tokens_per_epoch})
        log.note("parameter_groups", groups)

    def _step(self, batches: list[PackedBatch]) -> None:
        """One optimiser step over an accumulation window."""
        steps = self.model.config.num_mtp_steps if self.model.mtp is not None else 0
        counts = zip(*(batch.target_counts(steps) for batch in batches), strict=True)
        window = Window(targets=tuple(map(sum, counts)), tokens=sum(b.token_ids.numel() for b in batches))
        buffer = LoadBuffer()
        if self.config.loss.balance_count_first:
            for batch in batches:
                count_load(self.model, *batch.to(self.device), buffer)
            buffer.preset = True
        for batch in batches:
            inputs, targets = batch.to(self.device)
            loss = batch_loss(self.model, inputs, targets, window, buffer, self.weights)
            loss.total.backward()
            self.optimizer.accumulate()
            self.meter.add(loss)
        lr = self.config.optimizer.lr * lr_factor(self.config.schedule, self.progress.step)
        self.meter.end_step(self.optimizer.step(lr), lr)
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            tokens=self.progress.tokens + window.tokens,
            cursor=batches[-1].after,
        )

    def _report(self, log: RunLog, bar: Progress, task: Any) -> None:
        run, step = self.config.run, self.progress.step
        is_last = step == self.config.schedule.steps
        if step % run.log_every == 0 or is_last:
            self._refuse_divergence()
            row = self.meter.read(self.progress) | _norm_weights(self.model)
            log.row(step, row)
            bar.update(
                task, completed=step, loss=f"loss {row['loss/lm']:.3f}, {row['tokens_per_second']:,.0f} tokens/s"
            )
        if (run.validate_every and step % run.validate_every == 0) or is_last:
            self._validate(log)
        if run.checkpoint_every and step % run.checkpoint_every == 0 and not is_last:
            self._checkpoint()

    def _finish(self, log: RunLog) -> None:
        self._checkpoint()
        self._export(self.output / "model")
        if self.progress.step:
            plot_losses(self.output)

    def _validate(self, log: RunLog) -> None:
        results: dict[str, float] = {"tokens": self.progress.tokens}
        for name, documents in self.validation.items():
            results |= {f"validation/{name}/{k}": v for k, v in validate(self.model, documents, self.device).items()}
        if self.validation:
            log.row(self.progress.step, results)
            plot_losses(self.output)
        self.meter.restart_clock(self.progress)

    def _checkpoint(self) -> None:
        self._refuse_divergence()
        tensors = self.optimizer.state() | ckpt.generator_states(self.device)
        directory = self.output / "checkpoints"
        ckpt.save_checkpoint(
            directory, self.progress, _identity(self.config), tensors, self._export, self.config.run.keep
        )
        self.meter.restart_clock(self.progress)

    def _export(self, directory: Path) -> None:
        """The model in the published layout: every tensor in bf16."""
        self.model.save_pretrained(directory, dtype=torch.bfloat16)

    def _refuse_divergence(self) -> None:
        skipped = int(self.optimizer.skipped)
        if skipped > self.checked_skips:
            raise DivergedError(
                f"{skipped - self.checked_skips} step(s) up to step {self.progress.step} had a gradient that is not "
                f"finite. The last checkpoint in {self.output / 'checkpoints'} is good: continue from it with a smaller "
                "learning rate or stronger clipping, or look for broken rows in the data."
            )


class _Meter:
    """Sums figures on the device and fetches them when a row is due."""

    def __init__(self, progress: ckpt.Progress) -> None:
        self.sums: dict[str, Tensor] = {}
        self.load: Tensor | None = None
        self.steps, self.lr = 0, 0.0
        self.clock, self.tokens = time.monotonic(), progress.tokens

    def add(self, loss: BatchLoss) -> None:
        for name in ("total", "lm", "mtp", "balance"):
            self._sum(f"loss/{name}", getattr(loss, name).detach())
        if loss.load is not None:
            self.load = loss.load if self.load is None else self.load + loss.load

    def end_step(self, grad_norm: Tensor, lr: float) -> None:
        self._sum("grad_norm", grad_norm)
        self.steps, self.lr = self.steps + 1, lr

    def restart_clock(self, progress: ckpt.Progress) -> None:
        """Do not count the time of validation and checkpoints as training."""
        self.clock, self.tokens = time.monotonic(), progress.tokens

    def read(self, progress: ckpt.Progress) -> dict[str, float]:
        row = {name: value.item() / self.steps for name, value in self.sums.items()}
        rate = (progress.tokens - self.tokens) / (time.monotonic() - self.clock)
        row |= {"tokens": progress.tokens, "lr": self.lr, "tokens_per_second": rate}
        if self.load is not None:
            share = self.load.float() / self.load.float().mean(dim=1, keepdim=True)
            row |= {f"load/layer_{i}_max": v for i, v in enumerate(share.max(dim=1).values.tolist())}
        self.sums, self.load, self.steps = {}, None, 0
        self.clock, self.tokens = time.monotonic(), progress.tokens
        return row

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if name.startswith("cuda") and not available:
        raise ConfigError(f"run.device={name!r}, but no CUDA device is available; use 'cpu' or 'auto'.")
    return torch.device(name)


def _model(config: TrainConfig, device: torch.device) -> Qwen3NextForCausalLM:
    torch.manual_seed(config.run.seed)
    dtype = getattr(torch, config.run.dtype)
    if config.model.path:
        model = Qwen3NextForCausalLM.from_pretrained(config.model.path, dtype=dtype)
    else:
        model = Qwen3NextForCausalLM(Qwen3NextConfig(**config.model.config))
    for name, parameter in model.named_parameters():
        # The decay rates steer an exponential; their fp32 is what the published model computes them in.
        kept = torch.float32 if name.endswith(("A_log", "dt_bias")) else dtype
        parameter.data = parameter.data.to(device, kept)
    model.to(device)
    if config.run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def _weights(config: TrainConfig, model: Qwen3NextConfig) -> LossWeights:
    mtp, balance = config.loss.mtp_weight, config.loss.balance_coefficient
    return LossWeights(
        mtp=model.mtp_loss_weight if mtp is None else mtp,
        balance=model.router_aux_loss_coef if balance is None else balance,
    )


def _identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run must share with the run it continues."""
    settings = config.as_dict()
    run = {key: settings["run"][key] for key in ("seed", "dtype", "accumulate")}
    return {"model": settings["model"], "optimizer": settings["optimizer"], "loss": settings["loss"], "run": run} | {
        "data": {key: settings["data"][key] for key in ("sequence_length", "tokens_per_batch")}
    }


def _refuse_other_settings(saved: Mapping[str, Any], config: TrainConfig) -> None:
    mine = json.loads(json.dumps(_identity(config)))
    for section, values in mine.items():
        for key, value in values.items():
            if saved.get(section, {}).get(key) != value:
                raise ConfigError(
                    f"{section}.{key}={value!r}, but the run in {config.run.output} was started with "
                    f"{saved.get(section, {}).get(key)!r}; restore it, or choose another run.output."
                )


def _norm_weights(model: Qwen3NextForCausalLM) -> dict[str, float]:
    """The largest zero-centred norm weight, whose growth Qwen3-Next watches for."""
    weights = [
        p.detach().abs().max() for n, p in model.named_parameters() if n.endswith("norm.weight") and p.dim() == 1
    ]
    return {"max_norm_weight": torch.stack(weights).max().item()}


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM end the run after the current step, with a checkpoint."""
    stop = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    return Progress(*columns, refresh_per_second=2)
