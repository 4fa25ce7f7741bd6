"""What `rayft plan` ends with: fits only when memory was compared, and on GPUs a word about torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rayft import commands
from rayft.actors import placement
from rayft.actors.run import Run
from rayft.config.load import load
from rayft.models.tiny import write_tiny_model
from rayft.observe import flops
from rayft.observe.startup import FirstStep, begin, in_words, mark
from rayft.types import Launch

ROWS = ["method=sft", "data.seq_len=64", "batch.rows=4", "batch.micro_rows=1"]
PROMPTS = ["method=grpo", "rollout.engine=local", "reward.functions.a.function=length"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("verdict")
    write_tiny_model(made, ["words"], vocab_size=300, hidden_size=64, layers=1)
    return made


def planned(folder: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> list[str]:
    """The last lines of the plan."""
    shared = ["run.name=r", "run.dir=/nowhere", "run.max_steps=3", f"model.path={folder}", "data.train.a.path=a.jsonl"]
    commands.plan(load([], [*shared, *settings]))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("method", [ROWS, PROMPTS], ids=["sft", "grpo"])
def test_what_was_not_compared_does_not_fit(
    method: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(placement, "resources_in_reach", lambda: {"CPU": 8.0, "GPU": 2.0, "memory": 1e12})
    assert planned(folder, capsys, *method, "parallel.device=cpu")[-1] == "fits"
    *_, memory, speed = planned(folder, capsys, *method, "parallel.device=cuda")
    assert memory == "memory    not checked: there is no GPU here to compare it with"
    assert speed.startswith("speed     parallel.compile is off: on an H100") and "docs/benchmarks.md" in speed
    assert planned(folder, capsys, *method, "parallel.device=cuda", "parallel.compile=true")[-1] == memory
    monkeypatch.setattr(flops, "shape_of", lambda config: None)
    lines = planned(folder, capsys, *method, "parallel.device=cpu")
    assert lines[-1] == "memory    not checked: the formulas do not cover this architecture" and "fits" not in lines


def test_the_hint_has_the_figures_of_the_page(folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert "`tests/bench/bench_sft.py --compile` | **86,990**" in page
    assert "| full, float32 weights and states | 20.50 | 20.47 | 32,300 |" in page


def test_the_first_step_is_told_once_by_part(caplog: pytest.LogCaptureFixture) -> None:
    parts = {"command": 100.0, "imports": 101.5, "Ray": 108.0, "rows": 110.0, "workers and model": 117.25, "step": 118.0}
    assert in_words(parts) == "first step after 18.0 s: imports 1.5, Ray 6.5, rows 2.0, workers and model 7.2, step 0.8"
    begin()
    mark("rows")
    first = FirstStep()
    with caplog.at_level("INFO", logger="rayft"):
        first.look([{"event": "start", "step": 4, "time": 1e9}, {"step": 4, "eval/loss": 2.0}])
        first.look([{"step": 5, "train/loss": 2.0}, {"step": 6, "train/loss": 2.0}])
        first.look([{"event": "start", "step": 4, "time": 2e9}, {"step": 5, "train/loss": 2.0}])
    assert [record.message.partition(" after ")[0] for record in caplog.records] == ["first step"]
    assert "rows 0.0, workers and model" in caplog.text


@pytest.mark.parametrize(("device", "compiled", "told"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)])
def test_training_says_it_too(
    device: str, compiled: bool, told: bool, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["run.name=r", f"model.path={folder}", "data.train.a.path=a.jsonl", f"parallel.compile={str(compiled).lower()}"]
    cfg: Any = load([], [*ROWS, *settings])
    launch = Launch(cfg, tmp_path, "", None, {}, 3, device, True)
    with caplog.at_level("INFO", logger="rayft"), Run(cfg, tmp_path, device, True, None).progress(launch):
        pass
    assert [record.message.partition(":")[0] for record in caplog.records] == ["parallel.compile is off"] * told
