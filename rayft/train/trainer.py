"""One run's clock: owns model, optimizer and step; the recipe's loop calls it. Final: never subclassed, extended by callbacks.

with Trainer(launch, session, loss_fn, need) as trainer:
    for step, batches in trainer.steps():
        trainer.finish(step, *forward_backward(trainer.parts, batches, loss_fn, need, trainer.mesh))
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import final

from torch import Tensor

from rayft.checkpoint.sharded import Checkpointer
from rayft.config.schema import SftRun
from rayft.data.reader import Reader, micro_batches, prefetch
from rayft.losses.supervised import first_loss_warning
from rayft.models.load import config_of
from rayft.observe.metrics import finish as finish_metrics
from rayft.optim.build import set_lr
from rayft.optim.schedules import lr_at, rows_of_epochs
from rayft.parallel.reduce import read_later
from rayft.train.evaluate import Evaluations
from rayft.train.events import Events
from rayft.train.journal import Journal
from rayft.train.learner import build_learner, require_finite, restore
from rayft.train.meter import Meter
from rayft.train.requests import Requests
from rayft.train.room import with_micro_rows
from rayft.train.samples import Sampler
from rayft.train.step import update
from rayft.types import Batch, Launch, LossFn, Metrics, Need, Session

log = logging.getLogger("rayft")


@final
class Trainer:
    """Builds everything a run steps with, restores the newest checkpoint, and keeps the clock.

    Args:
        launch: the run and what it starts from.
        session: of this rank.
        loss_fn, need: the loss of evaluations; the recipe's loop names that of training.
    """

    def __init__(self, launch: Launch[SftRun], session: Session, loss_fn: LossFn, need: Need) -> None:
        cfg = launch.cfg
        self.cfg, self.launch, self.session = cfg, launch, session
        micro_rows = int(with_micro_rows(cfg, session).batch.micro_rows)
        self.event = Events(launch, session)
        learner = build_learner(cfg, session, 1 if launch.local else cfg.parallel.replicas)
        self.mesh, self.parts, self.optimizer = learner.mesh, learner.parts, learner.optimizer
        self.checkpointer = Checkpointer(session, launch.attempt, lambda step: self.event("checkpoint_committing", step))
        reader = Reader(launch.train_shards, seed=cfg.run.seed, shuffle=cfg.data.shuffle, window=cfg.data.window)
        self.batches = partial(
            micro_batches,
            reader,
            rows=cfg.batch.rows,
            micro_rows=micro_rows,
            rank=session.rank,
            world=session.world_size,
            # By epochs the last step may be partly empty; steps given by number repeat rows.
            limit=None if cfg.run.max_steps else rows_of_epochs(reader.num_rows, cfg.run.epochs),
        )
        self.evaluations = Evaluations(launch, session, loss_fn, need, self.mesh, micro_rows)
        self.sampler = Sampler(cfg, session.device) if cfg.eval.samples.prompts else None
        self.meter = Meter(config_of(self.parts[0]), session, self.parts)
        self.step = self.saved_step = restore(learner, launch, session, self.checkpointer)
        self.journal = Journal(launch, session, self.step)
        self.requests = Requests(session, self.mesh.loss, cfg.checkpoint.trigger)
        self.stop_asked = self.save_asked = False
        self.pending: tuple[int, Callable[[], dict[str, float]], dict[str, float]] | None = None

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.requests.close()
        self.journal.close()

    @property
    def stopped(self) -> bool:
        """Whether the run was asked to stop before its last step, so that it is not at its end."""
        return self.stop_asked and self.step < self.launch.last_step

    @property
    def over(self) -> bool:
        """Whether no step follows: the last one is done, evaluations no longer improve, or a stop was asked for."""
        patience = self.cfg.eval.patience
        learned = patience is not None and self.journal.best.since >= patience
        return self.step >= self.launch.last_step or learned or self.stop_asked

    def steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """(step, this rank's micro-batches on its device), from the restored step until `over`; then saves."""
        self.event("train_start", self.step)
        self._evaluate_if_due()
        ahead = range(self.step, self.step if self.over else self.launch.last_step)
        with closing(prefetch(lambda step: self.batches(step=step), ahead)) as batches:
            for step, (micro, waited) in enumerate(batches, start=self.step):
                self.meter.start(micro, waited)
                set_lr(self.optimizer, lr_at(step, self.launch.total_steps, self.cfg.optim))
                yield step, [batch.to(self.session.device) for batch in micro]
                if self.over:
                    break
        self._flush()
        if not self.stopped:
            self._sample_if_due(last=True)
        if self.step > self.saved_step:
            self._save()
        self.checkpointer.wait()
        self.event("train_end", self.step)

    def finish(self, step: int, sums: Metrics, divisor: Tensor) -> None:
        """Update the weights with the accumulated gradient; then log, save, evaluate and sample what is due.

        A step's numbers are read from the device one step later, so that logging does not hold the device up.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        norm = update(self.parts, self.optimizer, self.cfg.optim.max_grad_norm)
        self.step = step + 1
        self._flush()
        values = {**sums, "train/grad_norm": norm.to(divisor.device, non_blocking=True), "divisor": divisor, "asked": self.requests.agree()}
        lr = lr_at(step, self.launch.total_steps, self.cfg.optim)
        self.pending = (self.step, read_later(values), {"train/lr": lr} | self.meter.stop())
        # Before the save: callbacks have seen every step that a checkpoint covers, whatever dies in between.
        self.event("step_end", self.step, batches=self.meter.batches)
        every = self.cfg.checkpoint.every
        if self.save_asked or (every is not None and self.step % every == 0):
            self._flush()
            self._save()
        self._evaluate_if_due()
        self._sample_if_due()

    def _flush(self) -> None:
        """Read the pending step's numbers, refuse what is not finite, log them, and take up what was asked of the run."""
        if self.pending is None:
            return
        (step, read, host), self.pending = self.pending, None
        values = read()
        divisor, norm, asked = values.pop("divisor"), values.pop("train/grad_norm"), self.requests.read(values.pop("asked"))
        self.stop_asked, self.save_asked = self.stop_asked or asked[0], self.save_asked or asked[1]
        metrics = finish_metrics(values, divisor) | {"train/grad_norm": norm} | host
        self.journal.write(step, metrics)
        self.event("logged", step, values=metrics)
        if step == 1 and self.session.rank == 0:
            vocab, pretrained = config_of(self.parts[0]).vocab_size, self.cfg.model.init == "pretrained"
            if warning := first_loss_warning(metrics["train/loss"], vocab, pretrained):
                log.warning(warning)
        remedy = "Lower optim.lr, check the rows of that step, or use model.compute_dtype=float32"
        require_finite(step, metrics["train/loss"], norm, remedy)

    def _save(self) -> None:
        progress = {**self.launch.identity, "total_steps": self.launch.total_steps, "rows": self.step * self.cfg.batch.rows}
        seconds = self.checkpointer.save(self.step, self.parts, self.optimizer, progress, {"step": float(self.step)})
        self.saved_step, self.save_asked = self.step, False
        self.meter.exclude(seconds)
        self.journal.write(self.step, {"checkpoint/stage_s": seconds})

    def _evaluate_if_due(self) -> None:
        """Evaluate after this step if configured, unless the result is already recorded (a restart between save and evaluation)."""
        if not self.evaluations.due(self.step) or self.step in self.journal.evaluated:
            return
        self._flush()
        started = time.perf_counter()
        values = self.evaluations.run(self.parts[0])
        self.meter.exclude(time.perf_counter() - started)
        lowest = self.journal.add_evaluation(self.step, values)
        self.event("evaluated", self.step, loss=values["eval/loss"], values=values)
        if lowest and self.cfg.checkpoint.keep_best and self.step > self.saved_step:
            self._save()

    def _sample_if_due(self, last: bool = False) -> None:
        """Let the model answer the prompts of eval.samples, unless this step's answers are already recorded."""
        every = self.cfg.eval.samples.every
        due = last or (every is not None and self.step % every == 0)
        if self.sampler is None or not due or self.step in self.journal.sampled:
            return
        self._flush()
        started = time.perf_counter()
        prompts, texts = self.cfg.eval.samples.prompts, self.sampler.texts(self.parts[0])
        self.meter.exclude(time.perf_counter() - started)
        self.journal.add_samples(self.step, ({"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)))
        if self.session.rank == 0:
            for prompt, text in zip(prompts, texts, strict=True):
                log.info("sample at step %d: %r -> %r", self.step, prompt, text)
        self.event("sampled", self.step, prompts=prompts, texts=texts)
