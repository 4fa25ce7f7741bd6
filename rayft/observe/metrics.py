"""The metric names: an API that dashboards rely on. Each has a unit, a reduction over ranks and a meaning.

`python -m rayft.observe.metrics > docs/metrics.md` writes the page of names from this table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rayft.errors import ConfigError

Reduction = Literal["token mean", "trained mean", "source mean", "sum", "same", "rank 0"]

REDUCTIONS: dict[Reduction, str] = {
    "token mean": "summed over micro-batches and ranks, then divided by the sum of the loss weights",
    "trained mean": "summed over trained tokens, micro-batches and ranks, then divided by train/num_tokens",
    "source mean": "as token mean, over the tokens of one source; absent where it has none",
    "sum": "summed over micro-batches and ranks",
    "same": "equal on every rank",
    "rank 0": "measured on rank 0, which stands for all because ranks wait for each other",
}


@dataclass(frozen=True)
class Metric:
    """What a name stands for."""

    unit: str
    reduction: Reduction
    meaning: str


SOURCE = "<source>"
"""Stands for the name of a source in the names below."""

METRICS: dict[str, Metric] = {
    "train/loss": Metric(
        "nats per token", "token mean", "Negative log-likelihood of the step's trained tokens, by loss weight; online, the policy loss."
    ),
    "train/loss/<source>": Metric("nats per token", "source mean", "The same of one training source, when there are several."),
    "train/weights/<source>": Metric("tokens", "sum", "Loss weights of the step's tokens of that source: their number when each weighs 1."),
    "train/grad_norm": Metric("1", "same", "Global norm of the gradient before it is clipped."),
    "train/lr": Metric("1", "same", "Learning rate that the step used."),
    "train/num_tokens": Metric("tokens", "sum", "Tokens of the step that count in the loss."),
    "perf/tokens_per_s": Metric("tokens/s per device", "rank 0", "Tokens of the step, trained or not but without padding, over its time."),
    "perf/mfu": Metric("fraction", "rank 0", "Model FLOPs over the device's peak, recomputation not counted; absent when unknown."),
    "perf/peak_memory_gib": Metric("GiB", "rank 0", "Most memory held: GPU, by the allocator in the step; CPU, by the process so far."),
    "perf/data_wait_s": Metric("s", "rank 0", "Time that the step waited for its rows."),
    "perf/step_s": Metric("s", "rank 0", "Time from the end of the step before, without evaluation and the staging of checkpoints."),
    "perf/recompiles": Metric("graphs", "rank 0", "Graphs that torch.compile made so far; constant after warm-up."),
    "eval/loss": Metric("nats per token", "token mean", "Negative log-likelihood of the evaluation's trained tokens, by loss weight."),
    "eval/loss/<source>": Metric("nats per token", "source mean", "The same of one evaluation source, when there are several."),
    "eval/perplexity": Metric("1", "same", "exp(eval/loss)."),
    "eval/num_tokens": Metric("tokens", "sum", "Loss weights of the evaluation: its trained tokens when each weighs 1."),
    "train/entropy": Metric("nats per token", "trained mean", "Entropy of the policy's next token, at the sampling temperature."),
    "train/ref_kl": Metric("nats per token", "trained mean", "Estimate (k3) of the policy's divergence from the reference."),
    "train/policy_kl": Metric("nats per token", "trained mean", "Estimate (k3) of how far the step's earlier updates moved the policy."),
    "train/clipped_low": Metric("fraction", "trained mean", "Tokens whose ratio is clipped from below."),
    "train/clipped_high": Metric("fraction", "trained mean", "Tokens whose ratio is clipped from above."),
    "train/rollout_logprob_difference": Metric(
        "nats per token", "trained mean", "Absolute difference of a token's log-probability between trainer and engine, staleness included."
    ),
    "train/rollout_kl": Metric("nats per token", "trained mean", "Estimate (k3) of the engine's divergence from the trainer."),
    "train/importance_weight": Metric("1", "trained mean", "Weight that corrects for that difference."),
    "train/importance_capped": Metric("fraction", "trained mean", "Tokens whose weight the cap changed."),
    "reward/mean": Metric("1", "same", "Total reward of the step's answers."),
    "reward/group_std": Metric("1", "same", "Standard deviation of the total reward in a group, averaged."),
    "reward/zero_variance": Metric("fraction", "same", "Groups of the step whose answers all have the same reward."),
    "reward/part/<source>": Metric("1", "same", "One reward function's value, before its weight."),
    "rollout/length": Metric("tokens", "same", "Generated tokens of an answer, averaged over the step."),
    "rollout/length_max": Metric("tokens", "same", "The longest answer of the step."),
    "rollout/truncated": Metric("fraction", "same", "Answers that ended by rollout.max_tokens."),
    "rollout/turns": Metric("turns", "same", "Turns of the policy in an answer, averaged over the step; 1 without an environment."),
    "rollout/filtered": Metric("groups", "same", "Groups filtered so far."),
    "rollout/dropped": Metric("groups", "same", "Prompts given up so far, after failures."),
    "rollout/restarted": Metric(
        "groups", "same", "Groups that were asked for again so far, after an engine died or missed a deadline, or an environment failed."
    ),
    "rollout/rescored": Metric("groups", "same", "Groups that were scored again so far, after a reward failed."),
    "rollout/rerolled": Metric("groups", "same", "Filtered groups so far that were asked again under later weights."),
    "rollout/replayed": Metric("groups", "same", "Groups of the step that an earlier step has trained already."),
    "rollout/engines": Metric("engines", "same", "Engines that serve the current weights."),
    "rollout/tokens_per_s": Metric("tokens/s", "same", "Generated tokens of all engines, since the step before."),
    "rollout/idle": Metric("fraction", "same", "Time since the step before in which an engine had nothing to do, averaged over engines."),
    "rollout/kv_use": Metric(
        "fraction", "same", "Most of an engine's key-value cache that was seen in use since the step before; vLLM only."
    ),
    "rollout/preemptions": Metric("requests", "same", "Requests that engines put off for want of cache, since they started; vLLM only."),
    "staleness/mean": Metric("steps", "trained mean", "Steps between the weights that sampled a token and those that it trains."),
    "staleness/max": Metric("steps", "same", "The most of any token of the step; at most rollout.max_staleness."),
    "staleness/0": Metric("fraction", "trained mean", "Tokens sampled from the very weights that they train."),
    "staleness/1": Metric("fraction", "trained mean", "Tokens from weights one step older."),
    "staleness/2": Metric("fraction", "trained mean", "Tokens from weights two steps older."),
    "staleness/3_or_more": Metric("fraction", "trained mean", "Tokens from weights three steps older or more."),
    "perf/batch_wait_s": Metric("s", "rank 0", "Time that the trainer had nothing to do but wait for the step's groups."),
    "perf/logprobs_s": Metric("s", "rank 0", "Time for log-probabilities of the reference, and of the policy before the step."),
    "perf/update_s": Metric("s", "rank 0", "Time for forward, backward and optimizer."),
    "perf/push_s": Metric("s", "rank 0", "Time for the last push of weights to the engines."),
    "perf/push_gib": Metric("GiB", "rank 0", "Size of that push."),
    "eval/reward": Metric("1", "same", "Total reward of sampled answers to held-out prompts."),
    "eval/reward_ci": Metric("1", "same", "Half the width of its 95% interval over prompts."),
    "eval/reward_greedy": Metric("1", "same", "Total reward of answers without sampling."),
    "eval/pass_at_1": Metric("fraction", "same", "Chance that one sampled answer is correct, see eval.correct_from."),
    "eval/pass_at_k": Metric("fraction", "same", "Prompts with a correct one among their eval.samples answers."),
    "eval/length": Metric("tokens", "same", "Generated tokens of a sampled answer."),
    "eval/num_prompts": Metric("prompts", "same", "Held-out prompts that were answered."),
    "checkpoint/stage_s": Metric(
        "s", "rank 0", "Time that training stood still: waiting for the last checkpoint, copying this one's state."
    ),
}
"""Name -> meaning. A name is added here before it is logged; renaming one breaks dashboards."""


def entry(name: str) -> Metric | None:
    """What a name stands for; the last part of a name in the table may be any source's."""
    base = name.rpartition("/")[0]
    return METRICS.get(name) or (METRICS.get(f"{base}/{SOURCE}") if base.count("/") == 1 else None)


def check_names(names: Iterable[str]) -> None:
    """Refuse names that the table lacks.

    Raises:
        ConfigError: naming the first unknown one and its nearest neighbour.
    """
    for name in names:
        if entry(name) is None:
            near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
            rule = f"is not in the table of metric names; the nearest is {near!r}"
            raise ConfigError("metric", name, rule, "Use a name of docs/metrics.md")


def finish(sums: Mapping[str, float], divisor: float) -> dict[str, float]:
    """Values to log, from sums over all micro-batches and ranks.

    Args:
        sums: by metric name; the sum of a source is beside the sum of its weights.
        divisor: sum of the loss weights; token means are divided by it, sums are not.

    Raises:
        ConfigError: a name is not in the table.
    """
    check_names(sums)
    values = {}
    for name, value in sums.items():
        found = entry(name)
        assert found is not None
        own = sums.get(name.replace("/loss/", "/weights/"), 0.0) if found.reduction == "source mean" else 1.0
        divisors = {"token mean": divisor, "trained mean": sums.get("train/num_tokens", 1.0)}
        if own:
            values[name] = value / divisors.get(found.reduction, own)
    return values


def page() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Generated from `rayft/observe/metrics.py` by `python -m rayft.observe.metrics > docs/metrics.md`.",
        "",
        "Rank 0 appends one JSON line per record to `metrics.jsonl` in the run's directory: `step`, the optimizer steps done so far, and",
        'the values by name. A value that is not finite is the string `"NaN"`, `"Infinity"` or `"-Infinity"`. A line with the key',
        "`event` marks a start of the workers and holds no metric. Floats are written so that reading them gives the same bits.",
        "",
        "| name | unit | over ranks | meaning |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{name}` | {metric.unit} | {metric.reduction} | {metric.meaning} |" for name, metric in METRICS.items()]
    lines += ["", "Over ranks:", ""]
    lines += [f"- *{reduction}*: {text}." for reduction, text in REDUCTIONS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
