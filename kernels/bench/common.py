"""What the benchmark scripts share: the card's own ceilings, timers, peak memory, and one CSV row per measurement.

Run scripts from the root of the repository with PYTHONPATH=.:kernels, as in `python kernels/bench/bench_glu.py`. Without a GPU they run
their smallest shapes, which shows that they work and nothing about speed; memory is not measured then.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from bench.checks import kinds_of_failure

HEADER = "op,case,impl,dtype,ms,limit_ms,ratio,extra_mib"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Limits:
    """What the card does at best: bf16 matmul in TFLOP/s, device copy in TB/s (bytes read and written)."""

    tflops: float
    tbs: float


@cache
def limits() -> Limits:
    """Measure an 8192 cubed bf16 matmul of random numbers and a copy of 2 GiB; on a CPU 256 cubed and 16 MiB."""
    side, size = (8192, 2**31) if DEVICE == "cuda" else (256, 2**24)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    matmul = bench(lambda: a @ b)
    source = torch.zeros(size, device=DEVICE, dtype=torch.int8)
    target = torch.empty_like(source)
    copy = bench(lambda: target.copy_(source))
    return Limits(tflops=2 * side**3 / matmul / 1e9, tbs=2 * size / copy / 1e9)


def bench(fn: Callable[[], object], *, grads: Sequence[Tensor] = (), rep: int = 200) -> float:
    """Median milliseconds of `fn` as Python calls it, L2 cleared before each call, `.grad` of `grads` dropped."""
    if DEVICE == "cpu":
        return _on_cpu(fn)
    from triton.testing import do_bench

    ms: float = do_bench(fn, warmup=50, rep=rep, grad_to_none=list(grads) or None, return_mode="median")
    return ms


def bench_graph(fn: Callable[[], object], *, rep: int = 60) -> float:
    """Median milliseconds of `fn` replayed from a CUDA graph: the kernels without Python's launches."""
    if DEVICE == "cpu":
        return _on_cpu(fn)
    from triton.testing import do_bench_cudagraph

    ms: float = do_bench_cudagraph(fn, rep=rep, return_mode="median")
    return ms


def _on_cpu(fn: Callable[[], object]) -> float:
    """Median milliseconds of three calls after one."""
    fn()
    times = []
    for _ in range(3):
        start = perf_counter()
        fn()
        times.append(1e3 * (perf_counter() - start))
    return median(times)


def extra_mib(fn: Callable[[], object]) -> float:
    """Peak memory of one call above what is allocated before it, in MiB; nan on a CPU."""
    fn()
    if DEVICE == "cpu":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def row(op: str, case: str, impl: str, dtype: torch.dtype, ms: float, limit_ms: float, mib: float) -> str:
    """One line under HEADER; ratio is time over the limit, 1 at best."""
    name = str(dtype).removeprefix("torch.")
    return f"{op},{case},{impl},{name},{ms:.4f},{limit_ms:.4f},{ms / limit_ms:.2f},{mib:.1f}"


def foreign(name: str, rows: Callable[[], Iterable[str]]) -> Iterator[str]:
    """Rows of an implementation that is not ours, or a line that says why it gave none."""
    try:
        yield from list(rows())
    except kinds_of_failure() as error:
        print(f"# {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def installed(name: str) -> Any:
    """A library to compare with or to draw with, which nothing here depends on; None with a line that says why not."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"# {name}: {error}", flush=True)
        return None
