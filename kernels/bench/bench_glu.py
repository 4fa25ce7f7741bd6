"""Gated activations forward and backward: rayft, torch, and with the argument `peers` torch.compile and Liger, as CSV rows.

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
from bench.common import DEVICE, HEADER, bench, bench_graph, extra_mib, foreign, installed, limits, row
from rayft_kernels import glu, glu_packed

CASES = (("silu", 16384, 11008), ("gelu_tanh", 8192, 12288), ("gelu", 8192, 12288), ("silu", 8192, 3072))
TINY = (("silu", 16, 96), ("gelu_tanh", 8, 64))
DTYPE = torch.bfloat16
LIGER = {"silu": "LigerSiLUMulFunction", "gelu_tanh": "LigerGELUMulFunction"}
"""Its GELU is the tanh form."""


def step(fn: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    """Forward and backward of one implementation."""
    return lambda: torch.autograd.grad(fn(*leaves), leaves, grad)


def rows(peers: bool, tiny: bool = False) -> Iterator[str]:
    """One row for each case and implementation."""
    for activation, tokens, columns in TINY if tiny else CASES:
        gate, up, grad = (torch.randn(tokens, columns, device=DEVICE, dtype=DTYPE) for _ in range(3))
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
        if peers:
            for name, fn in peer_functions(activation).items():
                call = step(fn, leaves, grad)
                yield from foreign(name, partial(one_row, line, name, call))


def one_row(line: Callable[..., str], name: str, call: Callable[[], object]) -> list[str]:
    """The row of a peer."""
    return [line(f"{name} python", ms=bench(call), mib=extra_mib(call))]


def peer_functions(activation: str) -> dict[str, Callable[..., Tensor]]:
    """What users would call instead, as far as it is installed."""
    found: dict[str, Callable[..., Tensor]] = {"torch.compile": torch.compile(partial(written_out, activation=activation), dynamic=False)}
    if DEVICE == "cuda" and activation in LIGER and (liger := installed("liger_kernel.ops")):
        found["liger"] = lambda g, u: getattr(liger, LIGER[activation]).apply(g, u)
    return found


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
        print(HEADER, *rows("peers" in sys.argv, DEVICE == "cpu"), sep="\n", flush=True)
