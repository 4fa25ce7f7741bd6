"""Numbers about batches and evaluations, by metric name. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rayft.types import Scored

Z95 = 1.96
COUNTS = ("filtered", "dropped", "restarted", "rescored", "rerolled")
"""What `Admission.counts` counts, each a metric under rollout/."""


def of_batch(groups: Sequence[Scored], step: int) -> dict[str, float]:
    """Rewards, lengths and age of a step's batch.

    Args:
        groups: of the batch.
        step: steps behind the weights that train on it.
    """
    lengths = [length for group in groups for length in group.lengths]
    truncated = [flag for group in groups for flag in group.truncated]
    values = {
        "reward/mean": statistics.fmean(total for group in groups for total in group.total),
        "reward/group_std": statistics.fmean(statistics.pstdev(group.total) for group in groups),
        "reward/zero_variance": statistics.fmean(max(group.total) == min(group.total) for group in groups),
        "rollout/length": statistics.fmean(lengths),
        "rollout/length_max": float(max(lengths)),
        "rollout/truncated": statistics.fmean(truncated),
        "staleness/max": float(max(step - group.oldest for group in groups)),
    }
    if turns := [turn for group in groups for turn in group.turns]:
        values["rollout/turns"] = statistics.fmean(turns)
    for name in sorted({name for group in groups for name in group.rewards}):
        values[f"reward/part/{name}"] = statistics.fmean(value for group in groups for value in group.rewards.get(name, ()))
    return values


def of_evaluation(answered: Sequence[tuple[Scored, Scored]], correct_from: float) -> dict[str, float]:
    """Rewards on held-out prompts.

    Args:
        answered: for each prompt, the scores of its sampled answers and of one without sampling.
        correct_from: total from which an answer is correct.
    """
    sampled = [group for group, _ in answered]
    means = [statistics.fmean(group.total) for group in sampled]
    correct = [[total >= correct_from for total in group.total] for group in sampled]
    return {
        "eval/reward": statistics.fmean(means),
        "eval/reward_ci": Z95 * statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.inf,
        "eval/reward_greedy": statistics.fmean(greedy.total[0] for _, greedy in answered),
        "eval/pass_at_1": statistics.fmean(statistics.fmean(group) for group in correct),
        "eval/pass_at_k": statistics.fmean(any(group) for group in correct),
        "eval/length": statistics.fmean(length for group in sampled for length in group.lengths),
        "eval/num_prompts": float(len(answered)),
    }
