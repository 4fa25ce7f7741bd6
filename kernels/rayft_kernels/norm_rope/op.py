"""RMSNorm per head followed by rotary embedding, for query, key and value projections before attention.

For a row x [D] (one head of one token), weight w [D] and the token's cos, sin [n] with n <= D:

    r = 1 / sqrt(mean(x^2) + eps),   m = x r w          (w + 1 with unit_offset, x r without a weight)
    y = m cos + rot(m) sin           on the first n columns, y = m on the others;   rot([a, b]) = [-b, a]

and backward, with dm = dy cos + rot^T(dy sin), rot^T([a, b]) = [b, -a]:

    dw = sum over rows of dm x r,    g = dm w,    dx = r (g - x r mean(g x r)).

Values, weight, cos and sin enter in float32 (float64 for float64 rows). `casts` says where results are rounded to the type of x:

    once    at the end. The most accurate, the default.
    gemma   the norm's output, and each product and sum of the rotation: transformers' Gemma 3 and 4.
    llama   also x r before the weight: transformers' Llama, Qwen 3 and most others.

Gradients are those of the unrounded formula in every mode. The op is opaque to torch.compile and has a rule for fake tensors; where
nobody looks on, an autograd function calls the same bodies. CUDA runs Triton, everything else (and float64) the torch bodies below. cos
and sin get no gradient, and a gradient has none of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayft_kernels.direct import unobserved

CASTS = ("once", "gemma", "llama")
MOST_COLUMNS = 16384
"""A program keeps whole rows in its registers."""
PROGRAMS_PER_SM = 6
"""Backward programs of 128 threads whose registers fit a Hopper multiprocessor at once, so that none runs alone after the others."""


def qkv_norm_rope(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    casts: str = "once",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Norm and rotate q and k, norm v without weight or rotation, in one launch.

    Args:
        q: [B, S, H, D] or packed [T, H, D], D even and at most 16384; views of a packed projection are read where they lie.
        k: the same with its own number of heads, or None (layers that share keys).
        v: the same, or None for models without a value norm: use the projection itself.
        q_weight, k_weight: [D], any float type, or None for a norm without scale.
        cos, sin: [B or 1, S, n] (or [T, n] with packed rows), n even and at most D; None rotates nothing.
        eps: above 0.
        unit_offset: the factor is 1 + weight (Gemma 3).
        casts: once, gemma or llama: see the module docstring.

    Returns:
        (q, k, v), contiguous, in the type of the inputs; None where None was given.

    Raises:
        ValueError: shapes, eps or casts other than the above.
    """
    packed = q.dim() == 3
    if packed:
        q, k, v = q[None], None if k is None else k[None], None if v is None else v[None]
    if cos is not None and sin is not None and cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    _check(q, k, v, q_weight, k_weight, cos, sin, eps, casts)
    call = _NormRope.apply if unobserved(q, k, v, q_weight, k_weight, cos, sin) else _norm_rope
    q_out, k_out, v_out = call(q, k, v, q_weight, k_weight, cos, sin, eps, unit_offset, casts)
    k_out, v_out = None if k is None else k_out, None if v is None else v_out
    if packed:
        return q_out[0], None if k_out is None else k_out[0], None if v_out is None else v_out[0]
    return q_out, k_out, v_out


def norm_rope(
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    casts: str = "once",
) -> Tensor:
    """`qkv_norm_rope` of one tensor [B, S, H, D] or [T, H, D]."""
    return qkv_norm_rope(x, None, None, weight, None, cos, sin, eps=eps, unit_offset=unit_offset, casts=casts)[0]


def _check(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    casts: str,
) -> None:
    """Refuse what the bodies would read wrongly."""
    batch, seq, _, dim = q.shape
    if dim % 2 or dim > MOST_COLUMNS or eps <= 0 or casts not in CASTS:
        rule = f"D must be even and at most {MOST_COLUMNS}, eps positive, casts one of {', '.join(CASTS)}"
        raise ValueError(f"D {dim}, eps {eps}, casts {casts!r}: {rule}.")
    for name, x in (("k", k), ("v", v)):
        if x is not None and (x.dtype != q.dtype or x.shape[:2] != q.shape[:2] or x.shape[3] != dim):
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}: it must match q, {q.dtype} {tuple(q.shape)}, in all but heads.")
    for name, w in (("q_weight", q_weight), ("k_weight", k_weight)):
        if w is not None and w.shape != (dim,):
            raise ValueError(f"{name} has shape {tuple(w.shape)}: it must be ({dim},), one factor for each column.")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together, or neither of them.")
    for name, t in (("cos", cos), ("sin", sin)):
        if t is not None and (t.dim() != 3 or t.shape[0] not in (1, batch) or t.shape[1] != seq or t.shape[2] % 2 or t.shape[2] > dim):
            raise ValueError(f"{name} has shape {tuple(t.shape)}: it must be ({batch} or 1, {seq}, n), n even and at most {dim}.")


def _torch_norm_rope(q: Tensor, k: Tensor | None, v: Tensor | None, wq: Tensor | None, wk: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    cos, sin, *options = rest
    return _filled(
        q,
        _torch_forward(q, wq, cos, sin, *options),
        None if k is None else _torch_forward(k, wk, cos, sin, *options),
        None if v is None else _torch_forward(v, None, None, None, *options),
    )


def _torch_norm_rope_backward(
    gq: Tensor, gk: Tensor | None, gv: Tensor | None, q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    wq, wk, cos, sin, eps, unit_offset, need_wq, need_wk = rest
    dq, dwq = _torch_backward(gq, q, wq, cos, sin, eps, unit_offset)
    dk, dwk = (None, None) if k is None or gk is None else _torch_backward(gk, k, wk, cos, sin, eps, unit_offset)
    dv = None if v is None or gv is None else _torch_backward(gv, v, None, None, None, eps, unit_offset)[0]
    return _filled(q, dq, dk, dv, dwq if need_wq else None, dwk if need_wk else None)


def _filled(like: Tensor, *outputs: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns tensors only, and none twice: an empty one for each None."""
    return tuple(like.new_empty(0) if y is None else y for y in outputs)


def _torch_forward(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, unit_offset: bool, casts: str
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)

    def rounded(value: Tensor, when: bool) -> Tensor:
        return value.to(x.dtype).to(wide) if when else value

    m = x.to(wide)
    m = rounded(m * torch.rsqrt(m.square().mean(-1, keepdim=True) + eps), casts == "llama")
    if weight is not None:
        m = m * _factor(weight, unit_offset, wide)
    m = rounded(m, casts != "once")
    if cos is not None and sin is not None:
        n = cos.shape[-1]
        turned, rest = m[..., :n], m[..., n:]
        c, s = (t.to(wide)[:, :, None] for t in (cos, sin))
        y = rounded(turned * c, casts != "once") + rounded(_rotate(turned) * s, casts != "once")
        m = torch.cat((y, rest), -1)
    return m.to(x.dtype, memory_format=torch.contiguous_format, copy=True)


def _torch_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor | None]:
    wide = torch.promote_types(x.dtype, torch.float32)
    dm, h = grad.to(wide), x.to(wide)
    if cos is not None and sin is not None:
        n = cos.shape[-1]
        c, s = (t.to(wide)[:, :, None] for t in (cos, sin))
        turned = dm[..., :n]
        dm = torch.cat((turned * c - _rotate(turned * s), dm[..., n:]), -1)
    r = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h * r
    dw = None if weight is None else (dm * h).sum((0, 1, 2)).to(weight.dtype)
    g = dm if weight is None else dm * _factor(weight, unit_offset, wide)
    dx = r * (g - h * (g * h).mean(-1, keepdim=True))
    return dx.to(x.dtype, memory_format=torch.contiguous_format, copy=True), dw


def _factor(weight: Tensor, unit_offset: bool, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) + 1 if unit_offset else weight.to(dtype)


def _rotate(x: Tensor) -> Tensor:
    """rot; its transpose is its negative."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _cuda_norm_rope(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from rayft_kernels.norm_rope import triton

    with torch.cuda.device(q.device):
        return _filled(q, *triton.forward(*map(_with_dense_columns, (q, *rest))))


def _cuda_norm_rope_backward(
    gq: Tensor, gk: Tensor | None, gv: Tensor | None, q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    from rayft_kernels.norm_rope import triton

    gq, gk, gv, q, k, v, wq, wk, cos, sin, eps, unit_offset, *needs = map(_with_dense_columns, (gq, gk, gv, q, k, v, *rest))
    with torch.cuda.device(q.device):
        grads = triton.backward((gq, gk, gv), q, k, v, wq, wk, cos, sin, eps, unit_offset, (needs[0], needs[1]), _programs(q.device))
    return _filled(q, *grads)


def _with_dense_columns(x: Any) -> Any:
    """A tensor whose columns lie side by side: x itself, but for an expanded gradient or a transposed view."""
    return x.contiguous() if isinstance(x, Tensor) and x.stride(-1) != 1 else x


@cache
def _programs(device: torch.device) -> int:
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _bodies(q: Tensor) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    """Forward and backward for tensors like q."""
    if q.is_cuda and q.dtype != torch.float64:
        return _cuda_norm_rope, _cuda_norm_rope_backward
    return _torch_norm_rope, _torch_norm_rope_backward


def _forward(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _bodies(q)[0](q, *rest)


def _backward(gq: Tensor, gk: Tensor | None, gv: Tensor | None, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _bodies(q)[1](gq, gk, gv, q, *rest)


_COMMON = "Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, bool unit_offset"
_norm_rope = torch.library.custom_op(
    "rayft_kernels::norm_rope",
    _forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor? k, Tensor? v, {_COMMON}, str casts) -> (Tensor, Tensor, Tensor)",
)
_norm_rope_backward = torch.library.custom_op(
    "rayft_kernels::norm_rope_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor gq, Tensor? gk, Tensor? gv, Tensor q, Tensor? k, Tensor? v, {_COMMON}, bool need_wq, bool need_wk)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_norm_rope.register_fake
def _(q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0 if x is None else x.shape) for x in (q, k, v))


@_norm_rope_backward.register_fake
def _(gq: Tensor, gk: Tensor | None, gv: Tensor | None, q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    wq, wk, *_, need_wq, need_wk = rest
    dx = [q.new_empty(0 if x is None else x.shape) for x in (q, k, v)]
    dw = [w.new_empty(w.shape) if need and w is not None else q.new_empty(0) for w, need in ((wq, need_wq), (wk, need_wk))]
    return (*dx, *dw)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, eps, unit_offset, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (eps, unit_offset)


def _differentiate(backward: Callable[..., tuple[Tensor, ...]], ctx: Any, gq: Tensor, gk: Tensor, gv: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *others = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = (gq, None if k is None else gk, None if v is None else gv)
    dq, dk, dv, dwq, dwk = backward(*grads, q, k, v, *others, *ctx.options, needs[3], needs[4])
    return (
        dq,
        None if k is None else dk,
        None if v is None else dv,
        dwq if needs[3] else None,
        dwk if needs[4] else None,
        *[None] * 5,
    )


_norm_rope.register_autograd(partial(_differentiate, _norm_rope_backward), setup_context=_save)


class _NormRope(torch.autograd.Function):
    """The operator without the dispatcher; without setup_context, whose presence makes torch inspect the signature in every call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        _save(ctx, inputs, ())
        return _forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _differentiate(_backward, ctx, *grads)
