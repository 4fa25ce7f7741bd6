"""Experts with LoRA, forward and backward with a frozen base: rayft and what others do, as CSV rows.

The limit is the four base products alone (forward and the input's gradient) by torch's grouped_mm in the same run, on rows gathered
before. Peers: `grouped_mm no adapter` is a whole layer without LoRA as transformers runs it; `separate` adds LoRA by small grouped
products; `peft` builds W + s B A first; `scatter` follows the published ScatterMoE LoRA designs: every linear layer is one Triton scatter
GEMM and LoRA is two more. The argument `parts` times the steps, `sweep` other blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.common import DEVICE, HEADER, bench, extra_mib, foreign, row
from rayft_kernels.moe_lora import steps
from rayft_kernels.moe_lora.op import ExpertAdapter, moe_lora
from rayft_kernels.moe_lora.routing import Route, route

DTYPE = torch.bfloat16
EXPERTS, HIDDEN, INTER, TOP_K, RANK = 128, 2048, 768, 8, 16
TOKENS = (8192, 32768)
TINY = {"experts": 4, "hidden": 32, "inter": 16, "rank": 16, "top_k": 2}


class Layer(NamedTuple):
    """Inputs of one measurement."""

    x: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    up: ExpertAdapter
    low: ExpertAdapter


def layer(tokens: int, experts: int = EXPERTS, hidden: int = HIDDEN, inter: int = INTER, rank: int = RANK, top_k: int = TOP_K) -> Layer:
    """Random tensors; the router's scores are random too, so the experts' shares differ by chance only."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=DTYPE) * 0.02

    weights, index = torch.randn(tokens, experts, device=DEVICE).softmax(1).topk(top_k, 1)
    return Layer(
        torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE).requires_grad_(),
        index,
        (weights / weights.sum(1, keepdim=True)).to(DTYPE).requires_grad_(),
        draw(experts, 2 * inter, hidden),
        draw(experts, hidden, inter),
        ExpertAdapter(draw(experts * rank, hidden).requires_grad_(), draw(2 * inter, rank * experts).requires_grad_(), 2.0),
        ExpertAdapter(draw(experts * rank, inter).requires_grad_(), draw(hidden, rank * experts).requires_grad_(), 2.0),
    )


def ours(one: Layer) -> Tensor:
    """`moe_lora`."""
    return moe_lora(*one[:5], gate_up_adapter=one.up, down_adapter=one.low)


def ours_without(one: Layer) -> Tensor:
    """`moe_lora` without adapters."""
    return moe_lora(*one[:5])


Linear = Callable[[Tensor, Tensor, ExpertAdapter, Tensor], Tensor]


def grouped(linear: Linear, one: Layer) -> Tensor:
    """A layer around grouped linear layers: sort, gather, activation, weights and the sum over choices as separate operations."""
    tokens, top_k = one.index.shape
    chosen, order = torch.sort(one.index.reshape(-1))
    ends = torch.searchsorted(chosen, torch.arange(one.gate_up.shape[0], device=DEVICE), right=True).int()
    gate, up = linear(one.x[order // top_k], one.gate_up, one.up, ends).chunk(2, dim=-1)
    y = linear(F.silu(gate) * up, one.down, one.low, ends) * one.weights.reshape(-1)[order, None]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return y[place].view(tokens, top_k, -1).sum(1)


def base(x: Tensor, stack: Tensor, adapter: ExpertAdapter, ends: Tensor) -> Tensor:
    """Without the adapter."""
    return F.grouped_mm(x, stack.transpose(1, 2), offs=ends)


def _factors(adapter: ExpertAdapter, experts: int) -> tuple[Tensor, Tensor]:
    """A [E, r, in] and B [E, out, r]."""
    a, b = adapter.a.view(experts, -1, adapter.a.shape[1]), adapter.b.view(adapter.b.shape[0], -1, experts).permute(2, 0, 1)
    return a, b.contiguous()


def separate(x: Tensor, stack: Tensor, adapter: ExpertAdapter, ends: Tensor) -> Tensor:
    """LoRA as two small grouped products and a sum."""
    a, b = _factors(adapter, stack.shape[0])
    low = F.grouped_mm(x, a.transpose(1, 2), offs=ends)
    return base(x, stack, adapter, ends) + adapter.scale * F.grouped_mm(low, b.transpose(1, 2), offs=ends)


def materialised(x: Tensor, stack: Tensor, adapter: ExpertAdapter, ends: Tensor) -> Tensor:
    """peft's: the whole stack plus its update first."""
    a, b = _factors(adapter, stack.shape[0])
    return base(x, torch.baddbmm(stack, b, a, alpha=adapter.scale), adapter, ends)


class _Scatter(torch.autograd.Function):
    """A linear layer of experts: a scatter GEMM, and LoRA as two more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Tensor, a: Tensor, b: Tensor, scale: float, way: Route, gather: int) -> Tensor:
        sorting = (way.order, way.ends, way.tiles)
        low = steps.product(x, a, None, None, *sorting, gather)
        ctx.save_for_backward(x, stack, a, b, low)
        ctx.rest = scale, way, gather
        return steps.product(x, stack, None, None, *sorting, gather) + scale * steps.product(low, b, None, None, *sorting, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, stack, a, b, low = ctx.saved_tensors
        scale, way, gather = ctx.rest
        sorting, dy = (way.order, way.ends, way.tiles), grads[0]
        t = scale * steps.product(dy, b.transpose(1, 2), None, None, *sorting, 0)
        dx = steps.product(dy, stack.transpose(1, 2), None, None, *sorting, 0) + steps.product(
            t, a.transpose(1, 2), None, None, *sorting, 0
        )
        if gather:
            dx = dx[way.place.long()].view(x.shape[0], gather, -1).sum(1)
        da = steps.gram(t, x, way.order, way.ends, 0, gather, a.dtype)
        return dx, None, da, scale * steps.gram(dy, low, way.order, way.ends, 0, 0, b.dtype), None, None, None


def scatter(one: Layer) -> Tensor:
    """The ScatterMoE LoRA design with our scatter GEMM."""
    way = route(one.index, one.gate_up.shape[0])
    up, low = (_factors(adapter, one.gate_up.shape[0]) for adapter in (one.up, one.low))
    gate, value = _Scatter.apply(one.x, one.gate_up, *up, one.up.scale, way, way.top_k).chunk(2, dim=-1)
    y = _Scatter.apply(F.silu(gate) * value, one.down, *low, one.low.scale, way, 0)
    return torch.bmm(one.weights[:, None], y[way.place.long()].view(one.x.shape[0], way.top_k, -1))[:, 0]


WAYS: dict[str, Callable[[Layer], Tensor]] = {
    "rayft": ours,
    "rayft no adapter": ours_without,
    "grouped_mm no adapter": lambda one: grouped(base, one),
    "separate": lambda one: grouped(separate, one),
    "peft": lambda one: grouped(materialised, one),
    "scatter": scatter,
}


def step(fn: Callable[[Layer], Tensor], one: Layer, adapted: bool) -> Callable[[], object]:
    """Forward and backward of one implementation."""
    leaves = [one.x, one.weights, *((one.up.a, one.up.b, one.low.a, one.low.b) if adapted else ())]
    grad = torch.randn_like(one.x)
    return lambda: torch.autograd.grad(fn(one), leaves, grad)


def products(one: Layer) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Each base product by our kernel, rows gathered inside, and by grouped_mm on rows gathered before."""
    way = route(one.index, one.gate_up.shape[0])
    sorting = (way.order, way.ends, way.tiles)
    x, gate_up, down = one.x.detach(), one.gate_up, one.down
    rows, packed = x[way.order.long() // way.top_k], torch.randn(way.order.numel(), gate_up.shape[1], device=DEVICE, dtype=DTYPE)
    h = packed[:, : down.shape[2]].contiguous()

    def pair(given: Tensor, stack: Tensor, source: Tensor, gather: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        right = stack.transpose(1, 2)
        return (
            lambda: steps.product(given, stack, None, None, *sorting, gather),
            lambda: F.grouped_mm(source, right, offs=way.ends),
        )

    return {
        "gate and up": pair(x, gate_up, rows, way.top_k),
        "down": pair(h, down, h, 0),
        "down's gradient": pair(x, down.transpose(1, 2), rows, way.top_k),
        "gate and up's gradient": pair(packed, gate_up.transpose(1, 2), packed, 0),
    }


def _rows_of(name: str, case: str, run: Callable[[], object], limit: float) -> list[str]:
    return [row("moe_lora", case, name, DTYPE, bench(run), limit, extra_mib(run))]


def rows(peers: bool, tiny: bool = False) -> Iterator[str]:
    """Every case."""
    for tokens in (64,) if tiny else TOKENS:
        one = layer(tokens, **(TINY if tiny else {}))
        limit = sum(bench(theirs, rep=60) for _, theirs in products(one).values())
        experts, double, hidden = one.gate_up.shape
        case = f"T{tokens} E{experts} H{hidden} I{double // 2} k{one.index.shape[1]} r{one.up.a.shape[0] // experts}"
        for name, fn in WAYS.items():
            run = step(fn, one, "no adapter" not in name)
            if name.startswith("rayft"):
                yield row("moe_lora", case, name, DTYPE, bench(run), limit, extra_mib(run))
            elif peers:
                yield from foreign(name, partial(_rows_of, name, case, run, limit))
        del one


def parts() -> Iterator[str]:
    """Milliseconds of each step at the larger size, and TFLOP/s of the products beside grouped_mm's."""
    one = layer(TOKENS[-1])
    way = route(one.index, EXPERTS)
    for name, (mine, theirs) in products(one).items():
        flops = 2 * way.order.numel() * HIDDEN * INTER * (2 if "gate" in name else 1)
        times = [bench(fn, rep=60) for fn in (mine, theirs)]
        figures = (f"{ms:.3f} ms {flops / ms / 1e9:.0f} TFLOP/s" for ms in times)
        yield f"{name}: ours {next(figures)}, grouped_mm {next(figures)}"
    sorting, sums = (way.order, way.ends, way.tiles), (way.order, way.ends)
    x, total = one.x.detach(), way.order.numel()
    factor_h, factor_i, factor_2i = (torch.randn(EXPERTS, 16, size, device=DEVICE, dtype=DTYPE) for size in (HIDDEN, INTER, 2 * INTER))
    packed, h, y = (torch.randn(total, size, device=DEVICE, dtype=DTYPE) for size in (2 * INTER, INTER, HIDDEN))
    low, weights = torch.randn(total, 16, device=DEVICE, dtype=DTYPE), torch.rand(total, device=DEVICE, dtype=DTYPE)
    pieces: dict[str, Callable[[], object]] = {
        "route": lambda: route(one.index, EXPERTS),
        "low of x": lambda: steps.low(x, factor_h, *sorting, 1.0, TOP_K),
        "gate and up with low": lambda: steps.product(x, one.gate_up, low, factor_2i, *sorting, TOP_K),
        "activate": lambda: steps.activate(packed, factor_i, way.ends, way.tiles, 1.0, "silu"),
        "activate backward": lambda: steps.activate_backward(h, packed, weights, factor_2i, way.ends, way.tiles, 1.0, "silu", True),
        "gram x": lambda: steps.gram(x, low, *sums, TOP_K, 0, torch.float32),
        "gram packed": lambda: steps.gram(packed, low, *sums, 0, 0, torch.float32),
        "gram h": lambda: steps.gram(h, low, *sums, 0, 0, torch.float32),
        "combine": lambda: steps.combine(y, way.place, one.weights, TOP_K),
        "gram of a stack": lambda: steps.gram(packed, x, *sums, 0, TOP_K, DTYPE),
    }
    yield from (f"{name}: {bench(fn, rep=40):.3f} ms" for name, fn in pieces.items())


def sweep() -> Iterator[str]:
    """Other blocks of the products and of the kernels that walk over the width."""
    from rayft_kernels.moe_lora import triton as body

    one = layer(TOKENS[-1])
    kept = body.PRODUCT, body.GROUP, body.ACTIVATE, body.ACTIVATE_BACKWARD, body.LOW
    way = route(one.index, EXPERTS)
    packed, h = (torch.randn(way.order.numel(), size, device=DEVICE, dtype=DTYPE) for size in (2 * INTER, INTER))
    factors = {size: torch.randn(EXPERTS, 16, size, device=DEVICE, dtype=DTYPE) for size in (HIDDEN, INTER, 2 * INTER)}
    weights = torch.rand(way.order.numel(), device=DEVICE, dtype=DTYPE)
    rest = (way.ends, way.tiles, 1.0, "silu")
    for block in ((32, 64, 4), (32, 128, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8)):
        body.ACTIVATE = body.ACTIVATE_BACKWARD = block
        forward = bench(lambda: steps.activate(packed, factors[INTER], *rest), rep=30)
        backward = bench(lambda: steps.activate_backward(h, packed, weights, factors[2 * INTER], *rest, True), rep=30)
        yield f"activate {block}: {forward:.3f}, backward {backward:.3f}"
    for block in ((64, 128, 4, 3), (64, 128, 4, 4), (32, 128, 4, 3), (128, 64, 4, 4), (64, 256, 4, 3)):
        body.LOW = block
        ms = bench(lambda: steps.low(one.x.detach(), factors[HIDDEN], way.order, way.ends, way.tiles, 1.0, TOP_K), rep=30)
        yield f"low {block}: {ms:.3f}"
    body.ACTIVATE, body.ACTIVATE_BACKWARD, body.LOW = kept[2:]
    chosen = products(one)
    blocks = ((128, 64, 4, 3), 4), ((256, 64, 8, 3), 2), ((256, 64, 8, 4), 4), ((128, 64, 8, 3), 4)
    for block, group in blocks:
        body.PRODUCT, body.GROUP = block, group
        times = ", ".join(f"{name} {bench(mine, rep=30):.3f}" for name, (mine, _) in chosen.items())
        yield f"product {block} group {group}: {times}"
    body.PRODUCT, body.GROUP = kept[:2]


if __name__ == "__main__":
    chosen = sweep if "sweep" in sys.argv else parts if "parts" in sys.argv else None
    print(*(chosen() if chosen else (HEADER, *rows("peers" in sys.argv, DEVICE == "cpu"))), sep="\n", flush=True)
