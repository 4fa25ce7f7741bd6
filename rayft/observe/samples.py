"""samples.jsonl as a table for the terminal: what was asked, who said what, what it was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table


def table(samples: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each sample, of one step or of several.

    Args:
        samples: lines of samples.jsonl, of offline or online runs. What an environment said is dim.
    """
    made = Table(show_lines=True)
    online = any("reward" in sample for sample in samples)
    for name in ("step", *(("reward", "parts", "end") if online else ()), "prompt", "answer"):
        made.add_column(name, overflow="fold", justify="right" if name in ("step", "reward") else "left")
    for sample in samples:
        worth = [f"{sample['reward']:.3g}", _parts(sample["rewards"]), sample["finish_reason"]] if online else []
        made.add_row(str(sample["step"]), *worth, escape(sample["prompt"].strip()), _answer(sample))
    return made


def _parts(rewards: Mapping[str, float]) -> str:
    return "\n".join(f"{escape(name)} {value:.3g}" for name, value in rewards.items())


def _answer(sample: Mapping[str, Any]) -> str:
    if "turns" not in sample:
        return escape(str(sample.get("answer", sample.get("text", ""))).strip())
    said = [(turn["by"], escape(turn["text"].strip())) for turn in sample["turns"]]
    return "\n".join(text if by == "policy" else f"[dim]{text}[/dim]" for by, text in said)
