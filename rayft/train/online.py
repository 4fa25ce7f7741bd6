"""One online run's clock on a rank: does what the controller orders, and owns model, optimizer and step. The sibling of train/trainer.py.

with OnlineTrainer(launch, session, feed) as trainer:
    for step, updates in trainer.steps():
        for batches, divisor in updates:
            trainer.update(*forward_backward(trainer.parts, batches, loss_fn, NEED, trainer.mesh, divisor))
        trainer.finish(step)
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor

from rayft.checkpoint import resume
from rayft.checkpoint.sharded import Checkpointer
from rayft.config.functions import load_function
from rayft.config.schema import GrpoRun
from rayft.errors import TrainingError
from rayft.experience.orders import Order
from rayft.experience.pack import build
from rayft.models.load import config_of, named_trainable
from rayft.observe.metrics import finish as finish_metrics
from rayft.optim.build import build_optimizer, set_lr
from rayft.optim.groups import embeddings_of
from rayft.optim.schedules import lr_at
from rayft.parallel.mesh import build_mesh
from rayft.train.build import build_model
from rayft.train.experience_log import ExperienceLog
from rayft.train.journal import from_rank_0
from rayft.train.meter import Meter
from rayft.train.reference import Reference, columns
from rayft.train.requests import Requests
from rayft.train.step import update
from rayft.types import Batch, Callback, Group, Launch, Metrics, Session
from rayft.weight_sync.protocol import EngineHandle, PushReport, Sender

log = logging.getLogger("rayft")

SHARE = 0.49
"""Most of a card's memory that a worker takes when an engine is on it too."""
Prepared = tuple[list[Batch], float]
"""An update's micro-batches on the device, and what its loss is divided by."""


class Feed(Protocol):
    """A rank's line to the controller. Whatever waits in it has a deadline."""

    def join(self, step: int) -> None:
        """Tell that this attempt starts from that step; rank 0, before any rank asks."""

    def order(self, step: int, index: int, lost: Sequence[int]) -> Order:
        """The next thing to do; see `Controller.order`. Raises the controller's error, and InfrastructureError at the deadline."""

    def fetch(self, order: Order) -> tuple[dict[int, Group], list[int]]:
        """The order's groups by number, and the numbers of those that cannot be had."""

    def engines(self, order: Order) -> list[EngineHandle]:
        """Handles of the engines to push to."""

    def pushed(self, step: int, order: Order, report: PushReport) -> None:
        """Tell what a push did; rank 0."""

    def committed(self, step: int) -> None:
        """Tell that a checkpoint covers the steps before that one; rank 0, from any thread."""


@final
class OnlineTrainer:
    """Builds everything a run steps with, restores the newest checkpoint, and follows orders.

    Args:
        launch: the run and what it starts from.
        session: of this rank.
        feed: to the controller.
        sender: of weights to engines.

    Attributes:
        step: steps done.
        stopped: a stop was asked for before the end.
    """

    def __init__(self, launch: Launch[GrpoRun], session: Session, feed: Feed, sender: Sender) -> None:
        cfg = launch.cfg
        self.cfg, self.launch, self.session, self.feed, self.sender = cfg, launch, session, feed, sender
        self.callbacks: list[Callback] = [load_function(function) for function in launch.callbacks]
        if cfg.placement.mode == "colocated" and session.device != "cpu":
            torch.cuda.set_per_process_memory_fraction(SHARE, session.device)
        self.mesh = build_mesh(session.device.split(":")[0], session.world_size, cfg.parallel.replicas)
        self.parts = [build_model(cfg, session, self.mesh)]
        (policy,) = self.parts
        policy.temperature = cfg.rollout.temperature
        named = named_trainable(policy)
        self.optimizer = build_optimizer(named, cfg.optim, fused=True, embeddings=embeddings_of(policy), partial=policy.trained_rows)
        self.reference = Reference(cfg, session, self.mesh, policy) if cfg.algorithm.beta else None
        self.checkpointer = Checkpointer(_announcing(session, feed), launch.attempt, lambda step: self.event("checkpoint_committing", step))
        self.meter = Meter(config_of(policy), session, self.parts)
        self.step = self._restore()
        self.saved_step = self.step
        self.log = ExperienceLog(launch, session, self.step)
        self.requests, self.stopped = Requests(session, self.mesh.loss, cfg.checkpoint.trigger), False
        self.phases: dict[str, float] = {}
        self.sums: list[tuple[Metrics, Tensor, Tensor]] = []

    def __enter__(self) -> OnlineTrainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.requests.close()
        self.sender.close()
        self.log.close()

    def steps(self) -> Iterator[tuple[int, list[Prepared]]]:
        """(step, what to compute for each of its updates), from the restored step to the last one, or to a stop; then saves."""
        self.event("train_start", self.step)
        if self.session.rank == 0:
            self.feed.join(self.step)
        dist.barrier()
        while self.step < self.launch.last_step and not self.stopped:
            order, groups = self._next()
            set_lr(self.optimizer, lr_at(self.step, self.launch.total_steps, self.cfg.optim))
            yield self.step, self._prepare(order, groups)
        if self.step > self.saved_step:
            self._save()
        self.checkpointer.wait()
        if self.step == self.launch.total_steps:
            self._next()
        self.event("train_end", self.step)

    def update(self, sums: Metrics, divisor: Tensor) -> None:
        """Update the weights with the accumulated gradient."""
        norm = update(self.parts, self.optimizer, self.cfg.optim.max_grad_norm)
        self.sums.append((sums, divisor, norm))

    def finish(self, step: int) -> None:
        """Count the step; then log it, and save when that is due.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        metrics = [finish_metrics({name: float(value) for name, value in sums.items()}, float(divisor)) for sums, divisor, _ in self.sums]
        norms = [float(norm) for _, _, norm in self.sums]
        values = {name: sum(part[name] for part in metrics) / len(metrics) for name in metrics[0]}
        values |= {"train/num_tokens": sum(part["train/num_tokens"] for part in metrics), "train/grad_norm": sum(norms) / len(norms)}
        self.sums = []
        self.phases["perf/update_s"] = time.perf_counter() - self.phases.pop("began")
        self.step = step + 1
        self.log.write(
            self.step, values | self.phases | {"train/lr": lr_at(step, self.launch.total_steps, self.cfg.optim)} | self.meter.stop()
        )
        self.phases = {}
        if not all(map(math.isfinite, (values["train/loss"], *norms))):
            rule = f"the loss is {values['train/loss']} and the gradient norm {max(norms)}"
            raise TrainingError(f"step {self.step}", None, rule, "Lower optim.lr; the newest checkpoint is from before")
        self.event("step_end", self.step, batches=self.meter.batches)
        every = self.cfg.checkpoint.every
        asked, save_asked = self.requests.read(float(self.requests.agree()))
        self.stopped = asked and self.step < self.launch.last_step
        if save_asked or (every is not None and self.step % every == 0):
            self._save()

    def event(self, name: str, step: int, **state: Any) -> None:
        """Tell every callback.

        Raises:
            TrainingError: one raised, which stops the run.
        """
        for function, callback in zip(self.launch.callbacks, self.callbacks, strict=True):
            try:
                callback(name, {"step": step, "rank": self.session.rank, "run_dir": self.session.run_dir, **state})
            except Exception as problem:  # the user's code may raise anything
                rule = f"raised {type(problem).__name__} at {name} of step {step}: {problem}"
                remedy = "Mend it or take it out, then run the same command again to resume"
                raise TrainingError("run.callbacks", function.spec, rule, remedy) from problem

    def _restore(self) -> int:
        """Steps taken so far, after loading the newest committed checkpoint, the same one on every rank."""
        restored = from_rank_0(resume.newest(self.session.home) if self.session.rank == 0 else None)
        if restored is None:
            return 0
        resume.refuse_other_base(restored, self.launch.identity)
        self.checkpointer.restore(restored.directory, self.parts, self.optimizer)
        return restored.step

    def _next(self) -> tuple[Order, Mapping[int, Group]]:
        """Follow orders until one is for a batch that every rank has, or the end."""
        began, index, pushing = time.perf_counter(), 0, 0.0
        lost: list[int] | None = None
        while True:
            order = self.feed.order(self.step, index, lost or ())
            index += 1
            if self.session.rank == 0:
                for step, values in order.records:
                    self.log.write(step, values)
            groups, missing = self.feed.fetch(order)
            lost = agree(self.session, order, missing)
            if order.kind == "push" and lost is None:
                pushing += self._push(order)
            elif lost is None:
                self.phases |= {"perf/batch_wait_s": time.perf_counter() - began - pushing}
                return order, groups

    def _push(self, order: Order) -> float:
        """Bring engines to this step's weights; seconds."""
        engines = self.feed.engines(order) if self.session.rank == 0 else []
        report = self.sender.push(self.parts[0], order.version, engines)
        if self.session.rank == 0:
            self.feed.pushed(self.step, order, report)
        self.phases |= {"perf/push_s": report.seconds, "perf/push_gib": report.bytes / 2**30}
        return report.seconds

    def _prepare(self, order: Order, groups: Mapping[int, Group]) -> list[Prepared]:
        """The order's micro-batches with every column that the loss reads, on the device."""
        make = partial(build, groups=groups, budget=self.cfg.micro_tokens, step=self.step)
        prepared = [
            ([make(answers, documents=part.documents).to(self.session.device) for answers in part.micro[0]], part.divisor)
            for part in order.updates
        ]
        self.log.add_samples(self.step + 1, order, groups)
        every = [batch for batches, _ in prepared for batch in batches]
        self.meter.start(every, self.phases["perf/batch_wait_s"])
        began = time.perf_counter()
        if self.reference is not None:
            reference = iter(self.reference.columns(every))
            prepared = [([replace(batch, ref_logprobs=next(reference)) for batch in batches], divisor) for batches, divisor in prepared]
        if len(prepared) > 1:
            before = iter(columns(self.parts[0], every))
            prepared = [([replace(batch, policy_logprobs=next(before)) for batch in batches], divisor) for batches, divisor in prepared]
        self.phases |= {"perf/logprobs_s": time.perf_counter() - began, "began": time.perf_counter()}
        return prepared

    def _save(self) -> None:
        progress = {**self.launch.identity, "total_steps": self.launch.total_steps, "groups": self.step * self.cfg.rollout.prompts_per_step}
        seconds = self.checkpointer.save(self.step, self.parts, self.optimizer, progress, {"step": float(self.step)})
        self.saved_step = self.step
        self.meter.exclude(seconds)
        self.log.write(self.step, {"checkpoint/stage_s": seconds})


def agree(session: Session, order: Order, missing: list[int]) -> list[int] | None:
    """None when every rank has the same order and all that belongs to it; else the numbers of the groups that some rank misses."""
    said: list[Any] = [None] * session.world_size
    dist.all_gather_object(said, (order.kind, order.version, order.ticket, missing))
    every = sorted({number for *_, numbers in said for number in numbers})
    return every if every or any(other[:3] != said[0][:3] for other in said) else None


def _announcing(session: Session, feed: Feed) -> Session:
    """The session, whose rank 0 also tells the controller of every checkpoint once it is committed."""

    def report(metrics: dict[str, float], directory: str, finish: Any) -> None:
        def finish_and_tell() -> None:
            finish()
            if session.rank == 0:
                feed.committed(int(metrics["step"]))

        session.report(metrics, directory, finish_and_tell)

    return replace(session, report=report)
