"""Triton kernels over rows of a logits chunk [rows, vocab]: one program a row, which walks along it in blocks.

`exponentials` is the fast one: it reads each logit once and writes its gradient over it, up to a factor of the row. The gradient of
the plain loss is w (p - onehot) with p = exp(z - lse), and lse is not known before the end of the row. So the kernel writes
exp(z - shift) for a shift near the row's maximum, puts the one-hot entry right when the sum is known, and hands out the factor
w / sum; the caller applies it to the rows of the hidden states and of their gradient, which are far narrower than the logits.

The shift is the maximum of the first block. Should a later block exceed it by more than RANGE, what is written so far is scaled
down and the shift rises: rare, and exact but for entries too small to count.

`statistics` and `gradients` are the two halves for everything else: label smoothing, z-loss, entropy, and logits that are computed
twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8
RANGE = tl.constexpr(40.0)
"""exp(RANGE) times a vocabulary stays far below the largest bfloat16."""
FLOOR = tl.constexpr(-1e38)
"""Below every logit, and finite, so that 0 * (FLOOR - z) is 0."""


@triton.jit
def _capped(u, softcap, scale, SOFTCAP: tl.constexpr):
    """z and dz/du: scale * softcap * tanh(u / softcap), or scale * u."""
    slope = tl.full(u.shape, 1.0, tl.float32) * scale
    z = u * scale
    if SOFTCAP:
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * u / softcap) + 1.0)
        z = tanh * (softcap * scale)
        slope *= 1.0 - tanh * tanh
    return z, slope


@triton.jit
def _raw(logits_ptr, bias_ptr, cols, vocab, width):
    """Raw logits u of a block in float32, 0 outside the vocabulary."""
    u = tl.load(logits_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + cols, mask=cols < vocab, other=0.0).to(tl.float32)
    return tl.where(cols < vocab, u, 0.0)


@triton.jit
def _exponentials(
    logits_ptr, stride, targets_ptr, weights_ptr, bias_ptr, losses_ptr, factors_ptr, vocab, width, softcap, scale,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)
    z_target, slope_target = _capped(_raw(logits_ptr, bias_ptr, target + tl.arange(0, 1), vocab, width), softcap, scale, SOFTCAP)
    shift = FLOOR
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        cols = start + columns
        inside = cols < vocab
        z, slope = _capped(_raw(logits_ptr, bias_ptr, cols, vocab, width), softcap, scale, SOFTCAP)
        z = tl.where(inside, z, float("-inf"))
        top = tl.max(z, 0)
        if top > shift + RANGE:
            shrink = tl.exp(shift - top)
            tl.debug_barrier()
            for before in range(0, start, BLOCK):
                written = logits_ptr + before + columns
                tl.store(written, (tl.load(written).to(tl.float32) * shrink).to(logits_ptr.dtype.element_ty))
            sums *= shrink
            shift = top
        e = tl.exp(z - shift)
        sums += e
        tl.store(logits_ptr + cols, (e * slope).to(logits_ptr.dtype.element_ty), mask=cols < width)
    total = tl.sum(sums, 0)
    w = tl.load(weights_ptr + row).to(tl.float32)
    hot = (tl.exp(z_target - shift) - total) * slope_target
    tl.debug_barrier()
    tl.store(logits_ptr + target + tl.arange(0, 1), hot.to(logits_ptr.dtype.element_ty))
    tl.store(losses_ptr + row + tl.arange(0, 1), w * (shift + tl.log(total) - z_target))
    tl.store(factors_ptr + row, w / total)


@triton.jit
def _statistics(
    logits_ptr, stride, targets_ptr, bias_ptr, stats_ptr, stats_stride, vocab, width, softcap, scale,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)
    z_target, _slope_target = _capped(_raw(logits_ptr, bias_ptr, target + tl.arange(0, 1), vocab, width), softcap, scale, SOFTCAP)
    top = FLOOR
    total = 0.0
    moment = 0.0
    plain = 0.0
    for start in range(0, vocab, BLOCK):
        cols = start + columns
        inside = cols < vocab
        z, _slope = _capped(_raw(logits_ptr, bias_ptr, cols, vocab, width), softcap, scale, SOFTCAP)
        highest = tl.maximum(top, tl.max(tl.where(inside, z, float("-inf")), 0))
        e = tl.where(inside, tl.exp(z - highest), 0.0)
        shrink = tl.exp(top - highest)
        moment = shrink * (moment + total * (top - highest)) + tl.sum(e * (z - highest), 0)
        total = total * shrink + tl.sum(e, 0)
        plain += tl.sum(tl.where(inside, z, 0.0), 0)
        top = highest
    tl.store(stats_ptr + row, top + tl.log(total))
    tl.store(stats_ptr + stats_stride + row + tl.arange(0, 1), z_target)
    tl.store(stats_ptr + 2 * stats_stride + row, tl.log(total) - moment / total)
    tl.store(stats_ptr + 3 * stats_stride + row, plain / vocab)


@triton.jit
def _gradients(
    logits_ptr, stride, out_ptr, out_stride, targets_ptr, bias_ptr, coefs_ptr, coefs_stride, first, vocab, width, softcap, scale,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    out_ptr += row.to(tl.int64) * out_stride
    target = (tl.load(targets_ptr + row) - first).to(tl.int32)
    coefs_ptr += row
    lse = tl.load(coefs_ptr)
    share = tl.load(coefs_ptr + coefs_stride)
    spread = tl.load(coefs_ptr + 2 * coefs_stride)
    hot = tl.load(coefs_ptr + 3 * coefs_stride)
    flat = tl.load(coefs_ptr + 4 * coefs_stride)
    columns = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        cols = start + columns
        z, slope = _capped(_raw(logits_ptr, bias_ptr, cols, vocab, width), softcap, scale, SOFTCAP)
        logp = z - lse
        grad = tl.exp(logp) * (share + spread * logp) + tl.where(cols == target, hot, 0.0) + flat
        tl.store(out_ptr + cols, (grad * slope).to(out_ptr.dtype.element_ty), mask=cols < width)


@triton.jit
def _scale(source_ptr, factor_ptr, out_ptr, count, BLOCK: tl.constexpr):
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < count
    scaled = tl.load(source_ptr + cells, mask=inside, other=0.0).to(tl.float32) * tl.load(factor_ptr).to(tl.float32)
    tl.store(out_ptr + cells, scaled.to(out_ptr.dtype.element_ty), mask=inside)


def exponentials(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    losses: Tensor,
    factors: Tensor,
    softcap: float | None,
    scale: float,
) -> None:
    """Write the weighted losses of the rows, and over the logits their gradient divided by `factors`.

    Args:
        logits: raw logits [m, V], bfloat16 or float32 (float16 has not the range), rows contiguous.
        targets, weights: int64 and float32 [m].
        bias: [V] or None, not yet in the logits.
        losses, factors: float32 [m], written.
    """
    _launch(_exponentials, logits, softcap, scale, targets, weights, bias, losses, factors)


def statistics(logits: Tensor, targets: Tensor, bias: Tensor | None, stats: Tensor, softcap: float | None, scale: float) -> None:
    """Write into stats [4, m], float32, of each row: lse, the target's logit z, the entropy, the mean of z."""
    _launch(_statistics, logits, softcap, scale, targets, bias, stats, stats.stride(0))


def gradients(
    logits: Tensor, out: Tensor, targets: Tensor, bias: Tensor | None, coefs: Tensor, first: int, softcap: float | None, scale: float
) -> None:
    """Write into `out` the gradient of raw logits [m, v], which are the columns from `first` on; `out` may be the logits.

    With (lse, share, spread, hot, flat) = coefs [5, m] and logp = z - lse, it is, through the cap's slope,
        exp(logp) * (share + spread * logp) + hot * onehot(target) + flat.
    """
    _launch(_gradients, logits, softcap, scale, out, out.stride(0), targets, bias, coefs, coefs.stride(0), first)


def scale(source: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """out = source * factor, a scalar tensor, for contiguous tensors of any size; `out` may be the source."""
    if source.numel():
        with torch.cuda.device_of(source):
            _scale[(triton.cdiv(source.numel(), BLOCK),)](source, factor, out, source.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out


def _launch(kernel: Any, logits: Tensor, softcap: float | None, scale: float, *arguments: Tensor | int | None) -> None:
    rows, vocab = logits.shape
    # Rows of our buffers are padded: loads and stores that may touch the padding are 16 bytes wide whatever the vocabulary.
    width = -(-vocab // 16) * 16
    width = width if width <= logits.stride(0) else vocab
    if rows:
        with torch.cuda.device_of(logits):
            kernel[(rows,)](
                logits, logits.stride(0), *arguments, vocab, width, float(softcap or 0.0), float(scale),
                SOFTCAP=softcap is not None, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
