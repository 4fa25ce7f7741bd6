"""LoRA MLP and QKV forward and backward: rayft, torch as peft writes it, and with the argument `peers` torch.compile, as CSV rows.

The limit is the large products alone (forward and the input's gradient, frozen weights) at the rate of an 8192 cubed product in the same
run. The argument `sweep` times other tiles of the activation's kernels instead, and `parts` the pieces of the MLP.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.check_lora import linears, linears_written_out, mlp, mlp_written_out
from bench.common import DEVICE, HEADER, bench, bench_graph, extra_mib, limits, row
from rayft_kernels import Projection
from rayft_kernels.lora import triton as body  # importable without Triton

DTYPE = torch.bfloat16
MLPS = ((8192, 4096, 11008, 16), (16384, 2048, 6144, 16), (8192, 4096, 14336, 64))
"""Tokens, hidden, intermediate, rank."""
INPUTS = ((8192, 4096, (4096, 4096, 4096), 16), (8192, 4096, (4096, 1024, 1024), 16), (16384, 2048, (2048, 1024, 1024), 16))
"""Tokens, hidden, outputs, rank."""
TINY_MLPS, TINY_INPUTS = ((16, 24, 40, 4),), ((16, 24, (24, 8, 8), 4),)


def drawn(shapes: Sequence[tuple[int, int]], rank: int) -> list[Projection]:
    """One adapted projection for each (out, in)."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=DTYPE) * 0.02

    return [
        Projection(draw(out, width), None, draw(rank, width).requires_grad_(), draw(out, rank).requires_grad_(), 2.0)
        for out, width in shapes
    ]


def step(fn: Callable[..., Sequence[Tensor]], x: Tensor, ones: Sequence[Projection]) -> Callable[[], object]:
    """Forward and backward of one implementation."""
    leaves = [x, *(tensor for one in ones for tensor in (one.a, one.b) if tensor is not None)]
    grads = [torch.randn_like(y) for y in fn(x, ones)]
    return lambda: torch.autograd.grad(list(fn(x, ones)), leaves, grads)


def lines(
    op: str, case: str, flops: int, x: Tensor, ones: Sequence[Projection], ours: Callable[..., Sequence[Tensor]],
    plain: Callable[..., Sequence[Tensor]], peers: bool,
) -> Iterator[str]:  # fmt: skip
    """A row for each implementation called from Python, and for each but compiled ones one replayed from a CUDA graph."""
    limit = flops / limits().tflops / 1e9
    ways: dict[str, Callable[..., Sequence[Tensor]]] = {"rayft": ours, "torch": plain}
    if peers:
        ways |= {"torch.compile": torch.compile(plain, dynamic=False), "rayft compiled": torch.compile(ours, dynamic=False)}
    for name, fn in ways.items():
        run = step(fn, x, ones)
        yield row(op, case, name, DTYPE, bench(run), limit, extra_mib(run))
        if name in ("rayft", "torch"):
            yield row(op, case, f"{name} graph", DTYPE, bench_graph(run), limit, 0.0)


def rows(peers: bool, tiny: bool = False) -> Iterator[str]:
    """Every case."""
    for index, (tokens, hidden, wide, rank) in enumerate(TINY_MLPS if tiny else MLPS):
        x = torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE, requires_grad=True)
        ones = drawn(((wide, hidden), (wide, hidden), (hidden, wide)), rank)
        case = f"T{tokens} H{hidden} I{wide} r{rank}"
        flops = 2 * 2 * 3 * tokens * hidden * wide
        yield from lines("lora_mlp", case, flops, x, ones, partial(mlp, "silu"), partial(mlp_written_out, "silu"), peers and index == 0)
        del x, ones
    for index, (tokens, hidden, outs, rank) in enumerate(TINY_INPUTS if tiny else INPUTS):
        x = torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE, requires_grad=True)
        ones = drawn([(out, hidden) for out in outs], rank)
        case = f"T{tokens} H{hidden} {'+'.join(map(str, outs))} r{rank}"
        flops = 2 * 2 * tokens * hidden * sum(outs)
        yield from lines("lora_qkv", case, flops, x, ones, linears, linears_written_out, peers and index == 0)
        del x, ones


def _mlp_tensors() -> tuple[Tensor, ...]:
    tokens, hidden, wide, rank = MLPS[0]
    activations = [(tokens, wide)] * 3
    sizes = [(tokens, hidden), *activations, (tokens, 2 * rank), (wide, rank), (rank, wide), (wide, hidden)]
    return tuple(torch.randn(size, device="cuda", dtype=DTYPE) * 0.1 for size in sizes)


def parts() -> Iterator[str]:
    """Milliseconds of the pieces of the first MLP, beside what their bytes or operations allow."""
    x, gate, up, dh, low, b, a, weight = _mlp_tensors()
    rank, unit = b.shape[1], gate.numel() * gate.element_size() / limits().tbs / 1e9
    product = 2 * x.shape[0] * weight.numel() / limits().tflops / 1e9
    folds = (low[:, :rank], b, 2.0, low[:, rank:], b, 2.0)
    down = (low[:, :rank], a.t())
    hidden_bytes = x.numel() * x.element_size() / limits().tbs / 1e9
    wide = weight.t().contiguous()
    out, dx = torch.empty_like(gate), torch.empty_like(x)
    pieces: dict[str, tuple[Callable[[], object], float]] = {
        "x W^T": (lambda: torch.mm(x, weight.t(), out=out), product),
        "out += x W^T": (lambda: out.addmm_(x, weight.t(), beta=0.5), product),
        "dx += de W": (lambda: dx.addmm_(gate, weight, beta=0.5), product),
        "h W_down^T": (lambda: torch.mm(gate, wide.t(), out=dx), product),
        "dy W_down": (lambda: torch.mm(x, wide, out=out), product),
        "x A^T": (lambda: x @ weight[: 2 * rank].t(), hidden_bytes),
        "h A^T": (lambda: gate @ a.t(), unit),
        "dy B": (lambda: x @ weight[:rank].t(), hidden_bytes),
        "low B^T": (lambda: torch.mm(low[:, :rank], b.t(), out=out), unit),
        "de B": (lambda: gate @ b, unit),
        "t A": (lambda: low @ weight[: 2 * rank], hidden_bytes),
        "t^T x": (lambda: torch.mm(low.t(), x, out_dtype=torch.float32), hidden_bytes),
        "dy^T low": (lambda: torch.mm(x.t(), low[:, :rank], out_dtype=torch.float32), hidden_bytes),
        "activation forward": (lambda: body.glu_forward_kernel(gate, up, *folds, "silu"), 3 * unit),
        "activation backward": (lambda: body.glu_backward_kernel(dh, gate, up, *folds, *down, "silu"), 5 * unit),
    }
    for name, (fn, limit) in pieces.items():
        ms = bench(fn, rep=60)
        yield f"part {name}: {ms:.4f} ms, limit {limit:.4f}, ratio {ms / limit:.2f}"


def sweep() -> Iterator[str]:
    """Milliseconds of the activation's kernels for several tiles."""
    _, gate, up, dh, low, b, a, _ = _mlp_tensors()
    rank = b.shape[1]
    folds = (low[:, :rank], b, 2.0, low[:, rank:], b, 2.0)
    kept = body.FORWARD_TILE, body.BACKWARD_TILE, body.SHARE_TOKENS
    for tile in ((32, 64, 4), (32, 128, 4), (32, 128, 8), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 8), (16, 256, 4)):
        body.FORWARD_TILE = tile
        yield f"forward {tile}: {bench(lambda: body.glu_forward_kernel(gate, up, *folds, 'silu'), rep=40):.4f}"
    for tile in ((16, 64, 2), (16, 64, 4), (32, 64, 2), (32, 64, 4), (32, 128, 4), (32, 128, 8), (64, 64, 4), (64, 64, 8), (64, 128, 8)):
        for share in (512, 1024, 2048):
            body.BACKWARD_TILE, body.SHARE_TOKENS = tile, share
            ms = bench(lambda: body.glu_backward_kernel(dh, gate, up, *folds, low[:, :rank], a.t(), "silu"), rep=40)
            yield f"backward {tile} share {share}: {ms:.4f}"
    body.FORWARD_TILE, body.BACKWARD_TILE, body.SHARE_TOKENS = kept


if __name__ == "__main__":
    if "sweep" in sys.argv or "parts" in sys.argv:
        print(*(sweep() if "sweep" in sys.argv else parts()), sep="\n", flush=True)
    else:
        print(HEADER, *rows("peers" in sys.argv, DEVICE == "cpu"), sep="\n", flush=True)
