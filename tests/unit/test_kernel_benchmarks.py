"""The benchmarks of the operations run without a GPU, and what is made of their rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton")

from bench import common, once, run
from rules.source_tree import ROOT


def test_tiny_shapes_of_every_operation_run(tmp_path: Path) -> None:
    assert run.main([str(tmp_path), "--tiny"]) == 0
    found = run.read(tmp_path / "kernels.csv")
    assert {"glu_silu", "linear_ce", "lora_mlp", "lora_qkv", "moe_lora", "nf4", "norm_rope", "rms_norm"} <= set(found)
    for op in ("glu_silu", "lora_mlp", "lora_qkv", "nf4", "norm_rope", "rms_norm"):
        assert "rayft graph" in {row["impl"] for row in found[op]}
    for op, rows in found.items():
        assert any(row["impl"].startswith("rayft") for row in rows)
        assert all(float(row["ms"]) > 0 and float(row["limit_ms"]) > 0 for row in rows)
        bars = ElementTree.fromstring((tmp_path / f"{op}.svg").read_text()).findall("{http://www.w3.org/2000/svg}rect")
        assert len(bars) == len(rows)
    assert json.loads((tmp_path / "machine.json").read_text())["limits"]["tflops"] > 0
    assert (tmp_path / "table.md").read_text() == run.table(found)


def test_the_table_compares_what_is_called_in_the_same_way(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    rows = ["op,c,rayft graph,bfloat16,2.0000,1.0000,2.00,64.0", "op,c,rayft python,bfloat16,5.0000,1.0000,5.00,0.0"]
    rows += ["op,c,liger python,bfloat16,4.0000,1.0000,4.00,nan"]
    file.write_text("\n".join([common.HEADER, *rows]) + "\n")
    assert run.table(run.read(file)).splitlines() == [
        "| operation | way | limit, ms | rayft | liger |",
        "|---|---|---|---|---|",
        "| op, c | graph | 1 | 2 (2.00x), 64 MiB |  |",
        "| op, c | python | 1 | 5 (5.00x) | **4** (4.00x) |",
    ]


def test_without_a_sanitizer_or_a_gpu_the_script_says_so() -> None:
    environment = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([ROOT / "kernels/bench/sanitize.sh", "memcheck", sys.executable], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stderr
    assert done.stdout.startswith(("no compute-sanitizer: ", "no GPU: ")) and done.stdout.count("\n") == 1


@pytest.mark.parametrize("name", once.checks("cpu"))
def test_what_the_sanitizer_runs_holds(name: str) -> None:
    once.checks("cpu")[name]()
