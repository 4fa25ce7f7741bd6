"""The grouped steps in plain torch, expert by expert: the CPU's bodies, and what the Triton kernels are checked against.

Shapes as in `steps.py`. Products are summed in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

_C = 0.7978845608028654  # sqrt(2 / pi)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums over tensors of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, with its rows."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def rows_of(x: Tensor, order: Tensor, gather: int) -> Tensor:
    """x by sorted row: its tokens' rows where x has one row a token."""
    return x[(order // gather).long()] if gather else x


def low(x: Tensor, factor: Tensor, order: Tensor, ends: Tensor, scale: float, gather: int) -> Tensor:
    """`steps.low`."""
    x = rows_of(x, order, gather)
    out = x.new_zeros(x.shape[0], factor.shape[1])
    for expert, rows in groups(ends):
        kind = wide(x.dtype)
        out[rows] = (scale * (x[rows].to(kind) @ factor[expert].t().to(kind))).to(x.dtype)
    return out


def product(x: Tensor, weight: Tensor, low: Tensor | None, factor: Tensor | None, order: Tensor, ends: Tensor, gather: int) -> Tensor:
    """`steps.product`."""
    x = rows_of(x, order, gather)
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, rows in groups(ends):
        if low is None or factor is None:
            out[rows] = x[rows] @ weight[expert].t()
        else:
            out[rows] = torch.addmm(low[rows] @ factor[expert], x[rows], weight[expert].t())
    return out


def activation_parts(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(act(gate), its derivative)."""
    if activation == "silu":
        s = torch.sigmoid(gate)
        return gate * s, s * (1 + gate * (1 - s))
    if activation == "gelu":
        phi = torch.exp(-0.5 * gate * gate) * (_C / 2)
        share = 0.5 * (1 + torch.erf(gate * 0.5**0.5))
        return gate * share, share + gate * phi
    t = torch.tanh(_C * (gate + 0.044715 * gate**3))
    return F.gelu(gate, approximate="tanh"), 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * _C * (1 + 0.134145 * gate * gate)


def activate(gate_up: Tensor, factor: Tensor | None, ends: Tensor, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """`steps.activate`."""
    gate, up = gate_up.to(wide(gate_up.dtype)).chunk(2, dim=1)
    h = (activation_parts(gate, activation)[0] * up).to(gate_up.dtype)
    return h, h.new_empty(0) if factor is None else low(h, factor, ends, ends, scale, 0)


def activate_backward(
    dh: Tensor, gate_up: Tensor, weights: Tensor, factor: Tensor | None, ends: Tensor, scale: float, activation: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`steps.activate_backward`."""
    kind = wide(dh.dtype)
    gate, up = gate_up.to(kind).chunk(2, dim=1)
    grad, weight = dh.to(kind), weights.to(kind)[:, None]
    value, slope = activation_parts(gate, activation)
    h = value * up
    d_gate_up = torch.cat((weight * grad * up * slope, weight * grad * value), 1).to(dh.dtype)
    t = dh.new_zeros(0) if factor is None else low(d_gate_up, factor, ends, ends, scale, 0)
    return d_gate_up, (grad * h).sum(1), t, (weight * h).to(dh.dtype) if keep else dh.new_empty(0)


def gram(left: Tensor, right: Tensor, order: Tensor, ends: Tensor, gather_left: int, gather_right: int, dtype: torch.dtype) -> Tensor:
    """`steps.gram`."""
    left, right = rows_of(left, order, gather_left), rows_of(right, order, gather_right)
    out = torch.zeros((ends.numel(), left.shape[1], right.shape[1]), dtype=dtype, device=left.device)
    for expert, rows in groups(ends):
        kind = wide(left.dtype)
        out[expert] = (left[rows].t().to(kind) @ right[rows].to(kind)).to(dtype)
    return out


def combine(y: Tensor, place: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """`steps.combine`."""
    kind = wide(y.dtype)
    rows = y[place.long()].to(kind).view(-1, top_k, y.shape[1])
    if weights is not None:
        rows = rows * weights.to(kind)[:, :, None]
    return rows.sum(1).to(y.dtype)
