"""The Triton bodies, interpreted on a CPU, pass the checks that they pass on a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rules.source_tree import ROOT


def test_interpreted_bodies_pass_their_checks() -> None:
    pytest.importorskip("triton")
    environment = {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "interpreted.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") >= 13
