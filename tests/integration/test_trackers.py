"""Trackers get what metrics.jsonl gets, once, over kills and restarts; read back from what each of them wrote offline."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.job import Job, train, write_site
from rayft.errors import ConfigError
from rayft.observe.log import read
from rayft.observe.trackers import PACKAGES, TRACKERS, check_installed

pytestmark = pytest.mark.timeout(300)

STEPS = 12
Point = tuple[str, int, float]
"""(metric, step, value)"""


def from_tensorboard(folder: Path) -> Iterator[Point]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    for name in found.Tags()["scalars"]:
        yield from ((name, event.step, event.value) for event in found.Scalars(name))


def from_mlflow(folder: Path) -> Iterator[Point]:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(folder.as_uri())
    (run,) = [run for found in client.search_experiments() for run in client.search_runs([found.experiment_id])]
    assert run.info.run_name == "tracked" and run.info.status == "FINISHED" and run.data.params["optim.lr"] == "0.003"
    for name in run.data.metrics:
        yield from ((name, metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))


def from_trackio(folder: Path) -> Iterator[Point]:
    import sqlite3

    with sqlite3.connect(folder / "rayft.db") as database:
        rows = database.execute("select run_id, step, metrics from metrics").fetchall()
    assert len({run for run, _, _ in rows}) == 1
    for _, step, values in rows:
        yield from ((name, step, float(value)) for name, value in json.loads(values).items())


def from_wandb(folder: Path) -> Iterator[Point]:
    from wandb.proto import wandb_internal_pb2

    files = sorted(folder.rglob("*.wandb"))
    assert len(files) == 1, "each start writes the run anew, under the same id"
    assert json.loads((folder.parents[1] / "trackers.json").read_text())["wandb"]["run"] in files[0].name
    for file in files:
        for data in leveldb_records(file.read_bytes()[7:]):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
                yield from ((name, items["_step"], value) for name, value in items.items() if "/" in name)


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, pieces of checksum, length, kind, data."""
    place, parts = 0, b""
    while place + 7 <= len(content):
        left = 32768 - (place + 7) % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if kind == 0:
            return
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


READERS: dict[str, Callable[[Path], Iterator[Point]]] = {
    "mlflow": from_mlflow, "tensorboard": from_tensorboard, "trackio": from_trackio, "wandb": from_wandb,
}  # fmt: skip


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run with every tracker that is installed, killed after a few steps beyond its checkpoint, and started again."""
    names = [name for name in TRACKERS if importlib.util.find_spec(name)]
    sections = {"run": {"seed": 1, "max_steps": STEPS}, "checkpoint": {"every": 4}, "eval": {"every": 3}, "trackers": {"names": names}}
    site = write_site(tmp_path_factory.mktemp("site"), **sections)
    with Job(site, "tracked", hooks=["slow_steps"], local=True) as job:
        job.wait_for_step(7)
        os.kill(job.driver.pid, signal.SIGKILL)
        job.driver.wait(10)
        job.gone()  # wandb writes in a process of its own, which outlives the run by a moment
    before = {record["step"] for record in read(job.run_dir / "metrics.jsonl")}
    assert {5, 6, 7} <= before and max(before) < STEPS
    return train(site, "tracked", local=True)


@pytest.mark.parametrize("name", TRACKERS)
def test_every_value_is_there_once(tracked: Path, name: str) -> None:
    """But for the time of steps that were run twice: a tracker has the first value, metrics.jsonl the last."""
    pytest.importorskip(name)
    points = list(READERS[name](tracked / "trackers" / name))
    twice = [point for point, times in Counter((metric, step) for metric, step, _ in points).items() if times > 1]
    assert twice == [], "replayed steps were sent again"
    found = {(metric, step): value for metric, step, value in points}
    records = read(tracked / "metrics.jsonl")
    logged = {(metric, record["step"]): value for record in records for metric, value in record.items() if "/" in metric}
    # A kill may take the last of what was on its way: trackio writes beside the process, tensorboard value by value.
    late = {key for key in logged if key[1] in (6, 7, 8)} if name in ("tensorboard", "trackio") else set()
    assert set(found) | late >= set(logged)
    assert set(found) <= set(logged)
    same = {key: value for key, value in found.items() if not key[0].startswith(("perf/", "checkpoint/"))}
    assert same == pytest.approx({key: logged[key] for key in same}, rel=1e-6)


def test_a_tracker_that_joins_later_gets_what_came_before(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    site = write_site(tmp_path, run={"seed": 1, "max_steps": 6})
    train(site, "tracked", "run.stop_at=3", local=True)
    run_dir = train(site, "tracked", "trackers.names=[tensorboard]", f"trackers.dir={tmp_path / 'boards'}", local=True)
    found = {step for metric, step, _ in from_tensorboard(tmp_path / "boards" / "tracked" / "tensorboard") if metric == "train/loss"}
    assert found == {1, 2, 3, 4, 5, 6} and not (run_dir / "trackers").exists()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: None if found == name else object())
    check_installed([other for other in TRACKERS if other != name])
    with pytest.raises(ConfigError, match=rf"trackers.names = '{name}': the package {PACKAGES[name]} is not installed here. pip install "):
        check_installed([name])


def test_validate_refuses_before_anything_is_built(tmp_path: Path) -> None:
    """With a folder on the path in which the package cannot be found."""
    site = write_site(tmp_path)
    program = (
        "import importlib.util, sys; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'wandb' else find(name, *rest)\n"
        "from rayft.cli import main; sys.exit(main(['validate', 'run.yaml', 'run.name=x', 'trackers.names=[wandb]']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=site, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "the package wandb is not installed here" in done.stderr
