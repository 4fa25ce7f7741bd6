"""Checks and figures of the experts with LoRA on one GPU, in about a minute: `python kernels/bench/gpu_k5.py`.

Prints PASS or FAIL for each check, then CSV rows, the steps' times, times of other blocks, and whether the goals are met. Exit code 1 if
a check fails or a goal is missed. The argument `short` leaves out the other blocks.
"""

from __future__ import annotations

import sys
from time import perf_counter

import torch

from bench import bench_moe, check_moe
from bench.checks import failures
from bench.common import HEADER, limits

GOAL = 1.25
"""Most time of ours over a whole layer without LoRA by grouped_mm, at the larger size."""
SECONDS = 50.0
"""After which no further block is tried."""
SOME_OF_FLOAT32 = ("moe float32: adapters", "moe float32: square, transposed", "moe twice float32")


def run_benchmarks(missed: list[str]) -> None:
    """Print every row; `missed` takes the goals that are missed."""
    print(f"{limits()}\n{HEADER}", flush=True)
    times: dict[str, float] = {}
    for line in bench_moe.rows(True):
        print(line, flush=True)
        _, case, rest = line.split(",", 2)
        name, _, ms, *_ = rest.rsplit(",", 5)
        if case.startswith(f"T{bench_moe.TOKENS[-1]} "):
            times[name] = float(ms)
    for peer, most in (("grouped_mm no adapter", GOAL), ("scatter", 1.0)):
        ratio = times["rayft"] / times[peer]
        print(f"rayft / {peer} = {ratio:.3f}, goal {most}", flush=True)
        if ratio > most:
            missed.append(f"rayft takes {ratio:.3f} times {peer}, goal {most}")


def sweep(until: float) -> None:
    """Other blocks as long as there is time."""
    for line in bench_moe.sweep():
        print(line, flush=True)
        if perf_counter() > until:
            return


def main() -> int:
    """Exit code of the script."""
    start = perf_counter()
    print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    found = check_moe.checks("cuda", (torch.bfloat16, torch.float32))
    failed = failures({name: check for name, check in found.items() if "float32" not in name or name in SOME_OF_FLOAT32})
    torch.cuda.empty_cache()
    missed: list[str] = []
    failed += failures({"figures": lambda: run_benchmarks(missed)})
    failed += failures({"parts": lambda: print(*bench_moe.parts(), sep="\n", flush=True)})
    if "short" not in sys.argv:
        failed += failures({"sweep": lambda: sweep(start + SECONDS)})
    print(f"{perf_counter() - start:.0f} s")
    print("FAILED" if failed or missed else "ALL PASSED", *failed, *missed, sep="\n", flush=True)
    return 1 if failed or missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
