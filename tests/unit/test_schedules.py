"""Learning rates at the corners of the schedule, and everywhere against PyTorch's own schedulers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayft.config.schema import Optim
from rayft.optim.schedules import lr_at, warmup_steps

SCHEDULES = st.sampled_from(["cosine", "linear", "constant", "wsd"])


def optim(**fields: Any) -> Optim:
    return Optim(**({"lr": 2e-3} | fields))


@pytest.mark.parametrize(
    ("warmup", "total", "steps"), [(0.03, 100, 3), (0.07, 100, 7), (0.03, 10, 0), (5, 100, 5), (1, 100, 1), (50, 10, 10), (0, 10, 0)]
)
def test_warm_up_counts_steps_or_a_fraction_of_them(warmup: float, total: int, steps: int) -> None:
    assert warmup_steps(optim(warmup=warmup), total) == steps


def test_written_out() -> None:
    linear = optim(schedule="linear", warmup=4, min_lr_ratio=0.5)
    assert [lr_at(step, 8, linear) / 2e-3 for step in range(8)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.875, 0.75, 0.625, 0.5])
    cosine = optim(schedule="cosine", warmup=0)
    assert [lr_at(step, 5, cosine) / 2e-3 for step in range(5)] == pytest.approx(
        [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]
    )


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
@pytest.mark.parametrize(("decay", "steps"), [(4, 4), (0.4, 4), (9, 8)])
def test_wsd_holds_and_then_falls(shape: str, decay: float, steps: int) -> None:
    section = optim(schedule="wsd", warmup=2, decay=decay, decay_shape=shape, min_lr_ratio=0.25)
    rates = [lr_at(step, 10, section) / 2e-3 for step in range(10)]
    assert rates[: 10 - steps] == pytest.approx([0.5] + [1.0] * (9 - steps))
    progress = [(k + 1) / steps for k in range(steps)]
    fall = {"linear": lambda p: 1 - p, "cosine": lambda p: 0.5 + math.cos(math.pi * p) / 2, "sqrt": lambda p: 1 - p**0.5}[shape]
    assert rates[10 - steps :] == pytest.approx([0.25 + 0.75 * fall(p) for p in progress])


@given(SCHEDULES, st.integers(0, 30), st.integers(1, 60), st.floats(0, 1))
def test_every_schedule_starts_peaks_and_ends_as_documented(schedule: str, warmup: int, total: int, ratio: float) -> None:
    section = optim(schedule=schedule, warmup=warmup, min_lr_ratio=ratio)
    rates = [lr_at(step, total, section) for step in range(total)]
    rising = warmup_steps(section, total)
    peak = max(rising - 1, 0)
    assert rates[0] > 0 or total == 1
    assert rates[peak] == pytest.approx(section.lr)
    assert all(a < b for a, b in itertools.pairwise(rates[: peak + 1]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[peak:]))
    if total - 1 > peak:
        assert rates[-1] == pytest.approx(section.lr if schedule == "constant" else ratio * section.lr, abs=1e-15)
        assert lr_at(total + 5, total, section) == pytest.approx(rates[-1], abs=1e-15)


def test_the_fall_equals_torch_s_cosine() -> None:
    section = optim(schedule="cosine", warmup=0, min_lr_ratio=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=section.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=19, eta_min=0.1 * section.lr)
    for step in range(20):
        assert lr_at(step, 20, section) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
