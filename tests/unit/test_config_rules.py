"""Each rule refuses what it must, with its sentence, and lets through what is next to it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from rayft.config.load import dump, load
from rayft.config.rules import ROW_RULES, RULES, check
from rayft.config.schema import Adapter, SftRun
from rayft.errors import ConfigError

BASE: dict[str, Any] = {"method": "sft", "run": {"name": "r"}, "model": {"path": "m"}, "data": {"train": {"a": {"path": "a.jsonl"}}}}
EVAL = "data.eval.b.path=b.jsonl"
LORA = "adapter.type=lora"


def run(*overrides: str) -> SftRun:
    return load([], ["method=sft", "run.name=r", "model.path=m", "data.train.a.path=a.jsonl", *overrides])


def refusals(*overrides: str) -> list[str]:
    try:
        run(*overrides)
    except ConfigError as error:
        lines = str(error).split("\n")
        return [line.strip() for line in lines[1:]] or lines
    return []


REFUSED = [
    (["model.path=' '"], "model.path = ' ': must not be empty. Give a value, or remove the key to take its default."),
    (["data.train.a={path: x, format: text, text: ''}"], "data.train.a.text = '': must not be empty."),
    (["data.train.a.roles={human: ''}"], "data.train.a.roles.human = '': must not be empty."),
    ([LORA, "adapter.targets=[q_proj, '']"], "adapter.targets.1 = '': must not be empty."),
    (["data.train={a.b: {path: x}}"], "data.train.a.b: the name of a source is made of letters, digits, - and _. Rename the source."),
    (["data.eval={/: {path: x}}"], "data.eval./: the name of a source is made of letters, digits, - and _."),
    (
        ["data.train.a.text=body"],
        "data.train.a.text = 'body': is read only by format text, and this source has format chat. "
        "Set data.train.a.format to text, or remove the key.",
    ),
    (["data.train.a={path: x, format: text, messages: m}"], "data.train.a.messages = 'm': is read only by format chat"),
    (["data.train.a.input=null"], "data.train.a.input: is read only by format instruction"),
    (["data.train.a.role=content"], "data.train.a.content = 'content': is also the key of data.train.a.role."),
    (["data.roles_to_train=[]"], "data.roles_to_train = []: leaves nothing to train on. Name a role, or set data.train_on_inputs to true."),
    (["data.seq_len=1"], "data.seq_len = 1: a row needs two tokens, one to predict the other. Set it to 2 or more."),
    (["data.seq_len=16777217", "data.shard_rows=1"], "data.seq_len = 16777217: is more than a row can hold. Use at most 16777216."),
    (
        ["data.seq_len=1048576", "data.shard_rows=2048"],
        "data.shard_rows = 2048: times data.seq_len = 1048576 is over the 2147483647 tokens of a shard. Use at most 2047.",
    ),
    (["data.pack_window=1"], "data.pack_window = 1: packs each document alone. Use 2 or more, or set data.pack to false."),
    (["parallel.autoscaling=true"], "parallel.device = 'auto': takes what the cluster has when the run starts, and parallel.autoscaling"),
    (
        ["parallel.workers=6", "parallel.replicas=4"],
        "parallel.replicas = 4: does not divide parallel.workers = 6. Use one of 1, 2, 3, 6.",
    ),
    (
        ["parallel.cpu_offload=true", "optim.type=muon"],
        "optim.type = 'muon': cannot update parameters that parallel.cpu_offload keeps on the host. "
        "Use optim.type=adamw, or parallel.cpu_offload=false.",
    ),
    (["batch.micro_rows=9"], "batch.micro_rows = 9: is more than batch.rows = 8, the rows of a whole step. Use 8 or less."),
    (
        ["run.max_steps=10", "run.stop_at=11"],
        "run.stop_at = 11: is after the last step, run.max_steps = 10. Raise run.max_steps, or remove run.stop_at.",
    ),
    (["eval.every=5"], "eval.every = 5: has nothing to evaluate on. Add a source under data.eval, or remove eval.every."),
    (["eval.at_start=true"], "eval.at_start = True: has nothing to evaluate on. Add a source under data.eval, or remove eval.at_start."),
    (["eval.max_rows=5"], "eval.max_rows = 5: has nothing to evaluate on."),
    (["optim.warmup=1.0"], "optim.warmup = 1.0: a fraction of all steps must be below 1. Write 1, without a point, for one step."),
    (["optim.warmup=11", "run.max_steps=10"], "optim.warmup = 11: is longer than the run, run.max_steps = 10. Use at most 10 steps."),
    (["optim.beta2=1"], "optim.beta2 = 1.0: must be below 1, or the moment never takes a gradient in. Use a value such as 0.95."),
    (
        ["optim.schedule=constant", "optim.min_lr_ratio=0.1"],
        "optim.min_lr_ratio = 0.1: has no effect with optim.schedule constant. Remove it, or use another schedule.",
    ),
    (["eval.patience=2", EVAL], "eval.patience = 2: needs evaluations during training, and eval.every is null."),
    (["eval.min_delta=0.1", EVAL, "eval.every=5"], "eval.min_delta = 0.1: is read only with eval.patience."),
    (["checkpoint.keep_best=true"], "checkpoint.keep_best = True: needs evaluations during training to find the best."),
    (["eval.samples.every=5"], "eval.samples.every = 5: has no prompt to answer. Add eval.samples.prompts, or remove the key."),
    (["trackers.names=[wandb, wandb]"], "trackers.names = ['wandb', 'wandb']: names a tracker twice."),
    (["trackers.project=p"], "trackers.project = 'p': is read by no tracker. Add trackers.names, or remove the key."),
    (["optim.decay=10"], "optim.decay = 10: is read only by schedule wsd, and optim.schedule is cosine."),
    (["optim.schedule=wsd", "optim.decay=1.0"], "optim.decay = 1.0: a fraction of all steps must be below 1."),
    (["optim.schedule=wsd", "optim.decay=0"], "optim.decay = 0: leaves wsd no step to fall in."),
    (
        ["optim.schedule=wsd", "optim.warmup=6", "optim.decay=0.5", "run.max_steps=10"],
        "optim.decay = 0.5: and the warm-up are longer than the run, run.max_steps = 10. Shorten one of them.",
    ),
    (["optim.type=adafactor", "optim.beta1=0.5"], "optim.beta1 = 0.5: is not read by adafactor. Remove it, or choose another optim.type."),
    (["optim.momentum=0.5"], "optim.momentum = 0.5: is not read by adamw."),
    (["optim.embedding_lr=1e-4", "optim.embedding_lr_ratio=2.0"], "optim.embedding_lr_ratio = 2.0: and optim.embedding_lr = 0.0001 say"),
    (["optim.loraplus_lr_ratio=16.0"], "optim.loraplus_lr_ratio = 16.0: needs a LoRA adapter, and adapter.type is none."),
    ([LORA, "model.unfrozen=[lm_head]"], "model.unfrozen = ['lm_head']: has no meaning with adapter.type lora, which freezes all weights."),
    (["adapter.r=8"], "adapter.r = 8: needs an adapter, and adapter.type is none. Set adapter.type to lora, or remove the key."),
    (
        ["adapter.type=none", "adapter.modules_to_save=[lm_head]"],
        "adapter.modules_to_save = ('lm_head',): needs an adapter, and adapter.type is none. Set adapter.type to lora, or remove the key.",
    ),
    (["model.quantize=nf4"], "model.quantize = 'nf4': cannot be trained in full, and adapter.type is none."),
    ([LORA, "adapter.dropout=1"], "adapter.dropout = 1.0: drops every input, so the adapter learns nothing. Use a value below 1."),
    ([LORA, "adapter.targets=[]"], "adapter.targets = []: names no module. Use all-linear, or name the modules."),
    (
        [LORA, "adapter.targets=(q|k"],
        "adapter.targets = '(q|k': is not a regular expression: missing ), unterminated subpattern at position 0. "
        "Correct it, or give a list of names.",
    ),
    (
        [LORA, "model.init=random"],
        "model.init = 'random': leaves a LoRA adapter on weights that mean nothing and stay frozen. "
        "Use model.init pretrained, or adapter.type none.",
    ),
    (
        [LORA, "kernels.linear_cross_entropy=lean"],
        "kernels.linear_cross_entropy = 'lean': would save nothing, as the head is frozen. Set it to fast.",
    ),
    (["kernels.lora=on"], "kernels.lora = 'on': there is no LoRA adapter. Set adapter.type to lora, or kernels.lora to auto."),
    (["export.merge=true"], "export.merge = True: there is no adapter to merge. Set adapter.type to lora, or export.merge to false."),
    (
        [LORA, "export.merge=true", "export.at_end=false"],
        "export.merge = True: nothing is exported, as export.at_end is false. Set export.at_end to true.",
    ),
    (
        ["run.callbacks=[a:b, hooks.py]"],
        "run.callbacks.1 = 'hooks.py': must read module:function or ./file.py:function. Name one function, such as ./hooks.py:on_step.",
    ),
    (
        ["parallel.device=cpu", "parallel.attention=flex"],
        "parallel.attention = 'flex': flex attention has no backward on CPUs. Use auto or sdpa.",
    ),
    (
        ["parallel.device=cpu", "parallel.attention=triton"],
        "parallel.attention = 'triton': Triton kernels run on GPUs only. Use auto or sdpa.",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_refused(overrides: list[str], sentence: str) -> None:
    (found,) = refusals(*overrides)
    assert found.startswith(sentence)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.train.a={path: x, format: instruction, input: null, system: s}"],
        ["data.train.a={path: x, format: text, text: body}", "data.roles_to_train=[]"],
        ["data.roles_to_train=[]", "data.train_on_inputs=true"],
        ["data.seq_len=2"],
        ["data.seq_len=16777216", "data.shard_rows=127"],
        ["data.pack=false", "data.pack_window=1"],
        ["batch.micro_rows=8"],
        ["batch.micro_rows=auto"],
        ["parallel.workers=6", "parallel.replicas=3", "parallel.cpu_offload=true"],
        ["run.max_steps=10", "run.stop_at=10", "optim.warmup=10"],
        ["run.stop_at=11"],
        ["eval.every=5", "eval.at_start=true", EVAL],
        [EVAL, "data.eval.a.path=a.jsonl"],
        ["optim.warmup=1"],
        ["optim.warmup=0.99", "run.max_steps=1"],
        ["optim.schedule=constant", "optim.min_lr_ratio=0.0"],
        ["adapter.type=none", "adapter.r=8"],
        [LORA, "adapter.modules_to_save=[lm_head]", "export.merge=true", "model.dtype=bfloat16"],
        [LORA, "adapter.targets=.*(q|k)_proj"],
        ["model.init=random"],
        ["run.callbacks=[a.b:c, ./hooks.py:on_step, /abs/hooks.py:on_step]"],
        ["parallel.attention=flex"],
        ["parallel.attention=triton"],
        ["parallel.device=cpu", "parallel.attention=sdpa"],
    ],
    ids=" ".join,
)
def test_accepted(overrides: list[str]) -> None:
    assert refusals(*overrides) == []


def unchecked(*overrides: str) -> SftRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayft.config.rules.RULES", ())
        patch.setattr("rayft.config.rules.ROW_RULES", ())
        return run(*overrides)


def test_every_rule_has_a_refusal_here() -> None:
    runs = [unchecked(*overrides) for overrides, _ in REFUSED]
    assert [rule.__name__ for rule in (*ROW_RULES, *RULES) if not any(list(rule(cfg)) for cfg in runs)] == []


def test_all_refusals_are_listed_in_the_order_of_the_rules() -> None:
    found = refusals("batch.micro_rows=9", "data.seq_len=1", "eval.every=5", "eval.at_start=true")
    assert [line.split(" ")[0] for line in found] == ["data.seq_len", "batch.micro_rows", "eval.every", "eval.at_start"]


def test_a_lean_loss_is_for_trained_heads() -> None:
    assert run("kernels.linear_cross_entropy=lean").kernels.linear_cross_entropy == "lean"
    assert refusals(LORA, "adapter.modules_to_save=[lm_head]", "kernels.linear_cross_entropy=lean") == []


def test_a_list_of_refusals_survives_the_way_back_from_a_worker() -> None:
    with pytest.raises(ConfigError) as caught:
        run("batch.micro_rows=9", "data.seq_len=1")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.exit_code) == (str(caught.value), 2)


def test_an_adapter_without_its_type_is_refused_however_the_run_is_made_and_none_is_a_choice(tmp_path: Path) -> None:
    silent = SftRun.model_validate(BASE).model_copy(update={"adapter": Adapter(r=8)})
    with pytest.raises(ConfigError, match="needs an adapter"):
        check(silent)
    file = tmp_path / "resolved.yaml"
    file.write_text(dump(run("adapter.type=none", "adapter.r=8")))
    assert load([file], []).adapter.r == 8
