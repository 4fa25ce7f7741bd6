"""The Triton kernel of `op.dequantise`: up to three weights in one launch, codes and both levels of scales read once.

Importable where triton is not, then HAS_TRITON is False. A program writes some blocks of 64 values of one weight. Levels are read from
two small tables, which stay in L1. Products and sums are rounded one by one (no fused multiply-add), as bitsandbytes rounds them.
Bytes per value in bf16: 0.5 + 1/64 read, 2 written.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rayft_kernels.nf4.op import BLOCK, LEVELS, SCALE_BLOCK, _table, scale_levels

HAS_TRITON = importlib.util.find_spec("triton") is not None
SUPPORTED = (torch.bfloat16, torch.float16, torch.float32)
AT_ONCE = 3
"""Weights in a launch: queries, keys and values, or gate, up and down."""


class Tile(NamedTuple):
    """Blocks of 64 values, and warps, of a program."""

    blocks: int
    warps: int


TILE = Tile(blocks=64, warps=4)

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _tile(
        out_ptr, codes_ptr, scales_ptr, outer_ptr, number, count, levels_ptr, scale_levels_ptr,
        SCALE_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        blocks = number.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = blocks < count
        scale = tl.load(scale_levels_ptr + tl.load(scales_ptr + blocks, mask=inside, other=0).to(tl.int32))
        outer = tl.load(outer_ptr + blocks // SCALE_BLOCK, mask=inside, other=0.0)
        mean = tl.load(outer_ptr + (count + SCALE_BLOCK - 1) // SCALE_BLOCK)
        scale = (scale * outer + mean)[:, None]
        codes = tl.load(codes_ptr + blocks[:, None] * 32 + tl.arange(0, 32)[None, :], mask=inside[:, None], other=0).to(tl.int32)
        first = tl.load(levels_ptr + (codes >> 4)) * scale
        second = tl.load(levels_ptr + (codes & 15)) * scale
        values = tl.reshape(tl.join(first, second), (BLOCKS, 64)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + blocks[:, None] * 64 + tl.arange(0, 64)[None, :], values, mask=inside[:, None])

    @triton.jit(do_not_specialize=["count_0", "count_1", "count_2"])
    def _dequantise(
        out_ptr, codes_0, scales_0, outer_0, count_0, codes_1, scales_1, outer_1, count_1, codes_2, scales_2, outer_2, count_2,
        levels_ptr, scale_levels_ptr, SCALE_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        number = tl.program_id(0)
        programs_0, programs_1 = tl.cdiv(count_0, BLOCKS), tl.cdiv(count_1, BLOCKS)
        if number < programs_0:
            _tile(out_ptr, codes_0, scales_0, outer_0, number, count_0, levels_ptr, scale_levels_ptr, SCALE_BLOCK, BLOCKS)
        elif number < programs_0 + programs_1:
            out_1 = out_ptr + tl.cast(count_0, tl.int64) * 64
            _tile(out_1, codes_1, scales_1, outer_1, number - programs_0, count_1, levels_ptr, scale_levels_ptr, SCALE_BLOCK, BLOCKS)
        else:
            out_2 = out_ptr + (tl.cast(count_0, tl.int64) + count_1) * 64
            number = number - programs_0 - programs_1
            _tile(out_2, codes_2, scales_2, outer_2, number, count_2, levels_ptr, scale_levels_ptr, SCALE_BLOCK, BLOCKS)


def dequantise(
    codes: Sequence[Tensor], scales: Sequence[Tensor], outers: Sequence[Tensor], dtype: torch.dtype, tile: Tile = TILE
) -> Tensor:
    """All values of the weights, one after the other, [sum of out in]."""
    device = codes[0].device
    sizes = [2 * c.numel() for c in codes]
    out = torch.empty(sum(sizes), dtype=dtype, device=device)
    start = 0
    for first in range(0, len(codes), AT_ONCE):
        some = range(first, min(first + AT_ONCE, len(codes)))
        counts = [sizes[i] // BLOCK for i in some]
        arguments = [part for i in some for part in (codes[i].contiguous(), scales[i].contiguous(), outers[i], sizes[i] // BLOCK)]
        arguments += [codes[first], scales[first], outers[first], 0] * (AT_ONCE - len(counts))
        grid = (sum(triton.cdiv(count, tile.blocks) for count in counts),)
        tables = _table(LEVELS, device), _table(scale_levels(), device)
        _dequantise[grid](
            out[start:], *arguments, *tables, SCALE_BLOCK=SCALE_BLOCK, BLOCKS=tile.blocks, num_warps=tile.warps, enable_fp_fusion=False
        )
        start += sum(counts) * BLOCK
    return out
