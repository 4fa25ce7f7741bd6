"""Policy losses and advantages against verl 0.9 and OpenRLHF 0.11, on the same numbers: values and gradients to 1e-6.

Skipped where they are not installed; CONTRIBUTING.md says how. docs/losses.md says where they define something else.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from rayft.experience import advantages
from rayft.experience.pack import Answer, Weighing, build, plan
from rayft.losses.policy import PolicyLoss, divergence, policy_loss
from rayft.types import Batch, Group, Prompt, Scored, Terms, Trajectory

MAX_TOKENS, GROUPS, ANSWERS = 11, 4, 4
MODES = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}
"""algorithm.average -> what verl calls it."""


@pytest.fixture(scope="module")
def verl() -> Any:
    """verl's losses and advantages."""
    pytest.importorskip("verl")
    return importlib.import_module("verl.trainer.ppo.core_algos")


@pytest.fixture(scope="module")
def openrlhf() -> Iterator[dict[str, Any]]:
    """OpenRLHF's modules by their last name, imported without what its packages import: deepspeed and flash-attn."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs openrlhf")
    root, before = Path(spec.submodule_search_locations[0]), dict(sys.modules)
    sys.modules["deepspeed"] = types.ModuleType("deepspeed")
    for name in ("", ".models", ".utils", ".trainer", ".trainer.ppo_utils"):
        package = types.ModuleType(f"openrlhf{name}")
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[package.__name__] = package
    wanted = ("models.loss", "models.utils", "trainer.ppo_utils.length_penalty")
    yield {name.rpartition(".")[2]: importlib.import_module(f"openrlhf.{name}") for name in wanted}
    for name in [name for name in sys.modules if name == "deepspeed" or name.partition(".")[0] == "openrlhf"]:
        sys.modules.pop(name)
        if name in before:
            sys.modules[name] = before[name]


@dataclass(frozen=True)
class Sample:
    """The same answers twice: packed for this project, and padded, one row an answer, as the others take them.

    Attributes:
        batch: packed.
        divisor: of the step.
        rows: [M] and [M], row and column of each trained token.
        mask: [answers, MAX_TOKENS], 1 at trained tokens.
        current: [M], log-probabilities under the weights in training.
    """

    batch: Batch
    divisor: float
    rows: tuple[Tensor, Tensor]
    mask: Tensor
    current: Tensor

    def padded(self, values: Tensor) -> Tensor:
        """[M] or, for a column of the batch, [T] -> [answers, MAX_TOKENS], with 0.0 elsewhere."""
        values = values[self.batch.trained] if values.shape[0] == self.batch.tokens.shape[0] else values
        return torch.zeros(self.mask.shape, dtype=torch.float64).index_put(self.rows, values.double())

    @property
    def peers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Old and current log-probabilities, advantages and mask, padded; the second with a gradient."""
        assert self.batch.policy_logprobs is not None and self.batch.advantages is not None
        current = self.padded(self.current).detach().requires_grad_()
        return self.padded(self.batch.policy_logprobs), current, self.padded(self.batch.advantages), self.mask


def make_sample(average: str, seed: int = 0) -> Sample:
    """Answers of many lengths, one of each group cut off and left out; log-probabilities far enough apart to clip both ways."""
    draw, groups, scores = Random(seed), [], []
    for number in range(GROUPS):
        prompt = Prompt(f"0-{number}", number, (1, 2, 3), {})
        lengths = tuple(draw.randint(1, MAX_TOKENS) for _ in range(ANSWERS))
        answers = [Trajectory((5,) * n, (True,) * n, (0.0,) * n, (("1.0", 0, n),), "stop") for n in lengths]
        groups.append(Group(prompt, tuple(answers)))
        total, cut = tuple(draw.random() for _ in lengths), tuple(place == number for place in range(ANSWERS))
        scores.append(Scored(prompt.key, {}, total, lengths, tuple(3 + n for n in lengths), cut, 0, 0))
    weighing = Weighing("group_mean_std", {}, average, MAX_TOKENS, mask_truncated=True)  # type: ignore[arg-type]
    (update,) = plan(scores, weighing, budget=4096, world=1, updates=1)
    ((answers_of,),) = update.micro
    batch = build(answers_of, dict(enumerate(groups)), budget=4096, documents=update.documents, step=0)
    generator = torch.Generator().manual_seed(seed)

    def near(values: Tensor, spread: float) -> Tensor:
        return values + spread * torch.randn(values.shape, generator=generator, dtype=torch.float64)

    current = -3 * torch.rand(batch.tokens.shape, generator=generator, dtype=torch.float64)
    batch = replace(batch, policy_logprobs=near(current, 0.3), ref_logprobs=near(current, 0.5))
    batch = replace(batch, rollout_logprobs=near(batch.policy_logprobs, 0.4))
    rows = rows_of(answers_of, batch)
    mask = torch.zeros(len(answers_of), MAX_TOKENS, dtype=torch.float64).index_put(rows, torch.ones((), dtype=torch.float64))
    return Sample(batch, update.divisor, rows, mask, current[batch.trained])


def rows_of(answers: tuple[Answer, ...], batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and column of each trained token."""
    found, start = [], 0
    for row, answer in enumerate(answers):
        inside = [t for t in batch.trained.tolist() if start <= t < start + answer.size]
        found += [(row, column) for column in range(len(inside))]
        start += answer.size
    rows, columns = torch.tensor(found).unbind(1)
    return rows, columns


def ours(sample: Sample, loss: PolicyLoss) -> tuple[float, Tensor]:
    """The loss, and its gradient as [answers, MAX_TOKENS]."""
    current = sample.current.clone().requires_grad_()
    value = policy_loss(loss)(Terms(logprobs=current, entropy=current.detach()), sample.batch)[0] / sample.divisor
    (gradient,) = torch.autograd.grad(value, current)
    return float(value.detach()), sample.padded(gradient)


def assert_same(sample: Sample, loss: PolicyLoss, theirs: Tensor, at: Tensor) -> None:
    value, gradient = ours(sample, loss)
    assert abs(value) > 1e-3 and float(theirs.detach()) == pytest.approx(value, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(theirs, at)[0], gradient, rtol=1e-6, atol=1e-6)


def actor(**fields: Any) -> Any:
    """verl's settings; its bound for negative advantages is on unless it is made too large to matter."""
    from verl.workers.config import ActorConfig

    settings = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1e9, "global_batch_info": {}} | fields
    settings["global_batch_info"] = {"loss_scale_factor": MAX_TOKENS} | settings["global_batch_info"]
    return ActorConfig(strategy="fsdp2", rollout_n=2, ppo_micro_batch_size_per_gpu=1, **settings)


DAPO = PolicyLoss(clip_low=0.2, clip_high=0.28, correction="none")


@pytest.mark.parametrize("average", MODES)
@pytest.mark.parametrize("name", ["vanilla", "dual", "gspo", "cispo", "sapo"])
def test_losses_equal_verls(verl: Any, name: str, average: str) -> None:
    if name == "sapo" and average != "sequence":
        pytest.skip("verl averages sapo by sequence, whatever it is told")
    sample = make_sample(average)
    old, current, advantage, mask = sample.peers
    form = {"vanilla": "clip", "dual": "clip"}.get(name, name)
    loss = replace(DAPO, form=form, dual_clip=1.1 if name == "dual" else None)
    settings = actor(clip_ratio_c=1.1) if name == "dual" else actor()
    function = verl.get_policy_loss_fn("vanilla" if name == "dual" else name)
    assert_same(sample, loss, function(old, current, advantage, mask, MODES[average], settings, None)[0], current)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_equal_verls(verl: Any, level: str, mode: str) -> None:
    corrections = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
    sample = make_sample("token")
    old, current, advantage, mask = sample.peers
    assert sample.batch.rollout_logprobs is not None
    cap = 1.5
    bounds = cap if mode == "truncate" else f"{1 / cap!r}_{cap}"
    difference = old - sample.padded(sample.batch.rollout_logprobs)
    weights, _ = corrections.compute_rollout_correction_weights(difference, mask, level, bounds)
    loss = replace(DAPO, correction=level, correction_mode=mode, correction_cap=cap)
    theirs = verl.get_policy_loss_fn("vanilla")(old, current, advantage, mask, "token-mean", actor(), weights)[0]
    assert_same(sample, loss, theirs, current)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_divergences_equal_both(verl: Any, openrlhf: dict[str, Any], kl: Any) -> None:
    sample = make_sample("sequence")
    assert sample.batch.ref_logprobs is not None
    reference = sample.batch.ref_logprobs[sample.batch.trained]
    mine = divergence(sample.current, reference, kl)
    torch.testing.assert_close(verl.kl_penalty(sample.current, reference, kl), mine, rtol=1e-6, atol=1e-6)
    theirs = openrlhf["utils"].compute_approx_kl(sample.current, reference, kl_estimator=kl)
    torch.testing.assert_close(theirs.double(), mine, rtol=1e-6, atol=1e-6)
    old, current, advantage, mask = sample.peers
    total = verl.get_policy_loss_fn("vanilla")(old, current, advantage, mask, "seq-mean-token-mean", actor(), None)[0]
    total = total + 0.3 * verl.agg_loss(verl.kl_penalty(current, sample.padded(reference), kl), mask, "seq-mean-token-mean")
    assert_same(sample, replace(DAPO, beta=0.3, kl=kl), total, current)


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("change", [{}, {"dual_clip": 1.1}, {"form": "gspo"}])
def test_losses_equal_openrlhfs(openrlhf: dict[str, Any], change: dict[str, Any], average: str) -> None:
    if "form" in change and average == "token":
        pytest.skip("OpenRLHF averages gspo by sequence")
    sample = make_sample(average)
    old, current, advantage, mask = sample.peers
    kind = "gspo" if "form" in change else "ppo"
    settings = {"clip_eps_low": 0.2, "clip_eps_high": 0.28, "dual_clip": change.get("dual_clip"), "token_level_loss": average == "token"}
    theirs = openrlhf["loss"].PolicyLoss(**settings, policy_loss_type=kind)(current, old, advantage, mask)[0]
    assert_same(sample, replace(DAPO, **change), theirs, current)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights_equal_openrlhfs(openrlhf: dict[str, Any], mode: str) -> None:
    sample, cap = make_sample("token"), 1.5
    old, current, advantage, mask = sample.peers
    assert sample.batch.rollout_logprobs is not None
    bounds = (0.0, cap) if mode == "truncate" else (1 / cap, cap)
    settings = {
        "is_correction_level": "token",
        "is_correction_mode": {"truncate": "clip"}.get(mode, mode),
        "is_correction_threshold": bounds,
    }
    function = openrlhf["loss"].PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28, **settings)
    theirs = function(current, old, advantage, mask, sample.padded(sample.batch.rollout_logprobs))[0]
    assert_same(sample, replace(DAPO, correction="token", correction_mode=mode, correction_cap=cap), theirs, current)


def rewards(seed: int = 0) -> list[list[float]]:
    """Groups of rewards so large that what is added to deviations, different everywhere, does not count; one group without variance."""
    draw = Random(seed)
    return [[1000 * draw.random() for _ in range(ANSWERS)] for _ in range(GROUPS)] + [[7.0] * ANSWERS]


def verls_layout(groups: list[list[float]]) -> tuple[Tensor, Tensor, Any]:
    """Rewards, mask and group of each answer, as if every answer had one token: verl's moments over the batch are over tokens."""
    import numpy as np

    values = torch.tensor([value for group in groups for value in group], dtype=torch.float64)[:, None]
    return values, torch.ones_like(values), np.repeat(np.arange(len(groups)), ANSWERS)


@pytest.mark.parametrize(
    ("name", "function", "options"),
    [
        ("group_mean_std", "compute_grpo_outcome_advantage", {}),
        ("group_mean", "compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
        ("leave_one_out", "compute_rloo_outcome_advantage", {}),
        ("reinforce_pp_baseline", "compute_reinforce_plus_plus_baseline_outcome_advantage", {}),
    ],
)
def test_advantages_equal_verls(verl: Any, name: str, function: str, options: dict[str, Any]) -> None:
    theirs, _ = getattr(verl, function)(*verls_layout(rewards()), **options)
    mine = torch.tensor(advantages.ADVANTAGES[name](rewards()), dtype=torch.float64).flatten()
    torch.testing.assert_close(theirs.flatten(), mine, rtol=1e-6, atol=1e-6)


def test_gdpo_equals_verls(verl: Any) -> None:
    names = {"right": 1.0, "short": 0.3}
    by_name = {name: rewards(seed) for seed, name in enumerate(names)}
    values, mask, index = verls_layout(by_name["right"])
    theirs, _ = verl.compute_gdpo_outcome_advantage(
        values,
        mask,
        index,
        config={"gdpo_reward_keys": list(names), "gdpo_reward_weights": list(names.values())},
        non_tensor_batch={name: verls_layout(found)[0].flatten().numpy() for name, found in by_name.items()},
        batch={"prompts": torch.zeros(len(values), 2), "attention_mask": torch.ones(len(values), 3, dtype=torch.long)},
    )
    groups = [{name: found[number] for name, found in by_name.items()} for number in range(GROUPS + 1)]
    mine = torch.tensor(advantages.gdpo(groups, names), dtype=torch.float64).flatten()
    torch.testing.assert_close(theirs.flatten().double(), mine, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.95, 0.9)])
def test_gae_equals_verls(verl: Any, gamma: float, lam: float) -> None:
    """Answers of several lengths, some with tokens of an environment; values so large that what is added to deviations does not count."""
    draw, width = Random(4), 9
    mask = [[(place == 0 or draw.random() < 0.7) and place < length for place in range(width)] for length in (9, 4, 1, 7, 8, 6)]
    values = [[1000 * draw.gauss(0, 1) for _ in range(width)] for _ in mask]
    rewards = [[0.0] * width for _ in mask]
    for row, flags in zip(rewards, mask, strict=True):
        row[max(place for place, own in enumerate(flags) if own)] = 3000 * draw.random()
    padded, flags = (torch.tensor(rows, dtype=torch.float64) for rows in (values, mask))
    theirs, returns = verl.compute_gae_advantage_return(torch.tensor(rewards, dtype=torch.float64), padded, flags, gamma, lam)
    own = flags.bool()
    mine = [
        advantages.gae(torch.tensor(reward)[kept].tolist(), value[kept].tolist(), gamma, lam)
        for reward, value, kept in zip(rewards, padded, own, strict=True)
    ]
    raw = torch.tensor([value for answer in mine for value in answer], dtype=torch.float64)
    torch.testing.assert_close((returns - padded)[own], raw, rtol=1e-6, atol=1e-6)
    white = advantages.whitened([[array("f", answer) for answer in mine]])[0]
    torch.testing.assert_close(theirs[own].float(), torch.tensor([value for answer in white for value in answer]), rtol=1e-5, atol=1e-5)


def test_the_overlong_penalty_equals_openrlhfs(openrlhf: dict[str, Any]) -> None:
    lengths = torch.arange(1, 21)
    experience = types.SimpleNamespace(response_length=lengths, rewards=torch.zeros(20, dtype=torch.float64))
    openrlhf["length_penalty"].apply_overlong_penalty([experience], 20, 8, 0.5)
    mine = [advantages.overlong_penalty(int(length), 20, 8, 0.5) for length in lengths]
    assert experience.rewards.tolist() == pytest.approx(mine, abs=1e-12)
