"""The experts' Triton bodies: interpreted on a CPU, compiled for a GPU that is not there, and run where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import check_moe
from rules.source_tree import ROOT

GPU_CHECKS = check_moe.checks("cuda", (torch.bfloat16,))
PRODUCT = {"GATHER": 8, "EVEN": True, "BM": 128, "BN": 256, "BK": 64, "GROUP": 8}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CHECKS)
def test_check(name: str) -> None:
    GPU_CHECKS[name]()


def test_interpreted_bodies_pass_their_checks() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "tests/interpreted_moe.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") >= 13


def compiled_for_hopper(kernel: Any, constants: dict[str, Any], dtype: str, warps: int, stages: int) -> Any:
    """A kernel of pointers to `dtype` and of numbers of the routing, compiled where there is no GPU."""
    import triton

    names = kernel.arg_names
    types = {"order_ptr": "*i32", "tiles_ptr": "*i32", "scale": "fp32"}
    signature = {name: types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if signature[name] not in ("constexpr", "fp32") and name != "tiles"]
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def test_float32_loses_no_more_than_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter does not show: no approximate division, and products whose sums start from zero each time."""
    pytest.importorskip("triton")
    from rayft_kernels.moe_lora import triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"KIND": 0, "P": 16, "PARTS": 2, "BM": 64, "BI": 64}
    for dtype, exact in (("fp32", True), ("bf16", False)):
        found = compiled_for_hopper(kernels._activate, constants, dtype, 4, 2).asm
        assert ("div.rn.f32" in found["ptx"], "div.full.f32" in found["ptx"]) == (exact, not exact)
        starts = re.findall(r"= tt\.dot [^,]+, [^,]+, (%\w+)", found["ttir"])
        assert starts and all((f"{start} = arith.constant" in found["ttir"]) == exact for start in starts)


@pytest.mark.parametrize("rank", [0, 16, 64])
@pytest.mark.parametrize("ones", ["w_k", "w_n"])
def test_products_fit_into_a_hopper(rank: int, ones: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both orientations of the weights keep three stages of 48 KiB in shared memory, which is the pipeline, and fit beside the factors."""
    pytest.importorskip("triton")
    from rayft_kernels.moe_lora import triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _, _, warps, stages = kernels.PRODUCT
    compiled = compiled_for_hopper(kernels._product, PRODUCT | {"P": rank, ones: 1}, "bf16", warps, stages)
    assert 3 * 48 << 10 <= compiled.metadata.shared <= 227 << 10
    assert "wgmma" in compiled.asm["ptx"]
