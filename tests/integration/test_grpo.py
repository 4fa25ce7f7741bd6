"""Whole online runs on a local cluster: engines, rewards, controller and trainer; on-policy, one step behind, resumed, an engine killed."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from rayft.recipes import grpo

from faults.job import START_S, wait
from faults.online import fates, journal
from rayft.checkpoint import resume
from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.models.tiny import write_tiny_model
from rayft.observe.log import read

pytestmark = pytest.mark.usefixtures("ray_cluster")

WORDS = ("red", "green", "blue", "black", "white")
REWARDS = '''
import asyncio

async def letters(prompt, completion, row):
    """Share of the completion's letters that are the row's."""
    await asyncio.sleep(0)
    return sum(map(completion.count, row["word"])) / max(len(completion), 1)

def short(prompt, completions, row):
    return [-len(completion) / 100 for completion in completions]

def values(prompt, answers, by_policy, row):
    return [[0.01 * place for place, own in enumerate(flags) if own] for flags in by_policy]
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without weights, prompts, rewards and run.yaml."""
    folder = tmp_path_factory.mktemp("online")
    write_tiny_model(folder / "model", WORDS, vocab_size=300, hidden_size=64, layers=1)
    for split, count in (("train", 20), ("eval", 5)):
        rows = [{"text": f"say {WORDS[n % 5]}", "word": WORDS[n % 5], "n": n} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    run: dict[str, Any] = {
        "method": "grpo",
        "run": {"name": "x", "dir": str(folder / "runs"), "max_steps": 4, "deadline_s": 120.0},
        "model": {"path": str(folder / "model"), "init": "random"},
        "data": {split: {"words": {"path": str(folder / f"{split}.jsonl"), "format": "text"}} for split in ("train", "eval")},
        "rollout": {"engine": "local", "prompts_per_step": 3, "group_size": 4, "max_prompt_tokens": 16, "max_tokens": 8},
        "reward": {
            "functions": {
                "letters": {"function": f"{folder}/rewards.py:letters"},
                "short": {"function": f"{folder}/rewards.py:short", "weight": 0.1, "batch": True},
            }
        },
        "optim": {"lr": 1e-3},
        "parallel": {"device": "cpu"},
        "checkpoint": {"every": 2},
        "eval": {"every": 2, "at_start": True, "samples": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def train(site: Path, name: str, *overrides: str) -> Path:
    """The run's directory, after the recipe ran to its end."""
    cfg = load([site / "run.yaml"], [f"run.name={name}", *overrides])
    assert isinstance(cfg, GrpoRun)
    grpo.main(cfg)
    return site / "runs" / name


def merged(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step -> all its metrics."""
    steps: dict[int, dict[str, float]] = {}
    for record in read(run_dir / "metrics.jsonl"):
        steps.setdefault(int(record["step"]), {}).update(record)
    return steps


def check_journal(run_dir: Path, staleness: int) -> None:
    """No group is in two batches, and none is older than allowed."""
    started: dict[int, int] = {}
    version, used = 0, set[int]()
    for line in map(json.loads, (run_dir / "journal.jsonl").read_text().splitlines()):
        if line.get("event") == "pushed":
            version = line["step"]
        elif line.get("event") == "started":
            started[line["ordinal"]] = version
        elif line.get("event") == "consumed":
            assert not used.intersection(line["ordinals"])
            used.update(line["ordinals"])
            assert all(line["step"] - started[ordinal] <= staleness for ordinal in line["ordinals"])


def test_an_on_policy_run_agrees_with_its_engines_and_is_resumed(site: Path) -> None:
    run_dir = train(site, "on-policy", "rollout.max_staleness=0", "run.stop_at=2")
    train(site, "on-policy", "rollout.max_staleness=0")
    steps = merged(run_dir)
    assert sorted(steps) == [0, 1, 2, 3, 4]
    for step in (1, 2, 3, 4):
        assert steps[step]["train/rollout_logprob_difference"] < 1e-4, "trainer and engine hold the same weights"
        assert steps[step]["train/importance_weight"] == pytest.approx(1, abs=1e-4)
        assert steps[step]["staleness/max"] == 0 and steps[step]["staleness/0"] == 1
    for step in (0, 2, 4):
        assert steps[step]["eval/num_prompts"] == 5 and 0 <= steps[step]["eval/pass_at_k"] <= 1
    check_journal(run_dir, 0)
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert {"letters", "short"} == set(samples[0]["rewards"]) and samples[0]["prompt"].startswith("say ")
    newest = resume.newest(run_dir)
    assert newest is not None and newest.step == 4 and (run_dir / "export" / "model.safetensors").exists()
    assert json.loads((run_dir / "export" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"], "vLLM goes by it"


def test_two_workers_one_step_behind_with_reference_critic_and_updates_keep_the_bound(site: Path) -> None:
    run_dir = train(
        site,
        "behind",
        "parallel.workers=2",
        "rollout.engines=2",
        "rollout.prompts_per_step=4",
        "algorithm.updates=2",
        "algorithm.beta=0.1",
        "algorithm.type=dapo",
        "algorithm.filter=none",
        "algorithm.advantage=gae",
        f"algorithm.values={site}/rewards.py:values",
        "algorithm.lam=0.95",
        "weight_sync.type=gloo",
        "eval.every=4",
    )
    steps = merged(run_dir)
    assert steps[1]["train/ref_kl"] < steps[4]["train/ref_kl"] and steps[1]["train/policy_kl"] > 0
    assert all(steps[step]["staleness/max"] <= 1 for step in (1, 2, 3, 4)) and steps[1]["rollout/engines"] >= 1
    check_journal(run_dir, 1)


def kill_the_engine(run_dir: Path) -> int:
    """kill -9 of the run's only engine, after the first step, while it answers; its pid."""
    import ray

    def answering() -> bool:
        events = journal(run_dir)
        return any(line.get("event") == "pushed" and line["step"] == 1 for line in events) and events[-1].get("event") == "started"

    wait(answering, START_S, "an engine that answers")
    (name,) = [name for name in ray.util.list_named_actors() if name.endswith("-engine-0")]
    pid: int = ray.get(ray.get_actor(name).__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_killed_engine_comes_back_with_the_right_weights(site: Path) -> None:
    """Its groups are asked for again, and every prompt is accounted for; more of such faults are in tests/faults."""
    with ThreadPoolExecutor(1) as beside:
        killing = beside.submit(kill_the_engine, site / "runs" / "killed")
        run_dir = train(site, "killed", "rollout.max_staleness=0", "rollout.max_tokens=48", "eval.every=4", "eval.at_start=false")
        assert killing.result(0)
    steps = merged(run_dir)
    found = fates(run_dir)
    assert found.failures["process"] >= 1 and steps[4]["rollout/restarted"] >= 1, "nothing was under way"
    assert (
        not found.under_way
        and not found.dropped
        and {step: len(batch) for step, batch in found.batches.items()} == dict.fromkeys(range(4), 3)
    )
    assert all(steps[step]["train/rollout_logprob_difference"] < 1e-4 for step in (1, 2, 3, 4))
    check_journal(run_dir, 0)


def test_experts_with_adapters_beside_layers_in_4_bits_agree_with_their_engines(site: Path) -> None:
    """Engines get what training computes with: experts one by one with their adapters merged, and the values that 4 bits stand for."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from rayft.models.tokenizer import load_tokenizer

    cfg = load([site / "run.yaml"], [])
    tokenizer = load_tokenizer(cfg.model)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), max_position_embeddings=512, dtype="float32", **sizes, **experts))
    model.save_pretrained(site / "sparse")
    tokenizer.save_pretrained(site / "sparse")
    adapters = ["adapter.type=lora", "adapter.r=4", "adapter.target_parameters=[experts.gate_up_proj,experts.down_proj]", "optim.lr=2e-2"]
    held = [f"model.path={site / 'sparse'}", "model.init=pretrained", "model.quantize=nf4"]
    online = ["rollout.max_staleness=0", "run.max_steps=3", "eval.every=null", "eval.at_start=false"]
    run_dir = train(site, "sparse", *adapters, *held, *online)
    steps = merged(run_dir)
    for step in (1, 2, 3):
        assert steps[step]["train/rollout_logprob_difference"] < 1e-4, "trainer and engine hold the same weights"
    norms = [steps[step]["train/grad_norm"] for step in (1, 2, 3)]
    assert len(set(norms)) == 3 and min(norms) > 0
