"""What a run is: one value, discriminated by its method."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from rayft.config.schema.base import Section
from rayft.config.schema.online import (
    Algorithm,
    Environment,
    HttpJudge,
    OnlineEval,
    Placement,
    Prompts,
    Reward,
    RewardFunction,
    RewardModel,
    Rollout,
    TokenBudget,
    WeightSync,
)
from rayft.config.schema.sections import (
    Adapter,
    BatchShape,
    Checkpoint,
    Data,
    Dataset,
    Env,
    Eval,
    Export,
    Kernels,
    Model,
    Optim,
    Parallel,
    Run,
    Samples,
    Trackers,
)

__all__ = [
    "METHODS",
    "Adapter",
    "Algorithm",
    "AnyRun",
    "BatchShape",
    "Checkpoint",
    "Data",
    "Dataset",
    "Env",
    "Environment",
    "Eval",
    "Export",
    "GrpoRun",
    "HttpJudge",
    "Kernels",
    "Model",
    "OnlineEval",
    "Optim",
    "Parallel",
    "Placement",
    "Prompts",
    "Reward",
    "RewardFunction",
    "RewardModel",
    "Rollout",
    "Run",
    "Samples",
    "SftRun",
    "TokenBudget",
    "Trackers",
    "WeightSync",
]


class SftRun(Section):
    """Supervised fine-tuning: next-token loss on the trained tokens of each row."""

    schema_version: Literal[1] = Field(1, description="Version of this schema.")
    method: Literal["sft"] = Field(description="Training method.")
    run: Run
    model: Model
    adapter: Adapter = Adapter()
    data: Data
    batch: BatchShape = BatchShape()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    kernels: Kernels = Kernels()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    export: Export = Export()
    trackers: Trackers = Trackers()
    env: Env = Env()


class GrpoRun(Section):
    """Online reinforcement learning: groups of answers from a pool of engines, rewarded and learnt from."""

    schema_version: Literal[1] = Field(1, description="Version of this schema.")
    method: Literal["grpo"] = Field(description="Training method.")
    run: Run
    model: Model
    adapter: Adapter = Adapter()
    data: Prompts
    rollout: Rollout = Rollout()
    environment: Environment = Environment()
    reward: Reward = Reward()
    algorithm: Algorithm = Algorithm()
    batch: TokenBudget = TokenBudget()
    weight_sync: WeightSync = WeightSync()
    placement: Placement = Placement()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    kernels: Kernels = Kernels()
    checkpoint: Checkpoint = Checkpoint()
    eval: OnlineEval = OnlineEval()
    export: Export = Export()
    trackers: Trackers = Trackers()
    env: Env = Env()

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch.micro_tokens or self.rollout.max_prompt_tokens + self.rollout.max_tokens


AnyRun: TypeAlias = SftRun | GrpoRun

METHODS: dict[str, type[SftRun] | type[GrpoRun]] = {"sft": SftRun, "grpo": GrpoRun}
"""Method name -> the run's type. A new method is a new entry."""
