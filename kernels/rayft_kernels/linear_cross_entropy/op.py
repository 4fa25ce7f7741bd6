"""The two head operations. Logits exist only for a chunk of rows or columns at a time.

For a row with hidden state h [H], head W [V, H], bias b [V] and target y:

    u = W h + b                                   raw logits
    c = softcap * tanh(u / softcap)               when softcap is given, else u (Gemma 2, arXiv 2408.00118)
    z = logit_scale * c                           1 / temperature for sampling temperatures
    p = softmax(z),  lse = log sum exp z

`weighted_nll_sum` is the sum over rows of
    w * [ (1 - s) (lse - z_y) + s (lse - mean z) + zeta * lse^2 ]
with label smoothing s (arXiv 1512.00567 sec. 7) and z-loss zeta (arXiv 2204.02311 sec. 5); its gradient is known in the
forward, because the weights are, so each chunk's logits are used once:
    dz = w * [ (1 + 2 zeta lse) p - (1 - s) onehot(y) - s / V ].

`token_logprobs` returns log p_y and the entropy -sum p log p per row, and recomputes the chunks in the backward:
    dz = dlogp (onehot(y) - p) - dentropy p (log p + entropy).

Each is an operator of torch with two bodies, torch_body.py and, on CUDA, cuda_body.py. Sums are float32 throughout. On CUDA
`weighted_nll_sum` rounds logits to the inputs' type, as a head that is a Linear does; `token_logprobs` keeps them float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rayft_kernels.linear_cross_entropy import torch_body
from rayft_kernels.linear_cross_entropy.chunks import Head, chunk_rows, weighted_nll_bytes
from rayft_kernels.linear_cross_entropy.scaling import scale_, scaled

__all__ = ["chunk_rows", "token_logprobs", "weighted_nll_bytes", "weighted_nll_rows", "weighted_nll_sum"]


def weighted_nll_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    lean: bool = False,
) -> Tensor:
    """Sum over rows of the weighted negative log-likelihood; see `weighted_nll_rows`."""
    return weighted_nll_rows(
        hidden,
        weight,
        targets,
        loss_weights,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        lean=lean,
    )[0]


def weighted_nll_rows(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    lean: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum over rows of the weighted negative log-likelihood, and each row's part of it; gradients are made in the forward.

    The gradients are scaled in place when the backward runs, so it runs once per forward.

    Args:
        hidden: [M, H], any float type; under autocast it and the head are cast to autocast's type.
        weight: [V, H], the head, of the same type; no gradient is made for it when it does not require one.
        targets: int64 [M], each in [0, V).
        loss_weights: float32 [M]; not differentiated.
        bias: [V] or None.
        softcap, logit_scale, label_smoothing, z_loss: see the module docstring.
        lean: on CUDA, spend a fourth matrix product where the head is trained to hold no float32 copy of its gradient.

    Returns:
        (sum, parts), a float32 scalar and float32 [M] (float64 for float64 inputs); the parts have no gradient.
    """
    with _without_autocast(hidden, weight, bias) as (hidden, weight, bias):
        grad = torch.is_grad_enabled()
        needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        options = (softcap, float(logit_scale), float(label_smoothing), float(z_loss), needs, lean)
        total, rows, *_ = _weighted_nll(hidden, weight, targets, loss_weights, bias, *options)
    return total, rows


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row; the backward recomputes the logits.

    Args:
        hidden: [M, H], any float type; under autocast it and the head are cast to autocast's type.
        weight: [V, H], of the same type.
        targets: int64 [M], each in [0, V).
        bias: [V] or None.
        softcap, logit_scale: see the module docstring.

    Returns:
        (logprobs, entropy), float32 [M] each (float64 for float64 inputs); both are differentiable.
    """
    with _without_autocast(hidden, weight, bias) as (hidden, weight, bias):
        logprobs, entropy, _ = _token_logprobs(hidden, weight, targets, bias, softcap, float(logit_scale))
    return logprobs, entropy


@contextmanager
def _without_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The inputs in autocast's type if it is on, and autocast off, so that it leaves the products inside alone."""
    kind = hidden.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # is_autocast_available would break dynamo's graph
        yield hidden, weight, bias
        return
    low = torch.get_autocast_dtype(kind)
    inputs = hidden.to(low), weight.to(low), None if bias is None else bias.to(low)
    with torch.autocast(kind, enabled=False):
        yield inputs


def _filled(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns tensors only: what is not needed comes out empty."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


@torch.library.custom_op("rayft_kernels::weighted_nll", mutates_args=())
def _weighted_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    smoothing: float,
    z_loss: float,
    needs: Sequence[bool],
    lean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum, each row's part, and the sum's gradients by hidden, weight and bias."""
    head = Head(weight, bias, softcap, scale)
    total, rows, *grads = torch_body.weighted_nll(hidden, head, targets, loss_weights, smoothing, z_loss, needs)
    return _filled(hidden, total, rows, *grads)  # type: ignore[return-value]


@_weighted_nll.register_kernel("cuda")
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    *rest: Any,
) -> tuple[Tensor, ...]:
    from rayft_kernels.linear_cross_entropy import cuda_body

    head = Head(weight, bias, softcap, scale)
    if hidden.dtype == torch.float64:
        return _filled(hidden, *torch_body.weighted_nll(hidden, head, targets, loss_weights, *rest[:-1]))
    return _filled(hidden, *cuda_body.weighted_nll(hidden, head, targets, loss_weights, *rest))


@_weighted_nll.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, needs, lean = rest
    wide = torch_body.wide(hidden)
    rounded = weight.dtype if lean and hidden.is_cuda and hidden.dtype != torch.float64 else wide
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape, dtype=rounded) if needs[1] else hidden.new_empty(0),
        weight.new_empty(weight.shape[0], dtype=wide) if needs[2] else hidden.new_empty(0),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, _, _, bias, *_ = inputs
    ctx.types = (weight.dtype, None if bias is None else bias.dtype)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _scale_gradients(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    of_hidden, of_weight, of_bias = ctx.saved_tensors
    weight_type, bias_type = ctx.types
    needs = ctx.needs_input_grad
    return (
        _times(of_hidden, grad_total, of_hidden.dtype) if needs[0] else None,
        _times(of_weight, grad_total, weight_type) if needs[1] else None,
        None,
        None,
        _times(of_bias, grad_total, bias_type) if needs[4] else None,
        *(None,) * 6,
    )


def _times(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in `dtype`: in place where it has that type."""
    if grad.dtype == dtype:
        scale_(grad, factor)
    else:
        grad = scaled(grad, factor, dtype)
    return grad


_weighted_nll.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@torch.library.custom_op("rayft_kernels::token_logprobs", mutates_args=())
def _token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the target, entropy and log sum exp of each row."""
    return torch_body.token_terms(hidden, Head(weight, bias, softcap, scale), targets)


@_token_logprobs.register_kernel("cuda")
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from rayft_kernels.linear_cross_entropy import cuda_body

    token_terms = torch_body.token_terms if hidden.dtype == torch.float64 else cuda_body.token_terms
    return token_terms(hidden, Head(weight, bias, softcap, scale), targets)


@_token_logprobs.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (hidden.new_empty(hidden.shape[0], dtype=torch_body.wide(hidden)) for _ in range(3))
    return a, b, c


@torch.library.custom_op("rayft_kernels::token_logprobs_backward", mutates_args=())
def _token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    softcap: float | None,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, in their types."""
    head = Head(weight, bias, softcap, scale)
    grads = torch_body.token_terms_backward(grad_logprobs, grad_entropy, hidden, head, targets, lse, entropy, needs)
    return _in_their_types(hidden, head, grads)


@_token_logprobs_backward.register_kernel("cuda")
def _(
    grad_logprobs: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from rayft_kernels.linear_cross_entropy import cuda_body

    lse, entropy, softcap, scale, needs = rest
    head = Head(weight, bias, softcap, scale)
    backward = torch_body.token_terms_backward if hidden.dtype == torch.float64 else cuda_body.token_terms_backward
    return _in_their_types(hidden, head, backward(grad_logprobs, grad_entropy, hidden, head, targets, lse, entropy, needs))


def _in_their_types(hidden: Tensor, head: Head, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    of_hidden, of_weight, of_bias = _filled(hidden, *grads)
    return of_hidden, of_weight.to(head.weight.dtype), of_bias if head.bias is None else of_bias.to(head.bias.dtype)


@_token_logprobs_backward.register_fake
def _(grad_logprobs: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    types = (hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype)
    return tuple(hidden.new_empty(shape if need else 0, dtype=dtype) for shape, dtype, need in zip(shapes, types, rest[-1], strict=True))


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, *ctx.options = inputs
    _, entropy, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(hidden, weight, targets, bias, lse, entropy)


def _recompute_gradients(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
    grads = _token_logprobs_backward(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.options, needs)
    of_hidden, of_weight, of_bias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return of_hidden, of_weight, None, of_bias, None, None


_token_logprobs.register_autograd(_recompute_gradients, setup_context=_keep_inputs)
