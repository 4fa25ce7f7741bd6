"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from fractions import Fraction

from rayft.config.schema import Optim


def rows_of_epochs(num_rows: int, epochs: float) -> int:
    """Rows that `epochs` passes over `num_rows` rows take, rounded up; epochs as written: 1.1 times 100 rows is 110."""
    return math.ceil(Fraction(str(epochs)) * num_rows)


def warmup_steps(optim: Optim, total_steps: int) -> int:
    """Steps of warm-up: `optim.warmup` itself when it is an integer, else that fraction of all steps, rounded; at most all."""
    steps = optim.warmup if isinstance(optim.warmup, int) else round(optim.warmup * total_steps)
    return min(steps, total_steps)


def lr_at(step: int, total_steps: int, optim: Optim) -> float:
    """Learning rate of a step.

    It rises linearly over the warm-up, from lr / warmup at step 0 to lr at the last step of it, then falls as the schedule says
    and reaches min_lr_ratio * lr at the last step.

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
    peak_step = max(warmup - 1, 0)
    progress = min((step - peak_step) / max(total_steps - 1 - peak_step, 1), 1.0)
    left = (1 + math.cos(math.pi * progress)) / 2 if optim.schedule == "cosine" else 1 - progress
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * left)
