"""Gated activation of an MLP: h = act(gate) * up, for SiLU (SwiGLU) and both forms of GELU (GeGLU).

    dgate = dh up act'(gate),    dup = dh act(gate)

Everything is computed in float32 (float64 for float64 tensors) and rounded once; transformers rounds act(gate) as well. Only gate and
up are kept for the backward, which computes the activation anew. Nothing is written in place. The ops are opaque to torch.compile;
CUDA runs Triton, everything else (and float64) the torch bodies below. A gradient has no gradient of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
"""x sigmoid(x); GELU by tanh, transformers' gelu_pytorch_tanh (Gemma); GELU by the error function."""


def glu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up.

    Args:
        gate, up: [..., I] of one type. Halves of a fused projection are read where they lie; `glu_packed` also writes their
            gradient in one piece.
        activation: silu, gelu_tanh or gelu.

    Returns:
        [..., I], contiguous, in the type of gate.

    Raises:
        ValueError: another activation, or shapes or types that differ.
    """
    _check(activation)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype} {tuple(gate.shape)}, up {up.dtype} {tuple(up.shape)}: they must be alike.")
    out: Tensor = _glu(gate, up, activation)
    return out


def glu_packed(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """`glu` of the two halves of one projection [..., 2 I], gate first; their gradient is one tensor of the same layout.

    Raises:
        ValueError: another activation, or an odd number of columns.
    """
    _check(activation)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[-1]} columns: gate and up must have half of an even number each.")
    out: Tensor = _glu_packed(gate_up, activation)
    return out


def _check(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: it must be one of {', '.join(ACTIVATIONS)}.")


def _torch_glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    g, u = _widened(gate, up)
    return (g * _factor(g, activation)[0] * u).to(gate.dtype, memory_format=torch.contiguous_format)


def _torch_glu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dh, g, u = _widened(grad, gate, up)
    s, slope = _factor(g, activation)
    d_gate, d_up = (d.to(gate.dtype, memory_format=torch.contiguous_format) for d in (dh * u * (s + g * slope), dh * g * s))
    return d_gate, d_up


def _torch_glu_packed(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return _torch_glu(gate, up, activation)


def _torch_glu_packed_backward(grad: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.cat(_torch_glu_backward(grad, gate, up, activation), -1)


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _factor(g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(s, s') with act(g) = g s(g)."""
    if activation == "gelu":
        return 0.5 * torch.erf(g * math.sqrt(0.5)) + 0.5, torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    if activation == "silu":
        s = torch.sigmoid(g)
        return s, s * (1 - s)
    c = 2 * math.sqrt(2 / math.pi)
    s = torch.sigmoid(c * (g + 0.044715 * g**3))
    return s, s * (1 - s) * c * (1 + 3 * 0.044715 * g**2)


def _operator(name: str, torch_body: Callable[..., Any], triton_body: str) -> Any:
    """An operator with a torch body for every device and, on CUDA, the function `triton_body` of the Triton module."""

    def on_cuda(*args: Any) -> Any:
        if args[0].dtype == torch.float64:
            return torch_body(*args)
        from rayft_kernels.glu import triton

        with torch.cuda.device(args[0].device):
            return getattr(triton, triton_body)(*args)

    operator = torch.library.custom_op(f"rayft_kernels::{name}", torch_body, mutates_args=())
    operator.register_kernel("cuda", on_cuda)
    return operator


_glu = _operator("glu", _torch_glu, "forward")
_glu_backward = _operator("glu_backward", _torch_glu_backward, "backward")
_glu_packed = _operator("glu_packed", _torch_glu_packed, "forward_packed")
_glu_packed_backward = _operator("glu_packed_backward", _torch_glu_packed_backward, "backward_packed")


@_glu.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@_glu_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@_glu_packed.register_fake
def _(gate_up: Tensor, activation: str) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@_glu_packed_backward.register_fake
def _(grad: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_glu_backward(grad, *ctx.saved_tensors, ctx.activation), None)


def _differentiate_packed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _glu_packed_backward(grad, *ctx.saved_tensors, ctx.activation), None


_glu.register_autograd(_differentiate, setup_context=_save)
_glu_packed.register_autograd(_differentiate_packed, setup_context=_save)
