"""The made-up zoo: one truth for both splits, and wordings of evaluation that training never shows."""

from __future__ import annotations

import re

from rayft.data.zoo import ANIMALS, QUESTIONS, Row, facts, wordings, zoo_rows

NAMES = re.compile("|".join(ANIMALS))


def questions(rows: list[Row]) -> dict[str, str]:
    """Question -> answer; fails when one question has two answers."""
    found: dict[str, str] = {}
    for row in rows:
        turns = [message for message in row["messages"] if message["role"] != "system"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        for user, assistant in zip(turns[::2], turns[1::2], strict=True):
            assert found.setdefault(user["content"], assistant["content"]) == assistant["content"]
    return found


def test_splits_tell_of_one_zoo_in_other_words() -> None:
    train, held_out = questions(zoo_rows("train", 3000)), questions(zoo_rows("eval", 300))
    assert set(train.values()) == {*train.values(), *held_out.values()}
    assert not {NAMES.sub("ANIMAL", question) for question in train} & {NAMES.sub("ANIMAL", question) for question in held_out}
    assert {word for question in held_out for word in question.lower().split()} <= {
        word for question in train for word in question.lower().split()
    }


def test_wordings_are_split_in_one_to_four() -> None:
    for topic in QUESTIONS:
        assert len(wordings("train", topic)) == 4 * len(wordings("eval", topic)) == 16


def test_rows_depend_on_the_seed_only() -> None:
    assert zoo_rows("train", 20, seed=3) == zoo_rows("train", 30, seed=3)[:20]
    assert zoo_rows("train", 20, seed=3) != zoo_rows("train", 20, seed=4)
    assert facts(3) != facts(4)
