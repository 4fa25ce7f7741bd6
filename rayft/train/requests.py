"""What is asked of a run from outside while it trains: to save now, or to stop with a checkpoint.

Whoever can write into the run's directory asks by making a file there; the driver does so on SIGTERM and Ctrl-C. Rank 0 looks for the
files once a second, beside the training. What it found goes through the sum of a step over all ranks, which is read one step later
with the step's other numbers: so all ranks act at the same step, and none waits for it.
"""

from __future__ import annotations

import logging
import threading

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rayft.data import store
from rayft.errors import RayftError
from rayft.parallel import reduce
from rayft.types import Session

log = logging.getLogger("rayft")

SAVE_NOW, STOP_NOW = "CHECKPOINT_NOW", "STOP_NOW"
LOOK_S = 1.0


class Requests:
    """The requests of one run.

    Args:
        session: of this rank.
        axis: all ranks.
        trigger: whether to look for SAVE_NOW; STOP_NOW is always looked for.
    """

    def __init__(self, session: Session, axis: DeviceMesh, trigger: bool) -> None:
        self._home, self._axis = session.home, axis
        self._found: dict[str, bool] = {STOP_NOW: False} | ({SAVE_NOW: False} if trigger else {})
        # Kept on the device: to copy a number there would wait for the step in progress.
        self._values = torch.arange(4, dtype=torch.float64, device=axis.device_type)
        self._end, self._one_at_a_time = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="rayft-requests", daemon=True)
        if session.rank == 0:
            self._thread.start()

    def agree(self) -> Tensor:
        """A scalar on the device that says, once it is read by `read`, what rank 0 has found; every rank calls it at the same step."""
        code = 2 * self._found[STOP_NOW] + self._found.get(SAVE_NOW, False)
        return reduce.sum_over(self._values[code], self._axis)

    def read(self, value: float) -> tuple[bool, bool]:
        """(stop, save) from what `agree` gave one step earlier. A request to save is thereby taken up, and its file deleted."""
        stop, save = value >= 2, value % 2 == 1
        if save and self._thread.is_alive():
            with self._one_at_a_time:
                store.delete(store.join(self._home, SAVE_NOW))
                self._found[SAVE_NOW] = False
        return stop, save

    def close(self) -> None:
        """Look no more."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(LOOK_S):
            try:
                with self._one_at_a_time:
                    for name, found in self._found.items():
                        self._found[name] = found or store.exists(store.join(self._home, name))
            except RayftError as problem:
                log.warning("cannot look for requests to this run: %s", problem)
