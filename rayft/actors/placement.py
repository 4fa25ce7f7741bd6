"""What a run needs of the cluster, whether the cluster has it, and the connection to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from rayft.config.schema import AnyRun, GrpoRun, Parallel
from rayft.errors import ResourceError
from rayft.optim.schedules import rows_of_epochs

DATA_CPUS = 1
"""CPUs that workers leave to Ray Data: without one, its tasks and the training that waits for them never start."""

LOCAL_CPUS = 4
"""Least CPUs that a cluster started here claims to have; on 2, workers and Ray Data wait for each other for ever."""


@dataclass(frozen=True)
class Need:
    """What a run needs of the cluster.

    Attributes:
        workers: training processes.
        gpus: GPUs of all workers together.
        cpus: CPUs of all workers and of Ray Data together.
    """

    workers: int
    gpus: int
    cpus: int


def resolve_device(parallel: Parallel, resources: Mapping[str, float]) -> str:
    """ "cpu" or "cuda": as configured, and for auto on GPUs when the cluster has any."""
    if parallel.device != "auto":
        return parallel.device
    return "cuda" if resources.get("GPU", 0) >= 1 else "cpu"


ENGINE_SHARE, TRAINER_SHARE = 0.51, 0.49
"""Of a GPU that an engine and a worker share. Halves would let Ray put two engines on one GPU and two workers on another."""


def gpu_share(cfg: AnyRun) -> float:
    """GPUs of a worker that has any."""
    return TRAINER_SHARE if isinstance(cfg, GrpoRun) and cfg.placement.mode == "colocated" else 1.0


def worker_resources(parallel: Parallel, device: str, share: float = 1.0) -> dict[str, float]:
    """What Ray reserves for one worker: a GPU, a share or none, and CPUs as configured, which is none beside a GPU and one without."""
    cpus = parallel.cpus_per_worker if parallel.cpus_per_worker is not None else int(device == "cpu")
    return {"CPU": float(cpus)} | ({"GPU": share} if device == "cuda" else {})


def engine_resources(cfg: GrpoRun, gpu: bool) -> tuple[str, float]:
    """What an engine that shares nothing takes: the kind, and how much of it."""
    return ("GPU", float(cfg.rollout.tensor_parallel)) if gpu else ("CPU", 1.0)


def trainer_resources(cfg: GrpoRun, gpu: bool) -> dict[str, float]:
    """What all workers of the trainer take together."""
    each = worker_resources(cfg.parallel, "cuda" if gpu else "cpu")
    return {kind: cfg.parallel.workers * amount for kind, amount in each.items()}


def need_of(parallel: Parallel, device: str) -> Need:
    """Sum up the workers, and what they leave to Ray Data."""
    workers, each = parallel.workers, worker_resources(parallel, device)
    return Need(workers, gpus=workers * int(each.get("GPU", 0)), cpus=workers * int(each["CPU"]) + DATA_CPUS)


def check_cluster(need: Need, resources: Mapping[str, float]) -> None:
    """Refuse a run that the cluster, as large as it is, can never place.

    Args:
        need: of the run.
        resources: totals as `ray.cluster_resources()` gives them.

    Raises:
        ResourceError: telling what is missing.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if need.gpus > gpus:
        fewer = f"Set parallel.workers = {gpus}, with the same result" if gpus else "Set parallel.device = cpu"
        remedy = f"{fewer}, or add GPUs; with parallel.autoscaling = true they are waited for"
        raise ResourceError("parallel.workers", need.workers, f"needs {_count(need.gpus, 'GPU')}, the cluster has {gpus}", remedy)
    if need.cpus > cpus:
        raise ResourceError(
            "parallel.workers",
            need.workers,
            f"needs {_count(need.cpus, 'CPU')}, {DATA_CPUS} of them for Ray Data, the cluster has {cpus}",
            "Lower parallel.workers, with the same result, or parallel.cpus_per_worker, or add nodes; "
            "with parallel.autoscaling = true they are waited for",
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def start_ray() -> None:
    """Connect to the cluster that the environment points at (a Ray job, RAY_ADDRESS), or start one on this machine.

    Does nothing when this process is connected already.
    """
    import ray

    from rayft.config.environment import in_ray_job

    if ray.is_initialized():
        return
    if in_ray_job():
        ray.init()
    else:
        # None starts the dashboard where its packages are installed: Ray Train's cleaner asks its state API whether a controller is dead
        # and its workers' CPUs are free again.
        ray.init(address="local", num_cpus=max(LOCAL_CPUS, os.cpu_count() or 1), include_dashboard=None)


def resources_in_reach() -> dict[str, float]:
    """Of the cluster that the environment points at, else of this machine, as `ray.cluster_resources()` names them."""
    from rayft.config.environment import in_ray_job, prepare_process

    if in_ray_job():
        prepare_process()
        start_ray()
        import ray

        return dict(ray.cluster_resources())
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"CPU": float(max(LOCAL_CPUS, os.cpu_count() or 1)), "GPU": float(torch.cuda.device_count()), "memory": float(memory)}


def derive_steps(num_rows: int, rows: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of the run: max_steps, else those that `epochs` passes over `num_rows` rows take, the last one filled up.

    Args:
        num_rows: packed training rows.
        rows: packed rows in a step.
        epochs: passes, as written: 1.1 times 100 rows is 110, not a little more.
        max_steps: run.max_steps.
    """
    if max_steps is not None:
        return max_steps
    return -(-rows_of_epochs(num_rows, epochs) // rows)
