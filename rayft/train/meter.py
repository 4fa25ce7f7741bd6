"""How fast a step was: tokens per second, share of the device's peak, memory, waits."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from rayft.models.experts import is_wrapper
from rayft.models.load import is_adapter
from rayft.observe import flops
from rayft.types import Batch, Session


class Meter:
    """Measures one step at a time on this rank; rank 0's numbers are logged.

    Args:
        config: the model's text configuration, for its FLOPs.
        session: gives the device.
        parts: model parts, to tell trained from frozen weights.
    """

    def __init__(self, config: Any, session: Session, parts: Sequence[Any]) -> None:
        self.session = session
        self.shape = flops.shape_of(config)
        self.adapter_parameters = _adapter_parameters(parts, getattr(config, "num_experts_per_tok", None) or 1)
        self.peak = flops.peak_flops(torch.cuda.get_device_name()) if session.device.startswith("cuda") else None
        self.began: float | None = None
        self.excluded = 0.0

    def start(self, batches: Sequence[Batch], waited: float) -> None:
        """A step's rows are here; `waited` seconds were spent on waiting for them."""
        now = time.perf_counter()
        if self.began is None:
            self.began, self.excluded = now - waited, 0.0
        self.batches, self.waited = batches, waited

    def exclude(self, seconds: float) -> None:
        """Do not count these seconds in the step in progress: an evaluation, or staging a checkpoint."""
        self.excluded += seconds

    def stop(self) -> dict[str, float]:
        """The step's metrics; the next step begins now."""
        now = time.perf_counter()
        assert self.began is not None
        seconds = max(now - self.began - self.excluded, 1e-9)
        self.began, self.excluded = now, 0.0
        metrics = {
            "perf/tokens_per_s": sum(batch.num_tokens for batch in self.batches) / seconds,
            "perf/step_s": seconds,
            "perf/data_wait_s": self.waited,
            "perf/peak_memory_gib": self._peak_memory() / 2**30,
            "perf/recompiles": float(torch._dynamo.utils.counters["stats"]["unique_graphs"]),
        }
        if self.shape is not None and self.peak is not None:
            lengths = [length for batch in self.batches for length in batch.document_lengths]
            trained = sum(batch.trained.shape[0] for batch in self.batches)
            work = flops.flops_per_step(self.shape, lengths, trained, adapter_parameters=self.adapter_parameters)
            metrics["perf/mfu"] = work / seconds / self.peak
        return metrics

    def _peak_memory(self) -> float:
        """Bytes: the most that the allocator held since the last call on a GPU, the process's maximum on a CPU."""
        if self.session.device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return float(peak)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def _adapter_parameters(parts: Sequence[Any], top_k: int) -> int | None:
    """Weights of the low-rank adapters that a token meets, of experts those of `top_k`; None when the base is trained."""
    stacked = {
        parameter: wrapper.num_experts
        for part in parts
        for wrapper in part.modules()
        if is_wrapper(wrapper)
        for factors in (wrapper.lora_A, wrapper.lora_B)
        for parameter in factors.parameters()
    }
    adapters = (parameter for part in parts for name, parameter in part.named_parameters() if is_adapter(name))
    count = sum(p.numel() * top_k // stacked[p] if p in stacked else p.numel() for p in adapters)
    return count or None
