"""What the benchmark scripts share: the card's own ceilings, timers, peak memory, and one CSV row per measurement.

Run scripts from the root of the repository with PYTHONPATH=.:kernels, as in `python kernels/bench/bench_glu.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

HEADER = "op,case,impl,dtype,ms,limit_ms,ratio,extra_mib"


@dataclass(frozen=True)
class Limits:
    """What the card does at best: bf16 matmul in TFLOP/s, device copy in TB/s (bytes read and written)."""

    tflops: float
    tbs: float


@cache
def limits() -> Limits:
    """Measure an 8192 cubed bf16 matmul of random numbers and a copy of 2 GiB."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = bench(lambda: a @ b)
    source = torch.empty(2**31, device="cuda", dtype=torch.int8)
    target = torch.empty_like(source)
    copy = bench(lambda: target.copy_(source))
    return Limits(tflops=2 * 8192**3 / matmul / 1e9, tbs=2 * 2**31 / copy / 1e9)


def bench(fn: Callable[[], object], *, grads: Sequence[Tensor] = (), rep: int = 200) -> float:
    """Median milliseconds of `fn` as Python calls it, L2 cleared before each call, `.grad` of `grads` dropped."""
    ms: float = do_bench(fn, warmup=50, rep=rep, grad_to_none=list(grads) or None, return_mode="median")
    return ms


def bench_graph(fn: Callable[[], object], *, rep: int = 60) -> float:
    """Median milliseconds of `fn` replayed from a CUDA graph: the kernels without Python's launches."""
    ms: float = do_bench_cudagraph(fn, rep=rep, return_mode="median")
    return ms


def extra_mib(fn: Callable[[], object]) -> float:
    """Peak memory of one call above what is allocated before it, in MiB."""
    fn()
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


def installed(name: str) -> Any:
    """A library to compare with or to draw with, which nothing here depends on; None with a line that says why not."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"# {name}: {error}", flush=True)
        return None
