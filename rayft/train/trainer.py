"""One run's clock: owns model, optimizer and step; the recipe's loop calls it. Final: never subclassed, extended by callbacks.

with Trainer(launch, session, loss_fn, need) as trainer:
    for step, batches in trainer.steps():
        trainer.finish(step, *forward_backward(trainer.parts, batches, loss_fn, need, trainer.mesh))
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from functools import partial
from types import TracebackType
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from rayft.checkpoint import resume
from rayft.checkpoint.sharded import Checkpointer
from rayft.config.functions import load_function
from rayft.data.reader import Reader, micro_batches, prefetch
from rayft.errors import TrainingError
from rayft.losses.supervised import first_loss_warning
from rayft.models.load import config_of, named_trainable
from rayft.observe.log import MetricsLog, recorded
from rayft.observe.metrics import finish as finish_metrics
from rayft.optim.build import build_optimizer, set_lr
from rayft.optim.schedules import lr_at, rows_of_epochs
from rayft.parallel.mesh import build_mesh
from rayft.train.build import build_model
from rayft.train.evaluate import eval_batches, evaluate
from rayft.train.meter import Meter
from rayft.train.step import update
from rayft.types import Batch, Callback, Launch, LossFn, Metrics, Need, Session

log = logging.getLogger("rayft")


@final
class Trainer:
    """Builds everything a run steps with, restores the newest checkpoint, and keeps the clock.

    Args:
        launch: the run and what it starts from.
        session: of this rank.
        loss_fn, need: the loss of evaluations; the recipe's loop names that of training.
    """

    def __init__(self, launch: Launch, session: Session, loss_fn: LossFn, need: Need) -> None:
        cfg = launch.cfg
        self.cfg, self.launch, self.session, self.loss_fn, self.need = cfg, launch, session, loss_fn, need
        self.callbacks: list[Callback] = [load_function(function) for function in launch.callbacks]
        device_type = session.device.split(":")[0]
        self.mesh = build_mesh(device_type, session.world_size)
        self.parts = [build_model(cfg, session, self.mesh)]
        named = ((name, p) for part in self.parts for name, p in named_trainable(part))
        self.optimizer = build_optimizer(named, cfg.optim, fused=True)
        self.checkpointer = Checkpointer(session, launch.attempt, lambda step: self.event("checkpoint_committing", step))
        self.reader = Reader(launch.train_shards, seed=cfg.run.seed, shuffle=cfg.data.shuffle, window=cfg.data.window)
        self.eval_reader = Reader(launch.eval_shards, seed=0, shuffle=False, window=1) if launch.eval_shards else None
        self.meter = Meter(config_of(self.parts[0]), session, self.parts)
        self.step = self._restore()
        self.saved_step = self.step
        self.log: MetricsLog | None = None
        if session.rank == 0:
            self.log = MetricsLog(session.run_dir / "metrics.jsonl", self.step)
            self.log.start(launch.attempt, session.world_size)
        self.pending: tuple[int, dict[str, Tensor], dict[str, float]] | None = None

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.log is not None:
            self.log.close()

    def steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """(step, this rank's micro-batches on its device), from the restored step to the last; then saves and evaluates."""
        self.event("train_start", self.step)
        self._evaluate_if_due()
        build = partial(
            micro_batches,
            self.reader,
            rows=self.cfg.batch.rows,
            micro_rows=self.cfg.batch.micro_rows,
            rank=self.session.rank,
            world=self.session.world_size,
            limit=self._row_limit(),
        )
        batches = prefetch(lambda step: build(step=step), range(self.step, self.launch.last_step))
        for step, (micro, waited) in enumerate(batches, start=self.step):
            self.meter.start(micro, waited)
            set_lr(self.optimizer, lr_at(step, self.launch.total_steps, self.cfg.optim))
            yield step, [batch.to(self.session.device) for batch in micro]
        self._flush()
        if self.step > self.saved_step:
            self._save()
        self.checkpointer.wait()
        self.event("train_end", self.step)

    def finish(self, step: int, sums: Metrics, divisor: Tensor) -> None:
        """Update the weights with the accumulated gradient; then log, save and evaluate what is due.

        A step's numbers are read from the device one step later, so that logging does not hold the device up.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        norm = update(self.parts, self.optimizer, self.cfg.optim.max_grad_norm)
        self.step = step + 1
        self._flush()
        values = {**sums, "train/grad_norm": norm, "divisor": divisor}
        self.pending = (self.step, values, {"train/lr": self.optimizer.param_groups[0]["lr"]} | self.meter.stop())
        # Before the save: callbacks have seen every step that a checkpoint covers, whatever dies in between.
        self.event("step_end", self.step, batches=self.meter.batches)
        if self._due(self.cfg.checkpoint.every):
            self._flush()
            self._save()
        self._evaluate_if_due()

    def event(self, name: str, step: int, **state: Any) -> None:
        """Tell every callback.

        Raises:
            TrainingError: one raised, which stops the run.
        """
        for function, callback in zip(self.launch.callbacks, self.callbacks, strict=True):
            try:
                callback(name, {"step": step, "rank": self.session.rank, "run_dir": self.session.run_dir, **state})
            except Exception as problem:  # the user's code may raise anything
                raise TrainingError(
                    "run.callbacks",
                    function.spec,
                    f"raised {type(problem).__name__} at {name} of step {step}: {problem}",
                    "Mend it or take it out, then run the same command again to resume",
                ) from problem

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _row_limit(self) -> int | None:
        """Rows that count when the run ends by epochs: the last step may be partly empty. Steps given by number repeat rows."""
        return None if self.cfg.run.max_steps else rows_of_epochs(self.reader.num_rows, self.cfg.run.epochs)

    def _restore(self) -> int:
        """Steps taken so far, after loading the newest committed checkpoint, the same one on every rank."""
        found = [resume.newest(self.session.run_dir) if self.session.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        restored = found[0]
        if restored is None:
            return 0
        resume.refuse_other_base(restored, self.launch.identity)
        self.checkpointer.restore(restored.directory, self.parts, self.optimizer)
        if self.session.rank == 0:
            log.info("resumed at step %d from %s", restored.step, restored.directory)
        return restored.step

    def _flush(self) -> None:
        """Read the pending step's numbers, refuse what is not finite, and log them."""
        if self.pending is None:
            return
        (step, tensors, host), self.pending = self.pending, None
        values = dict(zip(tensors, torch.stack([t.double() for t in tensors.values()]).tolist(), strict=True))
        divisor, norm = values.pop("divisor"), values.pop("train/grad_norm")
        metrics = finish_metrics(values, divisor) | {"train/grad_norm": norm} | host
        if self.log is not None:
            self.log.write(step, metrics)
            if step == 1 and (
                warning := first_loss_warning(
                    metrics["train/loss"], config_of(self.parts[0]).vocab_size, self.cfg.model.init == "pretrained"
                )
            ):
                log.warning(warning)
        if not (math.isfinite(metrics["train/loss"]) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step}",
                None,
                f"the loss is {metrics['train/loss']} and the gradient norm {norm}",
                "Lower optim.lr, check the rows of that step, or use model.compute_dtype=float32; the newest checkpoint is from before",
            )

    def _save(self) -> None:
        progress = {**self.launch.identity, "total_steps": self.launch.total_steps, "rows": self.step * self.cfg.batch.rows}
        seconds = self.checkpointer.save(self.step, self.parts, self.optimizer, progress, {"step": float(self.step)})
        self.saved_step = self.step
        self.meter.exclude(seconds)
        if self.log is not None:
            self.log.write(self.step, {"checkpoint/stage_s": seconds})

    def _evaluate_if_due(self) -> None:
        """Evaluate after this step if configured, unless the result is already recorded (a restart between save and evaluation)."""
        if self.eval_reader is None:
            return
        at_edge = self.step == self.launch.last_step or (self.step == 0 and self.cfg.eval.at_start)
        if not (at_edge or (self.step > 0 and self._due(self.cfg.eval.every))):
            return
        known = [self.session.rank == 0 and recorded(self.session.run_dir / "metrics.jsonl", self.step, "eval/loss")]
        dist.broadcast_object_list(known, src=0)
        if known[0]:
            return
        self._flush()
        started = time.perf_counter()
        batches = eval_batches(self.eval_reader, self.session, self.cfg.batch.micro_rows, self.cfg.eval.max_rows)
        loss, weights = evaluate(self.parts[0], batches, self.loss_fn, self.need, self.mesh)
        self.meter.exclude(time.perf_counter() - started)
        if self.log is not None:
            self.log.write(self.step, {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0)), "eval/num_tokens": weights})
        self.event("evaluated", self.step, loss=loss)
