"""The Triton kernels of this folder and their registration with torch. Importable where triton is not, then HAS_TRITON is False.

Gate and up arrive as x W^T alone. A tile of tokens x columns is completed with its low-rank product (`tl.dot` of [tokens, r] and
[r, columns], both tiny), then the activation is applied, all in float32. The backward walks a strip of columns over a share of the
tokens, so that the sums over tokens of three adapter gradients stay in registers; the shares are added afterwards in a fixed order, which
keeps it deterministic. Bytes per element of the MLP's width: forward 2 reads and 1 write, backward 3 reads and 2 writes.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from rayft_kernels.device import on_its_device

HAS_TRITON = importlib.util.find_spec("triton") is not None
SUPPORTED = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANK = 64
"""Above it the accumulators of the backward do not fit into registers, and the products are left to cuBLAS."""
FORWARD_TILE = (32, 128, 4)
BACKWARD_TILE = (32, 64, 4)
"""Tokens, columns and warps of a program, so small that several fit on a multiprocessor at once."""
BACKWARD_REGISTERS = 168
"""Of a thread, so that three programs of 128 threads share the 65,536 registers of a multiprocessor."""
SHARE_TOKENS = 512
"""Tokens that one program of the backward walks over."""

if HAS_TRITON:
    import triton
    import triton.language as tl

    from rayft_kernels.glu.triton import ACTIVATIONS as ACTIVATION_NUMBER
    from rayft_kernels.glu.triton import _gate

    @triton.jit
    def _low_tile(low_ptr, stride, rows, inside, R: tl.constexpr, P: tl.constexpr):
        """[tokens, P] of low, zero beyond its rank."""
        k = tl.arange(0, P)
        return tl.load(low_ptr + rows[:, None] * stride + k[None, :], mask=inside[:, None] & (k[None, :] < R), other=0.0)

    @triton.jit
    def _wide_tile(wide_ptr, stride_column, stride_rank, columns, inside, R: tl.constexpr, P: tl.constexpr):
        """[P, columns] of the other factor, zero beyond its rank."""
        k = tl.arange(0, P)
        pointers = wide_ptr + k[:, None] * stride_rank + columns[None, :].to(tl.int64) * stride_column
        return tl.load(pointers, mask=(k[:, None] < R) & inside[None, :], other=0.0)

    @triton.jit
    def _glu_forward(
        gate_ptr, up_ptr, out_ptr, low_g, wide_g, low_u, wide_u, stride_lg, stride_lu, wg_c, wg_r, wu_c, wu_r, tokens, width,
        RG: tl.constexpr, PG: tl.constexpr, SG: tl.constexpr, RU: tl.constexpr, PU: tl.constexpr, SU: tl.constexpr,
        KIND: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
    ):  # fmt: skip
        columns = tl.program_id(0) * BI + tl.arange(0, BI)
        rows = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
        at, inside = rows < tokens, columns < width
        place = rows[:, None] * width + columns[None, :]
        mask = at[:, None] & inside[None, :]
        e = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if PG > 0:
            low = _low_tile(low_g, stride_lg, rows, at, RG, PG)
            e += SG * tl.dot(low, _wide_tile(wide_g, wg_c, wg_r, columns, inside, RG, PG), input_precision="ieee")
        if PU > 0:
            low = _low_tile(low_u, stride_lu, rows, at, RU, PU)
            u += SU * tl.dot(low, _wide_tile(wide_u, wu_c, wu_r, columns, inside, RU, PU), input_precision="ieee")
        s, _ = _gate(e, KIND)
        tl.store(out_ptr + place, (e * s * u).to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _glu_backward(
        dh_ptr, gate_ptr, up_ptr, du_ptr, sums_ptr, low_g, wide_g, low_u, wide_u, low_d, wide_d, stride_lg, stride_lu, stride_ld,
        wg_c, wg_r, wu_c, wu_r, wd_c, wd_r, tokens, width,
        RG: tl.constexpr, PG: tl.constexpr, SG: tl.constexpr, RU: tl.constexpr, PU: tl.constexpr, SU: tl.constexpr,
        RD: tl.constexpr, PD: tl.constexpr, KIND: tl.constexpr, SHARE: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
    ):  # fmt: skip
        columns = tl.program_id(0) * BI + tl.arange(0, BI)
        inside = columns < width
        kind: tl.constexpr = dh_ptr.dtype.element_ty
        if PG > 0:
            wide_of_g = _wide_tile(wide_g, wg_c, wg_r, columns, inside, RG, PG)
            sum_g = tl.zeros((PG, BI), tl.float32)
        if PU > 0:
            wide_of_u = _wide_tile(wide_u, wu_c, wu_r, columns, inside, RU, PU)
            sum_u = tl.zeros((PU, BI), tl.float32)
        if PD > 0:
            wide_of_d = _wide_tile(wide_d, wd_c, wd_r, columns, inside, RD, PD)
            sum_d = tl.zeros((PD, BI), tl.float32)
        first = tl.program_id(1).to(tl.int64) * SHARE
        for start in range(0, SHARE, BT):
            rows = first + start + tl.arange(0, BT)
            at = rows < tokens
            place = rows[:, None] * width + columns[None, :]
            mask = at[:, None] & inside[None, :]
            e = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
            u = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
            dh = tl.load(dh_ptr + place, mask=mask, other=0.0).to(tl.float32)
            if PG > 0:
                low_of_g = _low_tile(low_g, stride_lg, rows, at, RG, PG)
                e += SG * tl.dot(low_of_g, wide_of_g, input_precision="ieee")
            if PU > 0:
                low_of_u = _low_tile(low_u, stride_lu, rows, at, RU, PU)
                u += SU * tl.dot(low_of_u, wide_of_u, input_precision="ieee")
            if PD > 0:
                low_of_d = _low_tile(low_d, stride_ld, rows, at, RD, PD)
                dh += tl.dot(low_of_d, wide_of_d, input_precision="ieee")
            s, slope = _gate(e, KIND)
            value = e * s
            de, du = (dh * u * (s + e * slope)).to(kind), (dh * value).to(kind)
            tl.store(dh_ptr + place, de, mask=mask)
            tl.store(du_ptr + place, du, mask=mask)
            if PG > 0:
                sum_g += tl.dot(tl.trans(low_of_g), de, input_precision="ieee")
            if PU > 0:
                sum_u += tl.dot(tl.trans(low_of_u), du, input_precision="ieee")
            if PD > 0:
                sum_d += tl.dot(tl.trans(low_of_d), (value * u).to(kind), input_precision="ieee")
        out = sums_ptr + tl.program_id(1).to(tl.int64) * (PG + PU + PD) * width + columns[None, :]
        if PG > 0:
            tl.store(out + tl.arange(0, PG)[:, None] * width, sum_g, mask=inside[None, :])
        if PU > 0:
            tl.store(out + (PG + tl.arange(0, PU))[:, None] * width, sum_u, mask=inside[None, :])
        if PD > 0:
            tl.store(out + (PG + PU + tl.arange(0, PD))[:, None] * width, sum_d, mask=inside[None, :])

    @triton.jit
    def _mix(x):
        """MurmurHash3's finaliser on uint32."""
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        return x ^ (x >> 16)

    @triton.jit
    def _dropout(x_ptr, keys_ptr, out_ptr, seed, threshold, gain, tokens, width, stride, BT: tl.constexpr, BI: tl.constexpr):
        columns = tl.program_id(0) * BI + tl.arange(0, BI)
        rows = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
        mask = (rows < tokens)[:, None] & (columns < width)[None, :]
        keys = tl.load(keys_ptr + rows, mask=rows < tokens, other=0).to(tl.uint32)
        features = _mix(columns.to(tl.uint32) * 0x9E3779B1 + seed)
        keep = _mix(keys[:, None] ^ features[None, :]).to(tl.int64) >= threshold
        x = tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=mask & keep, other=0.0).to(tl.float32)
        tl.store(out_ptr + rows[:, None] * width + columns[None, :], (x * gain).to(out_ptr.dtype.element_ty), mask=mask)


def padded(rank: int) -> int:
    """The rank that a dot computes with: at least 16, a power of two."""
    return max(16, 1 << (rank - 1).bit_length())


def _factor(low: Tensor | None, wide: Tensor | None, spare: Tensor) -> tuple[Tensor, Tensor, int, int, int, int, int]:
    """Arguments of one low-rank product: pointers, strides (of low's rows, of wide's columns and ranks), rank and padded rank."""
    if low is None or wide is None:
        return spare, spare, 0, 0, 0, 0, 0
    low = low if low.stride(1) == 1 else low.contiguous()
    rank = low.shape[1]
    return low, wide, low.stride(0), wide.stride(0), wide.stride(1), rank, padded(rank)


@on_its_device
def glu_forward_body(
    gate: Tensor,
    up: Tensor,
    low_g: Tensor | None,
    wide_g: Tensor | None,
    scale_g: float,
    low_u: Tensor | None,
    wide_u: Tensor | None,
    scale_u: float,
    activation: str,
) -> Tensor:
    """act(gate + s low wide^T) * (up + s low wide^T), [T, I]; gate and up contiguous, low [T, r], wide [I, r] of any strides."""
    tokens, width = gate.shape
    out = torch.empty_like(gate)
    lg, wg, stride_lg, wg_c, wg_r, rg, pg = _factor(low_g, wide_g, gate)
    lu, wu, stride_lu, wu_c, wu_r, ru, pu = _factor(low_u, wide_u, gate)
    rows, columns, warps = FORWARD_TILE
    grid = (-(-width // columns), -(-tokens // rows))
    if tokens:
        _glu_forward[grid](
            gate, up, out, lg, wg, lu, wu, stride_lg, stride_lu, wg_c, wg_r, wu_c, wu_r, tokens, width,
            RG=rg, PG=pg, SG=scale_g, RU=ru, PU=pu, SU=scale_u, KIND=ACTIVATION_NUMBER[activation], BT=rows, BI=columns, num_warps=warps,
        )  # fmt: skip
    return out


glu_forward_kernel = torch.library.custom_op("rayft_kernels::lora_glu_forward", glu_forward_body, mutates_args=())


@glu_forward_kernel.register_fake
def _(
    gate: Tensor,
    up: Tensor,
    low_g: Tensor | None,
    wide_g: Tensor | None,
    scale_g: float,
    low_u: Tensor | None,
    wide_u: Tensor | None,
    scale_u: float,
    activation: str,
) -> Tensor:
    return torch.empty_like(gate)


@on_its_device
def glu_backward_body(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    low_g: Tensor | None,
    wide_g: Tensor | None,
    scale_g: float,
    low_u: Tensor | None,
    wide_u: Tensor | None,
    scale_u: float,
    low_d: Tensor | None,
    wide_d: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Writes the gradient of gate over dh; returns up's [T, I] and, float32 [sum of padded ranks, I], the sums over tokens of
    low_g^T dgate, low_u^T dup and low_d^T h."""
    tokens, width = gate.shape
    du = torch.empty_like(dh)
    lg, wg, stride_lg, wg_c, wg_r, rg, pg = _factor(low_g, wide_g, gate)
    lu, wu, stride_lu, wu_c, wu_r, ru, pu = _factor(low_u, wide_u, gate)
    ld, wd, stride_ld, wd_c, wd_r, rd, pd = _factor(low_d, wide_d, gate)
    rows, columns, warps = BACKWARD_TILE
    rows = rows if max(pg, pu, pd) <= 16 else rows // 2  # the sums of larger ranks need the registers
    shares = -(-tokens // SHARE_TOKENS)
    sums = torch.empty(shares, pg + pu + pd, width, dtype=torch.float32, device=dh.device)
    if tokens:
        _glu_backward[(-(-width // columns), shares)](
            dh, gate, up, du, sums, lg, wg, lu, wu, ld, wd, stride_lg, stride_lu, stride_ld,
            wg_c, wg_r, wu_c, wu_r, wd_c, wd_r, tokens, width,
            RG=rg, PG=pg, SG=scale_g, RU=ru, PU=pu, SU=scale_u, RD=rd, PD=pd,
            KIND=ACTIVATION_NUMBER[activation], SHARE=SHARE_TOKENS, BT=rows, BI=columns, num_warps=warps, maxnreg=BACKWARD_REGISTERS,
        )  # fmt: skip
    return du, sums.sum(0)


glu_backward_kernel = torch.library.custom_op("rayft_kernels::lora_glu_backward", glu_backward_body, mutates_args=("dh",))


@glu_backward_kernel.register_fake
def _(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    low_g: Tensor | None,
    wide_g: Tensor | None,
    scale_g: float,
    low_u: Tensor | None,
    wide_u: Tensor | None,
    scale_u: float,
    low_d: Tensor | None,
    wide_d: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    rows = sum(padded(low.shape[1]) for low in (low_g, low_u, low_d) if low is not None)
    return torch.empty_like(dh), dh.new_empty((rows, dh.shape[1]), dtype=torch.float32)


@on_its_device
def dropout_body(x: Tensor, keys: Tensor, seed: Tensor, p: float) -> Tensor:
    """`dropout.token_dropout` in one kernel; the seed is on the CPU, so nothing waits for the device."""
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, width = x.shape
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if tokens:
        grid = (-(-width // 256), -(-tokens // 16))
        _dropout[grid](x, keys, out, int(seed), int(p * 2**32), 1 / (1 - p), tokens, width, x.stride(0), BT=16, BI=256, num_warps=8)
    return out


dropout_kernel = torch.library.custom_op("rayft_kernels::token_dropout", dropout_body, mutates_args=())


@dropout_kernel.register_fake
def _(x: Tensor, keys: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape)
