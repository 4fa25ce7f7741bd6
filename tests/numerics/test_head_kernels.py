"""The CUDA body of the head operations: interpreted on a CPU, compiled for a GPU that is not there, and run where there is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import check_linear_ce
from rules.source_tree import ROOT

GPU_CHECKS = check_linear_ce.gpu_checks()


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CHECKS)
def test_check(name: str) -> None:
    GPU_CHECKS[name]()


def test_cuda_body_interpreted() -> None:
    pytest.importorskip("triton")
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "tests/interpreted_head.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("options", [{}, {"bias_ptr": "*bf16", "SOFTCAP": True}], ids=["plain", "bias and softcap"])
@pytest.mark.parametrize("name", ["_exponentials", "_statistics", "_gradients", "_scale"])
def test_kernels_compile_for_hopper(name: str, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter lets pass, such as a variable that changes its type in a loop; needs no GPU."""
    triton = pytest.importorskip("triton")
    from rayft_kernels.linear_cross_entropy import triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, name)
    names = kernel.arg_names
    types = {"logits_ptr": "*bf16", "out_ptr": "*bf16", "targets_ptr": "*i64", "softcap": "fp32", "scale": "fp32", "count": "i64"}
    choices = {"bias_ptr": None, "SOFTCAP": False, "BLOCK": kernels.BLOCK} | options
    constants = {n: value for n, value in choices.items() if n in names and value != "*bf16"}
    signature = {n: types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names}
    signature |= {n: "*bf16" for n in names if choices.get(n) == "*bf16"} | {n: "constexpr" for n in constants}
    aligned = [n for n in ("logits_ptr", "stride", "width", "source_ptr", "count") if n in names]
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": kernels.WARPS})
    assert "ld.global.v4" in compiled.asm["ptx"], "loads are not 16 bytes wide"
