"""Gated activation of an MLP: h = act(gate) * up, for SiLU (SwiGLU) and both forms of GELU (GeGLU).

    dgate = dh up act'(gate),    dup = dh act(gate)

Everything is computed in float32 (float64 for float64 tensors) and rounded once; transformers rounds act(gate) as well. Only gate and
up are kept for the backward, which computes the activation anew. Nothing is written in place. The ops are opaque to torch.compile; where
nobody looks on, autograd functions call the same bodies. CUDA runs Triton, everything else (and float64) the torch bodies below. A
gradient has no gradient of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayft_kernels.direct import unobserved

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
    out: Tensor = (_Glu.apply if unobserved(gate, up) else _glu)(gate, up, activation)
    return out


def glu_packed(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """`glu` of the two halves of one projection [..., 2 I], gate first; their gradient is one tensor of the same layout.

    Raises:
        ValueError: another activation, or an odd number of columns.
    """
    _check(activation)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[-1]} columns: gate and up must have half of an even number each.")
    out: Tensor = (_GluPacked.apply if unobserved(gate_up) else _glu_packed)(gate_up, activation)
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


def _bodies(x: Tensor) -> dict[str, Callable[..., Any]]:
    """Operator -> its body for tensors like x."""
    return TORCH_BODIES if not x.is_cuda or x.dtype == torch.float64 else _cuda_bodies()


@cache
def _cuda_bodies() -> dict[str, Callable[..., Any]]:
    from rayft_kernels.glu import triton

    def on_its_device(body: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with torch.cuda.device(args[0].device):
                return body(*args)

        return run

    bodies: dict[str, Callable[..., Any]] = {
        "glu": triton.forward,
        "glu_backward": triton.backward,
        "glu_packed": triton.forward_packed,
        "glu_packed_backward": triton.backward_packed,
    }
    return {name: on_its_device(body) for name, body in bodies.items()}


TORCH_BODIES: dict[str, Callable[..., Any]] = {
    "glu": _torch_glu,
    "glu_backward": _torch_glu_backward,
    "glu_packed": _torch_glu_packed,
    "glu_packed_backward": _torch_glu_packed_backward,
}


def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    out: Tensor = _bodies(gate)["glu"](gate, up, activation)
    return out


def _backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = _bodies(gate)["glu_backward"](grad, gate, up, activation)
    return grads


def _forward_packed(gate_up: Tensor, activation: str) -> Tensor:
    out: Tensor = _bodies(gate_up)["glu_packed"](gate_up, activation)
    return out


def _backward_packed(grad: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    grad_gate_up: Tensor = _bodies(gate_up)["glu_packed_backward"](grad, gate_up, activation)
    return grad_gate_up


_glu = torch.library.custom_op("rayft_kernels::glu", _forward, mutates_args=())
_glu_backward = torch.library.custom_op("rayft_kernels::glu_backward", _backward, mutates_args=())
_glu_packed = torch.library.custom_op("rayft_kernels::glu_packed", _forward_packed, mutates_args=())
_glu_packed_backward = torch.library.custom_op("rayft_kernels::glu_packed_backward", _backward_packed, mutates_args=())


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


def _differentiate(backward: Callable[..., tuple[Tensor, Tensor]], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*backward(grad, *ctx.saved_tensors, ctx.activation), None)


def _differentiate_packed(backward: Callable[..., Tensor], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return backward(grad, *ctx.saved_tensors, ctx.activation), None


_glu.register_autograd(partial(_differentiate, _glu_backward), setup_context=_save)
_glu_packed.register_autograd(partial(_differentiate_packed, _glu_packed_backward), setup_context=_save)


class _Glu(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        out = _forward(gate, up, activation)
        _save(ctx, (gate, up, activation), out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _differentiate(_backward, ctx, *grads)


class _GluPacked(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        out = _forward_packed(gate_up, activation)
        _save(ctx, (gate_up, activation), out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _differentiate_packed(_backward_packed, ctx, *grads)
