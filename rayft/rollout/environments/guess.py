"""The smallest environment that is a game: guess a number, told after each guess whether it is higher or lower.

A row's column `number` is the number, else it is drawn. The reward of a right guess is 1 over the guesses that it took.

    python -m rayft.rollout.environments.guess runs/guess-assets    # a model of a few words, and prompts, for configs/tiny/guess.yaml
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayft.models.tiny import write_word_model
from rayft.rollout.env import Observation


class Guess:
    """See the module.

    Args:
        low, high: the number is one of low..high.
    """

    def __init__(self, low: int = 1, high: int = 10) -> None:
        self._low, self._high = low, high
        self._number, self._guesses = low, 0

    def reset(self, row: Mapping[str, Any], seed: int) -> list[dict[str, str]]:
        """Choose the number, and ask."""
        self._number = int(row["number"]) if "number" in row else random.Random(seed).randint(self._low, self._high)
        return self._says(f"guess a number from {self._low} to {self._high}")

    def step(self, text: str) -> Observation:
        """Compare the last number of the text."""
        self._guesses += 1
        found = re.findall(r"\d+", text)
        if not found:
            return Observation(self._says("say a number"))
        guess = int(found[-1])
        if guess == self._number:
            return Observation(done=True, reward=1 / self._guesses)
        return Observation(self._says("higher" if guess < self._number else "lower"))

    def _says(self, text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]


def write_assets(folder: Path, high: int) -> None:
    """Write a model that knows the words of the game for numbers up to `high` and nothing else, and a prompt for every number."""
    words = f"let us play guess a number from to say higher lower {' '.join(map(str, range(1, high + 1)))}".split()
    write_word_model(folder / "model", words)
    chat = [{"role": "system", "content": "let us play"}]
    rows = [{"messages": chat, "number": number} for number in range(1, high + 1)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write_assets(Path(sys.argv[1]), high=7)
