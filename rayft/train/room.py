"""A worker's card: how many rows it takes at once, and what to say when it is full."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rayft.config.schema import AnyRun, SftRun
from rayft.errors import ResourceError
from rayft.models.load import read_config
from rayft.observe.flops import shape_of
from rayft.parallel import fitting
from rayft.parallel.memory import estimate
from rayft.parallel.online_memory import estimate_online, smaller_step
from rayft.types import Session

log = logging.getLogger("rayft")

GIB = 2**30


def with_micro_rows(cfg: SftRun, session: Session) -> SftRun:
    """The run with a number for batch.micro_rows, the same on every rank: auto fits the card with the least free memory.

    Call before the model is built; every rank must.

    Raises:
        ConfigError: auto for a model that the memory plan does not cover.
    """
    if cfg.batch.micro_rows != "auto":
        return cfg
    device, room = session.device.split(":")[0], 0
    if device == "cuda":
        least = torch.tensor(free_bytes(session.device), device=session.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        room = int(least.item())
    chosen = fitting.choose_micro_rows(shape_of(read_config(cfg.model)), cfg, device, room)
    if session.rank == 0:
        log.info("batch.micro_rows auto is %s", chosen.batch.micro_rows)
    return chosen


def free_bytes(device: str) -> int:
    """What this process may still allocate on a card: its free memory, and what torch has taken of it but does not use."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def explained(cfg: AnyRun, session: Session) -> Iterator[None]:
    """Say of a full card what was planned and what would fit.

    Raises:
        ResourceError: the block ran out of a GPU's memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise out_of_memory(cfg, session, problem) from problem


def out_of_memory(cfg: AnyRun, session: Session, problem: torch.OutOfMemoryError) -> ResourceError:
    """The error of a full card: what was planned, what the card has, and a setting that would fit by the plan.

    Args:
        cfg: the run; auto stands for what this worker chose.
        session: of this rank.
        problem: what torch raised.
    """
    free, total = torch.cuda.mem_get_info(session.device)
    peak, reserved = torch.cuda.max_memory_allocated(session.device), torch.cuda.memory_reserved(session.device)
    state = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free, this process used up to {peak / GIB:.1f}"
    return explain(
        cfg, f"memory of {session.device} on rank {session.rank}", state, free + reserved, ". ".join(str(problem).split(". ")[:2])
    )


def explain(cfg: AnyRun, field: str, state: str, room: int, problem: str) -> ResourceError:
    """The same from given figures.

    Args:
        cfg: the run; auto is read as what the plan chooses for `room`.
        field: what ran out.
        state: how full it is.
        room: bytes that the process may use of the card.
        problem: torch's own sentence.
    """
    shape = shape_of(read_config(cfg.model))
    if shape is None:
        micro = "batch.micro_rows" if isinstance(cfg, SftRun) else "batch.micro_tokens"
        remedy = f"Lower {micro}, or set parallel.activation_checkpointing=full or parallel.cpu_offload=true"
        return ResourceError(field, None, f"is full ({problem}); {state}", remedy)
    if isinstance(cfg, SftRun):
        cfg = fitting.choose_micro_rows(shape, cfg, "cuda", room)
        plan = estimate(shape, cfg, "cuda")
    else:
        plan = estimate_online(shape, cfg, "cuda").trainer
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in plan.table())
    rule = f"is full ({problem}); {state}; planned were {plan.total / GIB:.1f} GiB, highest in {plan.moment}: {parts}"
    # What fits must stay below the card and, where the plan took too little, below what was planned.
    most = min(plan.total, room)
    if isinstance(cfg, SftRun):
        return ResourceError(field, None, rule, fitting.remedy(shape, cfg, "cuda", lambda _, other: other.total <= fitting.FILLED * most))
    return ResourceError(field, None, rule, smaller_step(shape, cfg, "cuda", most))
