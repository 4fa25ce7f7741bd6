"""Runs of online methods: every rule refuses what it is for, and a small run is accepted."""

from __future__ import annotations

import pytest

from rayft.config.load import dump, load
from rayft.config.online_rules import ONLINE_RULES
from rayft.config.schema import GrpoRun, SftRun
from rayft.errors import ConfigError
from rayft.experience.algorithm import PRESETS, filter_of, loss_of, weighing_of
from rayft.experience.filters import FILTERS
from rayft.losses.policy import SURROGATES

SMALL = [
    "method=grpo",
    "run.name=first",
    "model.path=tiny",
    "data.train.sums.path=sums.jsonl",
    "reward.functions.exact.function=./rewards.py:exact",
]

JUDGED = [f"reward.functions.j.judge.{field}" for field in ("url=http://here/v1", "model=m", "prompt='{{ completion }}'")]

REFUSED = [
    (["rollout.group_size=1"], "rollout.group_size = 1: leaves an answer nothing to be compared with"),
    (
        ["algorithm.updates=3", "rollout.prompts_per_step=8"],
        "algorithm.updates = 3: does not divide rollout.prompts_per_step = 8. Use one of",
    ),
    (
        ["kernels.linear_cross_entropy=lean"],
        "kernels.linear_cross_entropy = 'lean': would save nothing, as the loss of this method computes the logits twice in any case.",
    ),
    (["batch.micro_tokens=100"], "batch.micro_tokens = 100: is less than rollout.max_prompt_tokens + rollout.max_tokens = 2048."),
    (["reward.overlong_buffer=2000"], "reward.overlong_buffer = 2000: is longer than the longest answer, rollout.max_tokens = 1024."),
    (["rollout.engine=local", "rollout.tensor_parallel=2"], "rollout.tensor_parallel = 2: cannot be had with rollout.engine local."),
    (["placement.mode=colocated", "rollout.engines=2"], "rollout.engines = 2: differs from parallel.workers = 1"),
    (["placement.mode=colocated", "rollout.tensor_parallel=2"], "rollout.tensor_parallel = 2: needs several GPUs for an engine"),
    (
        ["weight_sync.type=nccl", "parallel.device=cpu"],
        "weight_sync.type = 'nccl': moves tensors between GPUs, and parallel.device is cpu.",
    ),
    (["weight_sync.type=disk", "run.dir=s3://b/runs"], "weight_sync.type = 'disk': hands files to engines in the run's directory, and"),
    (["weight_sync.type=ipc"], "weight_sync.type = 'ipc': needs trainer and engine on one GPU, and placement.mode is separate."),
    (["weight_sync.type=nccl", "placement.mode=colocated"], "weight_sync.type = 'nccl': cannot join two processes on one GPU"),
    (["weight_sync.payload=adapter"], "weight_sync.payload = 'adapter': there is no adapter to send."),
    (["algorithm.advantage=gdpo", "reward.overlong_buffer=9"], "reward.overlong_buffer = 9: is added to the total, which"),
    (["algorithm.advantage=gae"], "algorithm.advantage = 'gae': needs a value for each token, and algorithm.values is null. Name a critic"),
    (["algorithm.values=m:f"], "algorithm.values = 'm:f': is read by algorithm.advantage gae alone, and that is null. Set algorithm.advan"),
    (["algorithm.values=m:f", "algorithm.advantage=gdpo"], "= 'm:f': is read by algorithm.advantage gae alone, and that is gdpo."),
    (
        ["algorithm.lam=0.95"],
        "algorithm.lam = 0.95: is read by algorithm.advantage gae alone, and that is null. Set algorithm.advantage to",
    ),
    (["algorithm.advantage=gae", "algorithm.values=m"], "algorithm.values = 'm': must read module:function or ./file.py:function"),
    (
        ["algorithm.advantage=gae", "algorithm.values=m:f", "algorithm.type=dapo", "rollout.group_size=1"],
        "rollout.group_size = 1: leaves an answer nothing to be compared with",
    ),
    (["reward.functions.exact.function=m:1f"], "reward.functions.exact.function = 'm:1f': must read module:function"),
    (["reward.functions.a/b.function=m:f"], "reward.functions.a/b: the name of a reward is made of letters"),
    (["reward.functions.exact.batch=true", "reward.functions.exact.trl=true"], "functions.exact.batch = True: is another form of call"),
    (["reward.functions.b.weight=1.0"], "reward.functions.b: has none of function, judge and model, and needs exactly one. Add one"),
    (["reward.functions.exact.model.path=m"], "reward.functions.exact: has function and model of function, judge and model, and needs"),
    ([*JUDGED, "reward.functions.j.trl=true"], "reward.functions.j.trl = True: is for a function, and there is none. Leave it out."),
    ([*JUDGED, "reward.functions.j.judge.url=here:80"], "reward.functions.j.judge.url = 'here:80': is no HTTP address."),
    ([*JUDGED, "reward.functions.j.judge.api_key_env=KEY"], "reward.functions.j.judge.api_key_env = 'KEY': is not in env.forward, so"),
    ([*JUDGED, "reward.functions.j.judge.json_field=a", "reward.functions.j.judge.score=(.)"], "judge.score = '(.)': is not read, as"),
    (["environment.function=chess"], "environment.function = 'chess': is not the name of a ready environment. Use one of openenv, tools,"),
    (["environment.arguments.a=1", "environment.tools=[m:f]"], "environment.function: is null, and environment has arguments and tools."),
    (["environment.function=tools"], "environment.tools = []: is empty, and environment.function is tools."),
    (["environment.function=openenv"], "environment.arguments.url: is missing, and environment.function is openenv."),
    (["environment.function=tools", "environment.tools=[m]"], "environment.tools = 'm': must read module:function or ./file.py:function."),
    (["environment.function=m:f", "reward.functions.environment.function=exact"], "reward.functions.environment: is the name of the"),
    (["adapter.type=lora", "model.quantize=nf4", "weight_sync.payload=adapter"], "weight_sync.payload = 'adapter': lets engines merge"),
    (["adapter.type=lora", "adapter.dropout=0.1"], "adapter.dropout = 0.1: makes the trained policy another one"),
    (["algorithm.rerolls=1"], "algorithm.rerolls = 1: has no filtered groups to roll again. Set algorithm.filter to zero_variance,"),
    (["algorithm.replay=1"], "algorithm.replay = 1: has no filtered groups whose places it could fill. Set algorithm.filter to zero"),
    (["algorithm.type=dapo", "algorithm.replay=1", "rollout.max_staleness=0"], "and rollout.max_staleness is 0. Set rollout.max_staleness"),
    (
        ["algorithm.type=dapo", "algorithm.replay=1", "algorithm.importance=none"],
        "1: trains on answers to older weights, and algorithm.imp",
    ),
    (
        ["algorithm.type=dapo", "algorithm.replay=64"],
        "algorithm.replay = 64: leaves no place for new groups among rollout.prompts_per_step",
    ),
    (
        ["checkpoint.keep_best=true", "checkpoint.keep=1", "data.eval.a.path=x", "eval.every=5"],
        "checkpoint.keep = 1: deletes a checkpoint before its reward is known",
    ),
    (
        ["adapter.type=lora", "adapter.target_parameters=[experts.down_proj]", "weight_sync.payload=adapter"],
        "weight_sync.payload = 'adapter': lets engines merge adapters of linear layers only",
    ),
    (["eval.patience=2", "data.eval.a.path=x"], "eval.patience = 2: needs evaluations during training, and eval.every is null."),
    (["eval.every=5"], "eval.every = 5: has nothing to evaluate on."),
]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load([], [*SMALL, *overrides])
    return str(caught.value)


@pytest.mark.parametrize(("overrides", "expected"), REFUSED, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_refused(overrides: list[str], expected: str) -> None:
    assert expected in refusal(*overrides)


def test_something_rewards() -> None:
    bare = SMALL[:-1]
    assert load([], [*bare, "environment.function=m:f"])
    for more in ([], ["environment.function=tools", "environment.tools=[m:f]"]):
        with pytest.raises(ConfigError, match=r"reward.functions = \{\}: is empty, and there is no environment that gives rewards"):
            load([], [*bare, *more])


def test_every_rule_has_a_refusal_here() -> None:
    runs = [GrpoRun.model_validate(_raw(overrides)) for overrides, _ in REFUSED]
    assert [rule.__name__ for rule in ONLINE_RULES if not any(list(rule(cfg)) for cfg in runs)] == []


def _raw(overrides: list[str]) -> dict[str, object]:
    raw: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayft.config.rules.ONLINE_RULES", ())
        patch.setattr("rayft.config.rules.RULES", ())
        raw = load([], [*SMALL, *overrides]).model_dump()
    return raw


def test_a_small_run_is_complete_and_reads_back(tmp_path) -> None:
    cfg = load([], SMALL)
    assert isinstance(cfg, GrpoRun) and cfg.micro_tokens == 2048
    (tmp_path / "run.yaml").write_text(dump(cfg))
    assert load([tmp_path / "run.yaml"], []) == cfg
    assert isinstance(load([], ["method=sft", "run.name=a", "model.path=m", "data.train.a.path=x"]), SftRun)


def test_algorithms_stand_for_parts_that_exist_and_yield_to_what_is_said() -> None:
    for name, preset in PRESETS.items():
        cfg = load([], [*SMALL, f"algorithm.type={name}"])
        assert preset.form in SURROGATES and filter_of(cfg.algorithm) in FILTERS
        assert loss_of(cfg.algorithm).clip_high == preset.clip_high and weighing_of(cfg).average == preset.average
    said = load([], [*SMALL, "algorithm.type=dapo", "algorithm.clip_high=0.5", "algorithm.average=sequence", "algorithm.filter=none"])
    assert (loss_of(said.algorithm).clip_high, weighing_of(said).average, filter_of(said.algorithm)) == (0.5, "sequence", "none")
