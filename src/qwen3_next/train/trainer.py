"""The training loop."""

import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast, get_args

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.errors import BackendError, ConfigError, DivergedError
from qwen3_next.model import Qwen3NextForCausalLM
from qwen3_next.train import checkpoint as ckpt
from qwen3_next.train.config import TrainConfig
from qwen3_next.train.cuts import WholeTensors
from qwen3_next.train.data import PackedBatch, PackedDocuments, Prefetcher
from qwen3_next.train.log import Row, RunLog, SilentLog, plot_losses
from qwen3_next.train.loss import LoadBuffer, LossWeights, Window, batch_loss, count_load
from qwen3_next.train.meter import Meter
from qwen3_next.train.optimizer import MasterAdamW
from qwen3_next.train.parallel import shard_
from qwen3_next.train.ranks import Ranks, joined
from qwen3_next.train.schedule import lr_factor
from qwen3_next.train.sources import copy_tokenizer, has_tokenizer, open_documents
from qwen3_next.train.validation import validate

Reason = Literal["finished", "time limit", "signal"]
_REASONS: tuple[Reason, ...] = get_args(Reason)
_TIME_LIMIT, _SIGNAL = 1, 2
"""Their places among the reasons; the later wins."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        reason: all steps are done, or it stopped early and continues when run again.
        step, tokens, seconds: done so far, earlier parts of a resumed run included.
        model: directory of the exported model.
    """

    reason: Reason
    step: int
    tokens: int
    seconds: float
    model: Path

    @property
    def finished(self) -> bool:
        """All steps are done."""
        return self.reason == "finished"


def train(config: TrainConfig | Path | str) -> TrainResult:
    """Train, continuing from the newest checkpoint in the output directory where there is one.

    On one device, or under `torchrun` on one for each of its processes, of which all return the same.

    A run continues only as the run it was; `checkpoint.same_run_settings` says which settings that takes.

    Args:
        config: the settings, or the path of a TOML file with them.

    Raises:
        BackendError: the device has not enough memory.
        ConfigError: a setting cannot be honoured, or differs from those of the run to continue.
        CheckpointError: `model.path` or the newest checkpoint of the run cannot be read.
        DataError: the documents cannot be read.
        RankError: another process of the run failed or is gone.
        DivergedError: loss or gradients are no longer finite; the last good checkpoint is intact.
        StorageError: the disk refused a checkpoint or a log; earlier checkpoints are intact.
    """
    settings = config if isinstance(config, TrainConfig) else TrainConfig.from_toml(config)
    try:
        with joined(settings) as ranks:
            return _Run(settings, ranks).run()
    except torch.OutOfMemoryError as error:
        raise BackendError(
            f"the device's memory is full with data.tokens_per_batch={settings.data.tokens_per_batch}; halve it and "
            "double run.accumulate in a new run.output, or set run.gradient_checkpointing."
        ) from error


class _Run:
    """One process of training: model, optimiser, documents, log."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks, self.output = config, ranks, Path(config.run.output)
        self.checkpoints = self.output / "checkpoints"
        ranks.refuse_disagreement("the settings", dict(ckpt.flattened(config.as_dict())))
        saved = ranks.together(self._saved)
        self.model = ranks.together(lambda: _model(config, saved))
        _refuse_beyond_context(self.model.config, config)
        stores, self.validation = ranks.one_after_the_first(
            lambda: open_documents(config.data, self.output / "tokens", self.model.config.vocab_size)
        )
        self.identity = ckpt.Identity(ckpt.same_run_settings(config), [store.checksum for store in stores])
        self.progress, self.meter = ckpt.Progress() if saved is None else saved.progress, Meter(ranks)
        ranks.refuse_disagreement("documents and checkpoint", self._read_so_far())
        if saved is not None:
            ckpt.refuse_other_documents(saved.identity.documents, self.identity.documents, config)
        self.documents = PackedDocuments(
            stores, config.data.sequence_length, config.data.tokens_per_batch, config.run.seed
        )
        self.tokenizer = ranks.one_after_the_first(self._keep_tokenizer)
        self.shapes = _without_values(self.model)
        self.optimizer = self._distribute(getattr(torch, config.run.dtype))
        self.weights = _weights(config, self.model.config)
        self.mtp_steps = self.model.config.num_mtp_steps if self.model.mtp is not None else 0
        if saved is not None:
            self.optimizer.load_state(saved.tensors)
            self.meter.load_state(saved.tensors)
            ckpt.set_generator_states(saved.tensors, ranks.device)

    def _saved(self) -> ckpt.Saved | None:
        saved = ckpt.load_latest(self.checkpoints)
        if saved is not None:
            ckpt.refuse_other_settings(saved.identity.settings, self.config)
            _refuse_steps_done(saved.progress.step, self.config)
        return saved

    def _read_so_far(self) -> dict[str, Any]:
        """What all ranks must have read alike."""
        checksums = {f"document {number}": checksum for number, checksum in enumerate(self.identity.documents)}
        return checksums | {"steps done": self.progress.step}

    def _distribute(self, dtype: torch.dtype) -> MasterAdamW:
        """The model goes to the device, or its parts to those of all ranks; the optimiser follows it."""
        if self.ranks.count == 1:
            cast("nn.Module", self.model).to(self.ranks.device)
            return MasterAdamW(self.model, self.config.optimizer, dtype)
        cuts = shard_(self.model, self.ranks, dtype)
        return MasterAdamW(self.model, self.config.optimizer, dtype, cuts, self.ranks)

    def _keep_tokenizer(self) -> str:
        """Copy the tokenizer into the run at once, so that nothing of it can be missing at the end; "" for none."""
        source, path, kept = self.config.data.tokenizer, self.config.model.path, self.output / "tokenizer"
        if path and not source and not has_tokenizer(str(kept)):
            source = path if has_tokenizer(path) or not Path(path).is_dir() else ""
        if source:
            with ckpt.storage_errors(kept):
                copy_tokenizer(source, kept)
        return str(kept) if has_tokenizer(str(kept)) else ""

    def run(self) -> TrainResult:
        with self.ranks.together(self._open_log) as log:
            self._introduce(log)
            reason = self._train(log)
            self._finish()
        p = self.progress
        return TrainResult(reason, p.step, p.tokens, p.seconds, self.output / "model")

    def _open_log(self) -> RunLog | SilentLog:
        return RunLog(self.output, self.progress.step) if self.ranks.is_first else SilentLog()

    def _train(self, log: RunLog | SilentLog) -> Reason:
        """Step until all steps are done, a signal comes or the time is up."""
        started, earlier = time.monotonic(), self.progress.seconds
        limit = self.config.run.max_seconds or float("inf")
        prefetcher = Prefetcher(self.documents.batches(self.progress.cursor))
        try:
            with _stop_signals() as stop, _progress_bar(self.ranks.is_first) as bar:
                task = bar.add_task("training", total=self.config.schedule.steps, figures="")
                while self.progress.step < self.config.schedule.steps:
                    self._step([next(prefetcher) for _ in range(self.config.run.accumulate)])
                    seconds = time.monotonic() - started
                    self.progress = replace(self.progress, seconds=earlier + seconds)
                    self._report(log, bar, task)
                    # Signals and clocks reach one rank before another; all stop after the same step.
                    reason = self.ranks.largest(_SIGNAL if stop.is_set() else _TIME_LIMIT if seconds > limit else 0)
                    if reason and self.progress.step < self.config.schedule.steps:
                        return _REASONS[reason]
                return _REASONS[0]
        finally:
            prefetcher.close()

    def _introduce(self, log: RunLog | SilentLog) -> None:
        settings = self.config.as_dict()
        if self.progress.step:
            log.note("resume", {"from_step": self.progress.step, "settings": settings})
            return
        log.note("start", {"settings": settings, "tokens_per_epoch": self.documents.tokens_per_epoch})
        decay = self.config.optimizer.weight_decay
        slots = self.optimizer.slots
        groups = {
            group.name: {
                "weight_decay": decay if group.decayed else 0.0,
                "parameters": sum(slots[name].size for name in group.parameters),
                "names": group.parameters,
            }
            for group in self.optimizer.groups
        }
        log.note("parameter_groups", groups)

    def _step(self, batches: list[PackedBatch]) -> None:
        """One optimiser step over an accumulation window, of which each rank computes every `count`-th batch."""
        counts = zip(*(batch.target_counts(self.mtp_steps) for batch in batches), strict=True)
        window = Window(targets=tuple(map(sum, counts)), tokens=sum(b.token_ids.numel() for b in batches))
        buffer = LoadBuffer()
        mine = batches[self.ranks.rank :: self.ranks.count]
        if self.config.loss.balance_count_first:
            for batch in mine:
                count_load(self.model, *batch.to(self.ranks.device), buffer)
            buffer.preset = True
        for batch in mine:
            inputs, targets = batch.to(self.ranks.device)
            loss = batch_loss(self.model, inputs, targets, window, buffer, self.weights)
            loss.total.backward()
            self.optimizer.accumulate()
            self.meter.add(loss)
        lr = self.config.optimizer.lr * lr_factor(self.config.schedule, self.progress.step)
        self.meter.end_step(self.optimizer.step(lr), lr, window.tokens)
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            tokens=self.progress.tokens + window.tokens,
            cursor=batches[-1].after,
        )

    def _report(self, log: RunLog | SilentLog, bar: Progress, task: TaskID) -> None:
        run, step = self.config.run, self.progress.step
        is_last = step == self.config.schedule.steps
        bar.update(task, completed=step)
        if step % run.log_every == 0 or is_last:
            self._refuse_divergence()
            row = self.meter.read()
            self._log(log, {**row, "max_norm_weight": self.optimizer.largest_norm_weight()})
            bar.update(task, figures=f"loss {row['loss/lm']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")
        if (run.validate_every and step % run.validate_every == 0) or is_last:
            self._validate(log)
        if run.checkpoint_every and step % run.checkpoint_every == 0:
            self._checkpoint()

    def _log(self, log: RunLog | SilentLog, figures: Row) -> None:
        self.ranks.together(lambda: log.row(self.progress.step, {"tokens": self.progress.tokens, **figures}))

    def _finish(self) -> None:
        """Save what there is and export it; nothing new where the run was finished before."""
        self._checkpoint()
        self._on_first(self._export_result)
        if self.progress.step:
            self._plot()

    def _plot(self) -> None:
        self.ranks.together(lambda: plot_losses(self.output) if self.ranks.is_first else None)

    def _validate(self, log: RunLog | SilentLog) -> None:
        results: dict[str, float] = {}
        for name, documents in self.validation.items():
            results |= {f"validation/{name}/{k}": v for k, v in validate(self.model, documents, self.ranks).items()}
        if self.validation:
            self._log(log, results)
            self._plot()
        self.meter.restart_clock()

    def _checkpoint(self) -> None:
        self._refuse_divergence()
        self._on_first(self._save)
        self.meter.restart_clock()

    def _on_first(self, work: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Let the first rank work with all tensors of a checkpoint, while the others hand it what they hold."""
        tensors = self.optimizer.state() | self.meter.state() | ckpt.generator_states(self.ranks.device)
        whole = WholeTensors(self.ranks, tensors, self.optimizer.cuts())
        self.ranks.together(lambda: whole.given_to(work))

    def _save(self, tensors: Mapping[str, Tensor]) -> None:
        ckpt.save_checkpoint(
            self.checkpoints,
            self.progress,
            self.identity,
            tensors,
            lambda directory: self._export(directory, tensors),
            self.config.run.keep,
        )

    def _export_result(self, tensors: Mapping[str, Tensor]) -> None:
        with ckpt.storage_errors(self.output / "model"):
            self._export(self.output / "model", tensors)

    def _export(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """The model in the published layout, every tensor in bf16, with its tokenizer where that is known."""
        self.shapes.save_pretrained(directory, dtype=torch.bfloat16, fetch=lambda name: tensors[f"master.{name}"])
        if self.tokenizer:
            copy_tokenizer(self.tokenizer, directory)

    def _refuse_divergence(self) -> None:
        skipped = int(self.optimizer.skipped)
        if skipped:
            raise DivergedError(
                f"{skipped} step(s) up to step {self.progress.step} had a gradient that is not finite. The last "
                f"checkpoint in {self.checkpoints} is good: begin a new run with the `model` directory in it as "
                "model.path and a smaller optimizer.lr or optimizer.clip, and look for broken rows in the data."
            )


def _model(config: TrainConfig, saved: ckpt.Saved | None) -> Qwen3NextForCausalLM:
    """The model in fp32 on the host: of the run to continue, of `model.path`, or fresh."""
    torch.manual_seed(config.run.seed)
    if saved is None and not config.model.path:
        model = Qwen3NextForCausalLM(Qwen3NextConfig(**config.model.config)).float()
    else:
        source = config.model.path if saved is None else str(saved.model)
        try:
            model = Qwen3NextForCausalLM.from_pretrained(source, dtype=torch.float32)
        except OSError as error:
            raise ConfigError(f"model.path={source!r} cannot be read ({str(error).splitlines()[0]}).") from error
    if config.run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def _without_values(model: Qwen3NextForCausalLM) -> Qwen3NextForCausalLM:
    """The same model on the meta device: what it is saved as, with the values of the master weights."""
    with torch.device("meta"):
        shapes = Qwen3NextForCausalLM(model.config)
    shapes.generation_config = model.generation_config
    return shapes


def _refuse_steps_done(done: int, config: TrainConfig) -> None:
    if config.schedule.steps < done:
        raise ConfigError(
            f"schedule.steps={config.schedule.steps}, but the run in {config.run.output} has done {done}; ask for at "
            "least as many, or choose another run.output."
        )


def _refuse_beyond_context(model: Qwen3NextConfig, config: TrainConfig) -> None:
    context = model.context_length()
    if config.data.sequence_length > context:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} is beyond the model's context; it must be at most "
            f"{context}, or max_position_embeddings of the model be larger."
        )


def _weights(config: TrainConfig, model: Qwen3NextConfig) -> LossWeights:
    mtp, balance = config.loss.mtp_weight, config.loss.balance_coefficient
    return LossWeights(
        mtp=model.mtp_loss_weight if mtp is None else mtp,
        balance=model.router_aux_loss_coef if balance is None else balance,
    )


@contextmanager
def _stop_signals() -> Generator[threading.Event]:
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


def _progress_bar(is_shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    return Progress(*columns, refresh_per_second=2, disable=not is_shown)
