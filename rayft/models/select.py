"""Parameters by regular expressions on their checkpoint names: which ones a section means, and which rows of them are trained.

Row ranges live through sharding by rows: a hook clears the gradient of every other row before anything reads it, so neither
its norm nor an optimizer sees one. Optimizers move no weight whose gradient was always 0; weight decay is theirs to leave out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rayft.errors import ConfigError
from rayft.models.load import hf_name

Ranges = tuple[tuple[int, int], ...]
"""Ascending, disjoint [first, end) ranges of rows."""

_ROWS = re.compile(r"(?P<pattern>.+)\[(?:(?P<row>\d+)|(?P<first>\d*):(?P<end>\d*))\]")
UNFROZEN = "model.unfrozen"


def matched_names(field: str, pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a regular expression matches from their start.

    Args:
        field: of the configuration, for errors.
        pattern: the expression.
        names: checkpoint names of parameters.

    Raises:
        ConfigError: the expression is malformed, or matches nothing.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as problem:
        raise ConfigError(field, pattern, f"is not a regular expression ({problem})", "Escape special characters") from problem
    matched = [name for name in names if compiled.match(name)]
    if not matched:
        rule = f"matches none of the parameters in question, whose names are like {names[0]}"
        raise ConfigError(field, pattern, rule, "Correct it; it must match from the start of a name")
    return matched


def unfreeze(module: nn.Module, patterns: Iterable[str]) -> dict[str, Ranges]:
    """Train exactly the parameters that the patterns of model.unfrozen match.

    Args:
        module: before sharding.
        patterns: each a regular expression, with an optional suffix [n], [a:], [:b] or [a:b] that selects rows.

    Returns:
        Checkpoint name -> rows, of the parameters that are trained in part.

    Raises:
        ConfigError: a pattern matches nothing, or its rows are none of a parameter's.
    """
    parameters = {hf_name(name): parameter for name, parameter in module.named_parameters()}
    chosen: dict[str, list[tuple[int, int]]] = {}
    for written in patterns:
        rows = _ROWS.fullmatch(written)
        for name in matched_names(UNFROZEN, rows["pattern"] if rows else written, list(parameters)):
            chosen.setdefault(name, []).append(_range(written, rows, name, parameters[name].shape[0]))
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    merged = {name: _merged(ranges) for name, ranges in chosen.items()}
    return {name: ranges for name, ranges in merged.items() if ranges != ((0, parameters[name].shape[0]),)}


def hold_rows(module: nn.Module, ranges: Mapping[str, Ranges]) -> None:
    """Clear the gradient of all other rows as soon as it is there; call once the (sharded) parameters have their storage."""
    for name, parameter in module.named_parameters():
        if hf_name(name) in ranges:
            parameter.register_post_accumulate_grad_hook(_Clear(local_rows(parameter, ranges[hf_name(name)])))


def local_rows(parameter: Tensor, ranges: Ranges) -> Tensor:
    """bool [local rows, 1, ...]: which of this rank's rows of a (possibly sharded) parameter are in the ranges."""
    mask = torch.zeros(parameter.shape[0], dtype=torch.bool)
    for first, end in ranges:
        mask[first:end] = True
    if isinstance(parameter, DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        mask = mask[offset[0] : offset[0] + shape[0]]
    return mask.reshape(-1, *[1] * (parameter.ndim - 1)).to(local(parameter).device)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Clear:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        local(parameter.grad).mul_(self.rows)


def _range(written: str, rows: re.Match[str] | None, name: str, size: int) -> tuple[int, int]:
    if rows is None:
        return 0, size
    if rows["row"]:
        first, end = int(rows["row"]), int(rows["row"]) + 1
    else:
        first, end = int(rows["first"] or 0), int(rows["end"] or size)
    if not first < end <= size:
        rule = f"selects no rows that {name} has: it has {size}"
        raise ConfigError(UNFROZEN, written, rule, f"Take rows below {size}, the first one below the end")
    return first, end


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    def join() -> Iterator[tuple[int, int]]:
        first, end = -1, -1
        for start, stop in sorted(ranges):
            if start > end:
                if end > first:
                    yield first, end
                first, end = start, stop
            end = max(end, stop)
        yield first, end

    return tuple(join())
