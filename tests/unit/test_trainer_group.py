"""What leaves the driver: a worker function of a user's own recipe file runs where that file cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ray.cloudpickle

from rayft.actors import trainer_group
from rayft.config.functions import load_function, resolve

RECIPE = """
FACTOR = 2

def helper(x):
    return FACTOR * x

def train(launch):
    return helper(launch)
"""


def test_a_recipe_s_worker_travels_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RECIPE)
    worker = load_function(resolve(f"{tmp_path / 'mine.py'}:train"))
    trainer_group._ship_code(worker)
    (tmp_path / "worker.pkl").write_bytes(ray.cloudpickle.dumps(worker))
    (tmp_path / "mine.py").unlink()
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'worker.pkl')!r}, 'rb'))(21))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "42\n", done.stderr
