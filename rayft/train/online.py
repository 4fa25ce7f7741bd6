"""One online run's clock on a rank: does what the controller orders, and owns model, optimizer and step. The sibling of train/trainer.py.

with OnlineTrainer(launch, session, feed) as trainer:
    for step, updates in trainer.steps():
        for batches, divisor in updates:
            trainer.update(*forward_backward(trainer.parts, batches, loss_fn, NEED, trainer.mesh, divisor))
        trainer.finish(step)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor

from rayft.checkpoint.sharded import Checkpointer
from rayft.config.schema import GrpoRun
from rayft.errors import TrainingError
from rayft.experience.orders import Order
from rayft.experience.pack import build
from rayft.models.load import config_of
from rayft.models.tokenizer import load_tokenizer
from rayft.observe.metrics import finish as finish_metrics
from rayft.optim.build import set_lr
from rayft.optim.schedules import lr_at
from rayft.parallel.online_memory import TRAINER_PART
from rayft.parallel.reduce import read_later
from rayft.train.events import Events
from rayft.train.experience_log import samples_of
from rayft.train.journal import Journal, from_rank_0
from rayft.train.learner import build_learner, require_finite, restore
from rayft.train.meter import Meter
from rayft.train.reference import Reference, columns
from rayft.train.requests import Requests
from rayft.train.step import update
from rayft.types import Batch, Group, Launch, Metrics, Session
from rayft.weight_sync.protocol import EngineHandle, PushReport, Sender

log = logging.getLogger("rayft")

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

    def journal(self) -> bytes:
        """What the controller has written down so far; rank 0."""

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
        self.event = Events(launch, session)
        if cfg.placement.mode == "colocated" and session.device != "cpu":
            torch.cuda.set_per_process_memory_fraction(TRAINER_PART, session.device)
        learner = build_learner(cfg, session, cfg.parallel.replicas)
        self.mesh, self.parts, self.optimizer = learner.mesh, learner.parts, learner.optimizer
        (policy,) = self.parts
        policy.temperature = cfg.rollout.temperature
        self.reference = Reference(cfg, session, self.mesh, policy) if cfg.algorithm.beta else None
        self.checkpointer = Checkpointer(_announcing(session, feed), launch.attempt, lambda step: self.event("checkpoint_committing", step))
        self.meter = Meter(config_of(policy), session, self.parts)
        self.step = self.saved_step = restore(learner, launch, session, self.checkpointer)
        self.journal = Journal(launch, session, self.step)
        self.decode = load_tokenizer(cfg.model).decode
        self.requests, self.stopped = Requests(session, self.mesh.loss, cfg.checkpoint.trigger), False
        self.phases: dict[str, float] = {}
        self.sums: list[tuple[Metrics, Tensor, Tensor]] = []

    def __enter__(self) -> OnlineTrainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.requests.close()
        self.sender.close()
        self.journal.close()

    def learned(self) -> bool:
        """Whether the reward on held-out prompts no longer rises; the same on every rank, each of which must ask."""
        return self.cfg.eval.patience is not None and from_rank_0(settled(self.journal, self.cfg.eval.patience))

    def steps(self) -> Iterator[tuple[int, list[Prepared]]]:
        """(step, what to compute for each of its updates), from the restored step to the last one, or to a stop; then saves."""
        self.event("train_start", self.step)
        if self.session.rank == 0:
            self.feed.join(self.step)
        dist.barrier()
        while self.step < self.launch.last_step and not self.stopped and not self.learned():
            order, groups = self._next()
            if self.learned():  # an evaluation came with the order
                break
            set_lr(self.optimizer, lr_at(self.step, self.launch.total_steps, self.cfg.optim))
            yield self.step, self._prepare(order, groups)
        if self.step > self.saved_step:
            self._save()
        self.checkpointer.wait()
        every = self.cfg.eval.every
        if self.step == self.launch.total_steps:
            self._next()
        elif every and self.step % every and (last := self.step // every * every) and last not in self.journal.evaluated:
            self._record(self.feed.order(self.step, 0, ()))  # the next push, which comes once the evaluation under way is done
        self.event("train_end", self.step)

    def update(self, sums: Metrics, divisor: Tensor) -> None:
        """Update the weights with the accumulated gradient."""
        norm = update(self.parts, self.optimizer, self.cfg.optim.max_grad_norm)
        self.sums.append((sums, divisor, norm))

    def finish(self, step: int) -> None:
        """Count the step; then log it, and save when that is due or asked for.

        Raises:
            TrainingError: the loss or the gradient is not finite, or engines sample from another policy than is trained.
        """
        values, self.sums = mean_over_updates(self.sums), []
        self.phases["perf/update_s"] = time.perf_counter() - self.phases.pop("began")
        self.step = step + 1
        values |= self.phases | {"train/lr": lr_at(step, self.launch.total_steps, self.cfg.optim)} | self.meter.stop()
        self.phases = {}
        self.journal.write(self.step, values)
        self.event("logged", self.step, values=values)
        require_finite(self.step, values["train/loss"], values["train/grad_norm"], "Lower optim.lr")
        if step == 0 or self.cfg.rollout.max_staleness == 0:  # then no token is of other weights than the trainer had
            require_same_policy(self.step, values["train/rollout_logprob_difference"], self.cfg.weight_sync.max_difference)
        self.event("step_end", self.step, batches=self.meter.batches)
        stop, save = self.requests.read(float(self.requests.agree()))
        self.stopped = stop and self.step < self.launch.last_step
        every, judged = self.cfg.checkpoint.every, self.cfg.eval.every if self.cfg.checkpoint.keep_best else None
        if save or any(number is not None and self.step % number == 0 for number in (every, judged)):
            self._save()

    def _next(self) -> tuple[Order, Mapping[int, Group]]:
        """Follow orders until one is for a batch that every rank has, or the end."""
        began, index, pushing = time.perf_counter(), 0, 0.0
        lost: list[int] | None = None
        while True:
            order = self.feed.order(self.step, index, lost or ())
            index += 1
            self._record(order)
            groups, missing = self.feed.fetch(order)
            lost = agree(self.session, order, missing)
            if order.kind == "push" and lost is None:
                pushing += self._push(order)
            elif lost is None:
                self.phases |= {"perf/batch_wait_s": time.perf_counter() - began - pushing}
                return order, groups

    def _record(self, order: Order) -> None:
        """Log what came with an order: evaluations, of which some may be known, and figures of the rollouts of a step to be taken."""
        metric = self.journal.goal.metric
        for step, values in sorted(order.records, key=lambda record: metric not in record[1]):
            if metric not in values:
                if not settled(self.journal, self.cfg.eval.patience):
                    self.journal.write(step, values)
            elif step not in self.journal.evaluated:
                self.journal.add_evaluation(step, values)
                self.event("evaluated", step, reward=values[metric], values=values)

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
        make = partial(build, groups=groups, budget=self.cfg.micro_tokens, step=self.step, whole=self.session.device != "cpu")
        prepared = [
            ([make(answers, documents=part.documents).to(self.session.device) for answers in part.micro[0]], part.divisor)
            for part in order.updates
        ]
        samples = list(samples_of(order, groups, self.cfg.rollout.samples, self.decode))
        if samples:
            self.journal.add_samples(self.step + 1, samples)
            self.event("sampled", self.step + 1, prompts=[one["prompt"] for one in samples], texts=[one["answer"] for one in samples])
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
        self.journal.write(self.step, {"checkpoint/stage_s": seconds})


def require_same_policy(step: int, difference: float, most: float | None) -> None:
    """Refuse to learn from engines that compute something else than the trainer with the same weights.

    Sums of tensors cannot tell when an engine has every weight and uses it wrongly, or when the two models differ in what is no weight.

    Args:
        step: for the message.
        difference: mean over tokens of |log-probability of the trainer - of the engine|, in nats. bfloat16 alone explains about 0.01.
        most: weight_sync.max_difference.

    Raises:
        TrainingError: it is larger than that.
    """
    if most is not None and difference > most:
        rule = f"step {step}: trainer and engine have the same weights and differ by {difference:.3g} nats a token"
        remedy = "Run `rayft check` on the model and try rollout.eager=true; raise the limit only when you know the cause"
        raise TrainingError("weight_sync.max_difference", most, rule, remedy)


def settled(journal: Journal, patience: int | None) -> bool:
    """Whether as many evaluations as `patience` in a row were no better than the best before them; known to rank 0, which has them."""
    return patience is not None and journal.best.since >= patience


def mean_over_updates(updates: Sequence[tuple[Metrics, Tensor, Tensor]]) -> dict[str, float]:
    """A step's metrics from the (sums, divisor, gradient norm) of its updates, once the device is done; tokens are counted together."""
    metrics = []
    for sums, divisor, norm in updates:
        read = read_later({**sums, "norm": norm.to(divisor.device, non_blocking=True), "divisor": divisor})()
        norm_of = {"train/grad_norm": read.pop("norm")}
        metrics.append(finish_metrics(read, read.pop("divisor")) | norm_of)
    values = {name: sum(part[name] for part in metrics) / len(metrics) for name in metrics[0]}
    return values | {"train/num_tokens": sum(part["train/num_tokens"] for part in metrics)}


def agree(session: Session, order: Order, missing: list[int]) -> list[int] | None:
    """None when every rank has the same order and all that belongs to it; else the numbers of the groups that some rank misses."""
    said: list[Any] = [None] * session.world_size
    dist.all_gather_object(said, (order.kind, order.version, order.ticket, missing))
    every = sorted({number for *_, numbers in said for number in numbers})
    return every if every or any(other[:3] != said[0][:3] for other in said) else None


def _announcing(session: Session, feed: Feed) -> Session:
    """The session, whose rank 0 also tells the controller of every checkpoint once it is committed.

    On a store the controller's journal is a file of rank 0, and so gets there before a checkpoint counts.
    """

    def report(metrics: dict[str, float], directory: str, finish: Any) -> None:
        if session.rank == 0 and session.remote is not None:
            whole = session.run_dir / "journal.jsonl.new"
            whole.write_bytes(feed.journal())
            whole.replace(session.run_dir / "journal.jsonl")

        def finish_and_tell() -> None:
            finish()
            if session.rank == 0:
                feed.committed(int(metrics["step"]))

        session.report(metrics, directory, finish_and_tell)

    return replace(session, report=report)
