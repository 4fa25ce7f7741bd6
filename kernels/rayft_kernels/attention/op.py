"""Attention of packed documents: each token sees the tokens of its own document up to itself, and of a window if there is one.

    out_i = sum over j of softmax_j(s_ij) v_j,    s_ij = scale q_i k_j, or softcap tanh(scale q_i k_j / softcap)

Grouped query heads share a key head. Kept for the backward are q, k, v, out and lse; the probabilities are computed anew. Sums are
float32 (float64 for float64 tensors); products take operands in the type of q. The ops are opaque to torch.compile; CUDA runs Triton,
everything else (and float64) the torch bodies below, which hold all scores and are for checks. A gradient has no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_COLUMNS = 512


def document_bounds(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """First token of each token's document, and the one after its last.

    Args:
        cu_seqlens: int32 [documents + 1 or more], from 0 to `tokens`, never falling; entries that repeat are empty documents.
        tokens: T.

    Returns:
        int32 [T] each, on the device of cu_seqlens, found there without waiting for it.
    """
    cu_seqlens = cu_seqlens.to(torch.int32)
    place = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    after = torch.searchsorted(cu_seqlens, place, right=True)
    return cu_seqlens[after - 1], cu_seqlens[after]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[Tensor, Tensor],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents.

    Args:
        q: [T, H, D]; k, v: [T, K, D] of the same type, H a multiple of K, D at most 512. Any strides; columns that do not lie side by side
            are copied.
        bounds: from `document_bounds`; once for all layers.
        scale: of the scores; None is D ** -0.5.
        window: a token sees itself and the window - 1 tokens before it; None is the whole document.
        softcap: scores are softcap * tanh(scores / softcap).
        longest: no document is longer. A head_dim above 256 then takes fewer launches; a number that is too small gives wrong results.

    Returns:
        ([T, H, D], contiguous, in the type of q; log of the sum of exp of each row's scores, float32 [H, T], float64 for float64).

    Raises:
        ValueError: shapes or types that do not fit, or a window, cap or longest that is not positive.
    """
    _check(q, k, v, bounds)
    for name, value in (("window", window), ("softcap", softcap), ("longest", longest)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}: it must be positive, or None.")
    out, lse = _attention(q, k, v, *bounds, q.shape[-1] ** -0.5 if scale is None else scale, window, softcap, longest)
    return out, lse


def _check(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor]) -> None:
    tokens, heads, dim = q.shape
    if k.shape != v.shape or k.shape[0] != tokens or k.shape[2] != dim or heads % k.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v are {shapes}: they must be [T, H, D], [T, K, D] and [T, K, D] with K a divisor of H.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: they must have one type.")
    if dim > MOST_COLUMNS:
        raise ValueError(f"head_dim is {dim}: it must be at most {MOST_COLUMNS}.")
    if any(x.shape != (tokens,) for x in bounds):
        raise ValueError(f"bounds are of {', '.join(str(tuple(x.shape)) for x in bounds)} tokens: q has {tokens}.")


def _scores(q: Tensor, k: Tensor, starts: Tensor, scale: float, window: int | None, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """([H, T, T] scores, -inf where masked; their derivative by the scaled product)."""
    groups = q.shape[1] // k.shape[1]
    scores = scale * torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(groups, 1))
    slope: Tensor | float = 1.0
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped**2
    place = torch.arange(len(q), device=q.device)
    low = starts if window is None else torch.maximum(starts, place - window + 1)
    return scores.masked_fill((place > place[:, None]) | (place < low[:, None]), float("-inf")), slope


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, scale: float, window: int | None, softcap: float | None,
    longest: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide_q, wide_k, wide_v = _widened(q, k, v)
    scores, _ = _scores(wide_q, wide_k, starts, scale, window, softcap)
    lse = torch.logsumexp(scores, -1)
    out = torch.einsum("hij,jhd->ihd", torch.exp(scores - lse[..., None]), wide_v.repeat_interleave(q.shape[1] // k.shape[1], 1))
    return out.to(q.dtype, memory_format=torch.contiguous_format).contiguous(), lse


def _torch_backward(
    grad: Tensor, lse_grad: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, ends: Tensor,
    scale: float, window: int | None, softcap: float | None, longest: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g, wide_q, wide_k, wide_v, wide_out = _widened(grad, q, k, v, out)
    groups = q.shape[1] // k.shape[1]
    scores, slope = _scores(wide_q, wide_k, starts, scale, window, softcap)
    p = torch.exp(scores - lse[..., None])
    sums = (g * wide_out).sum(-1).T - (0.0 if lse_grad is None else lse_grad)
    ds = p * (torch.einsum("ihd,jhd->hij", g, wide_v.repeat_interleave(groups, 1)) - sums[..., None]) * slope * scale
    dq = torch.einsum("hij,jhd->ihd", ds, wide_k.repeat_interleave(groups, 1))
    dk, dv = (torch.einsum("hij,ihd->jhd", w, x).unflatten(1, (-1, groups)).sum(2) for w, x in ((ds, wide_q), (p, g)))
    return tuple(d.to(q.dtype).contiguous() for d in (dq, dk, dv))  # type: ignore[return-value]


def _dense(tensor: Any) -> Any:
    """A tensor whose columns lie side by side."""
    return tensor if not isinstance(tensor, Tensor) or tensor.stride(-1) == 1 else tensor.contiguous()


def _operator(name: str, torch_body: Callable[..., Any], triton_body: str) -> Any:
    """An operator with a torch body for every device and, on CUDA, the function `triton_body` of the Triton module."""

    def on_cuda(*args: Any) -> Any:
        if args[0].dtype == torch.float64 or not args[0].numel():
            return torch_body(*args)
        from rayft_kernels.attention import triton

        with torch.cuda.device(args[0].device):
            return getattr(triton, triton_body)(*map(_dense, args))

    operator = torch.library.custom_op(f"rayft_kernels::{name}", torch_body, mutates_args=())
    operator.register_kernel("cuda", on_cuda)
    return operator


_attention = _operator("packed_attention", _torch_forward, "forward")
_attention_backward = _operator("packed_attention_backward", _torch_backward, "backward")


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, scale: float, window: int | None, softcap: float | None,
    longest: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse_type = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_type)


@_attention_backward.register_fake
def _(
    grad: Tensor, lse_grad: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, ends: Tensor,
    scale: float, window: int | None, softcap: float | None, longest: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ends, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, starts, ends)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, lse_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, starts, ends = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    dq, dk, dv = _attention_backward(grad, lse_grad, q, k, v, out, lse, starts, ends, *ctx.numbers)
    return dq, dk, dv, None, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
