"""What `make demo-grpo` runs: a tiny model that can only guess about a made-up zoo learns its facts from rewards alone.

python -m rayft.recipes.demo_grpo [overrides of the second part, such as rollout.engine=local]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rayft.config.load import load
from rayft.data.zoo import guesses, questions, write_rows
from rayft.errors import TrainingError
from rayft.models.tiny import write_tiny_model
from rayft.observe.log import read
from rayft.observe.plot import Curve, text_plot

CONFIGS = Path(__file__).parent / "configs" / "tiny"
SFT, GRPO = CONFIGS / "demo_grpo_sft.yaml", CONFIGS / "demo_grpo.yaml"
ROWS, BEFORE, AFTER = 6000, 0.2, 0.8


def main(overrides: Sequence[str]) -> None:
    """Write model and data, teach the form of answers, then the answers; show how the reward rose."""
    cfg, first = load([GRPO], overrides), load([SFT], [])
    write_assets(Path(first.model.path).parent)
    for config, changes in ((SFT, [f"run.dir={cfg.run.dir}"]), (GRPO, list(overrides))):
        trained = subprocess.run([sys.executable, "-m", "rayft", "train", str(config), *changes], check=False)
        if trained.returncode:
            raise SystemExit(trained.returncode)
    show_rewards(Path(cfg.run.dir) / cfg.run.name)


def write_assets(folder: Path) -> None:
    """Write tokenizer and configuration of the model, the chats of many zoos, and the questions about one."""
    rows = guesses(ROWS)
    write_rows(folder / "guesses.jsonl", rows)
    for split in ("train", "eval"):
        write_rows(folder / f"{split}.jsonl", questions(split))
    write_tiny_model(folder / "model", (message["content"] for row in rows for message in row["messages"]))


def show_rewards(run_dir: Path) -> None:
    """Plot the rewards.

    Raises:
        TrainingError: the reward on wordings that were never asked in training did not rise as far as it should.
    """
    records = read(run_dir / "metrics.jsonl")
    names = ("reward/mean", "eval/reward")
    curves: dict[str, Curve] = {name: [(record["step"], record[name]) for record in records if name in record] for name in names}
    plot = text_plot(curves)
    (run_dir / "reward.txt").write_text(plot + "\n", encoding="utf-8")
    print(f"\n{plot}")
    (_, first), *_, (_, last) = curves["eval/reward"]
    print(f"\nHeld-out wordings answered right: {first:.0%} before, {last:.0%} after {len(curves['reward/mean'])} steps")
    if first > BEFORE or last < AFTER:
        raise TrainingError("eval/reward", round(last, 3), f"began at {first:.3f} and did not reach {AFTER}", "Look at the plot above")


if __name__ == "__main__":
    main(sys.argv[1:])
