"""Adapters that another program wrote: whether peft would read their tensors as they were meant.

peft lays an adapter of a stack of experts out by which side of the stack is the input. Versions took other sides: up to 0.18 the middle
dimension always; 0.19.0 the last one of stacks that are stored [E, in, out]; since 0.19.1 the last one of those stored [E, out, in]. On a
stack that is not square shapes tell; on a square one the tensors fit either way, and only the version that wrote them says which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rayft.errors import DataError

_RIGHT = (0, 19, 1)
"""The first version of peft that takes the input side by the stack's own orientation."""
REMEDY = "Save it again with peft 0.19.1 or newer on the base it was trained on, or use its merged model"


def check_orientation(base: nn.Module, adapter_config: Mapping[str, Any], folder: Path) -> None:
    """Refuse an adapter on stacks of experts that this peft would put on the wrong way round.

    Args:
        base: the model without the adapter.
        adapter_config: content of its adapter_config.json.
        folder: for the message.

    Raises:
        DataError: a stack is square and the version that wrote the adapter is not known, or is one that took the other side.
    """
    targets = tuple(adapter_config.get("target_parameters") or ())
    written = _numbers(adapter_config.get("peft_version"))
    for path, part in base.named_modules():
        for own, parameter in part.named_parameters(recurse=False):
            name = f"{path}.{own}"
            if parameter.dim() != 3 or parameter.shape[1] != parameter.shape[2] or not any(_is(name, target) for target in targets):
                continue
            transposed = bool(getattr(part, "is_transposed", False))
            if written is None:
                rule = f"{name} is square, so only peft_version could tell which side is its input, and the file has none"
                raise DataError(f"{folder}/adapter_config.json", None, rule, REMEDY)
            if written < _RIGHT and not (transposed and written < (0, 19, 0)):
                rule = f"took the other side of {name}, which is square, for its input"
                raise DataError(f"{folder}/adapter_config.json: peft_version", adapter_config["peft_version"], rule, REMEDY)


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _numbers(version: str | None) -> tuple[int, ...] | None:
    """(0, 19, 1) of "0.19.1.dev0@main"; None of what is no version."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version or "")
    return tuple(map(int, found.groups())) if found else None
