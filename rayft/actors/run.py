"""The driver's side of a run: its directory and lease, the cluster, and what its workers are started with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rayft.actors import placement
from rayft.actors.session import owner_name
from rayft.checkpoint import resume
from rayft.config import environment, functions, load
from rayft.config.paths import absolute
from rayft.config.schema import SftRun
from rayft.data.shards import read_manifest
from rayft.observe.console import show_messages
from rayft.observe.progress import follow
from rayft.types import Launch


@dataclass(frozen=True)
class Run:
    """A run whose directory this process holds.

    Attributes:
        cfg: the run, its paths absolute.
        run_dir: absolute.
        device_type: "cpu" or "cuda".
        local: without Ray.
    """

    cfg: SftRun
    run_dir: Path
    device_type: str
    local: bool

    def launch(self, train_shards: Path, eval_shards: Path | None) -> Launch:
        """What the workers are started with."""
        manifest = read_manifest(train_shards)
        cfg = self.cfg
        return Launch(
            cfg=cfg,
            run_dir=self.run_dir,
            train_shards=train_shards,
            eval_shards=eval_shards,
            identity={"training rows": manifest.key, "base weights": base_identity(cfg)},
            total_steps=placement.derive_steps(manifest.totals["rows"], cfg.batch.rows, cfg.run.epochs, cfg.run.max_steps),
            device_type=self.device_type,
            local=self.local,
            callbacks=tuple(functions.resolve(spec) for spec in cfg.run.callbacks),
        )

    def progress(self, launch: Launch) -> AbstractContextManager[None]:
        """Show the steps as they are logged."""
        return follow(self.run_dir / "metrics.jsonl", launch.total_steps)

    def say_where(self) -> None:
        """Print what the run left, and where."""
        for name, what in (
            ("metrics.jsonl", "metrics"),
            ("checkpoints", "checkpoints"),
            ("export", "export"),
            ("export-merged", "merged export"),
        ):
            if (self.run_dir / name).exists():
                print(f"{what + ':':15}{self.run_dir / name}")


@contextmanager
def open_run(cfg: SftRun, local: bool) -> Iterator[Run]:
    """Start or join Ray, take the run's directory, and check that the run can be placed and resumed, before anything is built.

    Raises:
        ConfigError: a resumed run differs in what must not change, or a user function cannot be loaded.
        ResourceError: the cluster is too small.
        InfrastructureError: another driver holds the directory.
    """
    environment.prepare_process()
    show_messages()
    for spec in cfg.run.callbacks:
        functions.load_function(functions.resolve(spec))
    cfg = absolute(cfg)
    run_dir = Path(cfg.run.dir) / cfg.run.name
    with resume.lease(run_dir, owner_name()):
        _check_resume(cfg, run_dir)
        device_type = _local_device(cfg) if local else _place(cfg)
        (run_dir / "config.yaml").write_text(load.dump(cfg))
        yield Run(cfg, run_dir, device_type, local)


def _check_resume(cfg: SftRun, run_dir: Path) -> None:
    """Refuse a changed configuration once there is a checkpoint that it would not fit; drop what never got committed."""
    saved = run_dir / "config.yaml"
    if saved.exists() and resume.newest(run_dir) is not None:
        resume.refuse_changes(load.differences(load.load([saved], []), cfg))
    resume.remove_unfinished(run_dir)


def _place(cfg: SftRun) -> str:
    import ray

    placement.start_ray()
    resources = ray.cluster_resources()
    device = placement.resolve_device(cfg.parallel, resources)
    placement.check_cluster(placement.need_of(cfg.parallel, device), resources)
    return device


def _local_device(cfg: SftRun) -> str:
    import torch

    return placement.resolve_device(cfg.parallel, {"GPU": float(torch.cuda.device_count())})


def base_identity(cfg: SftRun) -> str:
    """Digest of the weights that the run starts from; drawn weights are named by their configuration."""
    from rayft.models.load import model_folder, weights_identity

    folder = model_folder(cfg.model)
    if cfg.model.init == "random":
        return "random " + hashlib.sha256((Path(folder) / "config.json").read_bytes()).hexdigest()
    return weights_identity(folder)
