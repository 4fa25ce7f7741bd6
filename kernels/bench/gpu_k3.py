"""Checks and figures of fused LoRA on one GPU, in about a minute: `python kernels/bench/gpu_k3.py`.

Prints PASS or FAIL for each check, then CSV rows, the pieces of the MLP, and whether the goals are met. Exit code 1 if a check fails or a
goal is missed. The argument `sweep` adds the timings of other tiles.
"""

from __future__ import annotations

import sys

import torch

from bench import bench_lora, check_lora
from bench.checks import failures
from bench.common import HEADER, limits

GOALS = {"lora_mlp,T8192 H4096 I11008 r16,rayft,": 1.18, "lora_qkv,T8192 H4096 4096+4096+4096 r16,rayft,": 1.18}
"""Largest ratio of time to limit by the beginning of a row."""
SOME_OF_FLOAT32 = ("lora kernels silu", "lora linears", "lora mlp silu", "lora dropout")


def missed(line: str) -> list[str]:
    """The goals that a CSV row misses."""
    ratio = float(line.split(",")[6])
    return [f"{line}: ratio above {goal}" for start, goal in GOALS.items() if line.startswith(start) and ratio > goal]


def run_benchmarks(found: list[str]) -> None:
    """Print every row, then every piece; `found` takes the goals that are missed."""
    print(f"{limits()}\n{HEADER}", flush=True)
    for line in bench_lora.rows(True):
        print(line, flush=True)
        found += missed(line)
    for line in bench_lora.parts():
        print(line, flush=True)


def main() -> int:
    """Exit code of the script."""
    print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    found = check_lora.checks("cuda", (torch.bfloat16, torch.float32))
    failed = failures({name: check for name, check in found.items() if "float32" not in name or name.startswith(SOME_OF_FLOAT32)})
    torch.cuda.empty_cache()
    goals: list[str] = []
    failed += failures({"figures": lambda: run_benchmarks(goals)})
    if "sweep" in sys.argv:
        failed += failures({"sweep": lambda: print(*bench_lora.sweep(), sep="\n", flush=True)})
    print("FAILED" if failed or goals else "ALL PASSED", *failed, *goals, sep="\n", flush=True)
    return 1 if failed or goals else 0


if __name__ == "__main__":
    raise SystemExit(main())
