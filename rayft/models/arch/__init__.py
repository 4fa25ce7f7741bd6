"""One file per architecture family that needs more than the plain spec."""

from __future__ import annotations

from rayft.models.arch import gpt_oss
from rayft.types import ModelSpec

SPECS: tuple[ModelSpec, ...] = (gpt_oss.SPEC,)
