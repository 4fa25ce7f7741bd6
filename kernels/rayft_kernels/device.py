"""Launching on the device of the tensors. Triton launches on the current one, which need not be theirs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def on_its_device(launch: Callable[Concatenate[Tensor, Rest], Result]) -> Callable[Concatenate[Tensor, Rest], Result]:
    """The same function, run while the device of its first argument is the current one."""

    @wraps(launch)
    def launched(x: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call, unused-ignore]
            return launch(x, *args, **kwargs)

    return launched
