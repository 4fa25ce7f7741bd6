"""What a run may not combine: one small function per rule, each refusal naming field, value, rule and remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rayft.config.functions import FORM, SPEC
from rayft.config.online_rules import ONLINE_RULES
from rayft.config.schema import Adapter, AnyRun, Dataset, SftRun
from rayft.errors import ConfigError

Refusals = Iterator[ConfigError]

SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
ROW_OFFSETS = 1 << 24  # a token's key is (row id << 24) + its offset in the row
SHARD_TOKENS = 1 << 31  # Arrow counts the elements of a list column in 32 bits
COLUMNS = {
    "chat": ("messages", "role", "content", "roles"),
    "instruction": ("instruction", "input", "output", "system"),
    "text": ("text",),
}
"""Format -> the fields of a dataset that only this format reads."""


def combine(problems: Sequence[ConfigError]) -> ConfigError:
    """One error that lists all problems, one a line; a single problem stays as it is."""
    if len(problems) == 1:
        return problems[0]
    lines = "".join(f"\n  {problem}" for problem in problems)
    remedy = problems[-1].remedy  # the sentence of the whole ends as its last line does
    return ConfigError("configuration", None, f"{len(problems)} settings are refused{lines.removesuffix(f'. {remedy}.')}", remedy)


def check(cfg: AnyRun) -> None:
    """Applies every rule.

    Raises:
        ConfigError: lists every refusal.
    """
    own = ROW_RULES if isinstance(cfg, SftRun) else ONLINE_RULES
    problems = [problem for rule in (*own, *RULES) for problem in rule(cfg)]
    if problems:
        raise combine(problems)


def text_is_not_empty(cfg: AnyRun) -> Refusals:
    """No text is empty or blank, least of all the name of a column."""
    for field, text in _texts("", cfg.model_dump()):
        if not text.strip():
            yield ConfigError(field, text, "must not be empty", "Give a value, or remove the key to take its default")


def source_names_can_be_addressed(cfg: AnyRun) -> Refusals:
    """They are used in overrides, metric names and file names."""
    for field, _ in _sources(cfg):
        name = field.split(".", 2)[2]
        if not SOURCE_NAME.fullmatch(name):
            yield ConfigError(field, None, "the name of a source is made of letters, digits, - and _", "Rename the source")


def columns_belong_to_the_format(cfg: AnyRun) -> Refusals:
    """A column of another format would be ignored, and most often the format was forgotten."""
    for field, source in _sources(cfg):
        for form, columns in COLUMNS.items():
            for column in _changed(source, columns) if form != source.format else ():
                rule = f"is read only by format {form}, and this source has format {source.format}"
                yield ConfigError(f"{field}.{column}", getattr(source, column), rule, f"Set {field}.format to {form}, or remove the key")


def role_and_content_differ(cfg: AnyRun) -> Refusals:
    """A message needs two keys."""
    for field, source in _sources(cfg):
        if source.format == "chat" and source.role == source.content:
            yield ConfigError(f"{field}.content", source.content, f"is also the key of {field}.role", "Name the key that holds the text")


def roles_are_trained(cfg: SftRun) -> Refusals:
    """Some turns count in the loss; plain text always does."""
    has_turns = any(source.format != "text" for source in cfg.data.train.values())
    if has_turns and not cfg.data.roles_to_train and not cfg.data.train_on_inputs:
        yield ConfigError("data.roles_to_train", [], "leaves nothing to train on", "Name a role, or set data.train_on_inputs to true")


def rows_are_long_enough(cfg: SftRun) -> Refusals:
    """A row holds a token and its target, and no more than the keys of its tokens can count."""
    if cfg.data.seq_len < 2:
        yield ConfigError("data.seq_len", cfg.data.seq_len, "a row needs two tokens, one to predict the other", "Set it to 2 or more")
    if cfg.data.seq_len > ROW_OFFSETS:
        yield ConfigError("data.seq_len", cfg.data.seq_len, "is more than a row can hold", f"Use at most {ROW_OFFSETS}")


def shards_fit(cfg: SftRun) -> Refusals:
    """The tokens of a shard can be counted by Arrow."""
    if cfg.data.shard_rows * cfg.data.seq_len >= SHARD_TOKENS:
        rule = f"times data.seq_len = {cfg.data.seq_len} is over the {SHARD_TOKENS - 1} tokens of a shard"
        yield ConfigError("data.shard_rows", cfg.data.shard_rows, rule, f"Use at most {(SHARD_TOKENS - 1) // cfg.data.seq_len}")


def packing_has_a_choice(cfg: SftRun) -> Refusals:
    """Packing needs more than one document to choose from."""
    if cfg.data.pack and cfg.data.pack_window < 2:
        rule = "packs each document alone"
        yield ConfigError("data.pack_window", cfg.data.pack_window, rule, "Use 2 or more, or set data.pack to false")


def micro_rows_fit(cfg: SftRun) -> Refusals:
    """A micro-batch is a part of a step."""
    batch = cfg.batch
    if batch.micro_rows != "auto" and batch.micro_rows > batch.rows:
        rule = f"is more than batch.rows = {batch.rows}, the rows of a whole step"
        yield ConfigError("batch.micro_rows", batch.micro_rows, rule, f"Use {batch.rows} or less")


def a_growing_cluster_has_its_device(cfg: AnyRun) -> Refusals:
    """Which devices its nodes will have cannot be seen before they are there."""
    if cfg.parallel.autoscaling and cfg.parallel.device == "auto":
        rule = "takes what the cluster has when the run starts, and parallel.autoscaling is true"
        yield ConfigError("parallel.device", "auto", rule, "Set it to cuda or cpu")


def workers_divide_into_replicas(cfg: AnyRun) -> Refusals:
    """Every replica has as many workers."""
    workers, replicas = cfg.parallel.workers, cfg.parallel.replicas
    if workers % replicas:
        rule = f"does not divide parallel.workers = {workers}"
        divisors = [number for number in range(1, workers + 1) if workers % number == 0]
        yield ConfigError("parallel.replicas", replicas, rule, f"Use one of {', '.join(map(str, divisors))}")


def offloaded_state_has_its_optimizer(cfg: AnyRun) -> Refusals:
    """Adafactor and Muon put sums and updates on the GPU, and rows of model.unfrozen are held there."""
    if not cfg.parallel.cpu_offload:
        return
    if cfg.optim.type != "adamw":
        rule = "cannot update parameters that parallel.cpu_offload keeps on the host"
        yield ConfigError("optim.type", cfg.optim.type, rule, "Use optim.type=adamw, or parallel.cpu_offload=false")
    if cfg.model.unfrozen:
        rule = "cannot hold rows of parameters that parallel.cpu_offload keeps on the host"
        yield ConfigError("model.unfrozen", ", ".join(cfg.model.unfrozen), rule, "Leave one of both out")


def run_ends_within_its_schedule(cfg: AnyRun) -> Refusals:
    """A stop after the last step would never come."""
    run = cfg.run
    if run.stop_at is not None and run.max_steps is not None and run.stop_at > run.max_steps:
        rule = f"is after the last step, run.max_steps = {run.max_steps}"
        yield ConfigError("run.stop_at", run.stop_at, rule, "Raise run.max_steps, or remove run.stop_at")


def evaluation_has_sources(cfg: AnyRun) -> Refusals:
    """Settings of the evaluation need something to evaluate on."""
    if not cfg.data.eval:
        for name in _changed(cfg.eval, tuple(name for name in type(cfg.eval).model_fields if name != "samples")):
            rule = "has nothing to evaluate on"
            yield ConfigError(f"eval.{name}", getattr(cfg.eval, name), rule, f"Add a source under data.eval, or remove eval.{name}")


def evaluations_are_repeated(cfg: AnyRun) -> Refusals:
    """What compares evaluations needs more than the one at the end."""
    repeated = bool(cfg.data.eval) and cfg.eval.every is not None
    remedy = "Add a source under data.eval and set eval.every, or remove the key"
    if cfg.eval.patience is not None and cfg.data.eval and not repeated:
        yield ConfigError("eval.patience", cfg.eval.patience, "needs evaluations during training, and eval.every is null", remedy)
    if cfg.checkpoint.keep_best and not repeated:
        yield ConfigError("checkpoint.keep_best", True, "needs evaluations during training to find the best", remedy)
    if cfg.eval.min_delta and cfg.eval.patience is None and cfg.data.eval:
        yield ConfigError("eval.min_delta", cfg.eval.min_delta, "is read only with eval.patience", "Set eval.patience, or remove the key")


def samples_have_prompts(cfg: SftRun) -> Refusals:
    """Without prompts nothing is sampled."""
    if not cfg.eval.samples.prompts:
        for name in _changed(cfg.eval.samples, ("every", "max_tokens")):
            rule = "has no prompt to answer"
            yield ConfigError(f"eval.samples.{name}", getattr(cfg.eval.samples, name), rule, "Add eval.samples.prompts, or remove the key")


def trackers_are_named(cfg: AnyRun) -> Refusals:
    """Each once, and settings only for some."""
    names = cfg.trackers.names
    if len(set(names)) < len(names):
        yield ConfigError("trackers.names", list(names), "names a tracker twice", "Name each once")
    if not names:
        for name in _changed(cfg.trackers, ("project", "dir", "offline")):
            value = getattr(cfg.trackers, name)
            yield ConfigError(f"trackers.{name}", value, "is read by no tracker", "Add trackers.names, or remove the key")


def warmup_fits(cfg: AnyRun) -> Refusals:
    """An integer counts steps and a number with a point is a fraction, so 1 and 1.0 mean different things."""
    warmup, last = cfg.optim.warmup, cfg.run.max_steps
    if isinstance(warmup, float) and warmup >= 1:
        yield ConfigError("optim.warmup", warmup, "a fraction of all steps must be below 1", "Write 1, without a point, for one step")
    if isinstance(warmup, int) and last is not None and warmup > last:
        yield ConfigError("optim.warmup", warmup, f"is longer than the run, run.max_steps = {last}", f"Use at most {last} steps")


def moments_decay(cfg: AnyRun) -> Refusals:
    """AdamW takes no moment that never decays."""
    for name in ("beta1", "beta2"):
        if getattr(cfg.optim, name) == 1:
            yield ConfigError(f"optim.{name}", 1.0, "must be below 1, or the moment never takes a gradient in", "Use a value such as 0.95")


def decay_belongs_to_wsd(cfg: AnyRun) -> Refusals:
    """The other schedules fall from the warm-up to the end; wsd needs steps to hold the rate in, or none too many."""
    optim, last = cfg.optim, cfg.run.max_steps
    if optim.schedule != "wsd":
        for name in _changed(optim, ("decay", "decay_shape")):
            rule = f"is read only by schedule wsd, and optim.schedule is {optim.schedule}"
            yield ConfigError(f"optim.{name}", getattr(optim, name), rule, "Set optim.schedule to wsd, or remove the key")
    elif isinstance(optim.decay, float) and optim.decay >= 1:
        yield ConfigError("optim.decay", optim.decay, "a fraction of all steps must be below 1", "Write 1, without a point, for one step")
    elif optim.decay == 0:
        yield ConfigError("optim.decay", optim.decay, "leaves wsd no step to fall in", "Use schedule constant, or give it steps")
    elif last is not None and _warmup_and_decay(cfg) > last:
        rule = f"and the warm-up are longer than the run, run.max_steps = {last}"
        yield ConfigError("optim.decay", optim.decay, rule, "Shorten one of them")


def optimizer_has_its_fields(cfg: AnyRun) -> Refusals:
    """A field that the optimizer does not read would be ignored."""
    unread = {"adafactor": ("beta1", "beta2", "eps", "momentum"), "muon": ()}.get(cfg.optim.type, ("momentum",))
    for name in _changed(cfg.optim, unread):
        rule = f"is not read by {cfg.optim.type}"
        yield ConfigError(f"optim.{name}", getattr(cfg.optim, name), rule, "Remove it, or choose another optim.type")


def learning_rates_do_not_compete(cfg: AnyRun) -> Refusals:
    """One rate for embeddings, and B matrices only where there are adapters."""
    optim = cfg.optim
    if optim.embedding_lr is not None and optim.embedding_lr_ratio is not None:
        rule = f"and optim.embedding_lr = {optim.embedding_lr} say the same thing twice"
        yield ConfigError("optim.embedding_lr_ratio", optim.embedding_lr_ratio, rule, "Keep one of them")
    if optim.loraplus_lr_ratio is not None and cfg.adapter.type != "lora":
        rule = "needs a LoRA adapter, and adapter.type is none"
        yield ConfigError("optim.loraplus_lr_ratio", optim.loraplus_lr_ratio, rule, "Set adapter.type to lora, or remove the key")


def unfrozen_has_no_adapter(cfg: AnyRun) -> Refusals:
    """An adapter freezes the weights below it."""
    if cfg.model.unfrozen and cfg.adapter.type != "none":
        rule = f"has no meaning with adapter.type {cfg.adapter.type}, which freezes all weights"
        yield ConfigError("model.unfrozen", list(cfg.model.unfrozen), rule, "Use adapter.modules_to_save, or adapter.type none")


def quantised_weights_are_frozen(cfg: AnyRun) -> Refusals:
    """4 bits take no update."""
    if cfg.model.quantize != "none" and cfg.adapter.type != "lora":
        rule = "cannot be trained in full, and adapter.type is none"
        yield ConfigError("model.quantize", cfg.model.quantize, rule, "Set adapter.type to lora, or model.quantize to none")


def min_lr_has_a_schedule(cfg: AnyRun) -> Refusals:
    """A constant learning rate has no end to fall to."""
    if cfg.optim.schedule == "constant" and cfg.optim.min_lr_ratio > 0:
        rule = "has no effect with optim.schedule constant"
        yield ConfigError("optim.min_lr_ratio", cfg.optim.min_lr_ratio, rule, "Remove it, or use another schedule")


def adapter_is_asked_for(cfg: AnyRun) -> Refusals:
    """Settings of an adapter without its type would train every weight; `type: none` written beside them is a choice."""
    if cfg.adapter.type != "none":
        return
    silent = "type" not in cfg.adapter.model_fields_set
    for name in _changed(cfg.adapter, tuple(Adapter.model_fields) if silent else ("target_parameters", "modules_to_save")):
        rule = "needs an adapter, and adapter.type is none"
        yield ConfigError(f"adapter.{name}", getattr(cfg.adapter, name), rule, "Set adapter.type to lora, or remove the key")


def adapter_dropout_keeps_something(cfg: AnyRun) -> Refusals:
    """Dropout of 1 leaves no input."""
    if cfg.adapter.dropout == 1:
        yield ConfigError("adapter.dropout", 1.0, "drops every input, so the adapter learns nothing", "Use a value below 1")


def adapter_targets_can_match(cfg: AnyRun) -> Refusals:
    """The targets are a valid pattern, or at least one name."""
    targets = cfg.adapter.targets
    if targets == ():
        yield ConfigError("adapter.targets", [], "names no module", "Use all-linear, or name the modules")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            yield ConfigError("adapter.targets", targets, f"is not a regular expression: {error}", "Correct it, or give a list of names")


def adapter_has_weights_below(cfg: AnyRun) -> Refusals:
    """Random weights below an adapter would stay random, as only the adapter is trained."""
    if cfg.model.init == "random" and cfg.adapter.type == "lora":
        rule = "leaves a LoRA adapter on weights that mean nothing and stay frozen"
        yield ConfigError("model.init", "random", rule, "Use model.init pretrained, or adapter.type none")


def merge_has_an_adapter(cfg: AnyRun) -> Refusals:
    """A merge needs an adapter, and an export to be written by."""
    if cfg.export.merge and cfg.adapter.type == "none":
        yield ConfigError("export.merge", True, "there is no adapter to merge", "Set adapter.type to lora, or export.merge to false")
    if cfg.export.merge and not cfg.export.at_end:
        yield ConfigError("export.merge", True, "nothing is exported, as export.at_end is false", "Set export.at_end to true")


def callbacks_are_named(cfg: AnyRun) -> Refusals:
    """Their names have the form of a user function."""
    for number, name in enumerate(cfg.run.callbacks):
        if not SPEC.fullmatch(name):
            yield ConfigError(f"run.callbacks.{number}", name, FORM, "Name one function, such as ./hooks.py:on_step")


def attention_runs_on_the_device(cfg: AnyRun) -> Refusals:
    """What is asked of a CPU by name must have a backward there."""
    reasons = {"flex": "flex attention has no backward on CPUs", "triton": "Triton kernels run on GPUs only"}
    if cfg.parallel.device == "cpu" and cfg.parallel.attention in reasons:
        yield ConfigError("parallel.attention", cfg.parallel.attention, reasons[cfg.parallel.attention], "Use auto or sdpa")


def lora_kernels_have_an_adapter(cfg: AnyRun) -> Refusals:
    """Fused LoRA that is asked for by name needs a LoRA adapter."""
    if cfg.kernels.lora == "on" and cfg.adapter.type != "lora":
        yield ConfigError("kernels.lora", "on", "there is no LoRA adapter", "Set adapter.type to lora, or kernels.lora to auto")


def lean_head_is_trained(cfg: AnyRun) -> Refusals:
    """A lean loss saves the float32 sum of a trained head's gradient, and policy gradients have none."""
    frozen = cfg.adapter.type == "lora" and not cfg.adapter.modules_to_save
    if cfg.kernels.linear_cross_entropy == "lean" and (frozen or cfg.method != "sft"):
        rule = "the head is frozen" if frozen else "the loss of this method computes the logits twice in any case"
        yield ConfigError("kernels.linear_cross_entropy", "lean", f"would save nothing, as {rule}", "Set it to fast")


RULES: tuple[Callable[[AnyRun], Refusals], ...] = (
    text_is_not_empty,
    source_names_can_be_addressed,
    columns_belong_to_the_format,
    role_and_content_differ,
    a_growing_cluster_has_its_device,
    workers_divide_into_replicas,
    offloaded_state_has_its_optimizer,
    run_ends_within_its_schedule,
    evaluation_has_sources,
    evaluations_are_repeated,
    trackers_are_named,
    warmup_fits,
    moments_decay,
    decay_belongs_to_wsd,
    min_lr_has_a_schedule,
    optimizer_has_its_fields,
    learning_rates_do_not_compete,
    unfrozen_has_no_adapter,
    quantised_weights_are_frozen,
    adapter_is_asked_for,
    adapter_dropout_keeps_something,
    adapter_targets_can_match,
    adapter_has_weights_below,
    merge_has_an_adapter,
    callbacks_are_named,
    attention_runs_on_the_device,
    lora_kernels_have_an_adapter,
    lean_head_is_trained,
)
"""Those of every run, applied in this order."""

ROW_RULES: tuple[Callable[[SftRun], Refusals], ...] = (
    roles_are_trained,
    rows_are_long_enough,
    shards_fit,
    packing_has_a_choice,
    micro_rows_fit,
    samples_have_prompts,
)
"""Those of runs on packed rows."""


def _warmup_and_decay(cfg: AnyRun) -> float:
    """Steps of both, a fraction taken of run.max_steps."""
    parts = (cfg.optim.warmup, cfg.optim.decay)
    return sum(part if isinstance(part, int) else part * (cfg.run.max_steps or 0) for part in parts)


def _sources(cfg: AnyRun) -> Iterator[tuple[str, Dataset]]:
    """Every source with its dotted name."""
    for kind, sources in (("train", cfg.data.train), ("eval", cfg.data.eval)):
        for name, source in sources.items():
            yield f"data.{kind}.{name}", source


def _changed(section: Any, names: Sequence[str]) -> list[str]:
    """Those of the named fields that differ from their default."""
    fields = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].get_default(call_default_factory=True)]


def _texts(field: str, value: object) -> Iterator[tuple[str, str]]:
    """Every text in a value, with its dotted name."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(f"{field}.{name}".lstrip("."), item)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _texts(f"{field}.{number}", item)
