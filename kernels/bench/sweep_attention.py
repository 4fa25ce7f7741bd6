"""Times of packed attention's blocks and tiles: each kernel's options beside the others' defaults, then the best of each together.

Prints the tables to put into rayft_kernels/attention. Every option is compiled beforehand by a pool of processes, into Triton's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
import triton

from bench.bench_attention import DOCUMENTS, DTYPE
from bench.check_attention import Case
from bench.common import bench
from rayft_kernels.attention import triton as flash
from rayft_kernels.attention import wide
from rayft_kernels.attention.triton import Block, Blocks
from rayft_kernels.attention.wide import Backward, Forward, Product

Config = Blocks | Forward | Backward

CASES = {512: Case((8192,), 512, 8, 2), 128: Case(DOCUMENTS, 128, 16, 8), 256: Case(DOCUMENTS, 256, 8, 4), 64: Case(DOCUMENTS, 64, 16, 8)}
PRODUCTS = ((64, 256, 8, 3), (64, 256, 8, 4), (128, 256, 8, 2), (32, 256, 8, 4), (64, 128, 4, 3), (64, 128, 8, 3), (64, 128, 8, 4))
SCORES = ((128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 128, 8, 2), (128, 128, 64, 4, 3), (128, 128, 32, 8, 5))
WIDER = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4))
SMALLER = ((128, 64, 64, 4, 3), (128, 64, 64, 4, 4), (128, 64, 64, 8, 4))
FLASH: dict[int, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    64: {
        "forward": ((128, 64, 4, 3), (128, 128, 8, 3), (128, 128, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
        "queries": ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3)),
        "keys": ((64, 128, 8, 3), (128, 128, 8, 2), (64, 128, 4, 3), (32, 128, 4, 3), (64, 64, 4, 3)),
    },
    128: {
        "forward": ((128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3)),
        "queries": ((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 8, 2)),
        "keys": ((64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 3), (32, 64, 4, 3)),
    },
    256: {
        "forward": ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3)),
        "queries": ((64, 64, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 3), (128, 64, 8, 2)),
        "keys": ((64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 4, 2), (64, 64, 8, 1), (64, 64, 4, 2)),
    },
}


def options() -> list[tuple[int, str, Config]]:
    """(head_dim, kernel, configuration): the options of each kernel beside the defaults of the others."""
    found: list[tuple[int, str, Config]] = []
    ahead, back = wide.HALF
    for rows, keys, step, warps, stages in (*SCORES, *WIDER):
        found.append((512, "scores", replace(ahead, rows=rows, keys=keys, scores=Product(step, 0, warps, stages))))
    for rows, keys, step, warps, stages in (*SCORES, *SMALLER):
        steps = {name: replace(getattr(back, name), step=min(step, 64)) for name in ("queries", "values")}
        found.append((512, "gradients", replace(back, rows=rows, keys=keys, gradients=Product(step, 0, warps, stages), **steps)))
    for product in PRODUCTS:
        found.append((512, "out", replace(ahead, out=Product(*product))))
        found.append((512, "queries", replace(back, queries=Product(*product))))
        found.append((512, "values", replace(back, values=Product(*product))))
    for dim in (256, 128):  # whether such heads should go through a workspace too
        found += [(dim, "out", ahead), (dim, "values", back)]
    for dim, kernels in FLASH.items():
        for kernel, blocks in kernels.items():
            found += [(dim, kernel, replace(flash.HALF[dim], **{kernel: Block(*block)})) for block in blocks]
    return found


def call(dim: int, kernel: str, config: Config, case: Case) -> Any:
    """A function that runs the pass of this kernel."""
    q, grad = (torch.randn(case.tokens, case.heads, dim, device="cuda", dtype=DTYPE) for _ in range(2))
    k, v = (torch.randn(case.tokens, case.kv_heads, dim, device="cuda", dtype=DTYPE) for _ in range(2))
    numbers = (*case.bounds("cuda"), dim**-0.5, None, None, max(case.lengths))
    lse = torch.zeros(case.heads, case.tokens, device="cuda")
    if isinstance(config, Forward):
        return lambda: wide.forward(q, k, v, *numbers, config)
    if isinstance(config, Backward):
        return lambda: wide.backward(grad, lse, q, k, v, lse, *numbers, config)
    if kernel == "forward":
        return lambda: flash.forward(q, k, v, *numbers, config)
    return lambda: flash.backward(grad, None, q, k, v, q, lse, *numbers, config)


def compile_one(option: tuple[int, str, Config]) -> None:
    """Run an option on a few tokens; what does not fit is found again when it is timed."""
    dim, kernel, config = option
    try:
        call(dim, kernel, config, replace(CASES[dim], lengths=(256, 256)))()
        torch.cuda.synchronize()
    except (triton.TritonError, RuntimeError):
        return


def shown(config: Config, kernel: str) -> str:
    """What an option differs by."""
    tile = "" if isinstance(config, Blocks) else f"{config.rows}x{config.keys} "
    return f"{tile}{getattr(config, kernel)}"


def sweep(pool: Executor, seconds: float = 90.0) -> Iterator[str]:
    """A line for each option, then the best together."""
    tried = options()
    list(pool.map(compile_one, tried))
    begin = perf_counter()
    best: dict[tuple[int, str], tuple[float, Config]] = {}
    for dim, kernel, config in tried:
        if perf_counter() - begin > seconds:
            yield "# out of time"
            break
        try:
            ms = bench(call(dim, kernel, config, CASES[dim]), rep=30)
        except (triton.TritonError, RuntimeError) as error:
            yield f"D{dim} {kernel} {shown(config, kernel)}: {type(error).__name__} {str(error)[:80]}"
            continue
        yield f"D{dim} {kernel} {shown(config, kernel)}: {ms:.3f} ms"
        if (dim, kernel) not in best or ms < best[dim, kernel][0]:
            best[dim, kernel] = ms, config
    yield from together(best)


def together(best: dict[tuple[int, str], tuple[float, Config]]) -> Iterator[str]:
    """The best option of every kernel in one configuration, timed."""
    passes = {(512, "out"): ("scores", "out"), (512, "values"): ("gradients", "queries", "values")}
    for dim in FLASH:
        passes |= {(dim, "forward"): ("forward",), (dim, "keys"): ("queries", "keys")}
    for (dim, last), kernels in passes.items():
        if any((dim, kernel) not in best for kernel in kernels):
            continue
        first: Any = best[dim, kernels[0]][1]
        config = replace(first, **{kernel: getattr(best[dim, kernel][1], kernel) for kernel in kernels})
        yield f"BEST D{dim} {last}: {bench(call(dim, last, config, CASES[dim]), rep=60):.3f} ms {config}"
