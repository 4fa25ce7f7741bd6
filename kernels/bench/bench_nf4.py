"""NF4 weights made dense, and LoRA on them, as CSV rows: rayft, torch, and bitsandbytes where it is installed.

The limit of the first is bytes at the rate of a copy (codes and scales read, values written); that of LoRA nodes the large products alone,
as in `bench_lora`. Beside each LoRA row stands the same on dense weights. The argument `sweep` times other tiles of the kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.bench_lora import step
from bench.check_lora import linears, mlp
from bench.common import DEVICE, HEADER, bench, bench_graph, extra_mib, installed, limits, row
from rayft_kernels import NF4, Projection, dequantise, quantise
from rayft_kernels.nf4 import triton as body
from rayft_kernels.nf4.op import bytes_of, dequantise_rows

DTYPE = torch.bfloat16
GROUPS = {
    "8B qkv": ((4096, 4096), (1024, 4096), (1024, 4096)),
    "8B gate+up+down": ((12288, 4096), (12288, 4096), (4096, 12288)),
    "0.6B qkv": ((2048, 1024), (1024, 1024), (1024, 1024)),
    "70B gate+up+down": ((28672, 8192), (28672, 8192), (8192, 28672)),
}
"""Weights of a layer that are made together, (out, in)."""
TINY = {"tiny qkv": ((64, 64), (32, 64), (32, 64)), "tiny gate+up+down": ((128, 64), (128, 64), (64, 128))}
LORA = (("lora_qkv", "qkv", linears), ("lora_mlp", "gate+up+down", partial(mlp, "silu")))
"""Operation, the group it takes the weights of, function."""
TOKENS = (2048, 8192)
RANK = 16


def drawn(shapes: Sequence[tuple[int, int]]) -> list[NF4]:
    """Random weights in 4 bits."""
    return [quantise(torch.randn(shape, device=DEVICE, dtype=DTYPE) * 0.02) for shape in shapes]


def made_by_bitsandbytes(shapes: Sequence[tuple[int, int]]) -> Callable[[], object] | None:
    """Its dequantisation of such weights, one after the other."""
    if (functional := installed("bitsandbytes.functional")) is None:
        return None
    held = [
        functional.quantize_4bit(torch.randn(s, device=DEVICE, dtype=DTYPE), blocksize=64, compress_statistics=True, quant_type="nf4")
        for s in shapes
    ]
    return lambda: [functional.dequantize_4bit(codes, state) for codes, state in held]


def dense_rows(groups: dict[str, tuple[tuple[int, int], ...]]) -> Iterator[str]:
    """Milliseconds of making weights dense, called from Python and replayed from a CUDA graph."""
    for case, shapes in groups.items():
        weights, count = drawn(shapes), sum(rows * columns for rows, columns in shapes)
        limit = (bytes_of(count) + DTYPE.itemsize * count) / limits().tbs / 1e9
        ways: dict[str, Callable[[], object]] = {"rayft": partial(dequantise, weights, DTYPE)}
        if DEVICE == "cuda" and (theirs := made_by_bitsandbytes(shapes)) is not None:
            ways["bitsandbytes"] = theirs
        if case == "8B qkv":
            ways["torch"] = lambda weights=weights: [dequantise_rows(weight, DTYPE, 0) for weight in weights]
        for name, fn in ways.items():
            yield row("nf4", case, name, DTYPE, bench(fn, rep=60), limit, extra_mib(fn))
        ms = bench_graph(partial(dequantise, weights, DTYPE))
        yield row("nf4", case, "rayft graph", DTYPE, ms, limit, 0.0)
        del weights, ways


def quantise_row(rows: int, columns: int) -> str:
    """Milliseconds of quantising one weight, as it is done at every start."""
    weight = torch.randn(rows, columns, device=DEVICE, dtype=DTYPE) * 0.02
    limit, run = (DTYPE.itemsize * weight.numel() + bytes_of(weight.numel())) / limits().tbs / 1e9, partial(quantise, weight)
    return row("nf4 quantise", f"{rows}x{columns}", "rayft", DTYPE, bench(run, rep=60), limit, extra_mib(run))


def adapted(weights: Sequence[Tensor | NF4], shapes: Sequence[tuple[int, int]]) -> list[Projection]:
    """One projection with an adapter for each weight."""

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, device=DEVICE, dtype=DTYPE) * 0.02).requires_grad_()

    return [Projection(w, None, draw(RANK, width), draw(out, RANK), 2.0) for w, (out, width) in zip(weights, shapes, strict=True)]


def lora_rows(size_of_model: str, shapes_of: dict[str, tuple[tuple[int, int], ...]], counts: Sequence[int]) -> Iterator[str]:
    """LoRA forward and backward on weights in 4 bits and dense; extra_mib is above inputs and held weights, which the case names."""
    for name, group, fn in LORA:
        case = f"{size_of_model} {group}"
        shapes = shapes_of[case]
        packed, count = drawn(shapes), sum(rows * columns for rows, columns in shapes)
        dense = [weight.clone() for weight in dequantise(packed, DTYPE)]
        for tokens in counts:
            x = torch.randn(tokens, shapes[0][1], device=DEVICE, dtype=DTYPE, requires_grad=True)
            limit = 2 * 2 * tokens * count / limits().tflops / 1e9
            for way, weights, size in (("nf4", packed, bytes_of(count)), ("dense", dense, DTYPE.itemsize * count)):
                run = step(fn, x, adapted(weights, shapes))
                what = f"{case} T{tokens} holds {size / 2**20:.0f} MiB"
                yield row(name, what, f"rayft {way}", DTYPE, bench(run, rep=100), limit, extra_mib(run))


def rows(tiny: bool = False) -> Iterator[str]:
    """Every case."""
    yield from dense_rows(TINY if tiny else GROUPS)
    yield quantise_row(64, 64) if tiny else quantise_row(12288, 4096)
    yield from lora_rows("tiny", TINY, (16,)) if tiny else lora_rows("8B", GROUPS, TOKENS)


def sweep() -> Iterator[str]:
    """Milliseconds of the kernel for several tiles."""
    for case in ("8B qkv", "8B gate+up+down"):
        parts = list(zip(*drawn(GROUPS[case]), strict=True))
        for blocks in (16, 32, 64, 128, 256):
            for warps in (2, 4, 8):
                tile = body.Tile(blocks, warps)
                yield f"{case} {tile}: {bench_graph(partial(body.dequantise, *parts, DTYPE, tile), rep=30):.4f}"


if __name__ == "__main__":
    print(*(sweep() if "sweep" in sys.argv else [HEADER, *rows(DEVICE == "cpu")]), sep="\n", flush=True)
