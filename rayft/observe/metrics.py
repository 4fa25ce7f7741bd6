"""The metric names: an API that dashboards rely on. Each has a unit, a reduction over ranks and a meaning.

`python -m rayft.observe.metrics > docs/metrics.md` writes the page of names from this table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rayft.errors import ConfigError

Reduction = Literal["token mean", "sum", "same", "rank 0"]

REDUCTIONS: dict[Reduction, str] = {
    "token mean": "summed over micro-batches and ranks, then divided by the sum of the loss weights",
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


METRICS: dict[str, Metric] = {
    "train/loss": Metric("nats per token", "token mean", "Negative log-likelihood of the step's trained tokens, by loss weight."),
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
    "eval/perplexity": Metric("1", "same", "exp(eval/loss)."),
    "eval/num_tokens": Metric("tokens", "sum", "Loss weights of the evaluation: its trained tokens when each weighs 1."),
    "checkpoint/stage_s": Metric(
        "s", "rank 0", "Time that training stood still: waiting for the last checkpoint, copying this one's state."
    ),
}
"""Name -> meaning. A name is added here before it is logged; renaming one breaks dashboards."""


def check_names(names: Iterable[str]) -> None:
    """Refuse names that the table lacks.

    Raises:
        ConfigError: naming the first unknown one and its nearest neighbour.
    """
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
            rule = f"is not in the table of metric names; the nearest is {near!r}"
            raise ConfigError("metric", name, rule, "Use a name of docs/metrics.md")


def finish(sums: Mapping[str, float], divisor: float) -> dict[str, float]:
    """Values to log, from sums over all micro-batches and ranks.

    Args:
        sums: by metric name.
        divisor: sum of the loss weights; token means are divided by it, sums are not.

    Raises:
        ConfigError: a name is not in the table.
    """
    check_names(sums)
    return {name: value / divisor if METRICS[name].reduction == "token mean" else value for name, value in sums.items()}


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
