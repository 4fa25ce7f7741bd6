"""A gradient times the scalar that arrives in the backward: in place, or from its float32 sum into a narrower type in one pass.

Operators of their own, because torch rounds the scalar to the tensor's type first, or makes a float32 copy of the tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("rayft_kernels::scale_", mutates_args=("grad",))
def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, a scalar tensor."""
    grad.copy_(grad.to(torch.promote_types(grad.dtype, factor.dtype)) * factor)


@torch.library.custom_op("rayft_kernels::scaled", mutates_args=())
def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor, a scalar tensor, in `dtype`."""
    return (grad * factor).to(dtype)


@scaled.register_fake
def _(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


@scale_.register_kernel("cuda")
def _(grad: Tensor, factor: Tensor) -> None:
    from rayft_kernels.linear_cross_entropy import triton

    triton.scale(grad, factor, grad)


@scaled.register_kernel("cuda")
def _(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    from rayft_kernels.linear_cross_entropy import triton

    return triton.scale(grad, factor, torch.empty_like(grad, dtype=dtype))
