"""Supervised fine-tuning, top to bottom: rows -> packed shards -> steps -> checkpoint -> Hugging Face folder."""

from __future__ import annotations

from rayft.actors.run import open_run
from rayft.actors.session import open_session
from rayft.actors.trainer_group import fit
from rayft.config.schema import SftRun
from rayft.data.pipeline import prepare
from rayft.types import Launch


def main(cfg: SftRun, local: bool = False) -> None:
    """The driver: holds the run directory, packs the rows, then trains until the steps are done.

    Args:
        cfg: the run.
        local: everything in this process, without Ray, for a debugger.
    """
    with open_run(cfg, local) as run:
        train_shards = prepare(run.cfg, "train", use_ray=not local)
        eval_shards = prepare(run.cfg, "eval", use_ray=not local) if cfg.data.eval else None
        launch = run.launch(train_shards, eval_shards)
        with run.progress(launch):
            fit(train, launch)
        run.say_where()


def train(launch: Launch[SftRun]) -> None:
    """One worker: builds the sharded model, resumes, and steps."""
    from rayft.checkpoint.huggingface import export
    from rayft.losses.supervised import supervised_loss
    from rayft.train.step import forward_backward
    from rayft.train.trainer import Trainer

    loss, need = supervised_loss(launch.cfg.data.train)
    with open_session(launch) as session, Trainer(launch, session, *supervised_loss(launch.cfg.data.eval)) as trainer:
        for step, batches in trainer.steps():
            trainer.finish(step, *forward_backward(trainer.parts, batches, loss, need, trainer.mesh))
        if not trainer.stopped:
            export(trainer.parts[0], launch.cfg, launch.home, trainer.step)
