"""From the checkpoints of a run to a model folder, in this process: for `rayft export`, and for a run that starts from another one."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from pathlib import Path
from typing import Any, cast

from rayft.actors.placement import resolve_device
from rayft.checkpoint import resume
from rayft.checkpoint.resume import Restored
from rayft.config import load
from rayft.config.paths import RUN
from rayft.config.schema import AnyRun
from rayft.data import store
from rayft.errors import ConfigError, DataError
from rayft.types import Launch, R

log = logging.getLogger("rayft")

CONFIG = "config.yaml"


def saved_config(home: str) -> AnyRun:
    """The configuration that a run was last started with."""
    with tempfile.TemporaryDirectory(prefix="rayft-") as folder:
        copy = Path(folder) / CONFIG
        copy.write_bytes(store.read(store.join(home, CONFIG)))
        return load.load([copy], [])


def base_identity(cfg: AnyRun) -> str:
    """Digest of the weights that the run starts from; drawn weights are named by their configuration."""
    from rayft.models.hub import model_folder
    from rayft.models.load import weights_identity

    folder = model_folder(cfg.model)
    if cfg.model.init == "random":
        return "random " + hashlib.sha256((Path(folder) / "config.json").read_bytes()).hexdigest()
    return weights_identity(folder)


def checkpoint_of(cfg: AnyRun, step: int | None) -> Restored:
    """The run's newest committed checkpoint, or that of a step, after checking that it belongs to these base weights.

    Raises:
        DataError: there is no such checkpoint, or the base weights are others.
    """
    home = store.join(cfg.run.dir, cfg.run.name)
    every = resume.committed(home)
    found = [one for one in every if step is None or one.step == step]
    if not found:
        have = ", ".join(str(one.step) for one in every) or "none"
        rule = f"there is no such checkpoint in {home} (steps: {have})"
        raise DataError("--step" if step is not None else "run.name", step, rule, "Name one of these steps, or train first")
    resume.refuse_other_base(found[-1], {"base weights": base_identity(cfg)})
    return found[-1]


def local_launch(cfg: AnyRun) -> Launch[Any]:
    """What a worker in this process is started with that reads no rows."""
    import torch

    device = resolve_device(cfg.parallel, {"GPU": float(torch.cuda.device_count())})
    folder = Path(tempfile.gettempdir())
    return Launch(cfg=cfg, run_dir=folder, train_shards="", eval_shards=None, identity={}, total_steps=0, device_type=device, local=True)


def export_checkpoint(cfg: AnyRun, restored: Restored, target: str, merge: bool) -> None:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        cfg: the run.
        restored: one of its checkpoints.
        target: the folder to make, by path or URL.
        merge: add an adapter to its base weights; without, it is written as an adapter.
    """
    import torch

    from rayft.actors.session import open_session
    from rayft.checkpoint.huggingface import export_adapter, export_full
    from rayft.checkpoint.sharded import Checkpointer
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model

    with open_session(local_launch(cfg)) as session:
        model = build_model(cfg, session, build_mesh(session.device.split(":")[0], 1))
        Checkpointer(session, 0, lambda step: None).restore(restored.directory, [model], None)
        if cfg.adapter.type == "lora" and not merge:
            export_adapter(model, cfg.model, cfg.adapter, target, restored.step)
        else:
            export_full(model, cfg.model, getattr(torch, cfg.export.dtype), target, restored.step)


def with_start(cfg: R) -> R:
    """The run with a model.path of the form run:NAME or run:NAME@STEP replaced by that run's export, which is made if it is not there.

    Raises:
        ConfigError: there is no such run, or this run is meant to draw its weights.
        DataError: that run has no such checkpoint.
    """
    if not cfg.model.path.startswith(RUN):
        return cfg
    name, _, step = cfg.model.path.removeprefix(RUN).partition("@")
    home = store.join(cfg.run.dir, name)
    if cfg.model.init == "random":
        raise ConfigError("model.init", "random", f"draws the weights that {cfg.model.path} is to give", "Set model.init to pretrained")
    if (step and not step.isdigit()) or name == cfg.run.name or not store.exists(store.join(home, CONFIG)):
        rule = f"must name another run in {cfg.run.dir} that was started, with or without a step"
        raise ConfigError("model.path", cfg.model.path, rule, "Write run:NAME, or run:NAME@STEP")
    before = saved_config(home)
    before = before.model_copy(update={"run": before.run.model_copy(update={"dir": cfg.run.dir})})
    return cast(
        "R", cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": _result(before, home, int(step) if step else None)})})
    )


def _result(before: AnyRun, home: str, step: int | None) -> str:
    """Folder of the full weights of a run at a step, by default the newest."""
    from rayft.checkpoint.huggingface import export_step

    merge = before.adapter.type != "none"
    kind = "export-merged" if merge else "export"
    newest = resume.newest(home)
    wanted = step or (newest.step if newest else export_step(store.join(home, kind)))
    for target in (store.join(home, kind), store.join(home, f"{kind}-step-{wanted}")):
        if wanted is not None and export_step(target) == wanted:
            return target
    restored = checkpoint_of(before, wanted)
    log.info("exporting step %d of %s to start from", restored.step, before.run.name)
    export_checkpoint(before, restored, target, merge)
    return target
