"""The Triton kernels of the grouped steps and their launches; shapes as in `steps.py`.

Rows are sorted by expert and cut into tiles of one expert each (`routing.Route.tiles`), so a program knows its expert from the table and
no number comes back to the host. Ranks are padded to a power of two of at least 16 with zeros, so low-rank products need no mask. No sum
is split over programs: each is made by one program in one order, which keeps everything deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayft_kernels.device import on_its_device
from rayft_kernels.glu.triton import ACTIVATIONS, _gate
from rayft_kernels.moe_lora.routing import TILE

PRODUCT = (256, 64, 8, 3)
"""Columns and depth of a product's block of TILE rows, warps, stages, where a multiprocessor has the memory for it."""
SMALL_PRODUCT = (128, 32, 8, 3)
"""The same on cards before Hopper, and for ranks above 64."""
GRAM = (128, 128, 64, 8, 3)
"""Left and right columns of a block, rows at a time, warps, stages."""
LOW = (64, 128, 4, 3)
"""Rows of a program, columns at a time, warps, stages; likewise the two below, without stages."""
ACTIVATE = (64, 64, 4)
ACTIVATE_BACKWARD = (32, 64, 4)
GROUP = 4
"""Tiles of rows that share a strip of weights while it is in the L2 cache."""


@triton.jit
def _tile_of(tiles_ptr, number):
    place = tiles_ptr + number * 3
    return tl.load(place), tl.load(place + 1), tl.load(place + 2)


@triton.jit
def _source(order_ptr, rows, start, stop, GATHER: tl.constexpr):
    """Where rows are read from; those beyond the expert read its first, and are not written."""
    rows = tl.where(rows < stop, rows, start)
    if GATHER > 0:
        rows = tl.load(order_ptr + rows) // GATHER
    return rows.to(tl.int64)


@triton.jit
def _plus_product(total, left, right):
    """total + left right. In float32 the product is summed apart: one sum in the order of the columns loses more than torch's.

    An fma with 1, because Triton makes a plain sum the value that the product's sum starts from.
    """
    if left.dtype == tl.float32:
        total = tl.fma(tl.dot(left, right, input_precision="ieee"), 1.0, total)
    else:
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _product(
    x_ptr, w_ptr, out_ptr, order_ptr, tiles_ptr, low_ptr, factor_ptr, tiles, N, K, stride_x, w_e, w_n, w_k,
    P: tl.constexpr, GATHER: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    strips = tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * strips)
    inside_group = tl.program_id(0) % (GROUP * strips)
    members = tl.minimum(tiles - group * GROUP, GROUP)
    expert, start, stop = _tile_of(tiles_ptr, group * GROUP + inside_group % members)
    if expert < 0:
        return
    rows = start + tl.arange(0, BM)
    columns = (inside_group // members) * BN + tl.arange(0, BN)
    source = _source(order_ptr, rows, start, stop, GATHER)
    there = columns < N
    LATE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    k = tl.arange(0, BK)
    x_at = x_ptr + source[:, None] * stride_x + k[None, :]
    w_at = w_ptr + expert.to(tl.int64) * w_e + columns[None, :] * w_n + k[:, None] * w_k
    if P > 0:
        p = tl.arange(0, P)
        low = tl.load(low_ptr + tl.where(rows < stop, rows, start)[:, None].to(tl.int64) * P + p[None, :])
        factor = tl.load(factor_ptr + (expert.to(tl.int64) * P + p[:, None]) * N + columns[None, :], mask=there[None, :], other=0.0)
    total = tl.zeros((BM, BN), tl.float32)
    if (P > 0) & (not LATE):
        total = tl.dot(low, factor, total, input_precision="ieee")
    for first in range(0, K, BK):
        if EVEN:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            x = tl.load(x_at, mask=k[None, :] < K - first, other=0.0)
            w = tl.load(w_at, mask=(k[:, None] < K - first) & there[None, :], other=0.0)
        total = _plus_product(total, x, w)
        x_at += BK
        w_at += BK * w_k
    if (P > 0) & LATE:
        total = _plus_product(total, low, factor)
    out_at = out_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=(rows < stop)[:, None] & there[None, :])


@triton.jit
def _low(
    x_ptr, factor_ptr, out_ptr, order_ptr, tiles_ptr, K, stride_x, scale,
    P: tl.constexpr, GATHER: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    expert, start, stop = _tile_of(tiles_ptr, tl.program_id(0) // PARTS)
    start += (tl.program_id(0) % PARTS) * BM
    if (expert < 0) | (start >= stop):
        return
    rows = start + tl.arange(0, BM)
    source = _source(order_ptr, rows, start, stop, GATHER)
    k, p = tl.arange(0, BK), tl.arange(0, P)
    total = tl.zeros((BM, P), tl.float32)
    for first in range(0, K, BK):
        there = first + k < K
        x = tl.load(x_ptr + source[:, None] * stride_x + first + k[None, :], mask=there[None, :], other=0.0)
        factor = tl.load(factor_ptr + (expert.to(tl.int64) * P + p[None, :]) * K + first + k[:, None], mask=there[:, None], other=0.0)
        total = _plus_product(total, x, factor)
    out_at = out_ptr + rows[:, None].to(tl.int64) * P + p[None, :]
    tl.store(out_at, (total * scale).to(out_ptr.dtype.element_ty), mask=(rows < stop)[:, None])


@triton.jit
def _activate(
    gu_ptr, factor_ptr, h_ptr, low_ptr, tiles_ptr, width, scale,
    KIND: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    expert, start, stop = _tile_of(tiles_ptr, tl.program_id(0) // PARTS)
    start += (tl.program_id(0) % PARTS) * BM
    if (expert < 0) | (start >= stop):
        return
    rows = (start + tl.arange(0, BM)).to(tl.int64)
    at = rows < stop
    kind: tl.constexpr = h_ptr.dtype.element_ty
    if P > 0:
        p = tl.arange(0, P)
        total = tl.zeros((BM, P), tl.float32)
    for first in range(0, width, BI):
        columns = first + tl.arange(0, BI)
        there = columns < width
        mask = at[:, None] & there[None, :]
        gate_at = gu_ptr + rows[:, None] * (2 * width) + columns[None, :]
        gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_at + width, mask=mask, other=0.0).to(tl.float32)
        s, _ = _gate(gate, KIND, kind == tl.float32)
        h = (gate * s * up).to(kind)
        tl.store(h_ptr + rows[:, None] * width + columns[None, :], h, mask=mask)
        if P > 0:
            factor_at = factor_ptr + (expert.to(tl.int64) * P + p[None, :]) * width + columns[:, None]
            total = _plus_product(total, h, tl.load(factor_at, mask=there[:, None], other=0.0))
    if P > 0:
        tl.store(low_ptr + rows[:, None] * P + p[None, :], (total * scale).to(kind), mask=at[:, None])


@triton.jit
def _activate_backward(
    dh_ptr, gu_ptr, weight_ptr, factor_ptr, dgu_ptr, dweight_ptr, low_ptr, h_ptr, tiles_ptr, width, scale,
    KIND: tl.constexpr, P: tl.constexpr, KEEP: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    expert, start, stop = _tile_of(tiles_ptr, tl.program_id(0) // PARTS)
    start += (tl.program_id(0) % PARTS) * BM
    if (expert < 0) | (start >= stop):
        return
    rows = (start + tl.arange(0, BM)).to(tl.int64)
    at = rows < stop
    kind: tl.constexpr = dh_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + rows, mask=at, other=0.0).to(tl.float32)
    dweight = tl.zeros((BM,), tl.float32)
    if P > 0:
        p = tl.arange(0, P)
        total = tl.zeros((BM, P), tl.float32)
    for first in range(0, width, BI):
        columns = first + tl.arange(0, BI)
        there = columns < width
        mask = at[:, None] & there[None, :]
        packed, single = rows[:, None] * (2 * width) + columns[None, :], rows[:, None] * width + columns[None, :]
        gate = tl.load(gu_ptr + packed, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gu_ptr + packed + width, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dh_ptr + single, mask=mask, other=0.0).to(tl.float32)
        s, slope = _gate(gate, KIND, kind == tl.float32)
        value = gate * s
        h = value * up
        dweight += tl.sum(grad * h, 1)
        grad *= weight[:, None]
        dgate, dup = (grad * up * (s + gate * slope)).to(kind), (grad * value).to(kind)
        tl.store(dgu_ptr + packed, dgate, mask=mask)
        tl.store(dgu_ptr + packed + width, dup, mask=mask)
        if KEEP:
            tl.store(h_ptr + single, (h * weight[:, None]).to(kind), mask=mask)
        if P > 0:
            factor_at = factor_ptr + (expert.to(tl.int64) * P + p[None, :]) * (2 * width) + columns[:, None]
            total = _plus_product(total, dgate, tl.load(factor_at, mask=there[:, None], other=0.0))
            total = _plus_product(total, dup, tl.load(factor_at + width, mask=there[:, None], other=0.0))
    tl.store(dweight_ptr + rows, dweight, mask=at)
    if P > 0:
        tl.store(low_ptr + rows[:, None] * P + p[None, :], (total * scale).to(kind), mask=at[:, None])


@triton.jit
def _gram(
    left_ptr, right_ptr, out_ptr, order_ptr, ends_ptr, M, N, stride_left, stride_right,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    strips, expert = tl.cdiv(N, BN), tl.program_id(1)
    left = (tl.program_id(0) // strips) * BM + tl.arange(0, BM)
    right = (tl.program_id(0) % strips) * BN + tl.arange(0, BN)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends_ptr + expert)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(start, stop, BK):
        rows = first + tl.arange(0, BK)
        at = rows < stop
        from_left = _source(order_ptr, rows, start, stop, GATHER_LEFT)
        from_right = _source(order_ptr, rows, start, stop, GATHER_RIGHT)
        mask = at[:, None] & (left < M)[None, :]
        x = tl.load(left_ptr + from_left[:, None] * stride_left + left[None, :], mask=mask, other=0.0)
        mask = at[:, None] & (right < N)[None, :]
        y = tl.load(right_ptr + from_right[:, None] * stride_right + right[None, :], mask=mask, other=0.0)
        total = _plus_product(total, tl.trans(x), y)
    out_at = out_ptr + (expert.to(tl.int64) * M + left[:, None]) * N + right[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=(left < M)[:, None] & (right < N)[None, :])


@triton.jit
def _combine(y_ptr, place_ptr, weight_ptr, out_ptr, width, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.zeros((BH,), tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(place_ptr + token * TOP_K + choice).to(tl.int64)
        y = tl.load(y_ptr + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weight_ptr + token * TOP_K + choice).to(tl.float32)
        total += y
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=columns < width)


def _dense(x: Tensor) -> Tensor:
    """x with its columns one after another."""
    return x if x.stride(1) == 1 else x.contiguous()


@on_its_device
def low(x: Tensor, factor: Tensor, order: Tensor, tiles: Tensor, scale: float, gather: int) -> Tensor:
    """`steps.low`."""
    x = _dense(x)
    rank, width = factor.shape[1:]
    out = x.new_empty(order.numel(), rank)
    rows, depth, warps, stages = LOW if x.element_size() == 2 else (32, 64, 4, 2)
    _low[(tiles.shape[0] * (TILE // rows),)](
        x, factor, out, order, tiles, width, x.stride(0), scale,
        P=rank, GATHER=gather, PARTS=TILE // rows, BM=rows, BK=depth, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _product_block(x: Tensor, rank: int) -> tuple[int, int, int, int]:
    """Columns, depth, warps and stages."""
    if x.element_size() == 4:
        return 64, 32, 4, 2
    return PRODUCT if rank <= 64 and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9 else SMALL_PRODUCT


@on_its_device
def product(x: Tensor, weight: Tensor, low: Tensor | None, factor: Tensor | None, order: Tensor, tiles: Tensor, gather: int) -> Tensor:
    """`steps.product`."""
    x = _dense(x)
    columns, width = weight.shape[1:]
    out = x.new_empty(order.numel(), columns)
    rank = 0 if factor is None else factor.shape[1]
    block, depth, warps, stages = _product_block(x, rank)
    block = min(block, max(16, triton.next_power_of_2(columns)))
    _product[(tiles.shape[0] * triton.cdiv(columns, block),)](
        x, weight, out, order, tiles, x if low is None else low, x if factor is None else factor,
        tiles.shape[0], columns, width, x.stride(0), *weight.stride(),
        P=rank, GATHER=gather, EVEN=width % depth == 0 and columns % block == 0,
        BM=TILE, BN=block, BK=depth, GROUP=GROUP, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@on_its_device
def activate(gate_up: Tensor, factor: Tensor | None, tiles: Tensor, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """`steps.activate`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    rank = 0 if factor is None else factor.shape[1]
    h, out = gate_up.new_empty(rows, width), gate_up.new_empty((rows, rank) if rank else (0,))
    lines, columns, warps = ACTIVATE
    _activate[(tiles.shape[0] * (TILE // lines),)](
        gate_up, gate_up if factor is None else factor, h, out, tiles, width, scale,
        KIND=ACTIVATIONS[activation], P=rank, PARTS=TILE // lines, BM=lines, BI=columns, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return h, out


@on_its_device
def activate_backward(
    dh: Tensor, gate_up: Tensor, weights: Tensor, factor: Tensor | None, tiles: Tensor, scale: float, activation: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`steps.activate_backward`."""
    rows, width = dh.shape
    rank = 0 if factor is None else factor.shape[1]
    d_gate_up, dweight = torch.empty_like(gate_up), dh.new_empty(rows, dtype=torch.float32)
    out, h = dh.new_empty((rows, rank) if rank else (0,)), dh.new_empty((rows, width) if keep else (0,))
    lines, columns, warps = ACTIVATE_BACKWARD
    _activate_backward[(tiles.shape[0] * (TILE // lines),)](
        dh, gate_up, weights, dh if factor is None else factor, d_gate_up, dweight, out, h, tiles, width, scale,
        KIND=ACTIVATIONS[activation], P=rank, KEEP=keep, PARTS=TILE // lines, BM=lines, BI=columns, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return d_gate_up, dweight, out, h


@on_its_device
def gram(left: Tensor, right: Tensor, order: Tensor, ends: Tensor, gather_left: int, gather_right: int, dtype: torch.dtype) -> Tensor:
    """`steps.gram`."""
    left, right = _dense(left), _dense(right)
    m, n = left.shape[1], right.shape[1]
    out = left.new_empty(ends.numel(), m, n, dtype=dtype)
    bm, bn, bk, warps, stages = GRAM if left.element_size() == 2 else (64, 64, 32, 4, 2)
    bm, bn = (min(block, max(16, triton.next_power_of_2(size))) for block, size in ((bm, m), (bn, n)))
    _gram[(triton.cdiv(m, bm) * triton.cdiv(n, bn), ends.numel())](
        left, right, out, order, ends, m, n, left.stride(0), right.stride(0),
        GATHER_LEFT=gather_left, GATHER_RIGHT=gather_right, BM=bm, BN=bn, BK=bk, num_warps=warps if bn > 32 else 4, num_stages=stages,
    )  # fmt: skip
    return out


@on_its_device
def combine(y: Tensor, place: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """`steps.combine`."""
    tokens, width = place.numel() // top_k, y.shape[1]
    out, factors = y.new_empty(tokens, width), y if weights is None else weights.contiguous()
    block = min(1024, triton.next_power_of_2(width))
    if tokens:
        _combine[(tokens, triton.cdiv(width, block))](
            y, place, factors, out, width, TOP_K=top_k, WEIGHTED=weights is not None, BH=block, num_warps=4
        )
    return out
