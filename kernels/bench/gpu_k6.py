"""Checks and figures of 4-bit weights on one GPU, in less than a minute: `python kernels/bench/gpu_k6.py`.

Prints PASS or FAIL for each check, CSV rows, timings of other tiles, and whether the goals are met. Exit code 1 if a check fails or a
goal is missed.
"""

from __future__ import annotations

import torch

from bench import bench_nf4, check_nf4
from bench.checks import failures
from bench.common import HEADER, limits

GOALS = {"nf4,8B gate+up+down,rayft,": 1.3, "nf4,70B gate+up+down,rayft,": 1.3}
"""Largest ratio of time to limit by the beginning of a row."""


def missed(line: str) -> list[str]:
    """The goals that a CSV row misses."""
    ratio = float(line.split(",")[6])
    return [f"{line}: ratio above {goal}" for start, goal in GOALS.items() if line.startswith(start) and ratio > goal]


def run_benchmarks(found: list[str]) -> None:
    """Print every row; `found` takes the goals that are missed."""
    print(f"{limits()}\n{HEADER}", flush=True)
    for line in bench_nf4.rows():
        print(line, flush=True)
        found += missed(line)


def run_sweep() -> None:
    """Print the timings of other tiles."""
    for line in bench_nf4.sweep():
        print(line, flush=True)


def main() -> int:
    """Exit code of the script."""
    print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    failed = failures(check_nf4.checks("cuda"))
    torch.cuda.empty_cache()
    goals: list[str] = []
    failed += failures({"figures": lambda: run_benchmarks(goals)})
    torch.cuda.empty_cache()
    failed += failures({"sweep": run_sweep})
    print("FAILED" if failed or goals else "ALL PASSED", *failed, *goals, sep="\n", flush=True)
    return 1 if failed or goals else 0


if __name__ == "__main__":
    raise SystemExit(main())
