"""What an online run is refused for before anything is placed: builds of vLLM, tools that cannot run here, files that are not there."""

from __future__ import annotations

import importlib.machinery
import re
from pathlib import Path
from typing import Any

import pytest

from rayft.actors import refusals
from rayft.cli import main
from rayft.config.load import dump, load
from rayft.config.paths import absolute
from rayft.config.schema import GrpoRun
from rayft.errors import ConfigError
from rayft.experience.judge import reward_functions
from rayft.rollout.environments import python
from rayft.rollout.stage import maker_of, scene_of

BASE = ["method=grpo", "run.name=first", "model.path=m", "data.train.a.path=x"]
ASKS_HOST = ["reward.functions.q.judge.url=http://h/v1", "reward.functions.q.judge.model=m"]
RUNS_CODE = ["environment.function=tools", "environment.tools=[rayft.rollout.environments.python:python]"]


def run_of(*overrides: str) -> GrpoRun:
    cfg = load([], [*BASE, *(overrides or ["reward.functions.r.function=exact"])])
    assert isinstance(cfg, GrpoRun)
    return cfg


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, version: str, takes_weights: bool) -> None:
    """A vLLM of that version, with or without its way to take weights."""
    found: Any = importlib.machinery.ModuleSpec("vllm", None, is_package=True)
    found.submodule_search_locations = [str(folder)]
    if takes_weights:
        (folder / refusals.NEEDED).parent.mkdir(parents=True)
        (folder / refusals.NEEDED).touch()
    monkeypatch.setattr(refusals.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(refusals.importlib.metadata, "version", lambda name: version)


@pytest.mark.parametrize("version", ["0.25.0", "0.25.1+cu130", "0.32.0", "1.0.0rc2", "0.28.0.post1"])
def test_a_release_is_known_by_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    install(monkeypatch, tmp_path, version, takes_weights=False)
    refusals.check_engine(run_of())


@pytest.mark.parametrize("version", ["0.24.3", "0.9.2+cpu"])
def test_an_old_release_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    install(monkeypatch, tmp_path, version, takes_weights=True)
    with pytest.raises(ConfigError, match=re.escape(f"is version {version} here, and 0.25 is the oldest that works")):
        refusals.check_engine(run_of())


@pytest.mark.parametrize("version", ["0.25.1.dev3+gabc1234", "0.1.dev1+gabc1234.d20260101", "0.0.0", "dev", "0.24.1.dev9"])
def test_a_build_from_source_is_judged_by_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    install(monkeypatch, tmp_path / "new", version, takes_weights=True)
    refusals.check_engine(run_of())
    assert caplog.messages == [f"vLLM {version} is no release; it can take new weights, so it is used"]
    install(monkeypatch, tmp_path / "old", version, takes_weights=False)
    with pytest.raises(ConfigError, match=re.escape(f"is a build of {version} here, which lacks vllm/distributed/weight_transfer")):
        refusals.check_engine(run_of())


def test_a_machine_that_only_submits_validates_without_vllm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rayft.recipes import grpo

    monkeypatch.chdir(tmp_path)
    cfg = run_of("reward.functions.r.function=length")
    (tmp_path / "run.yaml").write_text(dump(cfg))
    find = refusals.importlib.util.find_spec
    monkeypatch.setattr(refusals.importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    assert main(["validate", "run.yaml"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("rollout.engine=vllm was not checked: vllm is not installed here; rayft train checks it before")
    assert last == "first: a valid grpo run of m on a"
    with pytest.raises(ConfigError, match="the package vllm is not installed here"):
        grpo.main(cfg)
    assert main(["validate", "run.yaml", "rollout.engine=local"]) == 0
    assert capsys.readouterr().out == "first: a valid grpo run of m on a\n"


def test_a_tool_that_runs_programs_is_refused_where_none_can_be_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_of(run_of(*RUNS_CODE, "environment.weight=1.0", "reward.functions.r.function=exact"))
    assert scene is not None
    monkeypatch.setattr(python, "refusal", lambda: "Operation not permitted")
    with pytest.raises(ConfigError, match=r"the tool python: programs cannot be isolated here: Operation not permitted\. Run"):
        maker_of(scene)
    monkeypatch.setattr(python, "refusal", lambda: None)
    assert [tool["function"]["name"] for tool in maker_of(scene)[1] or ()] == ["python"]


def test_what_a_judge_is_asked_is_read_once_where_the_command_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = "Rate {{ completion }} from 0 to 10, as told in guide.jinja"
    (tmp_path / "ask.jinja").write_text(text)
    cfg = run_of(*ASKS_HOST, "reward.functions.q.judge.prompt=./ask.jinja")
    found = absolute(cfg)
    (tmp_path / "ask.jinja").unlink()
    judge = found.reward.functions["q"].judge
    assert judge is not None and judge.prompt == text
    assert reward_functions(found) == {} and absolute(found) == found
    (tmp_path / "saved.yaml").write_text(dump(found))
    assert load([tmp_path / "saved.yaml"], []) == found, "the saved run holds what was used"
    with pytest.raises(ConfigError, match=re.escape("reward.functions.q.judge.prompt = './ask.jinja': there is no such file")):
        reward_functions(absolute(cfg))
