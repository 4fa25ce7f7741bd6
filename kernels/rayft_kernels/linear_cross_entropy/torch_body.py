"""The head operations in torch: what runs without CUDA, and the reference of the CUDA body.

Logits and everything made of them are float32 (float64 for float64 inputs); products of the matrices are in the inputs' type. The
formulas are in op.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rayft_kernels.linear_cross_entropy.chunks import Head, chunk_rows


def weighted_nll(
    hidden: Tensor, head: Head, targets: Tensor, loss_weights: Tensor, smoothing: float, z_loss: float, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The weighted sum, each row's part, and the gradients in `needs` (hidden, weight, bias); the last two are sums, not rounded."""
    grads = HeadGradients(hidden, head, needs)
    losses = hidden.new_empty(hidden.shape[0], dtype=wide(hidden))
    total = hidden.new_zeros((), dtype=wide(hidden))
    vocab = head.weight.shape[0]
    for rows in _chunks(hidden, head):
        z, tanh = _logits(hidden[rows], head)
        target, w = targets[rows, None], loss_weights[rows].to(z.dtype)
        lse = torch.logsumexp(z, -1)
        nll = (1 - smoothing) * (lse - z.gather(-1, target)[:, 0])
        if smoothing:
            nll += smoothing * (lse - z.mean(-1))
        losses[rows] = w * (nll + z_loss * lse.square())
        total += losses[rows].sum()
        if any(needs):
            grad = z.sub_(lse[:, None]).exp_().mul_((w * (1 + 2 * z_loss * lse))[:, None])
            grad.scatter_add_(-1, target, (-(1 - smoothing) * w)[:, None])
            if smoothing:
                grad -= (smoothing / vocab * w)[:, None]
            grads.add(rows, _to_raw(grad, tanh, head.scale))
    return total, losses, grads.of_hidden, grads.of_weight, grads.of_bias


def token_terms(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the target, entropy and log sum exp of each row."""
    logprobs = hidden.new_empty(hidden.shape[0], dtype=wide(hidden))
    entropy, lse_all = torch.empty_like(logprobs), torch.empty_like(logprobs)
    for rows in _chunks(hidden, head):
        z, _ = _logits(hidden[rows], head)
        lse = torch.logsumexp(z, -1)
        lse_all[rows] = lse
        logprobs[rows] = z.gather(-1, targets[rows, None])[:, 0] - lse
        entropy[rows] = lse - (torch.softmax(z, -1) * z).sum(-1)
    return logprobs, entropy, lse_all


def token_terms_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; those of weight and bias are sums, not rounded."""
    grads = HeadGradients(hidden, head, needs)
    for rows in _chunks(hidden, head):
        z, tanh = _logits(hidden[rows], head)
        logp = z.sub_(lse[rows, None])
        p = logp.exp()
        grad = (logp + entropy[rows, None]).mul_(-grad_entropy[rows, None]).sub_(grad_logprobs[rows, None]).mul_(p)
        grad.scatter_add_(-1, targets[rows, None], grad_logprobs[rows, None])
        grads.add(rows, _to_raw(grad, tanh, head.scale))
    return grads.of_hidden, grads.of_weight, grads.of_bias


class HeadGradients:
    """Gradients of one head call, filled chunk by chunk: the hidden states' in their type, the head's as a float32 sum."""

    def __init__(self, hidden: Tensor, head: Head, needs: Sequence[bool]) -> None:
        self.hidden, self.weight = hidden, head.weight
        self.of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.of_weight = head.weight.new_zeros(head.weight.shape, dtype=wide(hidden)) if needs[1] else None
        self.of_bias = head.weight.new_zeros(head.weight.shape[0], dtype=wide(hidden)) if needs[2] else None

    def add(self, rows: slice, grad_raw: Tensor) -> None:
        """Account for the chunk `rows`, whose raw-logit gradient is float32 [m, V]."""
        low = grad_raw.to(self.hidden.dtype)
        if self.of_hidden is not None:
            self.of_hidden[rows] = low @ self.weight
        if self.of_weight is not None:
            # Rounding each chunk's product before the sum would bias training.
            total = self.of_weight
            total += low.t().to(total.dtype) @ self.hidden[rows].to(total.dtype)
        if self.of_bias is not None:
            self.of_bias += grad_raw.sum(0)


def wide(tensor: Tensor) -> torch.dtype:
    """The type of sums: float32, float64 for float64 inputs."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(hidden: Tensor, head: Head) -> Iterator[slice]:
    step = chunk_rows(hidden.shape[0], head.weight.shape[0])
    return (slice(start, start + step) for start in range(0, hidden.shape[0], step))


def _logits(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """Wide z [m, V], and tanh(u / softcap) when there is a softcap (its derivative needs it)."""
    raw = (hidden @ head.weight.t()).to(wide(hidden))
    if head.bias is not None:
        raw += head.bias
    if head.softcap is None:
        return (raw if head.scale == 1.0 else raw.mul_(head.scale)), None
    tanh = raw.div_(head.softcap).tanh_()
    return tanh * (head.softcap * head.scale), tanh


def _to_raw(grad_z: Tensor, tanh: Tensor | None, scale: float) -> Tensor:
    """Gradient with respect to the raw logits u, in place."""
    if scale != 1.0:
        grad_z *= scale
    if tanh is not None:
        grad_z *= 1 - tanh.square()
    return grad_z
