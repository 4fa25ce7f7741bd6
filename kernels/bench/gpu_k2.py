"""Checks and figures of the head operations on one GPU, in a minute and a half.

    PYTHONPATH=.:kernels python kernels/bench/gpu_k2.py

Prints PASS or FAIL for each check, then CSV rows, then whether the goals are met. Exit code 1 if a check fails or a goal is missed.
The argument `peers` adds what else is installed, `parts` the rates of the pieces.
"""

from __future__ import annotations

import sys

import torch

from bench import bench_linear_ce, check_linear_ce
from bench.checks import failures
from bench.common import HEADER, limits

GOALS = {"rayft": (1.15, 614.4), "rayft lean": (1.5, 358.4), "rayft frozen": (1.15, 614.4), "rayft logprobs": (1.25, None)}
"""Largest ratio of time to limit and MiB above inputs and gradients (and, where it is not lean, the head's float32 gradient)."""


def missed(line: str) -> list[str]:
    """The goals that a CSV row misses."""
    _, case, impl, _, _, _, ratio, mib = line.split(",")
    if impl not in GOALS:
        return []
    most, memory = GOALS[impl]
    _, width, vocab = (int(size[1:]) for size in case.split())
    own = 4 * width * vocab / 2**20 if impl == "rayft" else 0.0
    found = [f"{case} {impl}: ratio {ratio}, goal {most}"] if float(ratio) > most else []
    return found + ([f"{case} {impl}: {mib} MiB, goal {memory + own:.0f}"] if memory is not None and float(mib) > memory + own else [])


def run_benchmarks() -> list[str]:
    """Print every row; the goals that are missed."""
    print(f"{limits()}\n{HEADER}", flush=True)
    found = []
    for line in bench_linear_ce.rows("peers" in sys.argv):
        print(line, flush=True)
        found += missed(line)
    return found


def main() -> int:
    """Exit code of the script."""
    print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    failed = failures(check_linear_ce.gpu_checks())
    torch.cuda.empty_cache()
    failed += failures({"figures": lambda: failed.extend(run_benchmarks())})
    if "parts" in sys.argv:
        failed += failures({"parts": lambda: [print(line, flush=True) for line in bench_linear_ce.parts()]})
    print("FAILED" if failed else "ALL PASSED", *failed, sep="\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
