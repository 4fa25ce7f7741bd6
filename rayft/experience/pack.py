"""From the scored groups of a step to the micro-batches of each rank: who computes which answer, and with what weight. Pure.

The controller plans with numbers alone (`plan`); a rank builds its micro-batches from the groups that it fetched (`build`). Every rank
gets the same number of micro-batches, and neither the budget of tokens nor the number of ranks changes a loss: an answer carries its own
advantage and weight, and the divisor is that of the whole step.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rayft.data.packing import pack
from rayft.data.reader import Row, collate
from rayft.experience.advantages import ADVANTAGES, gdpo, whitened
from rayft.types import Batch, Group, Scored

BUCKET = 1024
"""Micro-batches are padded to multiples of so many tokens, or to the budget when it is smaller, where nothing is compiled for one size."""

Average = Literal["token", "sequence", "constant"]


@dataclass(frozen=True)
class Weighing:
    """How rewards become advantages, and how answers share the loss.

    Attributes:
        advantage: a key of ADVANTAGES; "gdpo", which normalises each reward on its own; or "gae", which whitens those that scores bring.
        reward_weights: reward name -> weight, for gdpo.
        average: token, the mean over all trained tokens; sequence, the mean over answers of their token means; constant, the sum over all
            tokens divided by answers times max_tokens.
        max_tokens: rollout.max_tokens.
        mask_truncated: answers that ended by length count in the baseline of their group but not in the loss.
    """

    advantage: str
    reward_weights: Mapping[str, float]
    average: Average
    max_tokens: int
    mask_truncated: bool


@dataclass(frozen=True)
class Answer:
    """An answer on its way into a micro-batch.

    Attributes:
        group, place: of the batch's groups and in the group.
        index: unique in the step; names its tokens, so that randomness does not depend on packing.
        size: tokens with the prompt.
        advantage: of all its trained tokens, or of each.
        weight: of each of its trained tokens in the loss; 0 leaves it out.
    """

    group: int
    place: int
    index: int
    size: int
    advantage: float | array[float]
    weight: float


@dataclass(frozen=True)
class Update:
    """What all ranks compute for one optimizer update.

    Attributes:
        micro: [rank][micro-batch] -> answers; every rank has the same number, some without an answer.
        documents: most answers in a micro-batch.
        divisor: what the weighted sum of the loss is divided by.
    """

    micro: tuple[tuple[tuple[Answer, ...], ...], ...]
    documents: int
    divisor: float


def plan(batch: Sequence[Scored], weighing: Weighing, *, budget: int, world: int, updates: int) -> list[Update]:
    """Split a step's groups into updates, and each update's answers into micro-batches.

    Args:
        batch: the groups of the step, in order.
        weighing: advantages and weights.
        budget: tokens of a micro-batch; no answer with its prompt is longer.
        world: ranks.
        updates: optimizer updates in the step; each takes consecutive groups. Advantages are those of the whole batch.
    """
    answers = _answers(batch, weighing)
    edges = [round(number * len(batch) / updates) for number in range(updates + 1)]
    return [
        _update([answer for answer in answers if first <= answer.group < end], batch, weighing, budget, world)
        for first, end in itertools.pairwise(edges)
    ]


def _answers(batch: Sequence[Scored], weighing: Weighing) -> list[Answer]:
    advantages = _advantages(batch, weighing)
    index, found = itertools.count(), []
    for number, group in enumerate(batch):
        for place, (size, length, truncated) in enumerate(zip(group.sizes, group.lengths, group.truncated, strict=True)):
            weight = 1 / length if weighing.average == "sequence" else 1.0
            counts = not (truncated and weighing.mask_truncated)
            found.append(Answer(number, place, next(index), size, advantages[number][place], weight if counts else 0.0))
    return found


def _advantages(batch: Sequence[Scored], weighing: Weighing) -> Sequence[Sequence[float | array[float]]]:
    if weighing.advantage == "gae":
        return whitened([group.advantages for group in batch])
    if weighing.advantage == "gdpo":
        return gdpo([group.rewards for group in batch], weighing.reward_weights)
    return ADVANTAGES[weighing.advantage]([group.total for group in batch])


def _update(answers: list[Answer], batch: Sequence[Scored], weighing: Weighing, budget: int, world: int) -> Update:
    rows = [tuple(answers[index] for index in row) for row in pack([answer.size for answer in answers], budget)]
    rows += [()] * (-len(rows) % world)
    counted = [answer for answer in answers if answer.weight]
    divisor = {
        "token": float(sum(batch[answer.group].lengths[answer.place] for answer in counted)),
        "sequence": float(len(counted)),
        "constant": float(len(counted) * weighing.max_tokens),
    }[weighing.average]
    micro = tuple(tuple(rows[rank::world]) for rank in range(world))
    return Update(micro, max(map(len, rows)), max(divisor, 1.0))


def build(answers: Sequence[Answer], groups: Mapping[int, Group], *, budget: int, documents: int, step: int, whole: bool = False) -> Batch:
    """The micro-batch of these answers, each a document of its prompt and what follows.

    Args:
        answers: what `plan` put together; none gives a micro-batch that counts for nothing.
        groups: those of the answers, by their number in the batch.
        budget, documents: of the plan; they give tensors of few shapes.
        step: of the run.
        whole: pad to the budget, so that compiled code meets one shape; else to a multiple of BUCKET.

    Returns:
        A batch on the CPU with rollout_logprobs, advantages and versions, in pinned memory where there is a GPU.
    """
    parts = [_document(answer, groups[answer.group]) for answer in answers]
    used = sum(answer.size for answer in answers)
    length = budget if whole else min(budget, -(-max(used, 1) // BUCKET) * BUCKET)
    padding = _Document.blank(length - used)
    parts += [padding] if length > used else []
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _Document.__annotations__}
    lengths = np.array([len(part.tokens) for part in parts], np.int32)
    row = Row(0, columns["tokens"], columns["weights"], lengths, np.zeros(len(parts), np.int32), used)
    batch = collate([row], [0], capacity=1 << documents.bit_length(), step=step)
    keys = [(answer.index << 24) + np.arange(answer.size, dtype=np.int64) for answer in answers]
    keys += [np.zeros(length - used, np.int64)]
    return replace(
        batch,
        row_keys=_like(batch.row_keys, np.concatenate(keys)),
        rollout_logprobs=_like(batch.loss_weights, np.roll(columns["logprobs"], -1)),
        advantages=_like(batch.loss_weights, np.roll(columns["advantages"], -1)),
        versions=_like(batch.source_ids, np.roll(columns["versions"], -1)),
    )


@dataclass(frozen=True)
class _Document:
    """Columns of one document, by token; position t of a batch takes those of token t + 1, which it predicts."""

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    versions: NDArray[np.int32]

    @staticmethod
    def blank(length: int) -> _Document:
        weights, logprobs, advantages = (np.zeros(length, np.float32) for _ in range(3))
        return _Document(np.zeros(length, np.int32), weights, logprobs, advantages, np.zeros(length, np.int32))


def _document(answer: Answer, group: Group) -> _Document:
    trajectory, start = group.trajectories[answer.place], len(group.prompt.tokens)
    document = _Document.blank(answer.size)
    document.tokens[:start] = group.prompt.tokens
    document.tokens[start:] = trajectory.tokens
    by_policy = np.array(trajectory.by_policy, bool)
    document.weights[start:] = by_policy * np.float32(answer.weight)
    document.logprobs[start:] = np.where(by_policy, np.array(trajectory.logprobs, np.float32), 0)
    document.advantages[start:][by_policy] = answer.advantage
    for version, first, end in trajectory.versions:
        document.versions[start + first : start + end] = step_of(version)
    return document


def step_of(version: str) -> int:
    """The steps behind a policy version "attempt.step"."""
    return int(version.rpartition(".")[2])


def _like(tensor: torch.Tensor, array: NDArray[np.generic]) -> torch.Tensor:
    made = torch.from_numpy(array.astype(str(tensor.dtype).removeprefix("torch.")))
    return made.pin_memory() if tensor.is_pinned() else made
