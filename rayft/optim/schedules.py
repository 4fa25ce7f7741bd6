"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from rayft.config.schema import Optim


def rows_of_epochs(num_rows: int, epochs: float) -> int:
    """Rows that `epochs` passes over `num_rows` rows take, rounded up; epochs as written: 1.1 times 100 rows is 110."""
    return math.ceil(Fraction(str(epochs)) * num_rows)


def warmup_steps(optim: Optim, total_steps: int) -> int:
    """Steps of warm-up: `optim.warmup` itself when it is an integer, else that fraction of all steps, rounded; at most all."""
    steps = optim.warmup if isinstance(optim.warmup, int) else round(optim.warmup * total_steps)
    return min(steps, total_steps)


def decay_steps(optim: Optim, total_steps: int) -> int:
    """Steps of the fall at the end of wsd, counted like the warm-up; what the warm-up leaves at most."""
    steps = optim.decay if isinstance(optim.decay, int) else round(optim.decay * total_steps)
    return min(steps, total_steps - warmup_steps(optim, total_steps))


def lr_at(step: int, total_steps: int, optim: Optim) -> float:
    """Learning rate of a step.

    It rises linearly over the warm-up, from lr / warmup at step 0 to lr at the last step of it, then falls as the schedule says
    and reaches min_lr_ratio * lr at the last step. wsd (warm-up, stable, decay; arXiv 2405.18392) falls over its last steps only.

    Args:
        step: counted from 0.
        total_steps: of the whole run.
        optim: the section.
    """
    warmup = warmup_steps(optim, total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    peak_step = total_steps - 1 - decay_steps(optim, total_steps) if optim.schedule == "wsd" else max(warmup - 1, 0)
    progress = min(max(step - peak_step, 0) / max(total_steps - 1 - peak_step, 1), 1.0)
    left = FALLS[optim.decay_shape if optim.schedule == "wsd" else optim.schedule](progress)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * left)


FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""Share of the height that is left, by progress from 0 to 1."""
