"""Experts with low-rank adapters: the public operation.

For a token x with choices e of weights w_e (each expert's gate, up and down are linear, an adapter adds s (x A_e^T) B_e^T):

    y = sum over its choices of w_e down_e(act(gate_e(x)) * up_e(x))

Rows are sorted by expert once. The two base products are grouped products; what is read and written around them is folded in: tokens are
gathered where a product reads them, the low-rank term is added where it writes, the activation makes down's low-rank input, the weights
are applied in the sum over a token's choices. The forward keeps x, gate and up, and tensors of the rank's size; h is computed again. The
gradient of a weight w_e is <dh, h> with dh the gradient of h before weighting, so the experts' outputs are not kept. Neither W + s B A
nor its gradient exists at any time.

Adapters are laid out as peft lays them out (arXiv 2106.09685 for the method): A [E r, in] with the rows of an expert together, B
[out, r E] with the experts fastest, B.view(out, r, E)[:, :, e] being one expert's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rayft_kernels.moe_lora import steps
from rayft_kernels.moe_lora.routing import Route, route
from rayft_kernels.moe_lora.torch_body import wide

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
"""SwiGLU, GeGLU with the tanh approximation, GeGLU with erf."""

MAX_RANK = 128
"""Above it the low-rank factors of a block do not fit beside the weights in a multiprocessor's memory."""


class ExpertAdapter(NamedTuple):
    """Low-rank adapters of one stacked weight.

    Attributes:
        a: [E r, in].
        b: [out, r E].
        scale: alpha / r, or alpha / sqrt(r).
    """

    a: Tensor
    b: Tensor
    scale: float


class _Static(NamedTuple):
    """What is constant of a call."""

    activation: str
    transposed: bool
    scale_up: float
    scale_down: float


def moe_lora(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str = "silu", *,
    gate_up_adapter: ExpertAdapter | None = None, down_adapter: ExpertAdapter | None = None, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """The experts' weighted sum for each token.

    Args:
        x: [T, H].
        index: [T, k], the experts chosen for each token, in [0, E).
        weights: [T, k], what each choice counts.
        gate_up: [E, 2 I, H], gate above up; trained if it requires a gradient.
        down: [E, H, I]; likewise.
        activation: one of ACTIVATIONS.
        gate_up_adapter, down_adapter: of H -> 2 I and I -> H.
        transposed: the stacks are [E, H, 2 I] and [E, I, H].

    Returns:
        [T, H].

    Raises:
        ValueError: the activation is not known, or an adapter's or a stack's shape does not belong to the others'.
    """
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = x.to(low), gate_up.to(low), down.to(low)
    _check(x, gate_up, down, activation, gate_up_adapter, down_adapter, transposed)
    a_up, b_up, scale_up = gate_up_adapter or (None, None, 1.0)
    a_down, b_down, scale_down = down_adapter or (None, None, 1.0)
    static = _Static(activation, transposed, float(scale_up), float(scale_down))
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _Experts.apply(x, weights, gate_up, down, a_up, b_up, a_down, b_down, index, static)
    return out


def _check(
    x: Tensor, gate_up: Tensor, down: Tensor, activation: str, of_up: ExpertAdapter | None, of_down: ExpertAdapter | None, transposed: bool
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    experts, hidden = gate_up.shape[0], x.shape[1]
    double = gate_up.shape[2 if transposed else 1]
    if _oriented(gate_up, transposed).shape[2] != hidden or _oriented(down, transposed).shape != (experts, hidden, double // 2):
        sizes = f"{tuple(gate_up.shape)} and {tuple(down.shape)}"
        raise ValueError(f"gate_up, down = {sizes}: are no stacks for inputs of {hidden}. Check `transposed`")
    for name, adapter, (width, out) in (("gate_up", of_up, (hidden, double)), ("down", of_down, (double // 2, hidden))):
        if adapter is not None and (
            adapter.a.shape[0] % experts or adapter.a.shape[1] != width or adapter.b.shape != (out, adapter.a.shape[0])
        ):
            sizes = f"{tuple(adapter.a.shape)} and {tuple(adapter.b.shape)}"
            raise ValueError(f"{name}_adapter = {sizes}: must be [{experts} r, {width}] and [{out}, r {experts}]")
        if adapter is not None and adapter.a.shape[0] > MAX_RANK * experts:
            raise ValueError(f"{name}_adapter: has the rank {adapter.a.shape[0] // experts}, and at most {MAX_RANK} fits")


def _oriented(stack: Tensor, transposed: bool) -> Tensor:
    """The stack as [E, out, in]."""
    return stack.transpose(1, 2) if transposed else stack


def _padded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, r, width] with the rank padded with zeros to a power of two of at least 16, which a matrix unit takes."""
    rank = factor.shape[1]
    target = max(16, 1 << (rank - 1).bit_length())
    return torch.nn.functional.pad(factor.to(dtype), (0, 0, 0, target - rank)).contiguous()


def _factors(a: Tensor | None, b: Tensor | None, experts: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """A [E, r, in] and B^T [E, r, out] of every expert."""
    if a is None or b is None:
        return None, None
    of_b = b.reshape(b.shape[0], -1, experts).permute(2, 1, 0)
    return _padded(a.reshape(experts, -1, a.shape[1]), dtype), _padded(of_b, dtype)


def _gradient_of_a(found: Tensor, a: Tensor) -> Tensor:
    """[E, in, padded r] -> [E r, in]."""
    rank = a.shape[0] // found.shape[0]
    return found[:, :, :rank].transpose(1, 2).reshape(a.shape).to(a.dtype)


def _gradient_of_b(found: Tensor, b: Tensor) -> Tensor:
    """[E, out, padded r] -> [out, r E]."""
    rank = b.shape[1] // found.shape[0]
    return found[:, :, :rank].permute(1, 2, 0).reshape(b.shape).to(b.dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, a_up: Tensor | None, b_up: Tensor | None,
        a_down: Tensor | None, b_down: Tensor | None, index: Tensor, static: _Static,
    ) -> Tensor:  # fmt: skip
        experts, way = gate_up.shape[0], route(index, gate_up.shape[0])
        sorting = (way.order, way.ends, way.tiles)
        fa_up, fb_up = _factors(a_up, b_up, experts, x.dtype)
        fa_down, fb_down = _factors(a_down, b_down, experts, x.dtype)
        low_up = None if fa_up is None else steps.low(x, fa_up, *sorting, static.scale_up, way.top_k)
        packed = steps.product(x, _oriented(gate_up, static.transposed), low_up, fb_up, *sorting, way.top_k)
        h, low = steps.activate(packed, fa_down, way.ends, way.tiles, static.scale_down, static.activation)
        low_down = None if fa_down is None else low
        y = steps.product(h, _oriented(down, static.transposed), low_down, fb_down, *sorting, 0)
        ctx.static, ctx.top_k = static, way.top_k
        ctx.save_for_backward(x, weights, gate_up, down, a_up, b_up, a_down, b_down, *way[:4], packed, low_up, low_down)
        out: Tensor = steps.combine(y, way.place, weights, way.top_k)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up, down, a_up, b_up, a_down, b_down, *kept = ctx.saved_tensors
        order, place, ends, tiles, packed, low_up, low_down = kept
        needs, static, experts = ctx.needs_input_grad, ctx.static, gate_up.shape[0]
        way, dy = Route(order, place, ends, tiles, ctx.top_k), grads[0].contiguous()
        fa_up, fb_up = _factors(a_up, b_up, experts, x.dtype)
        fa_down, fb_down = _factors(a_down, b_down, experts, x.dtype)
        sorting = (order, ends, tiles)
        sorted_weights = weights.reshape(-1)[order]
        t_down = None if fb_down is None else steps.low(dy, fb_down, *sorting, static.scale_down, way.top_k)
        dh = steps.product(dy, _oriented(down, not static.transposed), t_down, fa_down, *sorting, way.top_k)
        keep = needs[3] or needs[6]
        d_packed, d_weights, t, h = steps.activate_backward(
            dh, packed, sorted_weights, fb_up, way.ends, way.tiles, static.scale_up, static.activation, keep
        )
        t_up = None if fb_up is None else t
        found: list[Tensor | None] = [None] * 10
        if needs[0]:
            d_rows = steps.product(d_packed, _oriented(gate_up, not static.transposed), t_up, fa_up, *sorting, 0)
            found[0] = steps.combine(d_rows, way.place, None, way.top_k)
        if needs[1]:
            found[1] = d_weights[way.place].view_as(weights).to(weights.dtype)
        if needs[2]:
            found[2] = _stack_gradient(d_packed, x, way, (0, way.top_k), static.transposed)
        if needs[3]:
            found[3] = _stack_gradient(dy, h, way, (way.top_k, 0), static.transposed)
        sums = (way.order, way.ends)
        if needs[4] and t_up is not None:
            found[4] = _gradient_of_a(steps.gram(x, t_up, *sums, way.top_k, 0, wide(x.dtype)), a_up)
        if needs[5] and low_up is not None:
            found[5] = _gradient_of_b(steps.gram(d_packed, low_up, *sums, 0, 0, wide(x.dtype)), b_up)
        if needs[6] and t_down is not None:
            found[6] = _gradient_of_a(steps.gram(h, t_down, *sums, 0, 0, wide(x.dtype)), a_down)
        if needs[7] and low_down is not None:
            weighted = low_down * sorted_weights[:, None].to(low_down.dtype)
            found[7] = _gradient_of_b(steps.gram(dy, weighted, *sums, way.top_k, 0, wide(x.dtype)), b_down)
        return tuple(found)


def _stack_gradient(of_out: Tensor, of_in: Tensor, way: Route, gathers: tuple[int, int], transposed: bool) -> Tensor:
    """The gradient of a stacked weight in its own layout."""
    left, right = (of_in, of_out) if transposed else (of_out, of_in)
    first, second = reversed(gathers) if transposed else gathers
    found: Tensor = steps.gram(left, right, way.order, way.ends, first, second, left.dtype)
    return found
