"""Experiment trackers: wandb, tensorboard, mlflow and trackio get what metrics.jsonl gets, from rank 0.

A tracker's run is continued by every restart: its id is kept in `trackers.json` in the run's directory, with the last step that was
sent of each metric. Steps that are run again after a restart are not sent again. A tracker that joins later gets what came before.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rayft.config.schema import Trackers
from rayft.errors import ConfigError

RECORD = "trackers.json"
PACKAGES = {"mlflow": "mlflow-skinny", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
"""Name of a tracker, which is its module, -> what to install."""


@dataclass(frozen=True)
class Place:
    """What a tracker's run is made of.

    Attributes:
        name: of the run.
        project: that it belongs to.
        folder: for its files.
        offline: write there only; else also to the server that the tracker's own variables name.
        run_id: of its run so far; None for a new one.
        config: the run's configuration, flattened.
    """

    name: str
    project: str
    folder: Path
    offline: bool
    run_id: str | None
    config: Mapping[str, Any]


class Tracker(Protocol):
    """One run of one tracker.

    Attributes:
        run_id: by which it is continued.
        starts_over: the run is written anew, from metrics.jsonl, at every start.
    """

    run_id: str
    starts_over: bool

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_installed(names: Iterable[str]) -> None:
    """Refuse trackers whose package is missing.

    Raises:
        ConfigError: naming the first one and how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            rule = f"the package {PACKAGES[name]} is not installed here"
            raise ConfigError("trackers.names", name, rule, f"pip install {PACKAGES[name]}, or rayft[trackers] for all")


class TrackerLog:
    """All trackers of a run, open for logging.

    Args:
        section: which ones.
        run_dir: the run's directory.
        name: of the run.
        config: its configuration, nested.
        reached: metric -> last step in metrics.jsonl when this start found it, before it was cut back.
        history: the records that metrics.jsonl keeps.

    Raises:
        ConfigError: a package is missing.
    """

    def __init__(
        self,
        section: Trackers,
        run_dir: Path,
        name: str,
        config: Mapping[str, Any],
        reached: Mapping[str, int],
        history: Iterable[Mapping[str, Any]],
    ) -> None:
        check_installed(section.names)
        file = run_dir / RECORD
        known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self._open: list[tuple[Tracker, dict[str, int]]] = []
        for kind in section.names:
            before = known.get(kind, {"run": None, "sent": {}})
            folder = Path(section.dir) / name if section.dir else run_dir / "trackers"
            place = Place(name, section.project, folder / kind, section.offline, before["run"], dict(flat("", config)))
            place.folder.mkdir(parents=True, exist_ok=True)
            tracker = TRACKERS[kind](place)
            anew = before["run"] is None or tracker.starts_over
            sent = {} if anew else before["sent"] | {metric: max(step, before["sent"].get(metric, -1)) for metric, step in reached.items()}
            self._open.append((tracker, sent))
            known[kind] = {"run": tracker.run_id, "sent": sent}
            for record in history if anew else ():
                tracker.log(record["step"], {metric: value for metric, value in record.items() if "/" in metric})
        new = file.with_name(file.name + ".new")
        new.write_text(json.dumps(known, indent=1) + "\n")
        new.replace(file)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values that a tracker does not have yet."""
        for tracker, sent in self._open:
            if fresh := {name: value for name, value in values.items() if step > sent.get(name, -1)}:
                tracker.log(step, fresh)

    def close(self) -> None:
        """Finish what is on its way."""
        for tracker, _ in self._open:
            tracker.close()


def flat(prefix: str, value: object) -> Iterable[tuple[str, Any]]:
    """(dotted name, value) of everything in nested mappings."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flat(f"{prefix}.{key}".lstrip("."), item)
    else:
        yield prefix, value


class Wandb:
    """https://docs.wandb.ai; an offline run is sent later with `wandb sync`.

    wandb writes an offline run in blocks, and a killed process leaves less than it logged (seen with 0.31: nothing of 5 steps). So each
    start writes the whole run anew under the same id, and deletes what the start before has left.
    """

    def __init__(self, place: Place) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        self.run_id, self.starts_over = place.run_id or uuid.uuid4().hex[:8], place.offline
        for old in place.folder.glob(f"wandb/offline-run-*-{self.run_id}") if self.starts_over else ():
            shutil.rmtree(old)
        self._run = wandb.init(
            project=place.project,
            name=place.name,
            id=self.run_id,
            resume="allow",
            mode="offline" if place.offline else "online",
            dir=str(place.folder),
            config=dict(place.config),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add to the run's history at that step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until everything is written."""
        self._run.finish()


class TensorBoard:
    """Event files, written through at every record, so that a killed process loses none."""

    starts_over = False

    def __init__(self, place: Place) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_id = place.run_id or place.name
        self._writer = SummaryWriter(str(place.folder))
        if place.run_id is None:
            self._writer.add_text("config", json.dumps(place.config, indent=1))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Mlflow:
    """A store of files in the folder, or the server of MLFLOW_TRACKING_URI.

    mlflow asks for leave to use files, since only databases get its newest features, and those are not in mlflow-skinny.
    """

    starts_over = False

    def __init__(self, place: Place) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(place.folder.absolute().as_uri() if place.offline else None)
        if place.run_id is None:
            found = self._client.get_experiment_by_name(place.project)
            experiment = found.experiment_id if found else self._client.create_experiment(place.project)
            self.run_id = str(self._client.create_run(experiment, run_name=place.name).info.run_id)
            parameters = [Param(key, str(value)[:500]) for key, value in place.config.items()]
            for start in range(0, len(parameters), 100):  # the most that a server takes at once
                self._client.log_batch(self.run_id, params=parameters[start : start + 100])
        else:
            self.run_id = place.run_id
            self._client.update_run(self.run_id, status="RUNNING")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """All metrics of a record at once."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self.run_id)


class Trackio:
    """A database in the folder, shown by `TRACKIO_DIR=<folder> trackio show`."""

    starts_over = False

    def __init__(self, place: Place) -> None:
        if place.offline:
            os.environ["TRACKIO_DIR"] = str(place.folder)  # read on import, and by nothing else
        import trackio

        self.run_id = place.run_id or f"{place.name}-{uuid.uuid4().hex[:8]}"
        self._run: Any = trackio.init(
            project=place.project,
            name=self.run_id,
            config=dict(place.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add to the run at that step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until everything is written."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Place], Tracker]] = {"mlflow": Mlflow, "tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}
"""Name -> what opens its run. A new tracker is a class and an entry, a package in PACKAGES and a name in the schema."""
