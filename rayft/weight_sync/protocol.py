"""The trainer's side of a push: gather, pack, send chunk by chunk, hold every tensor's bit sum against what the engines got.

Every rank of the trainer builds a `Sender` and calls `push` at the same step. Rank 0 alone talks to the engines:

    pause               tokens stop; requests under way are kept
    receive start       where to join or map, what is verified
    receive chunk ...   one message per chunk, beside the transport of its bytes
    receive finish      the engine takes the version and answers with the sums of what arrived, and what it loaded wrongly
    resume              after all sums were found equal

A wrong sum stops the run (TrainingError): an engine that may hold other weights than the trainer must not produce a token, so it
stays paused. An engine that fails or is late is left out and named in the report; the caller must end its process, because what it
holds is half old and half new. Where all engines share one group (gloo, nccl), a failure in mid-push breaks the group, and the push
raises InfrastructureError on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayft.errors import InfrastructureError, RayftError, ResourceError, TrainingError
from rayft.weight_sync import gloo, nccl
from rayft.weight_sync.broadcast import BroadcastOutlet
from rayft.weight_sync.disk import DiskOutlet
from rayft.weight_sync.ipc import IpcOutlet
from rayft.weight_sync.source import Payload, Weight, adapter_facts, adapter_weights, full_weights, reshard
from rayft.weight_sync.wire import Entry, bit_sum, differences, plan_chunks, read_sums, to_table, view

Transport = Literal["disk", "gloo", "nccl", "ipc"]
CHUNK_BYTES = 256 << 20
Result = TypeVar("Result")


@dataclass(frozen=True)
class EngineHandle:
    """An engine as rank 0 of the trainer reaches it.

    Attributes:
        name: unique among all engines of the run and their restarts: it decides when a group is made anew.
        call: `call(method, *arguments)` starts a method of `types.Engine` and returns its future.
        workers: processes of the engine that hold weights (its tensor parallel size).
    """

    name: str
    call: Callable[..., Future[Any]]
    workers: int = 1


@dataclass(frozen=True)
class PushReport:
    """What a push did, as rank 0 saw it; other ranks know no engines.

    Attributes:
        version: that the engines now serve.
        seconds: on this rank, from the first message to the last.
        bytes: of the weights, once.
        verified: every tensor's sum was compared.
        unchecked: loaded weights that could not be compared, because the engine keeps them in a layout of its own.
        lost: name of an engine that is out of step -> why; its process must be ended.
    """

    version: str
    seconds: float
    bytes: int
    verified: bool
    unchecked: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)


class Outlet(Protocol):
    """The trainer's end of a transport. `every_rank`: all ranks pack. `independent`: one engine's failure is its own."""

    every_rank: bool
    independent: bool

    def start(self, version: str, buffer: Tensor | None, members: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
        """What each engine's end is opened with; every rank calls it. `buffer` is what chunks are packed into, on ranks that pack."""

    def join(self) -> None:
        """Open this end, while engines open theirs. Raises RuntimeError or TimeoutError."""

    def offer(self, buffer: Tensor, entries: Sequence[Entry]) -> dict[str, Any]:
        """Make the packed chunk available; what the message to the engines says of it."""

    def transmit(self, buffer: Tensor) -> None:
        """Move the bytes, while engines take them. Raises RuntimeError or TimeoutError."""

    def close(self) -> None:
        """Let go of groups, memory and files."""


class Sender:
    """Pushes a model to engines.

    Args:
        transport: how bytes travel. disk needs `folder`; nccl and ipc need GPUs.
        dtype: of the engines' weights.
        device: of this rank, "cpu" or "cuda:N"; chunks are packed there.
        deadline_s: for each answer of the engines and each transfer.
        payload: "full" sends every weight, adapters merged; "adapter" only what is trained, which engines merge themselves.
        verify_every: pushes from one comparison of all sums to the next; the first push of a group of engines always has one.
        host: address of this process that engines reach.
        folder: for disk, on storage that all engines read.
        chunk_bytes: size of a chunk, held once in the trainer and once or twice in each engine.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        dtype: torch.dtype,
        device: str,
        deadline_s: float,
        payload: Payload = "full",
        verify_every: int = 10,
        host: str = "127.0.0.1",
        folder: Path | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._rank = dist.get_rank() if ranks > 1 else 0
        self._control = dist.new_group(backend="gloo", timeout=timedelta(seconds=4 * deadline_s)) if ranks > 1 else None
        self._transport, self._dtype, self._device = transport, dtype, torch.device(device)
        self._deadline_s, self._payload, self._verify_every, self._chunk_bytes = deadline_s, payload, verify_every, chunk_bytes
        self._outlet = _outlet(transport, host, folder, self._device, deadline_s, self._control)
        self._pushes = 0
        self._members: tuple[tuple[str, int], ...] = ()

    def push(self, module: nn.Module, version: str, engines: Sequence[EngineHandle] = ()) -> PushReport:
        """Bring engines to this version of the weights. Every rank of the trainer calls it.

        Args:
            module: the policy, plain or sharded, with or without adapters.
            version: "<attempt>.<step>".
            engines: which to bring there; read on rank 0.

        Raises:
            TrainingError: an engine received or loaded something else than was sent. On every rank.
            InfrastructureError: the group that the engines share broke. On every rank.
        """
        began = time.monotonic()
        reshard(module)
        full = self._payload == "full"
        weights = full_weights(module, self._dtype) if full else adapter_weights(module)
        chunks = plan_chunks([(w.name, w.dtype, w.shape) for w in weights], self._chunk_bytes)
        packs = self._rank == 0 or self._outlet.every_rank
        buffer = torch.empty(max(chunk[-1].end for chunk in chunks), dtype=torch.uint8, device=self._device) if packs else None
        exchange = _Exchange(version, list(engines) if self._rank == 0 else [], self._deadline_s, self._outlet.independent)

        exchange.ask("pause", lambda _: ())
        members = tuple((engine.name, engine.workers) for engine in exchange.live)
        verify = members != self._members or self._pushes % self._verify_every == 0
        places = exchange.guard(lambda: self._outlet.start(version, buffer, members)) or []
        adapter = None if full else adapter_facts(module)
        facts = {"phase": "start", "transport": self._transport, "tensors": len(weights), "verify": verify, "adapter": adapter}
        place_of = {name: place for (name, _), place in zip(members, places, strict=False)}
        exchange.ask("receive", lambda name: (version, {**facts, "place": place_of[name]}), self._outlet.join)
        sums = self._send(chunks, {weight.name: weight for weight in weights}, buffer, exchange, verify)
        unchecked = self._finish(exchange, len(weights), read_sums(sums))
        self._agree(exchange.failure)
        self._pushes, self._members = self._pushes + 1, members
        size = sum(entry.end - entry.offset for chunk in chunks for entry in chunk)
        return PushReport(version, time.monotonic() - began, size, verify, unchecked, dict(exchange.lost))

    def close(self) -> None:
        """Let go of groups, memory and files."""
        self._outlet.close()

    def _send(
        self, chunks: Sequence[Sequence[Entry]], weights: Mapping[str, Weight], buffer: Tensor | None, exchange: _Exchange, verify: bool
    ) -> dict[str, Tensor]:
        """Gather and send every chunk; after a failure the gathering goes on, because other ranks wait in it."""
        sums: dict[str, Tensor] = {}
        for entries in chunks:
            for entry in entries:
                tensor = weights[entry.name].gather()
                if buffer is not None:
                    view(buffer, entry).copy_(tensor)
                if verify and self._rank == 0:
                    sums[entry.name] = bit_sum(tensor)
            if buffer is not None:
                self._send_chunk(entries, buffer, exchange)
        return sums

    def _send_chunk(self, entries: Sequence[Entry], buffer: Tensor, exchange: _Exchange) -> None:
        offered = exchange.guard(lambda: self._outlet.offer(buffer, entries))
        self._wait_for_ranks()
        message = {"phase": "chunk", "table": to_table(entries), **(offered or {})}
        packed = buffer[: entries[-1].end]
        exchange.ask("receive", lambda _: (exchange.version, message), lambda: self._outlet.transmit(packed))
        self._wait_for_ranks()

    def _wait_for_ranks(self) -> None:
        """Where every rank packs, no engine may read a buffer before all are full, and no rank refill one that is read."""
        if self._control is not None and self._outlet.every_rank:
            dist.barrier(self._control)

    def _finish(self, exchange: _Exchange, tensors: int, sent: Mapping[str, int]) -> tuple[str, ...]:
        """Compare what every worker of every engine got, then let them go on. Names that could not be compared."""
        answers = exchange.ask("receive", lambda _: (exchange.version, {"phase": "finish"}))
        unchecked: set[str] = set()
        for name, workers in answers.items():
            for worker in workers:
                flaws = [] if worker["tensors"] == tensors else [f"{worker['tensors']} of {tensors} tensors arrived"]
                if sent:
                    flaws += differences(sent, worker["received"]) + [f"{weight} was loaded wrongly" for weight in worker["wrong"]]
                    unchecked |= set(worker["unchecked"])
                if flaws and exchange.failure is None:
                    rule = f"the engine does not hold the trainer's weights: {'; '.join(flaws[:3])} ({len(flaws)} in all)"
                    remedy = "No token was sampled from them. Run the same command again, and report it if it comes back"
                    exchange.failure = TrainingError(f"weight_sync: {name}", exchange.version, rule, remedy)
        exchange.ask("resume", lambda _: ())
        return tuple(sorted(unchecked))

    def _agree(self, failure: RayftError | None) -> None:
        """Raise rank 0's failure on every rank; what was shared with the engines is not used again."""
        outcome = [failure]
        if self._control is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._control)
        if outcome[0] is not None:
            self._outlet.close()
            self._members = ()
            raise outcome[0]


class _Exchange:
    """Rank 0's talk with the engines in one push: who still takes part, who was lost and why, and what ended the push.

    On other ranks there are no engines, and nothing is asked.
    """

    def __init__(self, version: str, engines: list[EngineHandle], deadline_s: float, independent: bool) -> None:
        self.version, self.live, self.lost = version, engines, dict[str, str]()
        self.failure: RayftError | None = None
        self._deadline_s, self._independent = deadline_s, independent

    def ask(self, method: str, arguments: Callable[[str], tuple[Any, ...]], meanwhile: Callable[[], None] | None = None) -> dict[str, Any]:
        """Call all live engines at once, do something meanwhile, and return the answers of those that gave one in time."""
        if self.failure is not None or not self.live:
            return {}
        calls = {engine.name: engine.call(method, *arguments(engine.name)) for engine in self.live}
        broken = _attempt(meanwhile) if meanwhile is not None else ""
        end = time.monotonic() + self._deadline_s
        failed = {name: reason for name, call in calls.items() if (reason := _outcome(call, end, self._deadline_s)) is not None}
        self.lost |= {name: f"{method}: {reason}" for name, reason in failed.items()}
        self.live = [engine for engine in self.live if engine.name not in failed]
        if broken or (failed and method == "receive" and not self._independent):
            causes = [f"{name}: {reason}" for name, reason in failed.items()] + [broken] * bool(broken)
            rule = f"the push of weights broke off ({'; '.join(causes)})"
            self.failure = InfrastructureError("weight_sync", self.version, rule, "Restart the engines before the next push")
        return {name: call.result() for name, call in calls.items() if name not in failed}

    def guard(self, action: Callable[[], Result]) -> Result | None:
        """The action's result, or None when the push has failed or fails in it for want of room."""
        try:
            return action() if self.failure is None else None
        except ResourceError as problem:
            self.failure = problem
            return None


def _attempt(action: Callable[[], None]) -> str:
    """What went wrong in it, empty when nothing did."""
    try:
        action()
    except (RuntimeError, OSError, TimeoutError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


def _outcome(call: Future[Any], end: float, deadline_s: float) -> str | None:
    """Why a call gave no answer, None when it gave one."""
    try:
        problem = call.exception(max(0.0, end - time.monotonic()))
    except (TimeoutError, CancelledError):
        return f"no answer within {deadline_s:g} s"
    return None if problem is None else f"{type(problem).__name__}: {problem}"


def _outlet(transport: Transport, host: str, folder: Path | None, device: torch.device, deadline_s: float, control: Any) -> Outlet:
    if transport == "disk":
        assert folder is not None, "disk needs a folder"
        return DiskOutlet(folder)
    if transport == "ipc":
        return IpcOutlet(control)
    return BroadcastOutlet(nccl.connect if transport == "nccl" else gloo.connect, host, device, deadline_s)
