"""Checks and figures of norm + RoPE and of the gated activations on one GPU, in about a minute: `python kernels/bench/gpu_k1.py`.

Prints PASS or FAIL for each check, then CSV rows, then whether the goals are met. Exit code 1 if a check fails or a goal is missed.
The argument `sweep` adds the timings of other tiles and blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch

from bench import bench_glu, bench_norm_rope, check_glu, check_norm_rope
from bench.checks import failures
from bench.common import HEADER, limits

SOME_CASES = check_norm_rope.CASES[:8:2]
GOALS = {
    "norm_rope,D128 33.5M,rayft graph": 1.5,
    "norm_rope,D256 33.5M,rayft graph": 1.5,
    "norm_rope,D512 33.5M,rayft graph": 1.5,
    "glu_silu,T16384 I11008,rayft python": 1.0,
}
"""Largest ratio of time to limit by the beginning of a row."""


def run_checks() -> list[str]:
    """All checks in bfloat16, some in the other types, and those of more than 2^31 elements."""
    low = torch.bfloat16
    found = check_norm_rope.checks("cuda", (low,)) | check_glu.checks("cuda", (low, torch.float32))
    for dtype, cases in ((torch.float32, SOME_CASES), (torch.float16, SOME_CASES[:1])):
        for case in cases:
            found[f"norm_rope error {dtype} {case.name}"] = partial(check_norm_rope.check_error, case, dtype, "cuda")
    found["norm_rope above 2^31 elements"] = partial(check_norm_rope.check_large, "cuda")
    found["glu above 2^31 elements"] = partial(check_glu.check_large, "cuda")
    return failures(found)


def missed(line: str) -> list[str]:
    """The goals that a CSV row misses."""
    ratio = float(line.split(",")[6])
    return [f"{line}: ratio above {goal}" for start, goal in GOALS.items() if line.startswith(start) and ratio > goal]


def run_benchmark(rows: Iterator[str]) -> None:
    """Print every row as it comes.

    Raises:
        AssertionError: goals are missed.
    """
    found = []
    for line in rows:
        print(line, flush=True)
        found += missed(line)
    assert not found, "; ".join(found)


def main() -> int:
    """Exit code of the script."""
    print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    failed = run_checks()
    torch.cuda.empty_cache()
    print(f"{limits()}\n{HEADER}", flush=True)
    for module in (bench_norm_rope, bench_glu):
        failed += failures({f"figures of {module.__name__}": lambda module=module: run_benchmark(module.rows(False))})
        if "sweep" in sys.argv:
            failed += failures({f"sweep of {module.__name__}": lambda module=module: print(*module.sweep(), sep="\n", flush=True)})
    print("FAILED" if failed else "ALL PASSED", *failed, sep="\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
