"""Online reinforcement learning, top to bottom: prompts -> groups of answers -> rewards -> steps -> weights back to the engines."""

from __future__ import annotations

from rayft.actors.online import open_flow
from rayft.actors.refusals import check_engine
from rayft.actors.run import open_run
from rayft.actors.session import open_session
from rayft.actors.trainer_group import fit
from rayft.config.schema import GrpoRun
from rayft.types import Launch


def main(cfg: GrpoRun, local: bool = False) -> None:
    """The driver: holds the run directory, makes engines, rewards and controller, then trains until the steps are done.

    Args:
        cfg: the run.
        local: refused: engines are processes of their own.
    """
    check_engine(cfg)
    with open_run(cfg, local) as run, open_flow(run) as launch:
        with run.progress(launch):
            fit(train, launch)
        run.say_where()


def train(launch: Launch[GrpoRun]) -> None:
    """One worker: builds the sharded policy, resumes, and does what the controller orders."""
    from rayft.actors.feed import RayFeed, make_sender
    from rayft.checkpoint.huggingface import export
    from rayft.experience.algorithm import loss_of
    from rayft.losses.policy import NEED, policy_loss
    from rayft.train.online import OnlineTrainer
    from rayft.train.step import forward_backward

    loss = policy_loss(loss_of(launch.cfg.algorithm))
    with open_session(launch) as session, OnlineTrainer(launch, session, RayFeed(launch, session), make_sender(launch, session)) as trainer:
        for step, updates in trainer.steps():
            for batches, divisor in updates:
                trainer.update(*forward_backward(trainer.parts, batches, loss, NEED, trainer.mesh, divisor))
            trainer.finish(step)
        if not trainer.stopped:
            export(trainer.parts[0], launch.cfg, launch.home, trainer.step)
