"""Run as a program: the Triton bodies of the experts, interpreted on CPU tensors, through their checks; see tests/interpreted.py."""

from __future__ import annotations

import torch

from bench import check_moe
from bench.checks import failures
from interpreted import allow_scalars_of_one_element
from rayft_kernels.moe_lora import steps
from rayft_kernels.moe_lora import triton as body

NAMES = ("adapters", "square, transposed", "gate and up only", "down only", "base trained", "base trained, transposed, adapters")


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
    return 1 if failures(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
