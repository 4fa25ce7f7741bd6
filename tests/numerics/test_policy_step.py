"""Policy steps on a real model: packing, budget, world size and splitting change nothing; the reference stays where the run began."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from families import write_model
from ranks import run_ranks
from rayft.config.load import load
from rayft.experience.pack import Weighing, build, plan
from rayft.types import Batch, Group, Prompt, Scored, Session, Trajectory

BASE = [
    "method=grpo",
    "run.name=x",
    "data.train.a.path=x",
    "reward.functions.a.function=m:f",
    "optim.lr=1e-2",
    "parallel.device=cpu",
    "rollout.max_prompt_tokens=8",
    "rollout.max_tokens=16",
]


def experience(seed: int) -> tuple[list[Group], list[Scored]]:
    """Four groups of four answers with log-probabilities of an engine that is far off."""
    draw, groups, scores = Random(seed), [], []
    for number in range(4):
        prompt = Prompt(f"0-{number}", number, tuple(draw.choices(range(64), k=draw.randint(1, 8))), {})
        answers = [tuple(draw.choices(range(64), k=draw.randint(1, 16))) for _ in range(4)]
        spans = [(("1.0", 0, len(answer)),) for answer in answers]
        trajectories = tuple(
            Trajectory(answer, (True,) * len(answer), tuple(-4 - draw.random() for _ in answer), span, "stop")
            for answer, span in zip(answers, spans, strict=True)
        )
        total = tuple(draw.random() for _ in answers)
        lengths = tuple(map(len, answers))
        groups.append(Group(prompt, trajectories))
        scores.append(Scored(prompt.key, {}, total, lengths, tuple(len(prompt.tokens) + length for length in lengths), (False,) * 4, 0, 0))
    return groups, scores


def steps(rank: int, world: int, folder: str, overrides: list[str], budget: int, count: int) -> list[tuple[float, float, float, float]]:
    """(loss, gradient norm, divergence from the reference, log-probability under it) of each step."""
    from rayft.experience.algorithm import loss_of, weighing_of
    from rayft.losses.policy import NEED, policy_loss
    from rayft.models.load import named_trainable
    from rayft.optim.build import build_optimizer
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model
    from rayft.train.reference import Reference
    from rayft.train.step import forward_backward, update

    cfg: Any = load([], [*BASE, f"model.path={folder}", *overrides])
    session = Session(rank=rank, world_size=world, local_rank=rank, device="cpu", run_dir=Path("."), report=lambda *_: None, deadline_s=60)
    mesh = build_mesh("cpu", world)
    model = build_model(cfg, session, mesh)
    reference = Reference(cfg, session, mesh, model)
    optimizer = build_optimizer(named_trainable(model), cfg.optim, fused=True)
    loss, weighing, curve = policy_loss(loss_of(cfg.algorithm)), weighing_of(cfg), []
    for step in range(count):
        groups, scores = experience(0)
        (part,) = plan(scores, weighing, budget=budget, world=world, updates=1)
        batches = [
            build(answers, dict(enumerate(groups)), budget=budget, documents=part.documents, step=step) for answers in part.micro[rank]
        ]
        columns = reference.columns(batches)
        batches = [replace(batch, ref_logprobs=column) for batch, column in zip(batches, columns, strict=True)]
        sums, divisor = forward_backward([model], batches, loss, NEED, mesh, part.divisor)
        norm = update([model], optimizer, None)
        under = torch.stack([column.sum() for column in columns]).sum()
        torch.distributed.all_reduce(under)
        curve.append(tuple(float(value) for value in (sums["train/loss"] / divisor, norm, sums["train/ref_kl"], under)))
    return curve


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_budget_and_world_change_no_step(average: str, tmp_path: Path) -> None:
    folder = str(write_model("llama_tied", tmp_path))
    overrides = [f"algorithm.average={average}", "algorithm.beta=0.1", "algorithm.importance=sequence"]
    (expected,) = run_ranks(1, steps, folder, overrides, 512, 3)
    for world, budget in ((1, 24), (2, 24), (2, 100)):
        for curve in run_ranks(world, steps, folder, overrides, budget, 3):
            torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_reference_stays_while_the_policy_moves(adapter: str, tmp_path: Path) -> None:
    folder = str(write_model("llama", tmp_path))
    overrides = [f"adapter.type={adapter}", "algorithm.beta=0.1"]
    curve = run_ranks(2, steps, folder, overrides, 64, 4)[0]
    assert curve[0][2] == pytest.approx(0, abs=1e-4), "it begins where the policy does"
    assert curve[3][2] > 1e-3, "the policy moves"
    assert [step[3] for step in curve] == pytest.approx([curve[0][3]] * 4, rel=1e-6), "the reference does not"


def test_weighing_is_of_the_whole_batch() -> None:
    """Parts of a step share the advantages of the step."""
    groups, scores = experience(0)
    weighing = Weighing("reinforce_pp_baseline", {}, "token", 16, False)
    (whole,) = plan(scores, weighing, budget=512, world=1, updates=1)
    parts = plan(scores, weighing, budget=512, world=1, updates=2)

    def advantages(updates: list[Any]) -> list[float]:
        answers = [answer for update in updates for micro in update.micro[0] for answer in micro]
        return [answer.advantage for answer in sorted(answers, key=lambda answer: answer.index)]

    assert advantages(parts) == advantages([whole])
    assert isinstance(build(whole.micro[0][0], dict(enumerate(groups)), budget=512, documents=99, step=0), Batch)
