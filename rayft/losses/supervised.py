"""Next-token loss of supervised fine-tuning, and what its first value tells."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rayft.types import Batch, LossFn, Metrics, Need, Terms

if TYPE_CHECKING:
    from torch import Tensor

NEED: Need = "weighted_nll"
"""What `next_token` asks of `model.score`."""


def next_token(terms: Terms, batch: Batch) -> tuple[Tensor, Metrics]:
    """Sum over trained tokens of loss weight times negative log-likelihood.

    Returns:
        (sum, metrics): float32 scalars; the metrics are sums too.
    """
    loss = terms.nll_sum
    assert loss is not None, "next_token reads terms scored with need=weighted_nll"
    return loss, {"train/num_tokens": loss.new_full((), batch.trained.shape[0])}


def supervised_loss(sources: Collection[str]) -> tuple[LossFn, Need]:
    """The loss over the sources of a split, and what it asks of `model.score`.

    Args:
        sources: their names in the order of `Batch.source_ids`; several are told apart in the metrics.
    """
    return (next_token, NEED) if len(sources) < 2 else (partial(next_token_by_source, tuple(sources)), NEED)


def next_token_by_source(sources: Sequence[str], terms: Terms, batch: Batch) -> tuple[Tensor, Metrics]:
    """The same sum as `next_token`, with the part and the loss weights of each source among the metrics."""
    loss, metrics = next_token(terms, batch)
    assert terms.nll_parts is not None
    weights = batch.loss_weights.index_select(0, batch.trained)
    owners = batch.source_ids.index_select(0, batch.trained).long()
    parts = [values.new_zeros(len(sources)).index_add_(0, owners, values) for values in (terms.nll_parts, weights)]
    for name, part, weight in zip(sources, parts[0].unbind(), parts[1].unbind(), strict=True):
        metrics |= {f"train/loss/{name}": part, f"train/weights/{name}": weight}
    return loss, metrics


_HIGH = 3.0
_NEAR_RANDOM, _ABOVE_RANDOM = 0.1, 0.25
_CAUSES = (
    "the chat template is not the one the model was tuned with, the loss mask trains the wrong tokens, the adapter sits on vision or audio "
    "towers too, packed documents see each other, or the loss or the weights are scaled wrongly"
)


def first_loss_warning(loss: float, vocab: int, pretrained: bool) -> str | None:
    """What is suspicious about the loss of a run's first step, in nats per token; None when nothing is.

    A pretrained model starts supervised fine-tuning at 0.5 to 2; a random one at ln(vocab).
    """
    uniform = math.log(vocab)
    if not math.isfinite(loss):
        return f"The first loss is {loss}: the forward pass overflows, or the weights are not finite."
    if not pretrained:
        if loss <= uniform * (1 + _ABOVE_RANDOM):
            return None
        expected = f"random weights should give ln(vocabulary) = {uniform:.2f}"
        return f"The first loss is {loss:.2f}; {expected}: the initialisation or the loss is scaled wrongly."
    if abs(loss - uniform) <= _NEAR_RANDOM * uniform:
        return (
            f"The first loss is {loss:.2f}, close to ln(vocabulary) = {uniform:.2f}: the model predicts at random. "
            "The weights were not loaded, or the tokenizer is not the model's."
        )
    if loss > _HIGH:
        return f"The first loss is {loss:.2f}; a pretrained model starts at 0.5 to 2. Possible causes: {_CAUSES}."
    return None
