"""NF4 with double quantisation (arXiv 2305.14314 sec. 3): a frozen weight in 4.127 bits a value, equal to bitsandbytes' bit for bit.

A row is cut into blocks of 64 values. A block has a scale, its largest magnitude, and each value is the nearest of 16 levels times it.
Scales are stored in 8 bits: less their mean, in blocks of 256 along the whole weight, each value the nearest of 256 levels (the dynamic
8-bit type of arXiv 2110.02861) times the block's largest magnitude.

    value = LEVELS[code] * (scale_levels[scale] * outer[block of scales] + mean),   every operation rounded to float32

Blocks lie within rows and so do the codes of two neighbours in one byte, so rows can be sharded; only `outer`, 4 bytes for 16,384 values,
runs across rows. The arithmetic follows bitsandbytes' functions, so that a base quantised here is the one that its users train on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Values with one scale."""
SCALE_BLOCK = 256
"""Scales with one scale of their own."""
CHUNK = 1 << 16
"""Blocks that are quantised at once, which bounds the temporaries."""
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution, of which one is 0 (appendix E of the paper)."""


class NF4(NamedTuple):
    """A weight [out, in] in 4 bits.

    Attributes:
        codes: uint8 [out, in / 2], the code of the first of two neighbours in the upper half.
        scales: uint8 [out, in / 64].
        outer: float32 [ceil(out in / 16384) + 1], the scales of scales and, last, the mean.
    """

    codes: Tensor
    scales: Tensor
    outer: Tensor


def outer_size(out_features: int, in_features: int) -> int:
    """Length of `NF4.outer`."""
    return -(-out_features * in_features // (BLOCK * SCALE_BLOCK)) + 1


def bytes_of(weights: int) -> int:
    """Bytes that hold so many weights of one matrix."""
    return weights // 2 + weights // BLOCK + 4 * outer_size(weights, 1)


@torch.no_grad()
def quantise(weight: Tensor) -> NF4:
    """A weight [out, in] of any floating type in 4 bits, on its own device.

    Raises:
        ValueError: its rows are no multiple of 64 long.
    """
    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"weight has rows of {columns} values: they must be a multiple of {BLOCK}.")
    blocks = weight.reshape(-1, BLOCK)
    pieces = [_quantise_blocks(piece) for piece in blocks.split(CHUNK)]
    codes, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    mean = scales.mean()
    codes_of_scales, outer = _quantise_scales(scales - mean)
    return NF4(codes.view(rows, columns // 2), codes_of_scales.view(rows, columns // BLOCK), torch.cat([outer, mean[None]]))


def _quantise_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 64] -> codes, two in a byte [n, 32], and scales [n]."""
    blocks = blocks.float()
    codes, scales = _nearest(blocks, _table(LEVELS, blocks.device))
    return (codes[:, ::2] << 4) | codes[:, 1::2], scales


def _quantise_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """[n] -> codes [n] and a scale for each 256 of them."""
    missing = -len(scales) % SCALE_BLOCK
    blocks = torch.nn.functional.pad(scales, (0, missing)).view(-1, SCALE_BLOCK)
    codes, outer = _nearest(blocks, _table(scale_levels(), scales.device))
    return codes.view(-1)[: len(scales)], outer


def _nearest(blocks: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 index of the level next to each value over its row's largest magnitude, and those magnitudes; a row of zeros gives 0."""
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / largest.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8), largest


@cache
def scale_levels() -> tuple[float, ...]:
    """The 256 levels of the dynamic 8-bit type, rising: seven decades, each halved as often as the one above it, and 0 and 1."""
    found = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32, device="cpu")
        middles = (10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        found += middles + [-middle for middle in middles]
    return tuple(sorted(found))


@cache
def _table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """float32 [256, 2]: the two levels of a byte."""
    levels = _table(LEVELS, device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)


def dequantise(weights: Sequence[NF4], dtype: torch.dtype) -> list[Tensor]:
    """The weights [out, in] in `dtype`, on a GPU by one kernel for every three; they are slices of one tensor. No autograd.

    Args:
        weights: on one device.
        dtype: a floating type.
    """
    flat = _dequantise([w.codes for w in weights], [w.scales for w in weights], [w.outer for w in weights], dtype)
    pieces = flat.split([2 * w.codes.numel() for w in weights])
    return [piece.view(w.codes.shape[0], 2 * w.codes.shape[1]) for piece, w in zip(pieces, weights, strict=True)]


def dequantise_rows(weight: NF4, dtype: torch.dtype, first: int) -> Tensor:
    """Values of some rows, of which `weight` has codes and scales, and `outer` of all; `first` is the first one's number."""
    blocks = weight.scales.numel()
    numbers = torch.arange(blocks, device=weight.codes.device) + first * weight.scales.shape[1]
    levels = _table(scale_levels(), weight.codes.device)[weight.scales.reshape(-1).int()]
    scales = levels * weight.outer[numbers // SCALE_BLOCK] + weight.outer[-1]
    values = torch.nn.functional.embedding(weight.codes.int(), _pairs(weight.codes.device)).view(blocks, BLOCK)
    return values.mul_(scales[:, None]).to(dtype).view(weight.codes.shape[0], 2 * weight.codes.shape[1])


def _torch_dequantise(codes: Sequence[Tensor], scales: Sequence[Tensor], outers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    flat = torch.empty(sum(2 * c.numel() for c in codes), dtype=dtype, device=codes[0].device)
    pieces = flat.split([2 * c.numel() for c in codes])
    for piece, *parts in zip(pieces, codes, scales, outers, strict=True):
        piece.copy_(dequantise_rows(NF4(*parts), dtype, 0).view(-1))
    return flat


def _dequantise_on_cuda(codes: Sequence[Tensor], scales: Sequence[Tensor], outers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    from rayft_kernels.nf4 import triton

    if not triton.HAS_TRITON or dtype not in triton.SUPPORTED:
        return _torch_dequantise(codes, scales, outers, dtype)
    with torch.cuda.device(codes[0].device):
        return triton.dequantise(codes, scales, outers, dtype)


_dequantise: Any = torch.library.custom_op("rayft_kernels::nf4_dequantise", _torch_dequantise, mutates_args=())
_dequantise.register_kernel("cuda", _dequantise_on_cuda)


@_dequantise.register_fake
def _(codes: Sequence[Tensor], scales: Sequence[Tensor], outers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return codes[0].new_empty(sum(2 * c.numel() for c in codes), dtype=dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, outer: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales, outer)
        return x @ dequantise([NF4(codes, scales, outer)], x.dtype)[0].t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ dequantise([NF4(*ctx.saved_tensors)], grad.dtype)[0], None, None, None


def nf4_linear(x: Tensor, weight: NF4) -> Tensor:
    """x W^T: [..., in] -> [..., out]. The weight in x's type lives only inside of forward and backward, and gets no gradient."""
    out: Tensor = _Linear.apply(x, *weight)
    return out
