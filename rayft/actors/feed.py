"""A rank's line to the controller, and rank 0's to the engines: see `train.online.Feed`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError

from rayft.config.schema import GrpoRun
from rayft.data import store
from rayft.errors import InfrastructureError
from rayft.experience.orders import Order
from rayft.models.load import compute_dtype
from rayft.types import Group, Launch, Session
from rayft.weight_sync.protocol import EngineHandle, PushReport, Sender, Transport
from rayft.weight_sync.source import Payload

log = logging.getLogger("rayft")

ANSWER_S, AGAIN_S, STALL_S = 60.0, 0.5, 60.0


class RayFeed:
    """The line through Ray.

    Args:
        launch: names the controller.
        session: of this rank.
    """

    def __init__(self, launch: Launch[GrpoRun], session: Session) -> None:
        cfg = launch.cfg
        self._cfg, self._attempt, self._session = cfg, launch.attempt, session
        self._controller = ray.get_actor(launch.controller)

    def join(self, step: int) -> None:
        """See `Controller.join`."""
        self._call(lambda: self._controller.join.remote(self._attempt, step, self._session.world_size))

    def order(self, step: int, index: int, lost: Sequence[int]) -> Order:
        """See `Controller.order`.

        Raises:
            RayftError: the controller's reason to stop.
            InfrastructureError: no order came until the deadline; with a report of who waits for whom.
        """
        began = told = time.monotonic()
        while True:
            order: Order | None = self._call(lambda: self._controller.order.remote(self._attempt, step, index, self._session.rank, lost))
            now = time.monotonic()
            if order is not None:
                break
            if now - told > STALL_S and self._session.rank == 0:
                log.warning("step %d waits since %.0f s: %s", step, now - began, self._report())
                told = now
            if now - began > self._session.deadline_s:
                rule = f"step {step} got no groups: {self._report()}"
                raise InfrastructureError(
                    "run.deadline_s", self._session.deadline_s, rule, "Look into what it waits for, or raise the deadline"
                )
        if order.error is not None:
            raise order.error
        return order

    def fetch(self, order: Order) -> tuple[dict[int, Group], list[int]]:
        """The order's groups by number, and the numbers of those that cannot be had."""
        references = list(order.groups.values())
        there, _ = ray.wait(references, num_returns=len(references), timeout=ANSWER_S) if references else ([], [])
        found: dict[int, Group] = {}
        for number, reference in order.groups.items():
            try:
                found[number] = ray.get(reference, timeout=ANSWER_S if reference in there else 0)
            except RayError as problem:
                log.warning("a group of step %d is lost (%s); it is made again", order.step, type(problem).__name__)
        return found, [number for number in order.groups if number not in found]

    def engines(self, order: Order) -> list[EngineHandle]:
        """Handles of the engines to push to, each under the name of its life."""
        return [EngineHandle(life, _caller(name), self._cfg.rollout.tensor_parallel) for life, name in order.engines]

    def pushed(self, step: int, order: Order, report: PushReport) -> None:
        """See `Controller.pushed`."""
        reached = [life for life, _ in order.engines if life not in report.lost]
        self._call(lambda: self._controller.pushed.remote(self._attempt, step, reached, dict(report.lost)))

    def committed(self, step: int) -> None:
        """See `Controller.committed`."""
        self._call(lambda: self._controller.committed.remote(step))

    def journal(self) -> bytes:
        """See `Controller.journal`."""
        lines: bytes = self._call(self._controller.journal.remote)
        return lines

    def _report(self) -> str:
        return str(self._call(self._controller.report.remote))

    def _call(self, ask: Callable[[], Any]) -> Any:
        """The controller's answer; asked again while it is being restarted.

        Raises:
            InfrastructureError: it does not come back.
        """
        until = time.monotonic() + self._session.deadline_s
        while True:
            try:
                return ray.get(ask(), timeout=ANSWER_S)
            except (RayActorError, TimeoutError) as problem:
                if time.monotonic() > until:
                    rule = f"did not answer ({type(problem).__name__})"
                    raise InfrastructureError("controller", None, rule, "Run the same command again to resume") from problem
                time.sleep(AGAIN_S)


def _caller(name: str) -> Callable[..., Future[Any]]:
    actor = ray.get_actor(name)

    def call(method: str, *arguments: Any) -> Future[Any]:
        future: Future[Any] = getattr(actor, method).remote(*arguments).future()
        return future

    return call


def transport_of(cfg: GrpoRun, device_type: str) -> Transport:
    """How weights travel."""
    if cfg.weight_sync.type != "auto":
        return cfg.weight_sync.type
    if device_type == "cpu":
        return "gloo" if store.is_url(cfg.run.dir) else "disk"
    return "ipc" if cfg.placement.mode == "colocated" else "nccl"


def engine_dtype(cfg: GrpoRun, device_type: str) -> str:
    """Name of the precision that engines hold weights in."""
    return str(compute_dtype(cfg.model, device_type)).removeprefix("torch.")


def payload_of(cfg: GrpoRun) -> Payload:
    """What of the weights is sent."""
    if cfg.weight_sync.payload != "auto":
        return cfg.weight_sync.payload
    engines_can_merge = cfg.adapter.type == "lora" and cfg.model.quantize == "none" and not cfg.adapter.target_parameters
    return "adapter" if engines_can_merge else "full"


def make_sender(launch: Launch[GrpoRun], session: Session) -> Sender:
    """The trainer's end of weight transfers, on every rank."""
    cfg = launch.cfg
    return Sender(
        transport_of(cfg, launch.device_type),
        dtype=getattr(torch, engine_dtype(cfg, launch.device_type)),
        device=session.device,
        deadline_s=cfg.rollout.start_s,
        payload=payload_of(cfg),
        verify_every=cfg.weight_sync.verify_every,
        host=ray.util.get_node_ip_address(),
        folder=Path(session.run_dir) / "weights",
    )
