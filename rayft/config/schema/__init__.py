"""What a run is: one value, discriminated by its method."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayft.config.schema.base import Section
from rayft.config.schema.sections import (
    Adapter,
    BatchShape,
    Checkpoint,
    Data,
    Dataset,
    Eval,
    Export,
    Model,
    Optim,
    Parallel,
    Run,
)

__all__ = [
    "METHODS",
    "Adapter",
    "BatchShape",
    "Checkpoint",
    "Data",
    "Dataset",
    "Eval",
    "Export",
    "Model",
    "Optim",
    "Parallel",
    "Run",
    "SftRun",
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
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    export: Export = Export()


METHODS: dict[str, type[SftRun]] = {"sft": SftRun}
"""Method name -> the run's type. A new method is a new entry."""
