"""A broadcast group over NCCL between GPUs of the trainer and of the engines, made by vLLM's stateless groups.

NCCL has no deadline of its own: a broadcast whose peer died spins for ever. So its completion is polled, and a group that is late
is aborted and not used again.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from torch import Tensor

POLL_S = 0.002


class NcclGroup:
    """See `broadcast.Group`. Buffers lie on the device that the group was made on."""

    def __init__(self, communicator: Any, deadline_s: float) -> None:
        self._communicator, self._deadline_s = communicator, deadline_s

    def broadcast(self, buffer: Tensor) -> None:
        """Raises TimeoutError when it is not done in time; the group is unusable then."""
        self._communicator.broadcast(buffer, src=0, stream=torch.cuda.current_stream(buffer.device))
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(buffer.device))
        end = time.monotonic() + self._deadline_s
        while not done.query():
            if time.monotonic() > end:
                self.close()
                raise TimeoutError(f"a broadcast of weights took longer than {self._deadline_s:g} s")
            time.sleep(POLL_S)

    def close(self) -> None:
        """Abort the communicator."""
        self._communicator.destroy()


def connect(host: str, port: int, rank: int, world: int, device: torch.device, deadline_s: float) -> NcclGroup:
    """See `broadcast.Connect`. Raises TimeoutError when not all members come in time."""
    made: list[Any] = []
    problems: list[Exception] = []

    def join() -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        torch.cuda.set_device(device)
        try:
            members = StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=world, store_timeout=int(deadline_s))
            made.append(PyNcclCommunicator(members, device=device))
        except (RuntimeError, OSError, ValueError) as problem:
            problems.append(problem)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if made and not made[0].available:
        raise RuntimeError("the NCCL group for weights could not be made: vLLM finds no NCCL library")
    if problems:
        raise RuntimeError(f"the NCCL group for weights could not be made: {problems[0]}") from problems[0]
    if not made:
        raise TimeoutError(f"the NCCL group for weights was not complete after {deadline_s:g} s")
    return NcclGroup(made[0], deadline_s)
