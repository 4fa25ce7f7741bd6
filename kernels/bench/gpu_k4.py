"""Checks and figures of packed attention on one GPU, in a few minutes: `python kernels/bench/gpu_k4.py`.

Prints PASS or FAIL for each check, CSV rows beside SDPA and compiled flex, the time of each kernel, times of other blocks and tiles with
the best of them, and whether the goals are met. Exit code 1 if a check fails or a goal is missed. Arguments choose among `checks`,
`sweep` and `figures`.
"""

from __future__ import annotations

import sys
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

from bench import bench_attention, check_attention, sweep_attention
from bench.bench_attention import CASES
from bench.check_attention import Case
from bench.checks import failures
from bench.common import HEADER, limits

GROUPS = (
    (torch.bfloat16, 512), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.bfloat16, 64), (torch.float32, 512), (torch.float32, 128),
    (torch.float16, 512), (torch.bfloat16, 320), (torch.bfloat16, 80),
)  # fmt: skip
GOAL_512 = 9.5
"""Milliseconds forward and backward of the first case: a fifth of what tuned flex takes."""


def check_group(group: tuple[torch.dtype, int]) -> list[str]:
    """Names of the failed checks of one type and head_dim; compiled kernels stay in Triton's cache."""
    dtype, dim = group
    found = check_attention.checks("cuda", (dtype,), (dim,), long=dtype == torch.bfloat16)
    failed = failures({name: check for name, check in found.items() if dim == 512 or "error" in name or "twice" in name})
    torch.cuda.empty_cache()
    return failed


def run_benchmarks(missed: list[str]) -> None:
    """Print every row; `missed` takes the goals that are."""
    print(f"{limits()}\n{HEADER}", flush=True)
    took: dict[str, float] = {}

    def run_case(case: Case) -> None:
        for line in bench_attention.case_rows(case, True):
            print(line, flush=True)
            op, label, impl, _, ms, *_ = line.split(",")
            took[f"{op},{label},{impl}"] = float(ms)

    missed += failures({f"figures {case.name}": partial(run_case, case) for case in CASES})
    both = {name: ms for name, ms in took.items() if " both," in name}
    wide = next((ms for name, ms in both.items() if name.startswith("attention_d512")), float("inf"))
    missed += [f"D512: {wide} ms, goal {GOAL_512}"] if wide > GOAL_512 else []
    for name, ms in both.items():
        flex = both.get(name.replace(",rayft", ",flex"))
        if name.endswith(",rayft") and flex is not None and ms > flex:
            missed.append(f"{name}: {ms} ms, flex {flex}")


def run(pool: Executor, chosen: list[str]) -> list[str]:
    """Names of what failed."""
    failed: list[str] = []
    if "checks" in chosen:
        failed += [name for names in pool.map(check_group, GROUPS) for name in names]
        failed += failures({"attention beyond 2^31": lambda: check_attention.check_large("cuda")})
        torch.cuda.empty_cache()
        failed += failures({"parts": lambda: print(*bench_attention.parts(), sep="\n", flush=True)})
    if "sweep" in chosen:
        failed += failures({"sweep": lambda: [print(line, flush=True) for line in sweep_attention.sweep(pool)]})
        torch.cuda.empty_cache()
    if "figures" in chosen:
        run_benchmarks(failed)
    return failed


def main() -> int:
    """Exit code of the script."""
    print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    with ProcessPoolExecutor(9, get_context("spawn")) as pool:
        failed = run(pool, sys.argv[1:] or ["checks", "sweep", "figures"])
    print("FAILED" if failed else "ALL PASSED", *failed, sep="\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
