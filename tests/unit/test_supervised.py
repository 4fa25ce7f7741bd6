"""The loss of supervised fine-tuning, and the check of its first value."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rayft.losses.supervised import NEED, first_loss_warning, next_token, supervised_loss
from rayft.types import Batch, Terms

VOCAB = 49152


def batch_with(trained: list[int]) -> Batch:
    nothing = torch.zeros(0)
    return Batch(nothing, nothing, nothing, nothing, nothing, torch.tensor(trained), nothing, nothing, (), 0)


def test_the_loss_is_the_sum_itself_and_the_tokens_are_counted() -> None:
    nll_sum = torch.tensor(3.5, requires_grad=True)
    loss, metrics = next_token(Terms(nll_sum=nll_sum), batch_with([1, 4, 5]))
    assert loss is nll_sum
    assert {name: value.item() for name, value in metrics.items()} == {"train/num_tokens": 3.0}
    assert not any(value.requires_grad for value in metrics.values())
    assert NEED == "weighted_nll"
    with pytest.raises(AssertionError, match="weighted_nll"):
        next_token(Terms(logprobs=torch.zeros(3)), batch_with([1]))


@pytest.mark.parametrize("loss", [0.3, 0.5, 1.7, 2.9])
def test_a_usual_first_loss_says_nothing(loss: float) -> None:
    assert first_loss_warning(loss, VOCAB, pretrained=True) is None


@pytest.mark.parametrize("share", [0.91, 1.0, 1.09])
def test_a_loss_near_ln_vocab_is_random(share: float) -> None:
    warning = first_loss_warning(share * math.log(VOCAB), VOCAB, pretrained=True)
    assert warning is not None
    assert "at random" in warning


@pytest.mark.parametrize("loss", [3.1, 7.0, 12.5])
def test_a_high_first_loss_names_the_causes(loss: float) -> None:
    warning = first_loss_warning(loss, VOCAB, pretrained=True)
    assert warning is not None
    for cause in ("template", "mask", "towers", "packed documents", "scaled"):
        assert cause in warning


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_loss_that_is_not_finite_is_said_to_be(loss: float, pretrained: bool) -> None:
    warning = first_loss_warning(loss, VOCAB, pretrained)
    assert warning is not None
    assert str(loss) in warning


def test_random_weights_start_at_ln_vocab() -> None:
    assert first_loss_warning(math.log(VOCAB) + 0.5, VOCAB, pretrained=False) is None
    warning = first_loss_warning(2 * math.log(VOCAB), VOCAB, pretrained=False)
    assert warning is not None
    assert "10.80" in warning


def test_several_sources_give_the_same_sum_and_its_parts() -> None:
    loss_fn, need = supervised_loss(["a", "b", "c"])
    assert need == NEED and supervised_loss(["a"]) == (next_token, NEED) == supervised_loss([])
    nll_sum, parts = torch.tensor(8.0, requires_grad=True), torch.tensor([1.0, 1.0, 6.0])
    batch = batch_with([1, 4, 5])
    weights = torch.zeros(7)
    weights[[1, 4, 5]] = torch.tensor([1.0, 0.5, 2.0])
    owners = torch.zeros(7, dtype=torch.int32)
    owners[[1, 4, 5]] = torch.tensor([2, 0, 2], dtype=torch.int32)
    loss, metrics = loss_fn(Terms(nll_sum=nll_sum, nll_parts=parts), replace(batch, loss_weights=weights, source_ids=owners))
    assert loss is nll_sum and not any(value.requires_grad for value in metrics.values())
    assert {name: value.item() for name, value in metrics.items()} == {
        "train/num_tokens": 3, "train/loss/a": 1.0, "train/weights/a": 0.5, "train/loss/b": 0.0, "train/weights/b": 0.0,
        "train/loss/c": 7.0, "train/weights/c": 3.0,
    }  # fmt: skip
    blank = replace(batch, trained=torch.zeros(0, dtype=torch.int64), loss_weights=torch.zeros(7), source_ids=owners)
    nothing, metrics = loss_fn(Terms(nll_sum=torch.tensor(0.0), nll_parts=torch.zeros(0)), blank)
    assert nothing.item() == 0 and len(metrics) == 7
