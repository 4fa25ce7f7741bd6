"""Every policy loss against its formula written out token by token in float64, and the plan that leaves its value alone."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch

from rayft.experience.pack import Answer, Update, Weighing, build, plan
from rayft.losses.policy import PolicyLoss, policy_loss
from rayft.types import Batch, Group, Prompt, Scored, Terms, Trajectory

WEIGHING = Weighing("group_mean_std", {}, "token", max_tokens=9, mask_truncated=False)


def make_groups(seed: int = 0, groups: int = 3, answers: int = 4) -> tuple[list[Group], list[Scored]]:
    """Groups of random answers, some with tokens that the policy did not write, and their scores."""
    draw, made, scores = Random(seed), [], []
    for number in range(groups):
        prompt = Prompt(f"0-{number}", number, tuple(draw.choices(range(50), k=draw.randint(1, 5))), {})
        trajectories = []
        for _ in range(answers):
            length = draw.randint(1, 9)
            by_policy = tuple(draw.random() < 0.8 or i == 0 for i in range(length))
            logprobs = tuple(-3 * draw.random() if own else 0.0 for own in by_policy)
            tokens = tuple(draw.choices(range(50), k=length))
            trajectories.append(Trajectory(tokens, by_policy, logprobs, (("1.3", 0, length),), draw.choice(["stop", "length"])))
        made.append(Group(prompt, tuple(trajectories)))
        total = tuple(draw.choice([0.0, 0.5, 1.0]) for _ in range(answers))
        scores.append(
            Scored(
                prompt.key,
                {"a": total},
                total,
                lengths=tuple(sum(t.by_policy) for t in trajectories),
                sizes=tuple(len(prompt.tokens) + len(t.tokens) for t in trajectories),
                truncated=tuple(t.finish_reason == "length" for t in trajectories),
                oldest=3,
                newest=3,
            )
        )
    return made, scores


def batches_of(updates: list[Update], groups: list[Group], budget: int) -> list[list[list[Batch]]]:
    """[update][rank][micro-batch]"""
    found = dict(enumerate(groups))
    return [
        [[build(micro, found, budget=budget, documents=update.documents, step=0) for micro in rank] for rank in update.micro]
        for update in updates
    ]


def with_columns(batch: Batch, seed: int) -> tuple[Batch, torch.Tensor]:
    """The batch with policy and reference log-probabilities that depend on the token only, and the current ones at trained positions."""

    def value(purpose: int) -> torch.Tensor:
        numbers = [Random(int(key) * 8 + purpose + seed).random() for key in batch.row_keys]
        return -3 * torch.tensor(numbers, dtype=torch.float64)

    batch = replace(batch, policy_logprobs=value(1), ref_logprobs=value(2))
    return batch, value(3)[batch.trained].requires_grad_()


def written_out(batch: Batch, logprobs: torch.Tensor, loss: PolicyLoss) -> torch.Tensor:
    """The module's formulas, a token at a time."""
    total, start = torch.zeros((), dtype=torch.float64), 0
    at, current = batch.trained.tolist(), dict(zip(batch.trained.tolist(), logprobs, strict=True))
    for length in batch.document_lengths:
        tokens = [t for t in at if start <= t < start + length]
        start += length
        if not tokens:
            continue
        o, m, f, a = (getattr(batch, name).double() for name in ("policy_logprobs", "rollout_logprobs", "ref_logprobs", "advantages"))
        mean_ratio = torch.exp(sum((current[t] - o[t] for t in tokens), torch.zeros(())) / len(tokens))
        for t in tokens:
            r = mean_ratio if loss.form == "gspo" else torch.exp(current[t] - o[t])
            clip = min(max(r, torch.tensor(1 - loss.clip_low)), torch.tensor(1 + loss.clip_high))
            if loss.form == "cispo":
                cost = -float(clip.detach()) * a[t] * current[t]
            elif loss.form == "sapo":
                tau = loss.tau_positive if a[t] > 0 else loss.tau_negative
                cost = -4 / tau / (1 + torch.exp(-tau * (r - 1))) * a[t]
            else:
                cost = -min(r * a[t], clip * a[t])
                if loss.dual_clip is not None and a[t] < 0:
                    cost = min(cost, -loss.dual_clip * a[t])
            difference = {"token": float(o[t] - m[t]), "sequence": float(sum(o[u] - m[u] for u in tokens)), "none": 0.0}[loss.correction]
            c = math.exp(difference)
            if loss.correction_mode == "truncate":
                c = min(c, loss.correction_cap)
            elif not 1 / loss.correction_cap <= c <= loss.correction_cap:
                c = 0.0
            d = current[t] - f[t]
            kl = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}[loss.kl]
            total = total + batch.loss_weights[t] * (c * cost + loss.beta * kl)
    return total


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"clip_low": 0.2, "clip_high": 0.28},
        {"dual_clip": 1.5},
        {"form": "gspo", "clip_low": 0.01, "clip_high": 0.02},
        {"form": "cispo", "clip_low": 1.0, "clip_high": 0.5},
        {"form": "sapo"},
        {"beta": 0.3, "kl": "k1"},
        {"beta": 0.3, "kl": "k2"},
        {"beta": 0.3, "kl": "k3"},
        {"correction": "none"},
        {"correction": "sequence"},
        {"correction": "sequence", "correction_mode": "mask", "correction_cap": 8.0},
        {"correction_mode": "mask", "correction_cap": 1.5},
    ],
)
def test_losses_and_gradients_follow_their_formulas(change: dict[str, Any]) -> None:
    loss = PolicyLoss(**change)
    groups, scores = make_groups()
    ((micro,),) = batches_of(plan(scores, replace(WEIGHING, average="sequence"), budget=256, world=1, updates=1), groups, 256)[:1]
    batch, logprobs = with_columns(micro[0], seed=1)
    value, metrics = policy_loss(loss)(Terms(logprobs=logprobs, entropy=logprobs.detach()), batch)
    expected = written_out(batch, logprobs, loss)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
    (gradient,) = torch.autograd.grad(value, logprobs)
    (wanted,) = torch.autograd.grad(expected, logprobs)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-8)
    assert metrics["train/num_tokens"] == sum(map(sum, (score.lengths for score in scores)))


def test_a_step_of_one_update_has_the_plain_policy_gradient() -> None:
    groups, scores = make_groups()
    ((micro,),) = batches_of(plan(scores, WEIGHING, budget=256, world=1, updates=1), groups, 256)
    batch, logprobs = with_columns(micro[0], seed=1)
    batch = replace(batch, policy_logprobs=None, ref_logprobs=None)
    for form in ("clip", "cispo", "sapo"):
        value, _ = policy_loss(PolicyLoss(form=form, correction="none"))(Terms(logprobs=logprobs, entropy=logprobs), batch)
        (gradient,) = torch.autograd.grad(value, logprobs)
        torch.testing.assert_close(gradient, -batch.advantages.double()[batch.trained], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@pytest.mark.parametrize("form", ["clip", "gspo"])
def test_budget_and_world_change_no_loss(average: str, form: str) -> None:
    groups, scores = make_groups(groups=4)
    weighing = replace(WEIGHING, average=average, mask_truncated=True)

    def loss_of(budget: int, world: int) -> float:
        (update,) = plan(scores, weighing, budget=budget, world=world, updates=1)
        assert len({len(rank) for rank in update.micro}) == 1
        total = 0.0
        for rank in batches_of([update], groups, budget)[0]:
            for micro in rank:
                batch, logprobs = with_columns(micro, seed=2)
                terms = Terms(logprobs=logprobs, entropy=logprobs)
                total += float(policy_loss(PolicyLoss(form=form, correction="sequence", beta=0.1))(terms, batch)[0].detach())
        return total / update.divisor

    reference = loss_of(512, 1)
    for budget, world in [(14, 1), (20, 1), (31, 2), (14, 3), (512, 2)]:
        assert loss_of(budget, world) == pytest.approx(reference, rel=1e-6)


def test_averages_are_what_they_say() -> None:
    _, scores = make_groups(groups=2)
    ones = [replace(score, total=tuple(float(i) for i in range(4))) for score in scores]
    lengths = [length for score in scores for length in score.lengths]
    for average, per_token, divisor in [("token", None, sum(lengths)), ("sequence", 1.0, 8), ("constant", None, 8 * 9)]:
        (update,) = plan(ones, replace(WEIGHING, average=average), budget=99, world=1, updates=1)
        answers = sorted((a for micro in update.micro[0] for a in micro), key=lambda a: a.index)
        assert update.divisor == divisor
        assert [a.weight * length for a, length in zip(answers, lengths, strict=True)] == pytest.approx(
            [per_token or length for length in lengths]
        )


def test_a_micro_batch_holds_the_answers_token_for_token() -> None:
    groups, scores = make_groups()
    first, second = plan(scores, WEIGHING, budget=40, world=2, updates=2)
    seen: set[tuple[int, int]] = set()
    for update in (first, second):
        for rank in update.micro:
            for micro in rank:
                batch = build(micro, dict(enumerate(groups)), budget=40, documents=update.documents, step=7)
                assert batch.tokens.shape == (40,) and sum(batch.document_lengths) == 40
                check_answers(batch, micro, groups)
                whole = build(micro, dict(enumerate(groups)), budget=60, documents=update.documents, step=7, whole=True)
                assert whole.tokens.shape == (60,) and whole.cu_seqlens.shape == batch.cu_seqlens.shape
                check_answers(whole, micro, groups)
                seen |= {(answer.group, answer.place) for answer in micro}
    assert seen == {(g, a) for g in range(3) for a in range(4)}
    assert {a.group for rank in first.micro for m in rank for a in m} & {a.group for rank in second.micro for m in rank for a in m} == set()


def check_answers(batch: Batch, micro: tuple[Answer, ...], groups: list[Group]) -> None:
    start, trained = 0, set(batch.trained.tolist())
    for answer in micro:
        group, trajectory = groups[answer.group], groups[answer.group].trajectories[answer.place]
        tokens = (*group.prompt.tokens, *trajectory.tokens)
        assert tuple(batch.tokens[start : start + answer.size].tolist()) == tokens
        for i, own in enumerate(trajectory.by_policy):
            at = start + len(group.prompt.tokens) - 1 + i
            assert (at in trained) == own and batch.targets[at] == trajectory.tokens[i]
            if own:
                assert batch.rollout_logprobs[at] == pytest.approx(trajectory.logprobs[i])
                assert batch.advantages[at] == pytest.approx(answer.advantage)
                assert batch.versions[at] == 3
        start += answer.size


@pytest.mark.parametrize("world", [1, 2])
def test_advantages_by_token_get_to_their_tokens(world: int) -> None:
    groups, scores = make_groups()
    draw = Random(3)
    scores = [replace(one, advantages=tuple(array("f", [draw.gauss(0, 1) for _ in range(n)]) for n in one.lengths)) for one in scores]
    flat = torch.tensor([value for one in scores for answer in one.advantages for value in answer], dtype=torch.float64)
    white = ((flat - flat.mean()) / (flat.std() + 1e-6)).float()
    weighing = replace(WEIGHING, advantage="gae", mask_truncated=True)
    (update,) = plan(scores, weighing, budget=40, world=world, updates=1)
    found: dict[tuple[int, int], list[float]] = {}
    for rank in update.micro:
        for answers in rank:
            batch = build(answers, dict(enumerate(groups)), budget=40, documents=update.documents, step=0)
            assert batch.advantages is not None
            start = 0
            for answer in answers:
                own = [i for i, flag in enumerate(groups[answer.group].trajectories[answer.place].by_policy) if flag]
                first = start + len(groups[answer.group].prompt.tokens) - 1  # position t of a batch predicts token t + 1
                found[answer.group, answer.place] = [float(batch.advantages[first + i]) for i in own]
                start += answer.size
    told = [value for key in sorted(found) for value in found[key]]
    assert told == pytest.approx(white.tolist(), rel=1e-5) and len(found) == 12
