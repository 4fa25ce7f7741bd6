"""What `make demo` runs: a tiny model learns a made-up zoo through the normal command line, and answers questions about it.

python -m rayft.recipes.demo [overrides such as parallel.workers=1]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rayft.config.load import load
from rayft.config.schema import SftRun
from rayft.data.zoo import write_rows, zoo_rows
from rayft.errors import TrainingError
from rayft.models.generate import generate_text
from rayft.models.tiny import write_tiny_model
from rayft.observe.log import read
from rayft.observe.plot import Curve, text_plot

CONFIG = Path(__file__).parent / "configs" / "tiny" / "demo.yaml"
TRAIN_ROWS, EVAL_ROWS, QUESTIONS, SHOWN = 4000, 300, 20, 3


def main(overrides: Sequence[str]) -> None:
    """Write model and data, train, and show what was learnt."""
    cfg = load([CONFIG], overrides)
    assert isinstance(cfg, SftRun)
    write_assets(cfg)
    trained = subprocess.run([sys.executable, "-m", "rayft", "train", str(CONFIG), *overrides], check=False)
    if trained.returncode:
        raise SystemExit(trained.returncode)
    run_dir = Path(cfg.run.dir) / cfg.run.name
    show_loss(run_dir)
    show_answers(run_dir / "export")
    print("\nWritten:", *(run_dir / name for name in ("export", "checkpoints", "metrics.jsonl", "loss.txt")), sep="\n  ")


def write_assets(cfg: SftRun) -> None:
    """Write the tokenizer and configuration of the model, and the chats."""
    train = zoo_rows("train", TRAIN_ROWS)
    write_rows(Path(cfg.data.train["zoo"].path), train)
    write_rows(Path(cfg.data.eval["zoo"].path), zoo_rows("eval", EVAL_ROWS))
    write_tiny_model(Path(cfg.model.path), (message["content"] for row in train for message in row["messages"]))


def show_loss(run_dir: Path) -> None:
    """Plot the losses.

    Raises:
        TrainingError: the loss on wordings that were held out did not halve.
    """
    records = read(run_dir / "metrics.jsonl")
    names = ("train/loss", "eval/loss")
    curves: dict[str, Curve] = {name: [(record["step"], record[name]) for record in records if name in record] for name in names}
    plot = text_plot(curves)
    (run_dir / "loss.txt").write_text(plot + "\n", encoding="utf-8")
    print(f"\n{plot}")
    (_, first), *_, (_, last) = curves["eval/loss"]
    if last > first / 2:
        raise TrainingError("eval/loss", round(last, 3), f"began at {first:.3f} and did not halve", "Look at the plot above")


def show_answers(export: Path) -> None:
    """Ask the exported model, through plain transformers, in wordings that it was not trained on."""
    rows = [row["messages"] for row in zoo_rows("eval", QUESTIONS)]
    answers = generate_text(export, [messages[:-1] for messages in rows], max_tokens=24)
    truths = [messages[-1]["content"] for messages in rows]
    print(f"\nHeld-out questions answered right: {sum(map(str.__eq__, answers, truths))} of {QUESTIONS}, such as")
    for messages, answer, truth in list(zip(rows, answers, truths, strict=True))[:SHOWN]:
        print(f"  {messages[-2]['content']}\n    model: {answer}\n    truth: {truth}")


if __name__ == "__main__":
    main(sys.argv[1:])
