"""Two small runs whose losses are on record, and the command that records them on a machine like this one:

    cd tests && ../.venv/bin/python -m golden.record

Run it only when a change of the losses is meant, and say in the change why they move.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from faults.job import LOSS, values, write_site

FOLDER = Path(__file__).with_name("losses")
STEPS = 12
FULL: dict[str, dict[str, Any]] = {
    "run": {"name": "full", "seed": 7, "max_steps": STEPS},
    "parallel": {"activation_checkpointing": "full"},
    "export": {"dtype": "float32"},
}
LORA: dict[str, dict[str, Any]] = {
    "run": {"name": "lora", "seed": 7, "max_steps": STEPS},
    "model": {"path": "runs/full/export", "init": "pretrained"},
    "adapter": {"type": "lora", "r": 4, "dropout": 0.1},
    "batch": {"rows": 4, "micro_rows": 2},
}
RUNS = {"full": FULL, "lora": LORA}
FIXED = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE", "HF_HUB_OFFLINE": "1"}
"""One thread, and the matrix products that MKL computes alike on every x86 processor; torch's own kernels differ by CPU capability."""


def losses(folder: Path) -> dict[str, list[float]]:
    """Run -> loss of each step, below `folder`; each run is a process, and the second starts from the first one's export."""
    found = {}
    for name, sections in RUNS.items():
        write_site(folder, **sections)
        (folder / "run.yaml").rename(folder / f"{name}.yaml")
        command = [sys.executable, "-m", "rayft", "train", f"{name}.yaml", "--local"]
        subprocess.run(command, cwd=folder, env=os.environ | FIXED, check=True)
        found[name] = list(values(folder / "runs" / name, LOSS).values())
    return found


def this_machine() -> Path:
    """Where the losses of this version of torch on this kind of CPU are on record, if they are."""
    version = torch.__version__.partition("+")[0]
    return FOLDER / f"torch-{version}-{torch.backends.cpu.get_cpu_capability()}.json"


def main() -> None:
    """Record the losses of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        found = losses(Path(folder))
    FOLDER.mkdir(exist_ok=True)
    this_machine().write_text(json.dumps(found, indent=1) + "\n")
    print(f"recorded in {this_machine()}")


if __name__ == "__main__":
    main()
