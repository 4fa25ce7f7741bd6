"""Packed attention forward and backward: rayft, and with the argument `peers` SDPA and compiled flex, as CSV rows.

The limit counts the products of the scores that causal documents and windows leave, two forward and five backward, at the card's matmul
speed. The argument `parts` times each kernel instead; sweep_attention.py times their blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.check_attention import Case
from bench.common import DEVICE, HEADER, bench, extra_mib, limits, row
from rayft_kernels.attention.op import document_bounds

DTYPE = torch.bfloat16
DOCUMENTS = (4096, 2048, 1792, 1024, 1024, 768, 768, *(640,) * 6, 512, 512)
CASES = (
    Case((8192,), 512, 8, 2),
    Case(DOCUMENTS, 512, 8, 2),
    Case(DOCUMENTS, 128, 16, 8),
    Case((4096,) * 4, 128, 16, 8),
    Case(DOCUMENTS, 64, 16, 8),
    Case(DOCUMENTS, 256, 8, 4),
    Case((8192,), 256, 8, 4, window=1024),
)
FLEX = (CASES[0], CASES[2], CASES[5])
TINY = (Case((5, 27), 64, 2, 1, window=8), Case((40,), 512, 2, 1))


def inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """Leaves q, k, v [T, heads, D] and a gradient."""
    shapes = [(case.tokens, heads, case.dim) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    leaves = [torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for shape in shapes]
    return leaves, torch.randn(shapes[0], device=DEVICE, dtype=DTYPE)


def limit_ms(case: Case, products: int) -> float:
    """Time of so many products of queries and keys."""
    seen = sum(sum(min(i + 1, case.window or n) for i in range(n)) for n in case.lengths)
    return products * 2 * case.heads * case.dim * seen / limits().tflops / 1e9


def by_document(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    """SDPA of each document."""
    parts = zip(*(x.transpose(0, 1)[None].split(case.lengths, 2) for x in (q, k, v)), strict=True)
    outs = [scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True) for a, b, c in parts]
    return torch.cat(outs, 2)[0].transpose(0, 1)


def flex(case: Case) -> Callable[..., Tensor]:
    """Compiled flex_attention with its mask made, its blocks the largest that fit."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    starts, _ = case.bounds(DEVICE)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = (j <= i) & (j >= starts[i])
        return inside if case.window is None else inside & (i - j < case.window)

    mask = create_block_mask(seen, None, None, case.tokens, case.tokens, device=DEVICE)
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    options = dict.fromkeys(names, 32) | {"num_stages": 1} if case.dim > 256 else None
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Any = compiled(*heads_first, block_mask=mask, enable_gqa=True, kernel_options=options)
        return out[0].transpose(0, 1)

    return call


def ahead(fn: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> object:
    """Forward."""
    with torch.no_grad():
        return fn(*leaves)


def both(fn: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> object:
    """Forward and backward."""
    return torch.autograd.grad(fn(*leaves), leaves, grad)


def case_rows(case: Case, peers: bool) -> Iterator[str]:
    """Forward, and forward and backward, of each implementation; flex where its figure decides something."""
    tensors = inputs(case)
    op = case.ours(DEVICE)
    impls: dict[str, Callable[..., Tensor]] = {"rayft": lambda *qkv: op(*qkv)[0]}
    if peers and case.window is None:
        impls["sdpa by document"] = partial(by_document, case=case)
    if peers and case in FLEX:
        impls["flex"] = flex(case)
    for name, fn in impls.items():
        label = f"T{case.tokens} {case.heads}/{case.kv_heads} docs{len(case.lengths)} w{case.window}"
        for kind, products in ((ahead, 2), (both, 7)):
            step, limit = partial(kind, fn, *tensors), limit_ms(case, products)
            what = f"{label} {kind.__name__}"
            yield row(f"attention_d{case.dim}", what, name, DTYPE, ms=bench(step, rep=60), limit_ms=limit, mib=extra_mib(step))


def rows(peers: bool, tiny: bool = False) -> Iterator[str]:
    """`case_rows` of every case."""
    for case in TINY if tiny else CASES:
        yield from case_rows(case, peers)


def parts() -> Iterator[str]:
    """Milliseconds and launches of each kernel in one forward and backward of the first three cases, and of what comes once per batch."""
    for case in CASES[:3]:
        leaves, grad = inputs(case)
        fn = case.ours(DEVICE)
        torch.autograd.grad(fn(*leaves)[0], leaves, grad)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            torch.autograd.grad(fn(*leaves)[0], leaves, grad)
        events = profile.key_averages()
        found = ", ".join(f"{e.key} {e.device_time_total / 1e3:.3f} ms / {e.count}" for e in events if e.key.startswith("_"))
        yield f"D{case.dim} T{case.tokens} docs{len(case.lengths)}: {found}"
    cu_seqlens = torch.tensor([0, *accumulate(DOCUMENTS)], dtype=torch.int32, device=DEVICE)
    yield f"document_bounds, once per batch: {bench(lambda: document_bounds(cu_seqlens, sum(DOCUMENTS))):.4f} ms"


if __name__ == "__main__":
    if "parts" in sys.argv:
        print(*parts(), sep="\n", flush=True)
    else:
        print(HEADER, *rows("peers" in sys.argv, DEVICE == "cpu"), sep="\n", flush=True)
