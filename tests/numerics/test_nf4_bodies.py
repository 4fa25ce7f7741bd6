"""The Triton body of 4-bit weights, interpreted on a CPU, passes the checks that it passes on a GPU; the torch bodies pass them all."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench import check_nf4
from rules.source_tree import ROOT

CHECKS = check_nf4.checks("cpu")


def test_interpreted_body_passes_its_checks() -> None:
    pytest.importorskip("triton")
    paths = f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}"
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "interpreted_nf4.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") == 16


@pytest.mark.parametrize("name", CHECKS)
def test_torch_body_passes(name: str) -> None:
    CHECKS[name]()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_kernel_passes_on_a_gpu(name: str) -> None:
    check_nf4.checks("cuda")[name]()
