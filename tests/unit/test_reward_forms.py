"""The forms that a reward function may have: trl's own, arguments by name, reasoning-gym's scores; and what is refused before a run."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.data import tasks
from rayft.data.prompts import PromptSet, prepare_prompts
from rayft.errors import ConfigError, DataError
from rayft.experience.judge import Judge, reward_functions
from rayft.rewards import reasoning_gym
from rayft.types import Group, Prompt, Trajectory
from tiny import tiny_tokenizer

FUNCTIONS = """
SEEN = []
def plain(prompt, completion, row, factor=1.0, *, words=()): return factor * len(completion) + len(words)
def trl(prompts, completions, completion_ids, topic, scale=1, **columns):
    SEEN.append((prompts, completions, completion_ids, topic, columns))
    return [scale * len(ids) for ids in completion_ids]
async def later(completions, **columns): return [float(len(text[0]["content"])) for text in completions]
def skips(completions, **columns): return [None for _ in completions]
"""
ROW = {"topic": "zoo", "prompts": "a column of an awkward name", "asked": [{"role": "user", "content": "two and two"}]}
TEXTS = ("four", "<think>two</think>the")


def run(folder: Path, *overrides: str) -> GrpoRun:
    if not (folder / "model").exists():
        tiny_tokenizer(folder / "model")
        (folder / "forms.py").write_text(FUNCTIONS)
    base = ["method=grpo", "run.name=a", f"run.dir={folder}", f"model.path={folder / 'model'}", "data.train.a.path=x"]
    cfg = load([], [*base, *(override.replace("./", f"{folder}/") for override in overrides)])
    assert isinstance(cfg, GrpoRun)
    return cfg


def rewards(cfg: GrpoRun, row: dict[str, Any] = ROW) -> tuple[tuple[float, ...], list[list[int]]]:
    """Of TEXTS, under the name r, and their tokens; the policy read a token in the middle of each."""
    judge = Judge(cfg, reward_functions(cfg))
    ids = [judge._tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    made = tuple(
        Trajectory((*one, 5), (*[True] * len(one), False), (-1.0,) * (len(one) + 1), (("1.3", 0, len(one)),), "stop") for one in ids
    )
    return asyncio.run(judge.score(Group(Prompt("0-1", 1, (5, 6), row), made))).rewards["r"], ids


def test_arguments_reach_a_function_by_name(tmp_path: Path) -> None:
    given = ["reward.functions.r.arguments.factor=2.0", "reward.functions.r.arguments.words=[a, b]"]
    values, _ = rewards(run(tmp_path, "reward.functions.r.function=./forms.py:plain", *given))
    assert values == tuple(2.0 * len(text) + 2 for text in TEXTS)


def test_a_function_of_trls_form_sees_what_trl_would_show_it(tmp_path: Path) -> None:
    values, ids = rewards(run(tmp_path, "reward.functions.r.function=./forms.py:trl", "reward.functions.r.trl=true"))
    assert values == tuple(map(float, map(len, ids)))
    (seen,) = sys.modules[next(name for name in sys.modules if name.startswith("rayft_user_") and name.endswith("_forms"))].SEEN
    assert seen == (
        [ROW["asked"]] * 2,
        [[{"role": "assistant", "content": text}] for text in TEXTS],
        ids,
        ["zoo"] * 2,
        {},
    )
    values, _ = rewards(run(tmp_path, "reward.functions.r.function=./forms.py:later", "reward.functions.r.trl=true"))
    assert values == tuple(float(len(text)) for text in TEXTS)


def test_trls_own_functions_give_what_they_give_in_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl.rewards")
    cfg = run(tmp_path, "reward.functions.r.function=trl.rewards:think_format_reward", "reward.functions.r.trl=true")
    assert rewards(cfg)[0] == (0.0, 1.0) == tuple(trl.think_format_reward([[{"content": text}] for text in TEXTS]))
    penalty = "from trl.rewards import get_repetition_penalty_reward\nreward = get_repetition_penalty_reward(ngram_size=1)\n"
    (tmp_path / "penalty.py").write_text(penalty)
    values, ids = rewards(run(tmp_path, "reward.functions.r.function=./penalty.py:reward", "reward.functions.r.trl=true"))
    assert values == tuple(trl.get_repetition_penalty_reward(ngram_size=1)(completion_ids=ids))


def test_trls_answer_that_there_is_no_reward_is_an_error(tmp_path: Path) -> None:
    cfg = run(tmp_path, "reward.functions.r.function=./forms.py:skips", "reward.functions.r.trl=true")
    with pytest.raises(DataError, match=re.escape("must give 2 finite numbers for 2 answers, and gave [None, None]")):
        rewards(cfg)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["function=./forms.py:plain", "arguments.facto=1.0"], "got an unexpected keyword argument 'facto'. Correct the arguments"),
        (
            ["function=./forms.py:trl"],
            "cannot be called with (prompt, completion, row) and arguments {}: missing a required argument: 'topic'",
        ),
        (["function=code", "arguments.isolate=false"], "got an unexpected keyword argument 'isolate'"),
        (["function=./none.py:f"], "there is no file"),
    ],
)
def test_what_cannot_be_called_is_refused_before_the_run(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    cfg = run(tmp_path, *(f"reward.functions.r.{one}" for one in overrides))
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        reward_functions(cfg)


def test_questions_of_reasoning_gym_are_prompts_that_their_reward_knows(tmp_path: Path) -> None:
    library = pytest.importorskip("reasoning_gym")
    url = f"{tasks.SCHEME}chain_sum?size=5&seed=7&max_terms=3"
    cfg = run(tmp_path, f"data.train.a.path={url}", "data.train.a.limit=4", "reward.functions.r.function=reasoning_gym")
    prompts = PromptSet(prepare_prompts(cfg, "train"), seed=0, shuffle=False)
    made = library.create_dataset("chain_sum", size=5, seed=7, max_terms=3)
    assert len(prompts) == 4 and [prompts.prompt(n).row["question"] for n in range(4)] == [made[n]["question"] for n in range(4)]
    row = prompts.prompt(2).row
    assert row["asked"] == [{"role": "user", "content": f"{made[2]['question']}\n\n{tasks.HINT}"}]
    right = made[2]["answer"]
    for text, value in [
        (f"<answer>0</answer> no, <answer> {right} </answer>", 1.0),
        (right, 0.0),
        ("<answer>no</answer>", made.score_answer("no", made[2])),
    ]:
        assert reasoning_gym.reward("", text, row) == value
    for text, value in [(f"No, -3.5: it is {right}.", 1.0), (f"{right}, or 0", 0.0), ("none", 0.0), (f"1-{right}", 1.0)]:
        assert reasoning_gym.reward("", text, row, read="number") == value
    with pytest.raises(ConfigError, match=re.escape("arguments.read = 'words': is no way to read an answer. Use tags or number")):
        reasoning_gym.reward("", right, row, read="words")
    other = prepare_prompts(run(tmp_path, f"data.train.a.path={url}&min_terms=3", "reward.functions.r.function=reasoning_gym"), "train")
    assert other != prepare_prompts(cfg, "train")
    with pytest.raises(DataError, match="makes another question at place 2"):
        reasoning_gym.reward("", "", row | {"seed": 8})
    for flaw, sentence in [
        ("nope", "Dataset 'nope' not registered"),
        ("chain_sum?x=1", "unexpected keyword"),
        ("chain_sum?size=x", "refused by"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            list(tasks.rows("data.train.a.path", tasks.SCHEME + flaw))


def test_reasoning_gym_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    tasks._made.cache_clear()
    row = {"task": "chain_sum", "size": 1, "seed": 0, "settings": {}, "place": 0, "question": "q"}
    for call in (lambda: list(tasks.rows("f", f"{tasks.SCHEME}chain_sum")), lambda: reasoning_gym.reward("", "", row)):
        with pytest.raises(ConfigError, match=re.escape("needs the package reasoning-gym, which is not installed. Install rayft")):
            call()
    with pytest.raises(DataError, match="is no row of reasoning-gym://, as it lacks 'task'"):
        reasoning_gym.reward("", "", json.loads("{}"))


def test_a_model_scores_what_was_asked_with_each_answer(tmp_path: Path) -> None:
    cfg = run(tmp_path, "reward.functions.r.model.path=m", "reward.functions.r.weight=2.0")
    seen: list[Any] = []

    async def model(chats: list[Any]) -> list[float]:
        seen.extend(chats)
        return [0.25, 0.5]

    judge = Judge(cfg, reward_functions(cfg), {"r": model})
    ids = [tuple(judge._tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS]
    made = tuple(Trajectory(one, (True,) * len(one), (-1.0,) * len(one), (("1.3", 0, len(one)),), "stop") for one in ids)
    scored = asyncio.run(judge.score(Group(Prompt("0-1", 1, ids[0], ROW), made)))
    assert (scored.rewards, scored.total) == ({"r": (0.25, 0.5)}, (0.5, 1.0))
    assert seen == [[*ROW["asked"], {"role": "assistant", "content": text}] for text in TEXTS]
    seen.clear()
    asyncio.run(judge.score(Group(Prompt("0-1", 1, ids[0], {}), made)))
    assert seen[0][0] == {"role": "user", "content": TEXTS[0]}, "a prompt that was no chat is one message"


def test_a_judge_that_fails_is_an_error_of_the_reward_with_its_row(tmp_path: Path) -> None:
    fields = ("url=http://127.0.0.1:9/v1", "model=m", "prompt='{{ completion }} {{ row.nothing }}'")
    cfg = run(tmp_path, *(f"reward.functions.r.judge.{field}" for field in fields))
    with pytest.raises(DataError, match=re.escape("reward.functions.r: raised DataError on row {'topic': 'zoo'")):
        rewards(cfg)


def test_configurations_of_the_page_are_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.split("\n## A reward\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```yaml\n(.+?)```", section, re.DOTALL)
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.yaml").write_text(block)
        base = ["method=grpo", "run.name=a", "model.path=m", "data.train.x.path=x"]
        assert load([tmp_path / f"{number}.yaml"], base).method == "grpo"
