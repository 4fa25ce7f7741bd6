"""Forward and backward of linear layers that share an input, written once for `lora_linears` and for the parts of `lora_mlp`.

Shapes: x [T, in], weight [out, in], a [r, in], b [out, r]; the products drop(x) A^T are called low, [T, r].

The low-rank product is written first and the large product accumulates onto it (its scale is the product's beta), which costs one write of
the output instead of a further read and write. All A without dropout are stacked, so the input is read once for them. Gradients of A and
B are summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rayft_kernels.lora.dropout import token_dropout
from rayft_kernels.nf4.op import NF4, dequantise

SLOTS = ("weight", "bias", "a", "b", "magnitude", "lora_bias", "drop", "seed", "scales", "outer")
"""The tensors of a projection in the order in which autograd nodes take them."""


class Static(NamedTuple):
    """What is constant of a projection, and in a compiled graph: the adapter's scale and the share of its dropout."""

    scale: float
    p: float


class Part(NamedTuple):
    """One projection inside a node: the constants, and the tensors of SLOTS; with `scales` and `outer` its weight is the codes of NF4."""

    static: Static
    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    magnitude: Tensor | None
    lora_bias: Tensor | None
    drop: Tensor | None
    seed: Tensor | None
    scales: Tensor | None
    outer: Tensor | None


class Saved(NamedTuple):
    """What a projection keeps for its backward: low, and for DoRA the combined product [T, out] and the norms [out]."""

    low: Tensor | None = None
    combined: Tensor | None = None
    norm: Tensor | None = None


class Grads(NamedTuple):
    """Gradients in the order of SLOTS; those of the frozen weight and the dropout are always None."""

    weight: None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    magnitude: Tensor | None = None
    lora_bias: Tensor | None = None
    drop: None = None
    seed: None = None
    scales: None = None
    outer: None = None


Needs = tuple[bool, ...]
"""Which of SLOTS want a gradient."""


def parts_of(statics: Sequence[Static], tensors: Sequence[Tensor | None]) -> list[Part]:
    """The projections from their flat tensors."""
    width = len(SLOTS)
    return [Part(static, *cast(Any, tensors[width * i : width * (i + 1)])) for i, static in enumerate(statics)]


def needs_of(flags: Sequence[bool]) -> list[Needs]:
    """needs_input_grad of the flat tensors, by projection."""
    return [tuple(flags[i : i + len(SLOTS)]) for i in range(0, len(flags), len(SLOTS))]


def dense(parts: Sequence[Part], dtype: torch.dtype) -> list[Part]:
    """The projections with their weights [out, in] in `dtype` where these are held in 4 bits, all made by one kernel."""
    packed = [NF4(part.weight, part.scales, part.outer) for part in parts if part.scales is not None and part.outer is not None]
    made = iter(dequantise(packed, dtype) if packed else ())
    return [part if part.scales is None else part._replace(weight=next(made), scales=None, outer=None) for part in parts]


def dropped(x: Tensor, part: Part) -> Tensor:
    """The adapter's input, or equally the gradient on its way back through the dropout."""
    if part.drop is None:
        return x
    if part.seed is None:
        return x * part.drop.to(x.dtype)
    return token_dropout(x, part.drop, part.seed, part.static.p)


def lows_of(x: Tensor, parts: Sequence[Part]) -> list[Tensor | None]:
    """drop(x) A^T of every adapter; one product for all without dropout."""
    shared = [part.a.to(x.dtype) for part in parts if part.a is not None and part.drop is None]
    stacked = iter(torch.mm(x, _stack(shared).t()).split([a.shape[0] for a in shared], dim=1)) if shared else iter(())
    return [None if part.a is None else next(stacked) if part.drop is None else dropped(x, part) @ part.a.to(x.dtype).t() for part in parts]


def base(x: Tensor, part: Part) -> Tensor:
    """x W^T and the constants, without the low-rank product."""
    constant, weight = constant_of(part, x.dtype), part.weight
    return torch.mm(x, weight.t()) if constant is None else torch.addmm(constant, x, weight.t())


def constant_of(part: Part, dtype: torch.dtype) -> Tensor | None:
    """bias + s lora_bias, or None."""
    if part.lora_bias is None:
        return None if part.bias is None else part.bias.to(dtype)
    added = part.lora_bias.to(dtype) * part.static.scale
    return added if part.bias is None else added + part.bias.to(dtype)


def output(x: Tensor, part: Part, low: Tensor | None) -> tuple[Tensor, Saved]:
    """The projection of x, and what its backward needs."""
    if low is None:
        return base(x, part), Saved()
    assert part.a is not None and part.b is not None
    b, scale = part.b.to(x.dtype), part.static.scale
    if part.magnitude is not None:
        return _dora(x, part, low)
    constant = constant_of(part, x.dtype)
    out = torch.mm(low, b.t()) if constant is None else torch.addmm(constant, low, b.t(), alpha=scale)
    return accumulated(out, x, part.weight.t(), beta=scale if constant is None else 1.0), Saved(low)


def accumulated(total: Tensor, left: Tensor, right: Tensor, beta: float = 1.0) -> Tensor:
    """beta total + left right; in place but while compiling, where torch 2.11 takes an output changed in place for one without gradient."""
    if torch.compiler.is_compiling():
        return torch.addmm(total, left, right, beta=beta)
    return total.addmm_(left, right, beta=beta)


def _dora(x: Tensor, part: Part, low: Tensor) -> tuple[Tensor, Saved]:
    """gain (W x_d + s low B^T) + bias; with dropout the part of W x that was not dropped stays outside the gain, as in peft."""
    assert part.a is not None and part.b is not None and part.magnitude is not None
    weight, b = part.weight, part.b.to(x.dtype)
    norm = row_norms(weight, part.a, part.b, part.static.scale)
    combined = accumulated(low @ b.t(), dropped(x, part), weight.t(), beta=part.static.scale)
    out = combined * (part.magnitude / norm).to(x.dtype)
    if part.drop is not None:
        out = accumulated(out, x - dropped(x, part), weight.t())
    if part.bias is not None:
        out = out + part.bias
    return out, Saved(low, combined, norm)


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|W + s B A| of each row, float32 or wider [out], without the sum: |w|^2 + 2 s <w A^T, b> + s^2 b A A^T b^T."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    square = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    wa, gram = product(weight, a.to(weight.dtype).t(), wide), product(a, a.t(), wide)
    b = b.to(wide)
    square = square + 2 * scale * (wa * b).sum(1) + scale**2 * ((b @ gram) * b).sum(1)
    norm: Tensor = square.clamp_min(torch.finfo(wide).tiny).sqrt()
    return norm


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, summed and returned in a wider type than its factors'."""
    if left.dtype == dtype:
        return left @ right.to(dtype)
    if left.is_cuda:
        wide: Tensor = torch.mm(left, right, out_dtype=dtype)
        return wide
    return left.to(dtype) @ right.to(dtype)


def small_gradient(left: Tensor, right: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """s left^T right, a sum over tokens in float32 or wider, in the parameter's type."""
    total = product(left.t(), right, torch.promote_types(left.dtype, torch.float32))
    if scale == 1.0 or total.dtype == dtype:
        return total.to(dtype) if scale == 1.0 else total.mul_(scale)
    return torch.mul(total, scale, out=torch.empty_like(total, dtype=dtype))  # scaled and rounded at once


def sum_tokens(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over tokens in float32 or wider, in the parameter's type."""
    total: Tensor = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(dtype)
    return total


def inner(grad: Tensor, part: Part) -> Tensor:
    """s grad B: the gradient of low, [T, r]; scaled before it is rounded, inside of the product, which reads nothing of what it adds to."""
    assert part.b is not None
    b = part.b.to(grad.dtype)
    return torch.addmm(b[:1], grad, b, beta=0, alpha=part.static.scale)


def through_gain(grad: Tensor, part: Part, saved: Saved) -> Tensor:
    """The gradient of the combined product: the output's, times DoRA's gain."""
    if saved.norm is None:
        return grad
    assert part.magnitude is not None
    return grad * (part.magnitude / saved.norm).to(grad.dtype)


def side_gradients(grad: Tensor, gained: Tensor, part: Part, saved: Saved, needs: Needs) -> Grads:
    """Gradients of all that is small but A. The norm, not the magnitude, divides the magnitude's: a magnitude of 0 gives no NaN."""
    _, want_bias, _, want_b, want_magnitude, want_lora_bias, *_ = needs
    found: dict[str, Any] = {}
    if want_bias and part.bias is not None:
        found["bias"] = sum_tokens(grad, part.bias.dtype)
    if want_b and part.b is not None and saved.low is not None:
        found["b"] = small_gradient(gained, saved.low, part.b.dtype, part.static.scale)
    if want_magnitude and part.magnitude is not None and saved.combined is not None and saved.norm is not None:
        total = (grad * saved.combined).sum(0, dtype=saved.norm.dtype)
        found["magnitude"] = (total / saved.norm).to(part.magnitude.dtype)
    if want_lora_bias and part.lora_bias is not None:
        found["lora_bias"] = sum_tokens(gained, part.lora_bias.dtype).mul_(part.static.scale)
    return Grads(**found)


def backward(
    x: Tensor, parts: Sequence[Part], saved: Sequence[Saved], grads: Sequence[Tensor], needs: Sequence[Needs], need_x: bool
) -> tuple[Tensor | None, list[Grads]]:
    """Gradients of the input (None unless `need_x`) and of each projection's tensors.

    Args:
        x: [T, in].
        parts, saved, needs: by projection.
        grads: of the outputs, [T, out] each.
    """
    gained = [through_gain(g, part, s) for g, part, s in zip(grads, parts, saved, strict=True)]
    sides = [side_gradients(*item) for item in zip(grads, gained, parts, saved, needs, strict=True)]
    inners = [None if part.a is None else inner(g, part) for g, part in zip(gained, parts, strict=True)]
    together = [t for t, part in zip(inners, parts, strict=True) if t is not None and part.drop is None]
    stacked = _stack(together, dim=1) if together else None
    for index, gradient in _gradients_of_a(x, parts, inners, stacked, needs).items():
        sides[index] = sides[index]._replace(a=gradient)
    return (_gradient_of_x(parts, grads, gained, inners, stacked) if need_x else None), sides


def _gradients_of_a(
    x: Tensor, parts: Sequence[Part], inners: Sequence[Tensor | None], stacked: Tensor | None, needs: Sequence[Needs]
) -> dict[int, Tensor]:
    """Projection -> gradient of its A, [r, in]; those without dropout come from one product with their `stacked` inners."""
    adapted = [(i, part.a, part, t) for i, (part, t) in enumerate(zip(parts, inners, strict=True)) if part.a is not None and t is not None]
    found = {i: small_gradient(t, dropped(x, part), a.dtype) for i, a, part, t in adapted if part.drop is not None and needs[i][2]}
    shared = [(i, a) for i, a, part, _ in adapted if part.drop is None]
    if stacked is not None and any(needs[i][2] for i, _ in shared):
        dtypes = {a.dtype for _, a in shared}
        total = small_gradient(stacked, x, dtypes.pop() if len(dtypes) == 1 else torch.promote_types(x.dtype, torch.float32))
        pieces = total.split([a.shape[0] for _, a in shared])
        found |= {i: piece.to(a.dtype) for (i, a), piece in zip(shared, pieces, strict=True) if needs[i][2]}
    return found


def _gradient_of_x(
    parts: Sequence[Part], grads: Sequence[Tensor], gained: Sequence[Tensor], inners: Sequence[Tensor | None], stacked: Tensor | None
) -> Tensor:
    """[T, in]: the low-rank gradients first, then each large product accumulates onto them."""
    shared = [part.a.to(grad.dtype) for part, grad in zip(parts, grads, strict=True) if part.a is not None and part.drop is None]
    total = None if stacked is None else torch.mm(stacked, _stack(shared))
    for grad, through, part, t in zip(grads, gained, parts, inners, strict=True):
        weight = part.weight
        if part.drop is not None and t is not None and part.a is not None:
            low = t @ part.a.to(t.dtype)
            low = dropped(low if part.magnitude is None else low.addmm_(through - grad, weight), part)
            total, through = (low if total is None else total.add_(low)), grad
        total = torch.mm(through, weight) if total is None else total.addmm_(through, weight)
    assert total is not None
    return total


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, statics: tuple[Static, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        parts = dense(parts_of(statics, tensors), x.dtype)
        done = [output(x, part, low) for part, low in zip(parts, lows_of(x, parts), strict=True)]
        ctx.statics = statics
        ctx.save_for_backward(x, *tensors, *(tensor for _, saved in done for tensor in saved))
        return tuple(out for out, _ in done)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        count = len(ctx.statics)
        parts = dense(parts_of(ctx.statics, rest[: count * len(SLOTS)]), x.dtype)
        kept = rest[count * len(SLOTS) :]
        saved = [Saved(*kept[3 * i : 3 * i + 3]) for i in range(count)]
        need_x, _, *flags = ctx.needs_input_grad
        dx, found = backward(x, parts, saved, grads, needs_of(flags), need_x)
        return dx, None, *(gradient for one in found for gradient in one)


def linears(x: Tensor, statics: tuple[Static, ...], tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """All projections of x [T, in] as one autograd node; `tensors` in the order of SLOTS, projection by projection."""
    outs: tuple[Tensor, ...] = _Linears.apply(x, statics, *tensors)
    return outs
