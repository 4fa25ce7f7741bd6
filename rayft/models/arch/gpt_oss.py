"""gpt-oss: what rayft must know about this family, and nothing else."""

from __future__ import annotations

from rayft.types import ModelSpec

SPEC = ModelSpec(
    model_types=("gpt_oss",),
    unsupported={"training": "adds learned attention sinks to every softmax, which the packed attention backends do not compute yet"},
)
