"""What fits into memory: the micro-batch that does, and the change of a run that would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rayft.config.schema import SftRun
from rayft.errors import ConfigError
from rayft.observe.flops import ModelShape
from rayft.parallel.memory import MemoryPlan, estimate

FILLED = 0.85
"""Share of the memory that a plan may fill: it is right within 15%, and allocators lose some to fragments."""

SAVINGS: tuple[tuple[str, Any], ...] = (
    ("activation_checkpointing", "selective"),
    ("activation_checkpointing", "full"),
    ("activation_offload", True),
    ("cpu_offload", True),
)
"""Fields of `parallel` that save memory, each slower than those before it and added to them."""

MORE_WORKERS = tuple(2**power for power in range(1, 11))


def changed(cfg: SftRun, batch: Mapping[str, Any], parallel: Mapping[str, Any]) -> SftRun:
    """The run with other values in two sections."""
    return cfg.model_copy(update={"batch": cfg.batch.model_copy(update=batch), "parallel": cfg.parallel.model_copy(update=parallel)})


def splits(rows: int, workers: int) -> list[int]:
    """Values of batch.micro_rows that are worth trying, largest first: those that cut a worker's rows into equal parts, rounded up."""
    each = -(-rows // workers)
    return sorted({-(-each // parts) for parts in range(1, each + 1)}, reverse=True)


def choose_micro_rows(shape: ModelShape | None, cfg: SftRun, device: str, room: int) -> SftRun:
    """The run with a number for batch.micro_rows: auto becomes the most rows whose plan fills FILLED of the room, else 1.

    Args:
        shape: of the model; None when the plan does not cover it.
        cfg: the run.
        device: "cpu" or "cuda"; on CPUs larger micro-batches gain nothing, so auto is 1.
        room: bytes that a worker may use.

    Raises:
        ConfigError: auto for a model that the plan does not cover.
    """
    if cfg.batch.micro_rows != "auto":
        return cfg
    if device == "cpu":
        return changed(cfg, {"micro_rows": 1}, {})
    if shape is None:
        rule = "needs a memory plan, and the formulas do not cover this architecture"
        raise ConfigError("batch.micro_rows", "auto", rule, "Give a number of rows, such as 1")
    tried = (changed(cfg, {"micro_rows": rows}, {}) for rows in splits(cfg.batch.rows, cfg.parallel.workers))
    return next((one for one in tried if estimate(shape, one, device).total <= FILLED * room), changed(cfg, {"micro_rows": 1}, {}))


def remedy(shape: ModelShape, cfg: SftRun, device: str, fits: Callable[[SftRun, MemoryPlan], bool]) -> str:
    """The smallest change of a run that fits, as a sentence without its point; of those with the same savings, the most rows at once.

    Args:
        shape: of the model.
        cfg: the run that does not fit, its batch.micro_rows a number.
        device: "cpu" or "cuda".
        fits: whether a run with its plan does.
    """
    for other in _smaller(cfg, device):
        plan = estimate(shape, other, device)
        if fits(other, plan):
            settings = " and ".join(f"{field}={value}" for field, value in _differences(cfg, other))
            return f"Set {settings}, with the same result: the plan is then {plan.total / 2**30:.1f} GiB a worker"
    return "Take a smaller model, a shorter data.seq_len, or an adapter; no other setting makes it fit"


def _smaller(cfg: SftRun, device: str) -> Iterator[SftRun]:
    """The run with less and less need of memory: fewer rows at once, then each saving with every number of rows, then more workers."""
    assert cfg.batch.micro_rows != "auto"
    now = cfg.batch.micro_rows
    fewer = [number for number in splits(cfg.batch.rows, cfg.parallel.workers) if number < now]
    yield from (changed(cfg, {"micro_rows": number}, {}) for number in fewer)
    saved: dict[str, Any] = {}
    for name, value in SAVINGS:
        helps = name == "activation_checkpointing" or device == "cuda"
        if name == "cpu_offload" and (cfg.optim.type != "adamw" or cfg.model.unfrozen):
            continue
        if helps and getattr(cfg.parallel, name) not in (value, "full"):
            saved[name] = value
            yield from (changed(cfg, {"micro_rows": number}, saved) for number in (now, *fewer))
    if device == "cuda":
        for factor in MORE_WORKERS:
            yield changed(cfg, {"micro_rows": 1}, {"activation_checkpointing": "full", "workers": cfg.parallel.workers * factor})


def _differences(cfg: SftRun, other: SftRun) -> Iterator[tuple[str, str]]:
    """(dotted field, value as it is written) of what differs."""
    for section in ("batch", "parallel"):
        for name, value in getattr(other, section):
            if value != getattr(getattr(cfg, section), name):
                yield f"{section}.{name}", str(value).lower()
