"""The commands beside train, on a tiny run of this very process: what they print, and what they refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from rayft.cli import main
from rayft.data.zoo import write_rows, zoo_rows
from rayft.models.tiny import write_tiny_model
from rayft.observe.log import read

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with rows, a full run of 8 steps, and a LoRA run of 4 steps on its export."""
    folder = tmp_path_factory.mktemp("site")
    rows = zoo_rows("train", 120)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "eval.jsonl", zoo_rows("eval", 20))
    write_tiny_model(folder / "model", (message["content"] for row in rows for message in row["messages"]), hidden_size=64)
    sources = {split: {"zoo": {"path": str(folder / f"{split}.jsonl")}} for split in ("train", "eval")}
    run = {
        "method": "sft",
        "run": {"name": "full", "dir": str(folder / "runs"), "max_steps": 8},
        "model": {"path": str(folder / "model"), "init": "random"},
        "data": sources | {"seq_len": 128},
        "batch": {"rows": 4},
        "optim": {"lr": 3e-3},
        "checkpoint": {"every": 4},
        "export": {"dtype": "float32"},
    }
    (folder / "full.yaml").write_text(yaml.safe_dump(run))
    base = str(folder / "runs" / "full" / "export")
    lora = run | {"run": run["run"] | {"name": "lora", "max_steps": 4}, "model": {"path": base}, "adapter": {"type": "lora", "r": 4}}
    (folder / "lora.yaml").write_text(yaml.safe_dump(lora))
    assert main(["train", str(folder / "full.yaml"), "--local"]) == 0
    assert main(["train", str(folder / "lora.yaml"), "--local"]) == 0
    yield folder


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line; its exit code, output and errors."""

    def run(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return code, *capfd.readouterr()

    return run


def last_eval(site: Path, name: str) -> float:
    return [record["eval/loss"] for record in read(site / "runs" / name / "metrics.jsonl") if "eval/loss" in record][-1]


def printed_loss(text: str) -> float:
    found = re.search(r"loss ([\d.]+)", text)
    assert found is not None, text
    return float(found[1])


@pytest.mark.parametrize("name", ["full", "lora"])
def test_evaluate_repeats_the_run_s_last_evaluation(site: Path, command: Command, name: str) -> None:
    code, out, _ = command("evaluate", site / f"{name}.yaml", "--local")
    assert code == 0 and printed_loss(out) == pytest.approx(last_eval(site, name), abs=1e-4)


def test_evaluate_of_a_folder_reads_its_weights_even_when_the_run_drew_its_own(site: Path, command: Command) -> None:
    code, out, _ = command("evaluate", site / "full.yaml", "--local", "--model", site / "runs" / "full" / "export")
    assert code == 0 and printed_loss(out) == pytest.approx(last_eval(site, "full"), abs=1e-4)


def test_export_of_an_earlier_step_and_merged(site: Path, command: Command) -> None:
    from rayft.models.generate import load_exported

    code, out, _ = command("export", site / "full.yaml", "--step", 4)
    assert code == 0 and "step 4" in out
    earlier, _ = load_exported(site / "runs" / "full" / "export-step-4")
    final, _ = load_exported(site / "runs" / "full" / "export")
    assert any(not torch.equal(a, b) for a, b in zip(earlier.parameters(), final.parameters(), strict=True))

    target = site / "merged"
    assert command("export", site / "lora.yaml", "--merge", "--out", target)[0] == 0
    adapted, _ = load_exported(site / "runs" / "lora" / "export")
    merged, _ = load_exported(target)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, rtol=1e-5, atol=1e-5)


def test_export_refuses_a_missing_step_and_another_base(site: Path, command: Command) -> None:
    code, _, err = command("export", site / "full.yaml", "--step", 7)
    assert code == 3 and "steps: 4, 8" in err
    code, _, err = command("export", site / "lora.yaml", f"model.path={site / 'runs' / 'full' / 'export-step-4'}")
    assert code == 3 and "base weights: differ" in err


def test_generate_answers_from_the_export(site: Path, command: Command) -> None:
    code, out, _ = command("generate", site / "lora.yaml", "--prompt", "How many bears live here?", "--max-tokens", 8)
    assert code == 0 and out.strip()
    code, _, err = command("generate", site / "full.yaml", "run.name=none", "--prompt", "x")
    assert code == 2 and "has no export" in err


def test_plan_states_sizes_and_refuses_a_shortfall(site: Path, command: Command) -> None:
    code, out, _ = command("plan", site / "full.yaml", "run.max_steps=null", "run.epochs=2", "parallel.device=cpu")
    rows = json.loads(next((site / "runs" / ".shards").glob("train-*/manifest.json")).read_text())["totals"]["rows"]
    assert code == 0 and f"{-(-2 * rows // 4)} steps: 2 epochs of {rows} rows" in out and "fits" in out
    code, _, err = command("plan", site / "full.yaml", "parallel.workers=500", "parallel.device=cpu")
    assert code == 4 and "the cluster has" in err
    code, _, err = command("plan", site / "full.yaml", "data.seq_len=4000000", "parallel.device=cpu")
    assert code == 4 and "GiB" in err


def test_preprocess_reuses_the_shards_of_the_run(site: Path, command: Command) -> None:
    shards = site / "runs" / ".shards"
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*.parquet")}
    code, out, _ = command("preprocess", site / "full.yaml", "--local")
    assert code == 0 and "train:" in out and "eval:" in out
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*.parquet")} == before


def test_check_compares_with_transformers_and_names_what_would_be_adapted(site: Path, command: Command) -> None:
    code, out, _ = command("check", site / "runs" / "full" / "export")
    assert code == 0
    for said in ("14 modules", "documents on 2 layers", "packed documents against the same alone", "rayft against transformers"):
        assert said in out, out
    code, _, err = command("check", site / "runs" / "full" / "export", "--adapter-targets", "no_such_layer")
    assert code == 2 and "adapter.targets" in err
