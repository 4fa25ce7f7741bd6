"""Replicas, offloading and kinds of checkpointing change where tensors are and when, never what a step computes or where a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families import make_batch, write_model
from ranks import run_ranks
from rayft.config.load import load
from rayft.types import Session

STEPS, SAVED = 5, 2
LORA = ["adapter.type=lora", "adapter.r=4", "adapter.dropout=0.2"]
Curve = list[tuple[float, float]]


def curves(rank: int, world: int, folder: str, runs: str, cases: list[dict[str, Any]]) -> list[Curve]:
    """(loss, gradient norm) of each step and case; a case may `save` a checkpoint after SAVED steps, or start `from` one."""
    from rayft.checkpoint import resume
    from rayft.checkpoint.sharded import Checkpointer
    from rayft.losses.supervised import NEED, next_token
    from rayft.models.load import named_trainable
    from rayft.optim.build import build_optimizer, set_lr
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model
    from rayft.train.step import forward_backward, update

    found = []
    for case in cases:
        cfg = load([], ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", "optim.lr=3e-3", *case["overrides"]])
        run_dir = Path(runs, case.get("save") or case.get("from") or "none")
        session = Session(rank, world, rank, "cpu", run_dir, lambda _metrics, _directory, finish: finish(), 60)
        mesh = build_mesh("cpu", world, case.get("replicas", 1))
        model = build_model(cfg, session, mesh)
        optimizer = build_optimizer(named_trainable(model), cfg.optim, fused=True)
        checkpointer = Checkpointer(session, 1, lambda step: None)
        if "from" in case:
            restored = resume.newest(run_dir)
            assert restored is not None
            checkpointer.restore(restored.directory, [model], optimizer)
        curve: Curve = []
        for step in range(SAVED if "from" in case else 0, STEPS):
            set_lr(optimizer, cfg.optim.lr)
            rows = 4 // world
            batches = [
                make_batch([[20, 12, 31, 1]], seed=10 * step + row, step=step, positions=[4 * step + row])
                for row in range(rank * rows, (rank + 1) * rows)
            ]
            sums, divisor = forward_backward([model], batches, next_token, NEED, mesh)
            curve.append(((sums["train/loss"] / divisor).item(), update([model], optimizer, 1.0).item()))
            if "save" in case and step + 1 == SAVED:
                checkpointer.save(SAVED, [model], optimizer, {}, {})
                checkpointer.wait()
        found.append(curve)
    return found


def follows(curve: Curve, expected: Curve) -> None:
    got, wanted = np.array(curve), np.array(expected)[-len(curve) :]
    np.testing.assert_allclose(got[:, 0], wanted[:, 0], rtol=1e-5)
    np.testing.assert_allclose(got[:, 1], wanted[:, 1], rtol=1e-4)


OFFLOADS = ["parallel.cpu_offload=true", "parallel.activation_offload=true"]
FULL_CASES: dict[str, dict[str, Any]] = {
    "4 shards": {"overrides": []},
    "2 replicas of 2 shards": {"overrides": [], "replicas": 2, "save": "hsdp"},
    "4 replicas": {"overrides": [], "replicas": 4},
    "2 replicas, offloaded": {"overrides": ["parallel.cpu_offload=true"], "replicas": 2, "save": "offloaded"},
}
LORA_CASES: dict[str, dict[str, Any]] = {
    "lora, 2 replicas, all offloaded, full": {
        "overrides": [*LORA, *OFFLOADS, "parallel.activation_checkpointing=full"],
        "replicas": 2,
        "save": "lora",
    },
}
TWO_RANKS: dict[str, dict[str, Any]] = {
    "offloaded": {"overrides": ["parallel.cpu_offload=true"]},
    "activations offloaded": {"overrides": ["parallel.activation_offload=true"]},
    "full, activations offloaded": {"overrides": ["parallel.activation_checkpointing=full", "parallel.activation_offload=true"]},
    "selective": {"overrides": ["parallel.activation_checkpointing=selective"], "save": "selective"},
    "selective, all offloaded": {"overrides": ["parallel.activation_checkpointing=selective", *OFFLOADS]},
    "from 2 replicas of 2 shards": {"overrides": [], "from": "hsdp"},
    "from offloaded": {"overrides": ["parallel.activation_checkpointing=selective"], "from": "offloaded"},
}
TWO_RANKS_LORA: dict[str, dict[str, Any]] = {
    "lora, selective": {"overrides": [*LORA, "parallel.activation_checkpointing=selective"]},
    "lora, compiled, selective, activations offloaded": {
        "overrides": [*LORA, "parallel.compile=true", "parallel.activation_checkpointing=selective", "parallel.activation_offload=true"],
        "from": "lora",
    },
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """(curves of full training, of LoRA) by case; "plain" is one rank without any option."""
    folder, runs = str(write_model("llama_tied", tmp_path_factory.mktemp("model"))), str(tmp_path_factory.mktemp("runs"))
    one = {
        "plain": {"overrides": []},
        "from 2 replicas": {"overrides": OFFLOADS, "from": "hsdp"},
        "from selective": {"overrides": [], "from": "selective"},
    }
    one_lora = {"plain": {"overrides": LORA}}
    full: dict[str, Curve] = {}
    lora: dict[str, Curve] = {}
    for world, some, others in ((4, FULL_CASES, LORA_CASES), (2, TWO_RANKS, TWO_RANKS_LORA), (1, one, one_lora)):
        curves_ = run_ranks(world, curves, folder, runs, [*some.values(), *others.values()])[0]
        full |= dict(zip(some, curves_, strict=False))
        lora |= dict(zip(others, curves_[len(some) :], strict=True))
    return full, lora


def test_every_placement_follows_one_plain_rank(found: tuple[dict[str, Curve], dict[str, Curve]]) -> None:
    for cases in found:
        plain = cases["plain"]
        wrong = {}
        for name, curve in cases.items():
            try:
                follows(curve, plain)
            except AssertionError as problem:
                wrong[name] = problem
        assert not wrong, wrong
