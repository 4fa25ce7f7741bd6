"""The grouped steps as operators of torch, each with a Triton body for CUDA and a torch body elsewhere.

T tokens, k choices each, S = T k rows sorted by expert (`routing.Route`), E experts, r the padded rank. A factor is one half of an adapter
of every expert, [E, r, width]. `gather` is k where the input has one row a token and is read through the order, 0 where it has one a row.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from rayft_kernels.moe_lora import torch_body

HAS_TRITON = importlib.util.find_spec("triton") is not None
SUPPORTED = (torch.bfloat16, torch.float16, torch.float32)


def _triton(x: Tensor) -> ModuleType | None:
    """The Triton bodies where they run."""
    if not (HAS_TRITON and x.is_cuda and x.dtype in SUPPORTED):
        return None
    from rayft_kernels.moe_lora import triton as body

    return body


@torch.library.custom_op("rayft_kernels::moe_low", mutates_args=())
def low(x: Tensor, factor: Tensor, order: Tensor, ends: Tensor, tiles: Tensor, scale: float, gather: int) -> Tensor:
    """scale x_row factor_e^T, [S, r], of x [T or S, width]."""
    body = _triton(x)
    if body:
        return body.low(x, factor, order, tiles, scale, gather)  # type: ignore[no-any-return]
    return torch_body.low(x, factor, order, ends, scale, gather)


@torch.library.custom_op("rayft_kernels::moe_product", mutates_args=())
def product(
    x: Tensor, weight: Tensor, low: Tensor | None, factor: Tensor | None, order: Tensor, ends: Tensor, tiles: Tensor, gather: int
) -> Tensor:
    """x_row weight_e^T + low_row factor_e, [S, out], of x [T or S, in], weight [E, out, in] of any strides, factor [E, r, out]."""
    body = _triton(x)
    if body:
        return body.product(x, weight, low, factor, order, tiles, gather)  # type: ignore[no-any-return]
    return torch_body.product(x, weight, low, factor, order, ends, gather)


@torch.library.custom_op("rayft_kernels::moe_activate", mutates_args=())
def activate(gate_up: Tensor, factor: Tensor | None, ends: Tensor, tiles: Tensor, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """h = act(gate) * up, [S, I], of gate and up side by side; and scale h factor_e^T, [S, r], or nothing without a factor."""
    body = _triton(gate_up)
    if body:
        return body.activate(gate_up, factor, tiles, scale, activation)  # type: ignore[no-any-return]
    return torch_body.activate(gate_up, factor, ends, scale, activation)


@torch.library.custom_op("rayft_kernels::moe_activate_backward", mutates_args=())
def activate_backward(
    dh: Tensor, gate_up: Tensor, weights: Tensor, factor: Tensor | None, ends: Tensor, tiles: Tensor, scale: float, activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The backward of `activate`, where dh [S, I] is the gradient of h before the weights [S] of the rows.

    Returns:
        The gradient of gate and up [S, 2 I]; that of the weights, float32 or wider [S]; scale times the first and factor_e^T [S, r], or
        nothing without a factor; weights * h [S, I] if `keep`, else nothing.
    """
    body = _triton(dh)
    if body:
        return body.activate_backward(dh, gate_up, weights, factor, tiles, scale, activation, keep)  # type: ignore[no-any-return]
    return torch_body.activate_backward(dh, gate_up, weights, factor, ends, scale, activation, keep)


@torch.library.custom_op("rayft_kernels::moe_gram", mutates_args=())
def gram(left: Tensor, right: Tensor, order: Tensor, ends: Tensor, gather_left: int, gather_right: int, dtype: torch.dtype) -> Tensor:
    """The sum over an expert's rows of left_row^T right_row, [E, left width, right width]; zeros where an expert has none."""
    body = _triton(left) or torch_body
    return body.gram(left, right, order, ends, gather_left, gather_right, dtype)  # type: ignore[no-any-return]


@torch.library.custom_op("rayft_kernels::moe_combine", mutates_args=())
def combine(y: Tensor, place: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """The sum of each token's rows of y [S, width], times their weights [T, k] if given; [T, width]."""
    body = _triton(y) or torch_body
    return body.combine(y, place, weights, top_k)  # type: ignore[no-any-return]


@low.register_fake
def _(x: Tensor, factor: Tensor, order: Tensor, ends: Tensor, tiles: Tensor, scale: float, gather: int) -> Tensor:
    return x.new_empty(order.shape[0], factor.shape[1])


@product.register_fake
def _(
    x: Tensor, weight: Tensor, low: Tensor | None, factor: Tensor | None, order: Tensor, ends: Tensor, tiles: Tensor, gather: int
) -> Tensor:
    return x.new_empty(order.shape[0], weight.shape[1])


def _low_like(x: Tensor, factor: Tensor | None) -> Tensor:
    return x.new_empty(0) if factor is None else x.new_empty(x.shape[0], factor.shape[1])


@activate.register_fake
def _(gate_up: Tensor, factor: Tensor | None, ends: Tensor, tiles: Tensor, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2), _low_like(gate_up, factor)


@activate_backward.register_fake
def _(
    dh: Tensor, gate_up: Tensor, weights: Tensor, factor: Tensor | None, ends: Tensor, tiles: Tensor, scale: float, activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dweight = dh.new_empty(dh.shape[0], dtype=torch_body.wide(dh.dtype))
    return torch.empty_like(gate_up), dweight, _low_like(dh, factor), torch.empty_like(dh) if keep else dh.new_empty(0)


@gram.register_fake
def _(left: Tensor, right: Tensor, order: Tensor, ends: Tensor, gather_left: int, gather_right: int, dtype: torch.dtype) -> Tensor:
    return left.new_empty((ends.shape[0], left.shape[1], right.shape[1]), dtype=dtype)


@combine.register_fake
def _(y: Tensor, place: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    return y.new_empty(place.shape[0] // top_k, y.shape[1])
