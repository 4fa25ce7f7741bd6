"""The head operations on CUDA: cuBLAS products around Triton kernels over a chunk of logits, which is all that exists of them.

`weighted_nll` in one go: logits of some rows; their gradient over them; two products with it. The head's gradient is a float32 sum
over the chunks, added to inside the product, so it is never rounded before the end. Its lean way spends a fourth product to hold
less: first the statistics of every row, then, column by column of the head, logits again and gradients, where a part of the head's
gradient is one product and needs no sum.

`token_terms` and its backward are the same two halves, with float32 logits: the ratio of two policies is exp of a difference of
log-probabilities, and bfloat16 logits would put an error of some 1e-2 in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rayft_kernels.linear_cross_entropy import triton
from rayft_kernels.linear_cross_entropy.chunks import FAST_BYTES, LEAN_BYTES, Head, column_chunk, padded, row_chunk

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def weighted_nll(
    hidden: Tensor, head: Head, targets: Tensor, loss_weights: Tensor, smoothing: float, z_loss: float, needs: Sequence[bool], lean: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The weighted sum, each row's part, and the gradients asked for; that of the head is a float32 sum, or rounded already if lean."""
    vocab, weights = head.weight.shape[0], loss_weights.float()
    if any(needs) and not (lean and needs[1]):
        return _in_one_pass(hidden, head, targets, weights, smoothing, z_loss, needs, LEAN_BYTES if lean else FAST_BYTES)
    stats = _row_statistics(hidden, head, targets, hidden.dtype, LEAN_BYTES if lean else FAST_BYTES)
    losses = weights * _nll(stats, smoothing, z_loss)
    total = losses.sum()
    if not any(needs):
        return total, losses, None, None, None
    coefs = _nll_coefs(stats, weights, smoothing, z_loss, vocab)
    return total, losses, *_gradients_by_column(hidden, head, targets, coefs, needs, hidden.dtype, LEAN_BYTES)


def token_terms(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the target, entropy and log sum exp of each row."""
    lse, target, entropy, _ = _row_statistics(hidden, head, targets, torch.float32, FAST_BYTES).unbind()
    return target - lse, entropy.clone(), lse.clone()


def token_terms_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of hidden, weight and bias."""
    coefs = torch.stack([lse, -grad_logprobs - grad_entropy * entropy, -grad_entropy, grad_logprobs, torch.zeros_like(lse)])
    return _gradients_by_column(hidden, head, targets, coefs, needs, torch.float32, FAST_BYTES)


def _in_one_pass(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    weights: Tensor,
    smoothing: float,
    z_loss: float,
    needs: Sequence[bool],
    budget: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    (num_rows, width), vocab = hidden.shape, head.weight.shape[0]
    step = row_chunk(num_rows, width, vocab, budget, hidden.dtype)
    buffer = hidden.new_empty(min(step, num_rows), padded(vocab))
    product = hidden.new_empty(min(step, num_rows), width, dtype=torch.float32)
    scaled = hidden.new_empty(min(step, num_rows), width)
    losses = torch.empty_like(weights)
    of_hidden, of_weight, of_bias = _sums(hidden, head, needs)
    # float16 cannot hold what is not normalised yet, and the factors of the rows leave no place for a term that all columns share.
    plain = smoothing == 0 and z_loss == 0 and not needs[2] and hidden.dtype != torch.float16
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        states, labels, factors = hidden[rows], targets[rows], weights[rows]
        logits = _mm(states, head.weight.t(), buffer[: len(labels), :vocab])
        if plain:
            factors = torch.empty_like(factors)
            triton.exponentials(logits, labels, weights[rows], head.bias, losses[rows], factors, head.softcap, head.scale)
            if of_weight is not None:
                states = torch.mul(states, factors[:, None], out=scaled[: len(labels)])
        else:
            stats = weights.new_empty(4, len(labels))
            triton.statistics(logits, labels, head.bias, stats, head.softcap, head.scale)
            torch.mul(factors, _nll(stats, smoothing, z_loss), out=losses[rows])
            coefs = _nll_coefs(stats, factors, smoothing, z_loss, vocab)
            triton.gradients(logits, logits, labels, head.bias, coefs, 0, head.softcap, head.scale)
        if of_hidden is not None:
            part = _mm(logits, head.weight, product[: len(labels)])
            if plain:
                torch.mul(part, factors[:, None], out=of_hidden[rows])
            else:
                of_hidden[rows] = part
        if of_weight is not None:
            _mm(logits.t(), states, of_weight, add=start > 0)
        if of_bias is not None:
            of_bias += logits.sum(0, dtype=torch.float32)
    return losses.sum(), losses, of_hidden, of_weight, of_bias


def _sums(hidden: Tensor, head: Head, needs: Sequence[bool]) -> Gradients:
    """Buffers of the gradients: the hidden states' in their type, the others float32, zero where no chunk will write first."""
    of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
    make = torch.empty if len(hidden) else torch.zeros
    of_weight = make(head.weight.shape, dtype=torch.float32, device=hidden.device) if needs[1] else None
    of_bias = torch.zeros(head.weight.shape[0], dtype=torch.float32, device=hidden.device) if needs[2] else None
    return of_hidden, of_weight, of_bias


def _row_statistics(hidden: Tensor, head: Head, targets: Tensor, dtype: torch.dtype, budget: int) -> Tensor:
    """Float32 [4, rows]: log sum exp, the target's logit, entropy and mean logit, from logits in `dtype`."""
    num_rows, vocab = len(targets), head.weight.shape[0]
    step = row_chunk(num_rows, 0, vocab, budget, dtype)
    buffer = hidden.new_empty(min(step, num_rows), padded(vocab), dtype=dtype)
    stats = hidden.new_empty(4, num_rows, dtype=torch.float32)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        logits = _mm(hidden[rows], head.weight.t(), buffer[: len(targets[rows]), :vocab])
        triton.statistics(logits, targets[rows], head.bias, stats[:, rows], head.softcap, head.scale)
    return stats


def _gradients_by_column(
    hidden: Tensor, head: Head, targets: Tensor, coefs: Tensor, needs: Sequence[bool], dtype: torch.dtype, budget: int
) -> Gradients:
    """Gradients from logits computed again in `dtype`, some columns at a time; `coefs` as in triton.gradients."""
    (num_rows, width), vocab = hidden.shape, head.weight.shape[0]
    low = hidden.dtype
    itemsize = dtype.itemsize + (low.itemsize if low != dtype else 0)
    step = column_chunk(num_rows, width, vocab, budget, itemsize)
    buffer = hidden.new_empty(num_rows, min(step, padded(vocab)), dtype=dtype)
    rounded = buffer if low == dtype else torch.empty_like(buffer, dtype=low)
    total = hidden.new_zeros(num_rows, width, dtype=torch.float32) if needs[0] else None
    of_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if needs[1] else None
    of_bias = head.weight.new_empty(vocab, dtype=torch.float32) if needs[2] else None
    for first in range(0, vocab, step):
        columns = slice(first, min(first + step, vocab))
        weight, count = head.weight[columns], columns.stop - first
        bias = None if head.bias is None else head.bias[columns]
        logits, grad = _mm(hidden, weight.t(), buffer[:, :count]), rounded[:, :count]
        triton.gradients(logits, grad, targets, bias, coefs, first, head.softcap, head.scale)
        if total is not None:
            _mm(grad, weight, total, add=True)
        if of_weight is not None:
            torch.mm(grad.t(), hidden, out=of_weight[columns])
        if of_bias is not None:
            torch.sum(grad, 0, dtype=torch.float32, out=of_bias[columns])
    return None if total is None else total.to(low), of_weight, of_bias


def _nll(stats: Tensor, smoothing: float, z_loss: float) -> Tensor:
    lse, target, _, mean = stats.unbind()
    return (1 - smoothing) * (lse - target) + smoothing * (lse - mean) + z_loss * lse.square()


def _nll_coefs(stats: Tensor, weights: Tensor, smoothing: float, z_loss: float, vocab: int) -> Tensor:
    """The loss's derivative by a logit, as triton.gradients wants it."""
    lse, zero = stats[0], torch.zeros_like(weights)
    return torch.stack([lse, weights * (1 + 2 * z_loss * lse), zero, (smoothing - 1) * weights, (-smoothing / vocab) * weights])


def _mm(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b. A float32 `out` takes the product of narrower ones unrounded."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if not a.is_cuda:  # Triton's interpreter in the tests: the CPU has no product into another type
        return _mm(a.to(out.dtype), b.to(out.dtype), out, add=add)
    if add:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)
