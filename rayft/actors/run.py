"""The driver's side of a run: its directory and lease, the cluster, and what its workers are started with."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from rayft.actors import placement
from rayft.actors.export import CONFIG, base_identity, saved_config, with_start
from rayft.actors.mirror import followed
from rayft.actors.session import owner_name
from rayft.actors.shared import check_shared
from rayft.checkpoint import resume
from rayft.config import environment, functions, load
from rayft.config.paths import absolute
from rayft.config.schema import AnyRun, SftRun
from rayft.data import store
from rayft.data.shards import read_manifest
from rayft.observe.console import show_messages
from rayft.observe.progress import follow
from rayft.observe.startup import mark, uncompiled
from rayft.observe.trackers import check_installed
from rayft.types import Launch, R

log = logging.getLogger("rayft")


@dataclass(frozen=True)
class Run(Generic[R]):
    """A run whose directory this process holds.

    Attributes:
        cfg: the run, its paths absolute.
        run_dir: the run's directory, or a folder of this process when it is on an object store.
        device_type: "cpu" or "cuda".
        local: without Ray.
        remote: URL of the run's directory on an object store.
    """

    cfg: R
    run_dir: Path
    device_type: str
    local: bool
    remote: str | None

    @property
    def home(self) -> str:
        """The run's directory: a path or a URL."""
        return self.remote or str(self.run_dir)

    def launch(self: Run[SftRun], train_shards: str, eval_shards: str | None) -> Launch[SftRun]:
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
            remote=self.remote,
        )

    @contextmanager
    def progress(self, launch: Launch[R]) -> Iterator[None]:
        """Show the steps as they are logged."""
        mark("rows")
        if line := uncompiled(self.cfg.parallel, self.device_type):
            log.info(line)
        metrics = self.run_dir / "metrics.jsonl"
        with ExitStack() as stack:
            stack.enter_context(follow(metrics, launch.total_steps))
            if self.remote is not None and not self.local:
                stack.enter_context(followed(store.join(self.remote, metrics.name), metrics))
            yield

    def say_where(self) -> None:
        """Print what the run left, and where."""
        for name, what in (
            ("metrics.jsonl", "metrics"),
            ("samples.jsonl", "samples"),
            ("trackers", "trackers"),
            ("checkpoints", "checkpoints"),
            ("export", "export"),
            ("export-merged", "merged export"),
        ):
            place = store.join(self.home, name)
            if store.exists(place) or (store.is_url(place) and store.sizes(place)):
                print(f"{what + ':':15}{place}")


@contextmanager
def open_run(cfg: R, local: bool) -> Iterator[Run[R]]:
    """Start or join Ray, take the run's directory, and check that the run can be placed and resumed, before anything is built.

    Raises:
        ConfigError: a resumed run differs in what must not change, a user function cannot be loaded, a tracker's package is
            missing, or a variable to forward is not set.
        ResourceError: the cluster is too small, or a node does not see the run's directory.
        InfrastructureError: another driver holds the directory.
    """
    mark("imports")
    environment.prepare_process()
    show_messages()
    for spec in cfg.run.callbacks:
        functions.load_function(functions.resolve(spec))
    check_installed(cfg.trackers.names)
    environment.credentials(forward=cfg.env.forward)
    cfg = absolute(cfg)
    home = store.join(cfg.run.dir, cfg.run.name)
    remote = home if store.is_url(home) else None
    with ExitStack() as stack:
        stack.enter_context(resume.lease(home, owner_name()))
        cfg = with_start(cfg)
        _check_resume(cfg, home)
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rayft-driver-")) if remote else home)
        device_type = _local_device(cfg) if local else _place(cfg)
        mark("torch" if local else "Ray")
        if not local and remote is None:
            check_shared(run_dir, device_type)
        store.write(store.join(home, CONFIG), load.dump(cfg).encode())
        yield Run(cfg, run_dir, device_type, local, remote)


def _check_resume(cfg: AnyRun, home: str) -> None:
    """Refuse a changed configuration once there is a checkpoint that it would not fit; drop what never got committed."""
    if store.exists(store.join(home, CONFIG)) and resume.newest(home) is not None:
        resume.refuse_changes(load.differences(saved_config(home), cfg))
    resume.remove_unfinished(home)


def _place(cfg: AnyRun) -> str:
    import ray

    placement.start_ray()
    resources = ray.cluster_resources()
    device = placement.resolve_device(cfg.parallel, resources)
    if not cfg.parallel.autoscaling:
        placement.check_cluster(placement.need_of(cfg.parallel, device), resources)
    return device


def _local_device(cfg: AnyRun) -> str:
    import torch

    return placement.resolve_device(cfg.parallel, {"GPU": float(torch.cuda.device_count())})
