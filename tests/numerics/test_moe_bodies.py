"""The experts' Triton bodies: interpreted on a CPU, compiled for a GPU that is not there, and run where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("rank", [0, 16, 64])
@pytest.mark.parametrize("ones", ["w_k", "w_n"])
def test_products_fit_into_a_hopper(rank: int, ones: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both orientations of the weights keep three stages of 48 KiB in shared memory, which is the pipeline, and fit beside the factors."""
    triton = pytest.importorskip("triton")
    from rayft_kernels.moe_lora import triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = kernels._product, PRODUCT | {"P": rank, ones: 1}
    names = kernel.arg_names
    numbers = ("order_ptr", "tiles_ptr")
    signature = {name: "*i32" if name in numbers else "*bf16" if name.endswith("_ptr") else "i32" for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if signature[name] != "constexpr" and name != "tiles"]
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    _, _, warps, stages = kernels.PRODUCT
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    assert 3 * 48 << 10 <= compiled.metadata.shared <= 227 << 10
    assert "wgmma" in compiled.asm["ptx"]
