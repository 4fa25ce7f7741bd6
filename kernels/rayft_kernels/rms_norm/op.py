"""RMSNorm over the last dimension: the norm of `norm_rope` without a rotation, with a row for each token."""

from __future__ import annotations

from torch import Tensor

from rayft_kernels.norm_rope.op import norm_rope


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, unit_offset: bool = False, casts: str = "once") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in float32, in the type of x.

    Args:
        x: [..., H], H even and at most 16384.
        weight: [H] or None.
        eps: above 0.
        unit_offset: the factor is 1 + weight.
        casts: once and gemma round at the end, llama also before the weight.

    Returns:
        The shape of x, contiguous.

    Raises:
        ValueError: see `qkv_norm_rope`.
    """
    return norm_rope(x.reshape(-1, 1, x.shape[-1]), weight, eps=eps, unit_offset=unit_offset, casts=casts).view(x.shape)
