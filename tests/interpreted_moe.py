"""Run as a program: the Triton bodies of the experts, interpreted on CPU tensors, through their checks; see tests/interpreted.py."""

from __future__ import annotations

from unittest.mock import patch

import torch

from bench import check_moe
from bench.checks import failures
from interpreted import allow_scalars_of_one_element
from rayft_kernels.moe_lora import steps
from rayft_kernels.moe_lora import triton as body

NAMES = ("adapters", "square, transposed", "gate and up only", "down only", "base trained", "base trained, transposed, adapters")


def check_device() -> None:
    """Each launch of a forward and backward is made on the device of its tensors."""
    case = check_moe.CASES["base trained, transposed, adapters"]
    given, index = check_moe.cast(check_moe.made(case, "cpu"), torch.float32), check_moe.choices(case, "cpu")
    with patch.object(torch.cuda, "device_of", wraps=torch.cuda.device_of) as entered:
        check_moe.values(check_moe.ours, case, index, given)
    assert entered.call_count == 16, entered.call_count


def main() -> int:
    """Exit code 1 if a check fails."""
    allow_scalars_of_one_element()
    steps._triton = lambda x: None if x.dtype == torch.float64 else body
    found = {
        f"moe {kind}: {name}": lambda name=name, kind=kind: check_moe.check_against(check_moe.CASES[name], getattr(torch, kind), "cpu")
        for name in NAMES
        for kind in ("float32", "float16")
    }
    found["twice"] = lambda: check_moe.check_twice(torch.float32, "cpu")
    found["strides"] = lambda: check_moe.check_strides(torch.float32, "cpu")
    found["device"] = check_device
    return 1 if failures(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
