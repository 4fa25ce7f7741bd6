"""What `rayft evaluate` runs: held-out rows through the trainer's own model, held-out prompts through engines, and no step."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import cast

from rayft.actors.export import checkpoint_of, with_start
from rayft.actors.online import open_flow
from rayft.actors.refusals import check_engine
from rayft.actors.run import open_run
from rayft.actors.session import open_session
from rayft.actors.trainer_group import fit
from rayft.checkpoint.resume import Restored
from rayft.config.paths import RUN, absolute
from rayft.config.schema import Adapter, GrpoRun, SftRun
from rayft.data import store
from rayft.data.pipeline import prepare
from rayft.errors import InfrastructureError
from rayft.types import Launch, R


def of_rows(cfg: SftRun, model: str | None, local: bool) -> dict[str, float]:
    """Loss of data.eval under the run's newest checkpoint, or under a model folder; with the step of the checkpoint."""
    with open_run(cfg if model is None else _on(cfg, model), local) as run:
        restored = checkpoint_of(run.cfg, None) if model is None else None
        shards = prepare(run.cfg, "eval", use_ray=not local)
        fit(functools.partial(_score_rows, restored), run.launch(shards, shards))
        found: dict[str, float] = json.loads(store.read(store.join(run.home, "evaluation.json")))
        return found


def of_prompts(cfg: GrpoRun, model: str | None, local: bool) -> dict[str, float]:
    """Reward on data.eval under the run's newest checkpoint, or under a model folder; with the step of the checkpoint.

    It is an online run of no step, named <run.name>-evaluate, which ends with the evaluation of the weights that it starts from.

    Raises:
        DataError: the run has no checkpoint.
        InfrastructureError: not one prompt was answered.
    """
    check_engine(cfg)
    step = checkpoint_of(with_start(absolute(cfg)), None).step if model is None else 0
    cfg = _on(cfg, model or f"{RUN}{cfg.run.name}@{step}")
    changed = {
        "run": cfg.run.model_copy(update={"max_steps": 0, "callbacks": ()}),
        "algorithm": cfg.algorithm.model_copy(update={"beta": 0.0}),
        "weight_sync": cfg.weight_sync.model_copy(update={"payload": "auto"}),
        "trackers": cfg.trackers.model_copy(update={"names": ()}),
    }
    with open_run(cfg.model_copy(update=changed), local) as run:
        for name in ("journal.jsonl", "metrics.jsonl"):  # of an earlier evaluation, which would be taken for this one
            store.delete(store.join(run.home, name))
        with open_flow(run) as launch:
            fit(_score_prompts, launch)
        records = _metrics(run.home)
    if not records:
        rule = "not one held-out prompt was answered"
        raise InfrastructureError("data.eval", None, rule, "Look at the warnings above, then run the same command again")
    return {"step": step} | {name: value for name, value in records[-1].items() if "/" in name}


def _on(cfg: R, model: str) -> R:
    """The run on another model, all of it as its folder has it."""
    changed = {
        "model": cfg.model.model_copy(update={"path": model, "revision": None, "init": "pretrained", "quantize": "none"}),
        "adapter": Adapter(),
        "kernels": cfg.kernels.model_copy(update={"lora": "auto"}),
        "run": cfg.run.model_copy(update={"name": f"{cfg.run.name}-evaluate"}),
    }
    return cast("R", cfg.model_copy(update=changed))


def _metrics(home: str) -> list[dict[str, float]]:
    from rayft.observe.log import read

    with tempfile.TemporaryDirectory(prefix="rayft-") as folder:
        copy = Path(folder) / "metrics.jsonl"
        copy.write_bytes(store.read(store.join(home, copy.name)))
        return [record for record in read(copy) if "eval/reward" in record]


def _score_prompts(launch: Launch[GrpoRun]) -> None:
    """One worker of an evaluation on prompts: it brings engines to its weights and waits for what they are worth."""
    from rayft.actors.feed import RayFeed, make_sender
    from rayft.train.online import OnlineTrainer

    with open_session(launch) as session, OnlineTrainer(launch, session, RayFeed(launch, session), make_sender(launch, session)) as trainer:
        for step, _ in trainer.steps():
            raise AssertionError(f"step {step} of a run of none")


def _score_rows(restored: Restored | None, launch: Launch[SftRun]) -> None:
    """One worker of an evaluation on rows, of a checkpoint or else of the model as it is; rank 0 writes the result down."""
    from rayft.checkpoint.sharded import Checkpointer
    from rayft.data.reader import Reader
    from rayft.losses.supervised import supervised_loss
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model
    from rayft.train.evaluate import eval_batches, evaluate
    from rayft.train.room import with_micro_rows

    assert launch.eval_shards is not None
    with open_session(launch) as session:
        mesh = build_mesh(session.device.split(":")[0], session.world_size, 1 if launch.local else launch.cfg.parallel.replicas)
        model = build_model(launch.cfg, session, mesh)
        if restored is not None:
            Checkpointer(session, launch.attempt, lambda step: None).restore(restored.directory, [model], None)
        micro_rows = int(with_micro_rows(launch.cfg, session).batch.micro_rows)
        batches = eval_batches(Reader(launch.eval_shards, seed=0, shuffle=False, window=1), session, micro_rows, launch.cfg.eval.max_rows)
        values = evaluate(model, batches, *supervised_loss(launch.cfg.data.eval), mesh)
        if session.rank == 0:
            result = {"step": restored.step if restored else 0, **values}
            store.write(store.join(launch.home, "evaluation.json"), json.dumps(result).encode())
