"""What the Triton kernels of packed attention share: tiles of rows, capped scores, key and query ranges, row sums.

Tokens i see keys j of low(i) <= j <= i, low(i) = max(start of i's document, i - window + 1). Both bounds never fall with i, so the keys
of a block of rows are one interval, whose ends are scalars read from its first and last row; seen from the keys, row i takes part for
j <= i < up(j), up(j) = min(end of j's document, j + window). Nothing of this comes from the host.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_WINDOW = 2**30
VARYING = ["tokens", "window", "group"]
"""Arguments whose values must not compile a kernel anew."""


@cache
def roomy(device: torch.device) -> bool:
    """Whether a program can have more than 160 KB of shared memory, as on data centre cards."""
    if device.type != "cuda":
        return True
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]) > 160 * 1024


@triton.jit
def load_rows(base, first, stride, tokens, column, DIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, BOUNDED: tl.constexpr):
    """[ROWS, WIDE] from (first, column) on; zeros beyond the tokens, where BOUNDED, and beyond DIM."""
    row, lane = tl.arange(0, ROWS), tl.arange(0, WIDE)
    at = base + (first.to(tl.int64) * stride + column) + (row[:, None] * stride + lane[None, :])
    if DIM % WIDE == 0:
        tile = tl.load(at, mask=(row < tokens - first)[:, None], other=0.0) if BOUNDED else tl.load(at)
    else:
        inside = (lane < DIM - column)[None, :]
        if BOUNDED:
            inside = inside & (row < tokens - first)[:, None]
        tile = tl.load(at, mask=inside, other=0.0)
    return tile


@triton.jit
def store_rows(base, first, stride, tokens, column, tile, DIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The inverse of `load_rows`."""
    row, lane = tl.arange(0, ROWS), tl.arange(0, WIDE)
    at = base + (first.to(tl.int64) * stride + column) + (row[:, None] * stride + lane[None, :])
    inside = (row < tokens - first)[:, None] & (lane < DIM - column)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def to_log2(scores, scale, softcap, CAPPED: tl.constexpr):
    """(scores in units of log 2, tanh of the capped scores), from products of queries and keys."""
    if CAPPED:
        t = 1.0 - 2.0 / (tl.exp2(scores * (scale / softcap * 2.8853900817779268)) + 1.0)
        s = t * (softcap * 1.4426950408889634)
    else:
        t = scores
        s = scores * (scale * 1.4426950408889634)
    return s, t


@triton.jit
def lowest(starts_ptr, row, window):
    """low(row)."""
    return tl.maximum(tl.load(starts_ptr + row), row - window + 1)


@triton.jit
def highest(ends_ptr, key, window):
    """up(key)."""
    return tl.minimum(tl.load(ends_ptr + key), key + window)


@triton.jit
def keys_of_rows(starts_ptr, m0, tokens, window, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """(begin, full_from, full_to, end): blocks of keys that rows m0.. see from `begin` to `end`, and whole between the other two."""
    last = tl.minimum(m0 + ROWS, tokens) - 1
    begin = lowest(starts_ptr, m0, window) // KEYS * KEYS
    full_to = tl.maximum((m0 + 1) // KEYS * KEYS, begin)
    full_from = tl.minimum(tl.cdiv(lowest(starts_ptr, last, window), KEYS) * KEYS, full_to)
    return begin, full_from, full_to, last + 1


@triton.jit
def rows_of_keys(ends_ptr, n0, tokens, window, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """`keys_of_rows` seen from keys n0..: blocks of rows."""
    last = tl.minimum(n0 + KEYS, tokens) - 1
    begin = n0 // ROWS * ROWS
    full_to = tl.maximum(highest(ends_ptr, n0, window) // ROWS * ROWS, begin)
    full_from = tl.minimum(tl.cdiv(n0 + KEYS - 1, ROWS) * ROWS, full_to)
    return begin, full_from, full_to, highest(ends_ptr, last, window)


@triton.jit
def edge(i, begin, full_from, full_to, SIDE: tl.constexpr):
    """First element of the i-th block that is not whole: those before `full_from`, then those from `full_to` on."""
    before = (full_from - begin) // SIDE
    return tl.where(i < before, begin + i * SIDE, full_to + (i - before) * SIDE)


@triton.jit
def edges(begin, full_from, full_to, end, SIDE: tl.constexpr):
    """How many blocks are not whole."""
    return (full_from - begin) // SIDE + tl.cdiv(end - full_to, SIDE)


@triton.jit(do_not_specialize=VARYING[:1])
def _row_sums(
    grad_ptr, out_ptr, lse_grad_ptr, sums_ptr, tokens, grad_token, grad_head, out_token, out_head,
    DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    g = load_rows(grad_ptr + head * grad_head, first, grad_token, tokens, 0, DIM, ROWS, WIDE, True).to(tl.float32)
    o = load_rows(out_ptr + head * out_head, first, out_token, tokens, 0, DIM, ROWS, WIDE, True).to(tl.float32)
    row = first + tl.arange(0, ROWS)
    total = tl.sum(g * o, 1)
    if WITH_LSE:
        total -= tl.load(lse_grad_ptr + head * tokens + row, mask=row < tokens, other=0.0)
    tl.store(sums_ptr + head * tokens + row, total, mask=row < tokens)


def row_sums(grad: Tensor, out: Tensor, lse_grad: Tensor | None) -> Tensor:
    """float32 [H, T]: sum over head_dim of grad * out, less the gradient of lse [H, T]; what the softmax's backward subtracts."""
    tokens, heads, dim = out.shape
    sums = torch.empty((heads, tokens), dtype=torch.float32, device=out.device)
    _row_sums[(triton.cdiv(tokens, 16), heads)](
        grad, out, sums if lse_grad is None else lse_grad.contiguous(), sums, tokens,
        grad.stride(0), grad.stride(1), out.stride(0), out.stride(1),
        DIM=dim, WIDE=triton.next_power_of_2(dim), ROWS=16, WITH_LSE=lse_grad is not None, num_warps=4,
    )  # fmt: skip
    return sums
