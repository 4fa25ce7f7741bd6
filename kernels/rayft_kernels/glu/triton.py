"""Triton bodies of the gated activations: one pass over gate and up forward, one over gate, up and the gradient backward.

All three activations are gate times a sigmoid or a normal distribution function, so one formula serves both passes:

    act(g) = g s(g),    act'(g) = s(g) + g s'(g)

with s = sigmoid(g) for SiLU, sigmoid(2 c (g + 0.044715 g^3)), c = sqrt(2 / pi), for the tanh form of GELU (since
(1 + tanh z) / 2 = sigmoid(2 z)), and the normal distribution function for its exact form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


@dataclass(frozen=True)
class Block:
    """Elements and warps of one program."""

    elements: int = 2048
    warps: int = 8


BLOCK = Block()


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """e^x. As it is, Triton rounds x / ln 2 once, an error that grows with x; exactly, 2^n e^r with a remainder r in two roundings."""
    if not EXACT:
        return tl.exp(x)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, -1.42860677e-6, tl.fma(n, -0.693145752, x))
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def _gate(g, ACT: tl.constexpr, EXACT: tl.constexpr = False):
    """(s, s') of float32 g; EXACT where results are not rounded to a narrower type, which hides what is lost otherwise."""
    if ACT == 2:
        s = 0.5 * tl.erf(g * 0.7071067811865476) + 0.5
        slope = 0.3989422804014327 * _exp(-0.5 * g * g, EXACT)
    else:
        z, dz = g, 1.0
        if ACT == 1:
            z = 1.5957691216057308 * (g + 0.044715 * g * g * g)
            dz = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        e = _exp(tl.minimum(-z, 88.0), EXACT)
        s = tl.div_rn(1.0, 1.0 + e) if EXACT else 1.0 / (1.0 + e)
        slope = s * (e * s) * dz  # 1 - s = e s, which loses nothing where s is near 1
    return s, slope


@triton.jit
def _place(cols, BLOCK: tl.constexpr):
    """(row, first column, columns from there on, whether they exist) of this program, the scalars 64 bits wide."""
    blocks = tl.cdiv(cols, BLOCK)
    program = tl.program_id(0)
    start = (program % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    return (program // blocks).to(tl.int64), start, lane, lane < cols - start


@triton.jit
def _forward(gate_ptr, up_ptr, out_ptr, cols, gate_stride, up_stride, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row, start, lane, mask = _place(cols, BLOCK)
    g = tl.load(gate_ptr + (row * gate_stride + start) + lane, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + (row * up_stride + start) + lane, mask=mask, other=0.0).to(tl.float32)
    s, _ = _gate(g, ACT)
    tl.store(out_ptr + (row * cols + start) + lane, (g * s * u).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, cols, grad_stride, gate_stride, up_stride, d_stride,
    ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, lane, mask = _place(cols, BLOCK)
    dh = tl.load(grad_ptr + (row * grad_stride + start) + lane, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + (row * gate_stride + start) + lane, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + (row * up_stride + start) + lane, mask=mask, other=0.0).to(tl.float32)
    s, slope = _gate(g, ACT)
    d_gate, d_up = dh * u * (s + g * slope), dh * g * s
    out = row * d_stride + start
    tl.store(d_gate_ptr + out + lane, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(d_up_ptr + out + lane, d_up.to(d_up_ptr.dtype.element_ty), mask=mask)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors as [rows, columns] with contiguous columns: one long row if all are contiguous, views wherever strides allow."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    flat = [t.reshape(-1, t.shape[-1]) for t in tensors]
    return [t if t.stride(1) == 1 else t.contiguous() for t in flat]


def forward(gate: Tensor, up: Tensor, activation: str, block: Block | None = None) -> Tensor:
    """act(gate) * up, contiguous; both [..., I] of one type, rows apart by any stride."""
    block = block or BLOCK
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g, u = _rows(gate, up)
    if out.numel():
        _forward[(g.shape[0] * -(-g.shape[1] // block.elements),)](
            *(g, u, out, g.shape[1], g.stride(0), u.stride(0)),
            ACT=ACTIVATIONS[activation], BLOCK=block.elements, num_warps=block.warps,
        )  # fmt: skip
    return out


def forward_packed(gate_up: Tensor, activation: str) -> Tensor:
    """`forward` of the halves of [..., 2 I]."""
    gate, up = gate_up.chunk(2, -1)
    return forward(gate, up, activation)


def backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str, block: Block | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, contiguous, from that of the product; all [..., I], rows apart by any stride."""
    d_gate, d_up = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
    _backward_into(_rows(grad, gate, up, d_gate, d_up), activation, block or BLOCK)
    return d_gate, d_up


def backward_packed(grad: Tensor, gate_up: Tensor, activation: str, block: Block | None = None) -> Tensor:
    """Gradient of gate and up side by side, [..., 2 I] contiguous like the projection that they come from."""
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    _backward_into(_rows(grad, *gate_up.chunk(2, -1), *out.chunk(2, -1)), activation, block or BLOCK)
    return out


def _backward_into(tensors: list[Tensor], activation: str, block: Block) -> None:
    grad, gate, up, d_gate, _ = tensors
    rows, cols = gate.shape
    if grad.numel():
        _backward[(rows * -(-cols // block.elements),)](
            *tensors, cols, grad.stride(0), gate.stride(0), up.stride(0), d_gate.stride(0),
            ACT=ACTIVATIONS[activation], BLOCK=block.elements, num_warps=block.warps,
        )  # fmt: skip
