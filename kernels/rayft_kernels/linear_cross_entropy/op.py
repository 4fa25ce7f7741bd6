"""The two head operations. Logits exist only for a chunk of rows at a time, in float32.

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
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20
"""Float32 logits that a chunk may hold."""


def chunk_rows(num_rows: int, vocab: int) -> int:
    """Rows whose float32 logits fit in CHUNK_BYTES; at least one, at most `num_rows`."""
    return max(1, min(num_rows, CHUNK_BYTES // (4 * vocab)))


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
) -> Tensor:
    """Sum over rows of the weighted negative log-likelihood; gradients are made in the forward.

    Args:
        hidden: [M, H], any float type.
        weight: [V, H], the head; no gradient is made for it when it does not require one.
        targets: int64 [M], each in [0, V).
        loss_weights: float32 [M]; not differentiated.
        bias: [V] or None.
        softcap, logit_scale, label_smoothing, z_loss: see the module docstring.

    Returns:
        float32 scalar.
    """
    total: Tensor = _WeightedNll.apply(hidden, weight, targets, loss_weights, bias, softcap, logit_scale, label_smoothing, z_loss)
    return total


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
        hidden: [M, H], any float type.
        weight: [V, H].
        targets: int64 [M], each in [0, V).
        bias: [V] or None.
        softcap, logit_scale: see the module docstring.

    Returns:
        (logprobs, entropy), float32 [M] each; both are differentiable.
    """
    terms: tuple[Tensor, Tensor] = _TokenLogprobs.apply(hidden, weight, targets, bias, softcap, logit_scale)
    return terms


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """Float32 z [m, V], and tanh(u / softcap) when there is a softcap (its derivative needs it)."""
    raw = (hidden @ weight.t()).float()
    if bias is not None:
        raw += bias.float()
    if softcap is None:
        return (raw if scale == 1.0 else raw.mul_(scale)), None
    tanh = raw.div_(softcap).tanh_()
    return tanh * (softcap * scale), tanh


def _to_raw(grad_z: Tensor, tanh: Tensor | None, scale: float) -> Tensor:
    """Gradient with respect to the raw logits u, in place."""
    if scale != 1.0:
        grad_z *= scale
    if tanh is not None:
        grad_z *= 1 - tanh.square()
    return grad_z


class _HeadGradients:
    """Gradients of one head call, filled chunk by chunk: the hidden states' in their type, the head's in float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> None:
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs[1] else None
        self.bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if bias is not None and needs[2] else None

    def add(self, rows: slice, grad_raw: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Account for the chunk `rows`, whose raw-logit gradient is float32 [m, V]."""
        low = grad_raw.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = low @ weight
        if self.weight is not None:
            self.weight += low.t() @ hidden
        if self.bias is not None:
            self.bias += grad_raw.sum(0)


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss_weights: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        scale: float,
        smoothing: float,
        z_loss: float,
    ) -> Tensor:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4])
        grads = _HeadGradients(hidden, weight, bias, needs)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        vocab = weight.shape[0]
        step = chunk_rows(hidden.shape[0], vocab)
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            z, tanh = _logits(hidden[rows], weight, bias, softcap, scale)
            target, w = targets[rows, None], loss_weights[rows].float()
            lse = torch.logsumexp(z, -1)
            nll = (1 - smoothing) * (lse - z.gather(-1, target)[:, 0])
            if smoothing:
                nll += smoothing * (lse - z.mean(-1))
            total += (w * (nll + z_loss * lse.square())).sum()
            if any(needs):
                grad = z.sub_(lse[:, None]).exp_().mul_((w * (1 + 2 * z_loss * lse))[:, None])
                grad.scatter_add_(-1, target, (-(1 - smoothing) * w)[:, None])
                if smoothing:
                    grad -= (smoothing / vocab * w)[:, None]
                grads.add(rows, _to_raw(grad, tanh, scale), hidden[rows], weight)
        ctx.grads, ctx.dtypes = grads, (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grads: _HeadGradients = ctx.grads
        weight_type, bias_type = ctx.dtypes
        scaled = [None if g is None else g.mul_(grad_total) for g in (grads.hidden, grads.weight, grads.bias)]
        ctx.grads = None
        weight = None if scaled[1] is None else scaled[1].to(weight_type)
        bias = None if scaled[2] is None else scaled[2].to(bias_type)
        return scaled[0], weight, None, None, bias, None, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy, lse_all = torch.empty_like(logprobs), torch.empty_like(logprobs)
        step = chunk_rows(hidden.shape[0], weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            z, _ = _logits(hidden[rows], weight, bias, softcap, scale)
            lse = torch.logsumexp(z, -1)
            lse_all[rows] = lse
            logprobs[rows] = z.gather(-1, targets[rows, None])[:, 0] - lse
            entropy[rows] = lse - (torch.softmax(z, -1) * z).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, bias, lse_all, entropy)
        ctx.options = (softcap, scale)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, lse_all, entropy = ctx.saved_tensors
        softcap, scale = ctx.options
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        grads = _HeadGradients(hidden, weight, bias, needs)
        step = chunk_rows(hidden.shape[0], weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            z, tanh = _logits(hidden[rows], weight, bias, softcap, scale)
            logp = z.sub_(lse_all[rows, None])
            p = logp.exp()
            grad = (logp + entropy[rows, None]).mul_(-grad_entropy[rows, None]).sub_(grad_logprobs[rows, None]).mul_(p)
            grad.scatter_add_(-1, targets[rows, None], grad_logprobs[rows, None])
            grads.add(rows, _to_raw(grad, tanh, scale), hidden[rows], weight)
        weight_grad = None if grads.weight is None else grads.weight.to(weight.dtype)
        bias_grad = None if grads.bias is None else grads.bias.to(bias.dtype)
        return grads.hidden, weight_grad, None, bias_grad, None, None
