"""Dropout of an adapter's input, its mask a hash of (token key, feature, seed) instead of a random state.

The same token is dropped in the same features wherever and whenever it is run, so the backward makes the mask again and nothing is saved.
The hash is the finaliser of MurmurHash3 on 32 bits (public domain, A. Appleby).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayft_kernels.direct import unobserved
from rayft_kernels.lora.triton import HAS_TRITON, SUPPORTED, dropout_body, dropout_kernel

_GOLDEN = 0x9E3779B1
_MASK = 0xFFFFFFFF


def token_dropout(x: Tensor, keys: Tensor, seed: Tensor, p: float) -> Tensor:
    """x / (1 - p) where the hash keeps it, else 0; linear in x and its own transpose. No autograd: call it inside a node.

    Args:
        x: [T, H].
        keys: int64 [T], each in [0, 2^32).
        seed: int64 [] on the CPU, in [0, 2^31).
        p: share that is dropped, in [0, 1).
    """
    if HAS_TRITON and x.is_cuda and x.dtype in SUPPORTED:
        dropped: Tensor = (dropout_body if unobserved(x, keys, seed) else dropout_kernel)(x, keys, seed, p)
        return dropped
    features = _mix(torch.arange(x.shape[-1], device=x.device, dtype=torch.int64) * _GOLDEN + seed)
    keep = _mix(keys[:, None] ^ features[None, :]) >= int(p * 2**32)
    return torch.where(keep, x / (1 - p), torch.zeros((), dtype=x.dtype, device=x.device))


def _mix(x: Tensor) -> Tensor:
    """The finaliser on int64 values; uniform in [0, 2^32)."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
