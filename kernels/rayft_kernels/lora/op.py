"""The public operations: linear layers that read one input, and the gated MLP, each one autograd node.

For an input x [T, in], a frozen weight W [out, in] and an adapter A [r, in], B [out, r] with scale s:

    y = x W^T + bias + s (drop(x) A^T B^T + lora_bias)                                  LoRA, arXiv 2106.09685 (rsLoRA only has another s)
    y = m / n * (x W^T + s x A^T B^T) + bias,   n = |W + s B A| by rows, a constant     DoRA, arXiv 2402.09353 sec. 4.3

`lora_linears` is queries, keys and values (or queries and keys where values are the keys, or queries alone), `lora_linear` the output
projection, `lora_mlp` gate, up and down with the activation between. The input is saved once; h = act(gate) * up is computed again in the
backward; a weight never gets a gradient. On CUDA the products with B of gate and up, the product with A of down's gradient and the sums
over tokens of their gradients happen inside the activation's kernels (`glu.py`), so that no tensor of the MLP's width is read for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rayft_kernels.lora.linears import Static, linears
from rayft_kernels.lora.mlp import mlp
from rayft_kernels.nf4.op import NF4

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
"""SwiGLU, GeGLU with the tanh approximation, GeGLU with erf."""


class TokenDropout(NamedTuple):
    """Dropout whose mask is a hash of (token key, feature, seed), see `dropout.token_dropout`.

    Attributes:
        keys: int64 [T], each in [0, 2^32).
        seed: int64 [] on the CPU, the layer's, in [0, 2^31). A tensor, because torch.compile makes a graph for each value of an int.
        p: share that is dropped.
    """

    keys: Tensor
    seed: Tensor
    p: float


class Projection(NamedTuple):
    """One linear layer, with or without an adapter.

    Attributes:
        weight: [out, in], frozen; or in 4 bits, then it is made in the input's type inside of the forward and again of the backward.
        bias: [out] or None; may be trained.
        a, b: [r, in] and [out, r], or None for both.
        scale: alpha / r, or alpha / sqrt(r).
        magnitude: [out] for DoRA.
        lora_bias: [out], added by the adapter before the scale.
        dropout: on the adapter's input: a mask of the input's shape with values 0 and 1 / (1 - p), or a TokenDropout.
    """

    weight: Tensor | NF4
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    magnitude: Tensor | None = None
    lora_bias: Tensor | None = None
    dropout: Tensor | TokenDropout | None = None


def lora_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Every projection of one input.

    Args:
        x: [..., in].
        projections: of any outputs, ranks and options.

    Returns:
        [..., out] each, in order.

    Raises:
        ValueError: a weight wants a gradient, or a projection's parts do not belong together.
    """
    x, statics, tensors = _flatten(x, projections)
    with _without_autocast(x.device.type):
        outs = linears(x.reshape(-1, x.shape[-1]), statics, tensors)
    return tuple(out.reshape(*x.shape[:-1], out.shape[-1]) for out in outs)


def lora_linear(x: Tensor, projection: Projection) -> Tensor:
    """One projection: x [..., in] -> [..., out]. Raises as `lora_linears`."""
    return lora_linears(x, (projection,))[0]


def lora_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection, activation: str) -> Tensor:
    """down(act(gate(x)) * up(x)).

    Args:
        x: [..., hidden].
        gate, up: hidden -> intermediate; down: intermediate -> hidden.
        activation: one of ACTIVATIONS.

    Returns:
        [..., hidden].

    Raises:
        ValueError: the activation is not known, a weight wants a gradient, or a projection's parts do not belong together.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    x, statics, tensors = _flatten(x, (gate, up, down))
    with _without_autocast(x.device.type):
        out = mlp(x.reshape(-1, x.shape[-1]), activation, statics, tensors)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _without_autocast(kind: str) -> AbstractContextManager[object]:
    """Autocast off, so that it leaves the products inside alone. Turning it off where it is not on would cost as much as a launch."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _flatten(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, tuple[Static, ...], list[Tensor | None]]:
    """The input and, for each projection, its constants and its tensors in the order of SLOTS; in autocast's type inside autocast."""
    low = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    statics: list[Static] = []
    tensors: list[Tensor | None] = []
    for one in projections:
        _check(one)
        drop, seed, p = _dropout_parts(one.dropout)
        statics.append(Static(float(one.scale), p))
        codes, scales, outer = one.weight if isinstance(one.weight, NF4) else (_to(one.weight, low), None, None)
        small = (one.bias, one.a, one.b, one.magnitude, one.lora_bias, drop)  # the order of SLOTS
        tensors += (codes, *(small if low is None else [_to(tensor, low) for tensor in small]), seed, scales, outer)
    return _to(x, low), tuple(statics), tensors


def _dropout_parts(dropout: Tensor | TokenDropout | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Mask or keys, seed and share. Keys are shared by projections, and torch.compile takes no tensor twice: each gets a view."""
    if isinstance(dropout, TokenDropout):
        return dropout.keys.view(-1), dropout.seed, dropout.p
    return (None if dropout is None else dropout.reshape(-1, dropout.shape[-1])), None, 0.0


def _to(tensor: Any, dtype: torch.dtype | None) -> Any:
    return tensor if tensor is None or dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _check(one: Projection) -> None:
    if isinstance(one.weight, Tensor) and one.weight.requires_grad:
        raise ValueError("weight: must be frozen here, its gradient would be lost. Use the plain layer where the weight is trained")
    if (one.a is None) != (one.b is None):
        raise ValueError("a, b: an adapter has both or none. Give the missing one")
    if one.a is None and (one.magnitude is not None or one.lora_bias is not None or one.dropout is not None):
        raise ValueError("magnitude, lora_bias, dropout: belong to an adapter, and there is none. Give a and b, or leave them out")
    if one.magnitude is not None and one.lora_bias is not None:
        raise ValueError("lora_bias: has no place in DoRA, whose norm would have to contain it. Leave out one of both")
