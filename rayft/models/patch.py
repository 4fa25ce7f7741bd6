"""Puts a family's fixes on a model instance, checks that each took effect, and says so in one line each."""

from __future__ import annotations

import logging
from typing import Any

from rayft.errors import TrainingError
from rayft.types import ModelSpec

log = logging.getLogger("rayft")


def apply_fixes(module: Any, spec: ModelSpec) -> None:
    """Apply every fix of the family to this instance.

    Raises:
        TrainingError: a fix did not take effect, so the run would silently be without it.
    """
    for fix in spec.fixes:
        fix.apply(module)
        if not fix.check(module):
            raise TrainingError(
                f"model fix {fix.name}",
                None,
                f"did not take effect on {fix.where}",
                f"Report it with the transformers version; it is there because {fix.why}",
            )
        log.info("fix %s on %s: %s (until %s)", fix.name, fix.where, fix.why, fix.remove_when)
