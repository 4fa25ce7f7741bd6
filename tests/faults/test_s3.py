"""Rows, shards, run directory and export on an object store, through HTTP, with Ray and a kill on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from faults.job import LOSS, Job, attempts, exact, resumed_at, train, values, wait, write_site
from rayft.checkpoint import resume
from rayft.cli import main
from rayft.data import store
from rayft.models.hub import fetched_folder
from s3_server import CREDENTIALS, S3, reached, serve

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

STEPS = 20


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with serve() as endpoint, reached(endpoint, retry_s=20.0, request_s=5.0):
        yield endpoint


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sections: dict[str, dict[str, Any]] = {
        "run": {"seed": 1, "max_steps": STEPS},
        "checkpoint": {"every": 5},
        "eval": {"every": 10},
        "export": {"dtype": "float32"},
        "parallel": {"workers": 2},
    }
    return write_site(tmp_path_factory.mktemp("site"), **sections)


def log_of(run: str, folder: Path) -> Path:
    """A local folder with the small files of a run on the store."""
    for name in ("metrics.jsonl", "attempts.jsonl"):
        store.fetch(f"{run}/{name}", folder / name)
    return folder


def test_a_run_on_a_store_equals_one_on_a_path_in_spite_of_a_kill(site: Path, s3: S3, tmp_path: Path) -> None:
    for name in ("train.jsonl", "eval.jsonl"):
        store.upload(site / name, f"s3://bucket/rows/{name}")
    run = "s3://bucket/runs/far"
    places = [
        "run.dir=s3://bucket/runs",
        "data.train.zoo.path=s3://bucket/rows/train.jsonl",
        "data.eval.zoo.path=s3://bucket/rows/eval.jsonl",
    ]
    with Job(site, "far", *places, hooks=["note_process", "slow_steps"]) as job:
        wait(lambda: job.driver.poll() is not None or resume.newest(run) is not None, 120, "a checkpoint")
        pid = int(store.read(f"{run}/rank-1.pid"))
        assert job.processes()[pid].startswith("ray::RayTrainWorker")
        os.kill(pid, signal.SIGKILL)
        assert job.end() == 0
        text = job.text()
    reference = train(site, "near")
    far = log_of(run, tmp_path)
    assert attempts(far) == [2, 2] and resumed_at(far)[1] in (5, 10, 15)
    for name in (LOSS, "eval/loss"):
        assert exact(values(far, name)) == exact(values(reference, name)), name
    assert [one.step for one in resume.committed(run)] == [15, STEPS] and resume.unfinished(run) == []
    assert not store.exists(f"{run}/lease.json") and not (site / "runs" / "far").exists()
    assert f"step {STEPS}/{STEPS}" in text and f"{run}/export" in text
    folders = Path(fetched_folder(f"{run}/export", tmp_path)), reference / "export"
    tensors = [load_file(folder / "model.safetensors") for folder in folders]
    assert tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])

    secret = CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
    saved = [name for name in store.sizes("s3://bucket") if secret.encode() in store.read(f"s3://bucket/{name}")]
    assert saved == [] and secret not in text


def test_a_run_starts_from_a_step_of_another_one_on_the_store(site: Path, s3: S3, capfd: pytest.CaptureFixture[str]) -> None:
    """In this process; the step's export is made on the way, an adapter is merged when it is asked for, and the rest is cleaned up."""
    places = ["run.dir=s3://bucket/starts", "parallel.workers=1", "eval.every=null"]
    config = str(site / "run.yaml")
    here = [f"data.{split}.zoo.path={site / f'{split}.jsonl'}" for split in ("train", "eval")]
    first = [*here, *places, "run.name=first", "run.max_steps=4", "checkpoint.every=2", f"model.path={site / 'model'}"]
    second = [*here, *places, "run.name=second", "run.max_steps=2", "model.init=pretrained", "model.path=run:first@2", "adapter.type=lora"]
    assert main(["train", config, *first, "--local"]) == 0
    assert main(["train", config, *second, "--local"]) == 0
    assert store.exists("s3://bucket/starts/first/export-step-2/export.json")
    third = [*second, "run.name=third", "model.path=run:second", "adapter.type=none"]
    assert main(["train", config, *third, "--local"]) == 0
    assert store.exists("s3://bucket/starts/second/export-merged-step-2/export.json")
    capfd.readouterr()
    assert main(["train", config, *second, "run.name=fourth", "model.path=run:first@3", "--local"]) == 3
    assert "there is no such checkpoint in s3://bucket/starts/first (steps: 2, 4)" in capfd.readouterr().err
    assert main(["train", config, *second, "run.name=fourth", "model.path=run:nobody", "--local"]) == 2
    assert "must name another run in s3://bucket/starts" in capfd.readouterr().err

    assert main(["clean", config, *first, "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert "first/checkpoints/step-00000002-a1  (checkpoint beyond the newest 1)" in shown and "1 folders would be deleted" in shown
    assert [one.step for one in resume.committed("s3://bucket/starts/first")] == [2, 4]
    assert main(["clean", config, *first]) == 0
    assert [one.step for one in resume.committed("s3://bucket/starts/first")] == [4]
