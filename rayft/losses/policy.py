"""Policy-gradient losses, as sums over trained tokens. Which token counts how much is in the batch's loss weights and divisor.

For a trained token t of document d, with log-probabilities l under the weights in training, o before the step's first update (l itself,
without gradient, when a step is one update), m under the engine that sampled it, f under the reference, and advantage A:

    r = exp(l - o)                                               the ratio that clipping bounds
    clip    -min(r A, clip(r, 1 - low, 1 + high) A)              PPO arXiv 1707.06347, GRPO 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783
    gspo    the same with r = exp(mean over d of l - o)          arXiv 2507.18071
    cispo   -stop(clip(r, 1 - low, 1 + high)) A l                arXiv 2506.13585
    sapo    -(4 / tau) sigmoid(tau (r - 1)) A, tau by sign of A  arXiv 2511.20347

    loss = sum over t of w (c surrogate + beta kl)

c is the importance weight between trainer and engine, exp(o - m) by token or summed over the document, cut at a cap or set to zero outside
[1 / cap, cap] (truncated importance sampling, masked importance sampling); it also covers the staleness of the sampling policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from rayft.types import Batch, LossFn, Metrics, Need, Terms

if TYPE_CHECKING:
    from torch import Tensor

NEED: Need = "logprobs"
"""What a policy loss asks of `model.score`."""

LARGEST_LOG_RATIO = 20.0
"""Exponents are held to this, so that one token that the trainer finds impossible makes no infinity."""


@dataclass(frozen=True)
class PolicyLoss:
    """Which loss, as numbers.

    Attributes:
        form: a key of SURROGATES.
        clip_low, clip_high: how far the ratio may fall below and rise above 1.
        dual_clip: largest multiple of -A that a token of negative advantage may cost (arXiv 1912.09729); None for no such bound.
        tau_positive, tau_negative: temperatures of sapo.
        beta: weight of the divergence from the reference.
        kl: its estimator (http://joschu.net/blog/kl-approx.html). As a loss, k1 has no gradient on average; k2 and k3 do.
        correction: token, sequence or none.
        correction_mode: truncate cuts the weight at the cap, mask leaves tokens outside [1 / cap, cap] out.
        correction_cap: see there.
    """

    form: Literal["clip", "gspo", "cispo", "sapo"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    beta: float = 0.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    correction: Literal["none", "token", "sequence"] = "token"
    correction_mode: Literal["truncate", "mask"] = "truncate"
    correction_cap: float = 2.0


Documents = Callable[["Tensor"], "Tensor"]
"""[M] -> [M]: at each token, the sum over the trained tokens of its document."""

Surrogate = Callable[["Tensor", "Tensor", "Tensor", Documents, PolicyLoss], "Tensor"]
"""(l, o, A, sums by document, loss) -> what each token costs; all float [M]."""


def policy_loss(loss: PolicyLoss) -> LossFn:
    """The loss as the step takes it; see the module docstring. The batch brings rollout_logprobs and advantages."""
    surrogate = SURROGATES[loss.form]

    def sum_of(terms: Terms, batch: Batch) -> tuple[Tensor, Metrics]:
        logprobs, entropy = terms.logprobs, terms.entropy
        assert logprobs is not None and entropy is not None, "policy losses read terms scored with need=logprobs"
        sums = by_document(batch)
        rollout, advantages = _at(batch, batch.rollout_logprobs), _at(batch, batch.advantages)
        old = logprobs.detach() if batch.policy_logprobs is None else _at(batch, batch.policy_logprobs)
        correction, cut = importance(old - rollout, sums, loss)
        cost = correction * surrogate(logprobs, old, advantages, sums, loss)
        metrics = mismatch(old - rollout, correction, cut) | movement(logprobs.detach() - old, advantages, loss)
        if batch.ref_logprobs is not None:
            reference = _at(batch, batch.ref_logprobs)
            cost = cost + loss.beta * divergence(logprobs, reference, loss.kl)
            metrics["train/ref_kl"] = divergence(logprobs.detach(), reference, "k3").sum()
        metrics |= ages(batch)
        metrics["train/entropy"] = entropy.detach().sum()
        metrics["train/num_tokens"] = cost.new_full((), cost.shape[0])
        return (batch.loss_weights.index_select(0, batch.trained) * cost).sum(), metrics

    return sum_of


def clipped(logprobs: Tensor, old: Tensor, advantages: Tensor, sums: Documents, loss: PolicyLoss) -> Tensor:
    """PPO's pessimistic bound on the token's ratio."""
    return _bounded(_exp(logprobs - old), advantages, loss)


def gspo(logprobs: Tensor, old: Tensor, advantages: Tensor, sums: Documents, loss: PolicyLoss) -> Tensor:
    """The same on one ratio for the whole document, the geometric mean of its tokens'."""
    return _bounded(_exp(sums(logprobs - old) / sums(torch.ones_like(old))), advantages, loss)


def cispo(logprobs: Tensor, old: Tensor, advantages: Tensor, sums: Documents, loss: PolicyLoss) -> Tensor:
    """REINFORCE whose importance weight, not its gradient, is clipped."""
    weight = _exp(logprobs - old).detach().clamp(1 - loss.clip_low, 1 + loss.clip_high)
    return -weight * advantages * logprobs


def sapo(logprobs: Tensor, old: Tensor, advantages: Tensor, sums: Documents, loss: PolicyLoss) -> Tensor:
    """A smooth gate in the place of the clip."""
    tau = torch.where(advantages > 0, loss.tau_positive, loss.tau_negative)
    return -(4 / tau) * torch.sigmoid(tau * (_exp(logprobs - old) - 1)) * advantages


SURROGATES: dict[str, Surrogate] = {"clip": clipped, "gspo": gspo, "cispo": cispo, "sapo": sapo}
"""Name -> form of the loss."""


def divergence(logprobs: Tensor, reference: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per token, an estimate of KL(policy || reference) from tokens that the policy sampled; float [M]."""
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return _exp(-difference) - 1 + difference


def importance(difference: Tensor, sums: Documents, loss: PolicyLoss) -> tuple[Tensor, Tensor]:
    """Weights that make up for sampling under other log-probabilities than the trainer's.

    Args:
        difference: o - m, trainer's before the step less the engine's, float [M], without gradient.
        sums: by document.
        loss: the correction's settings.

    Returns:
        (weights, whether the cap changed it), float and bool [M].
    """
    if loss.correction == "none":
        return torch.ones_like(difference), torch.zeros_like(difference, dtype=torch.bool)
    weight = _exp(sums(difference) if loss.correction == "sequence" else difference)
    if loss.correction_mode == "truncate":
        return weight.clamp(max=loss.correction_cap), weight > loss.correction_cap
    outside = (weight > loss.correction_cap) | (weight < 1 / loss.correction_cap)
    return weight.masked_fill(outside, 0.0), outside


def mismatch(difference: Tensor, correction: Tensor, cut: Tensor) -> Metrics:
    """How far trainer and engine disagree about the tokens of the batch, staleness included; sums over tokens."""
    return {
        "train/rollout_logprob_difference": difference.abs().sum(),
        "train/rollout_kl": (_exp(difference) - 1 - difference).sum(),
        "train/importance_weight": correction.sum(),
        "train/importance_capped": cut.sum().to(correction.dtype),
    }


def movement(difference: Tensor, advantages: Tensor, loss: PolicyLoss) -> Metrics:
    """How far the step's updates have moved the policy from where it began; sums over tokens."""
    ratio = _exp(difference)
    low, high = (ratio < 1 - loss.clip_low) & (advantages < 0), (ratio > 1 + loss.clip_high) & (advantages > 0)
    return {
        "train/policy_kl": (ratio - 1 - difference).sum(),
        "train/clipped_low": low.sum().to(ratio.dtype),
        "train/clipped_high": high.sum().to(ratio.dtype),
    }


def ages(batch: Batch) -> Metrics:
    """Steps between the weights that sampled each trained token and those that it trains; sums over tokens."""
    age = batch.step - _at(batch, batch.versions).float()
    by_age = {"0": age <= 0, "1": age == 1, "2": age == 2, "3_or_more": age >= 3}
    return {"staleness/mean": age.sum()} | {f"staleness/{name}": found.float().sum() for name, found in by_age.items()}


def by_document(batch: Batch) -> Documents:
    """Sums over the trained tokens of each document, given back at every one of them."""
    ends = batch.cu_seqlens[1:].long()
    documents = torch.searchsorted(ends, batch.trained, right=True)

    def sums(values: Tensor) -> Tensor:
        return values.new_zeros(ends.shape[0]).index_add(0, documents, values).index_select(0, documents)

    return sums


def _bounded(ratio: Tensor, advantages: Tensor, loss: PolicyLoss) -> Tensor:
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high) * advantages)
    if loss.dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, loss.dual_clip * advantages), gain)
    return -gain


def _exp(difference: Tensor) -> Tensor:
    return difference.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def _at(batch: Batch, column: Tensor | None) -> Tensor:
    """A column at the trained positions."""
    assert column is not None, "the batch lacks a column that policy losses read"
    return column.index_select(0, batch.trained)
