"""act(gate) * up and its backward, with the low-rank parts of gate, up and of h's gradient added on the way.

Both functions run one Triton kernel on CUDA; the torch bodies are their reference and serve CPUs and float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rayft_kernels.direct import unobserved
from rayft_kernels.glu.op import _factor
from rayft_kernels.lora.triton import (
    HAS_TRITON,
    SUPPORTED,
    glu_backward_body,
    glu_backward_kernel,
    glu_forward_body,
    glu_forward_kernel,
    padded,
)


class Fold(NamedTuple):
    """A low-rank product s low wide^T that is added inside: low [T, r], wide [I, r]."""

    low: Tensor
    wide: Tensor
    scale: float


def glu_forward(gate: Tensor, up: Tensor, folds: Sequence[Fold | None], activation: str) -> Tensor:
    """h = act(gate + fold) * (up + fold).

    Args:
        gate, up: [T, I].
        folds: of gate and up.
        activation: silu, gelu_tanh or gelu.
    """
    if not _on_triton(gate):
        e, u = _completed(gate, folds[0]), _completed(up, folds[1])
        return (e * _factor(e, activation)[0] * u).to(gate.dtype)
    of_gate, of_up = folds
    run = glu_forward_body if unobserved(gate, up) else glu_forward_kernel
    h: Tensor = run(gate, up, *_arguments(of_gate, gate), *_arguments(of_up, gate), activation)
    return h


def glu_backward(
    dh: Tensor, gate: Tensor, up: Tensor, folds: Sequence[Fold | None], activation: str
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Gradients of gate and up, and of each fold's wide factor as a sum over tokens, float32 or wider [r, I], without its scale.

    Args:
        dh: [T, I], overwritten.
        gate, up: [T, I], as given to the forward.
        folds: of gate, up and dh; low of the last is scaled already.
    """
    if not _on_triton(dh):
        return _backward_reference(dh, gate, up, folds, activation)
    g, u, d = folds
    low_d, wide_d, _ = _arguments(d, dh)
    run = glu_backward_body if unobserved(dh, gate, up) else glu_backward_kernel
    du, sums = run(dh, gate, up, *_arguments(g, dh), *_arguments(u, dh), low_d, wide_d, activation)
    pieces = iter(sums.split([padded(fold.low.shape[1]) for fold in folds if fold is not None]))
    return dh, du, [None if fold is None else next(pieces)[: fold.low.shape[1]] for fold in folds]


def _on_triton(x: Tensor) -> bool:
    return HAS_TRITON and x.is_cuda and x.dtype in SUPPORTED


def _arguments(fold: Fold | None, like: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    return (None, None, 0.0) if fold is None else (fold.low, fold.wide.to(like.dtype), fold.scale)


def _completed(x: Tensor, fold: Fold | None) -> Tensor:
    """x and its low-rank part in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    return x if fold is None else torch.addmm(x, fold.low.to(wide), fold.wide.to(wide).t(), alpha=fold.scale)


def _backward_reference(
    dh: Tensor, gate: Tensor, up: Tensor, folds: Sequence[Fold | None], activation: str
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    e, u, grad = _completed(gate, folds[0]), _completed(up, folds[1]), _completed(dh, folds[2])
    s, slope = _factor(e, activation)
    de, du = (grad * u * (s + e * slope)).to(dh.dtype), (grad * e * s).to(dh.dtype)
    sources = (de, du, (e * s * u).to(dh.dtype))
    sums = [None if fold is None else fold.low.t().to(e.dtype) @ x.to(e.dtype) for fold, x in zip(folds, sources, strict=True)]
    return de, du, sums
