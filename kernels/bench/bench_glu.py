"""Gated activations forward and backward: rayft, torch, and with the argument `compile` torch.compile, as CSV rows.

The limit counts three passes over the columns forward and five backward, at the card's copy speed. The argument `sweep` times other
blocks and warps instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.check_glu import written_out
from bench.common import HEADER, bench, bench_graph, extra_mib, limits, row
from rayft_kernels import glu, glu_packed

CASES = (("silu", 16384, 11008), ("gelu_tanh", 8192, 12288), ("gelu", 8192, 12288), ("silu", 8192, 3072))
DTYPE = torch.bfloat16


def step(fn: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    """Forward and backward of one implementation."""
    return lambda: torch.autograd.grad(fn(*leaves), leaves, grad)


def rows(compiled: bool) -> Iterator[str]:
    """One row for each case and implementation."""
    for activation, tokens, columns in CASES:
        gate, up, grad = (torch.randn(tokens, columns, device="cuda", dtype=DTYPE) for _ in range(3))
        leaves = [gate.requires_grad_(), up.requires_grad_()]
        limit = 8 * gate.numel() * gate.element_size() / limits().tbs / 1e9
        line = partial(row, f"glu_{activation}", f"T{tokens} I{columns}", dtype=DTYPE, limit_ms=limit)
        ours, eager = (
            step(partial(glu, activation=activation), leaves, grad),
            step(partial(written_out, activation=activation), leaves, grad),
        )
        yield line("rayft graph", ms=bench_graph(ours), mib=extra_mib(ours))
        yield line("rayft python", ms=bench(ours), mib=0.0)
        packed = [torch.cat((gate, up), -1).detach().requires_grad_()]
        yield line("rayft packed python", ms=bench(step(partial(glu_packed, activation=activation), packed, grad)), mib=0.0)
        yield line("torch python", ms=bench(eager), mib=extra_mib(eager))
        if compiled:
            fused = step(torch.compile(partial(written_out, activation=activation), dynamic=False), leaves, grad)
            yield line("torch.compile python", ms=bench(fused), mib=extra_mib(fused))


def sweep() -> Iterator[str]:
    """Milliseconds of the forward and backward bodies for several blocks."""
    from rayft_kernels.glu import triton as body

    gate, up, grad = (torch.randn(16384, 11008, device="cuda", dtype=DTYPE) for _ in range(3))
    for elements, warps in ((1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 8), (8192, 16)):
        block = body.Block(elements, warps)
        forward = bench(partial(body.forward, gate, up, "silu", block))
        backward = bench(partial(body.backward, grad, gate, up, "silu", block))
        yield f"{elements} elements {warps} warps: forward {forward:.4f}, backward {backward:.4f}, sum {forward + backward:.4f}"


if __name__ == "__main__":
    if "sweep" in sys.argv:
        print(*sweep(), sep="\n", flush=True)
    else:
        print(HEADER, *rows("compile" in sys.argv), sep="\n", flush=True)
