"""What an algorithm's name stands for, with what the run says otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rayft.config.schema import Algorithm, GrpoRun
from rayft.experience.pack import Average, Weighing
from rayft.losses.policy import PolicyLoss

Form = Literal["clip", "gspo", "cispo", "sapo"]


@dataclass(frozen=True)
class Preset:
    """An algorithm as its authors describe it.

    Attributes:
        form: of the loss, see `losses.policy`.
        advantage: see `experience.advantages`.
        average: see `experience.pack`.
        clip_low, clip_high: bounds of the ratio.
        filter: see `experience.filters`.
    """

    form: Form
    advantage: str
    average: Average
    clip_low: float = 0.2
    clip_high: float = 0.2
    filter: str = "none"


PRESETS: dict[str, Preset] = {
    "grpo": Preset("clip", "group_mean_std", "sequence"),
    "dr_grpo": Preset("clip", "group_mean", "constant"),
    "dapo": Preset("clip", "group_mean_std", "token", clip_high=0.28, filter="zero_variance"),
    "gspo": Preset("gspo", "group_mean_std", "sequence", clip_low=3e-4, clip_high=4e-4),
    "cispo": Preset("cispo", "group_mean_std", "token", clip_low=1.0, clip_high=4.0),
    "sapo": Preset("sapo", "group_mean_std", "sequence"),
    "rloo": Preset("clip", "leave_one_out", "constant"),
    "reinforce_pp": Preset("clip", "reinforce_pp_baseline", "token"),
}
"""algorithm.type -> what it stands for. Sources are beside the formulas."""


def loss_of(algorithm: Algorithm) -> PolicyLoss:
    """The loss that the section describes."""
    preset = PRESETS[algorithm.type]
    return PolicyLoss(
        form=preset.form,
        clip_low=algorithm.clip_low if algorithm.clip_low is not None else preset.clip_low,
        clip_high=algorithm.clip_high if algorithm.clip_high is not None else preset.clip_high,
        dual_clip=algorithm.dual_clip,
        beta=algorithm.beta,
        kl=algorithm.kl,
        correction=algorithm.importance,
        correction_mode=algorithm.importance_mode,
        correction_cap=algorithm.importance_cap,
    )


def weighing_of(cfg: GrpoRun) -> Weighing:
    """How the run's rewards become advantages and shares of the loss."""
    preset = PRESETS[cfg.algorithm.type]
    return Weighing(
        advantage=cfg.algorithm.advantage or preset.advantage,
        reward_weights=reward_weights_of(cfg),
        average=cfg.algorithm.average or preset.average,
        max_tokens=cfg.rollout.max_tokens,
        mask_truncated=cfg.algorithm.mask_truncated,
    )


def reward_weights_of(cfg: GrpoRun) -> dict[str, float]:
    """Weight of every reward that an answer gets, by name."""
    own = {"environment": cfg.environment.weight} if cfg.environment.function is not None else {}
    return {name: function.weight for name, function in cfg.reward.functions.items()} | own


def filter_of(algorithm: Algorithm) -> str:
    """Name of the filter that groups go through."""
    return algorithm.filter or PRESETS[algorithm.type].filter
