"""A closed world of chats about a made-up zoo, small enough that a tiny model learns it in a minute: for the demo and for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

Split = Literal["train", "eval"]
Row = dict[str, list[dict[str, str]]]

ANIMALS = (
    "bear", "camel", "crocodile", "elephant", "flamingo", "giraffe", "gorilla", "kangaroo", "lemur", "leopard",
    "lion", "monkey", "otter", "panda", "parrot", "penguin", "seal", "tiger", "turtle", "zebra",
)  # fmt: skip
COLOURS = ("black", "blue", "brown", "green", "orange", "purple", "red", "white", "yellow")
FOODS = ("apples", "bread", "carrots", "clover", "fish", "honey", "leaves", "nuts", "rice")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

OPENINGS = ("{}", "Please tell me: {}", "I would like to know: {}", "A child asks: {}", "One more question: {}")
QUESTIONS = {
    "colour": ("what colour is the {}?", "which colour does the {} have?", "the {} has which colour?", "what is the colour of the {}?"),
    "food": ("what does the {} eat?", "which food does the {} like?", "the {} eats which food?", "do you know the food of the {}?"),
    "number": ("how many {}s live here?", "what is the number of {}s?", "you keep how many {}s?", "do you know the number of {}s?"),
}
ANSWERS = {"colour": "The {} is {}.", "food": "The {} eats {}.", "number": "There are {1} {0}s."}
GUIDE = {"role": "system", "content": "You are the guide of the zoo."}


def facts(seed: int) -> dict[tuple[str, str], str]:
    """(animal, topic) -> value, for every animal and the topics colour, food and number."""
    draw = Random(f"zoo facts {seed}")
    values = {"colour": COLOURS, "food": FOODS, "number": NUMBERS}
    return {(animal, topic): draw.choice(choices) for animal in ANIMALS for topic, choices in values.items()}


def wordings(split: Split, topic: str) -> list[str]:
    """Ways to ask about a topic. One pairing of opening and question in five is kept for evaluation, and trained on never."""
    pairs = [(i, j) for i in range(len(OPENINGS)) for j in range(len(QUESTIONS[topic]))]
    kept = [(i, j) for i, j in pairs if ((i + j) % 5 == 0) == (split == "eval")]
    return [OPENINGS[i].format(QUESTIONS[topic][j]) for i, j in kept]


def zoo_rows(split: Split, count: int, seed: int = 0) -> list[Row]:
    """Chat rows of one or two questions; both splits tell of the same zoo.

    Args:
        split: decides which wordings occur.
        count: number of rows.
        seed: of the zoo and of the rows.

    Returns:
        Rows with one column, `messages`, each message a role and a content.
    """
    draw, zoo = Random(f"zoo {split} {seed}"), facts(seed)
    rows: list[Row] = []
    for _ in range(count):
        messages = [GUIDE] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 2)):
            animal, topic = draw.choice(list(zoo))
            question = draw.choice(wordings(split, topic)).format(animal)
            messages.append({"role": "user", "content": question[0].upper() + question[1:]})
            messages.append({"role": "assistant", "content": ANSWERS[topic].format(animal, zoo[animal, topic])})
        rows.append({"messages": messages})
    return rows


def guesses(count: int, seed: int = 1) -> list[Row]:
    """Chat rows of one question, each about a zoo of its own: they teach how a guide answers, and nothing of any zoo."""
    return [zoo_rows("train", 1, seed=seed + number)[0] for number in range(count)]


def questions(split: Split, seed: int = 0) -> list[dict[str, Any]]:
    """Every fact of the zoo asked in every wording of the split, with the one right answer in the column `answer`."""
    return [
        {
            "messages": [{"role": "user", "content": (question := wording.format(animal))[0].upper() + question[1:]}],
            "answer": ANSWERS[topic].format(animal, value),
        }
        for (animal, topic), value in facts(seed).items()
        for wording in wordings(split, topic)
    ]


def knows(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """1 for the right answer of a row of `questions`, else 0."""
    return float(completion.strip() == row["answer"])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a .jsonl file, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
