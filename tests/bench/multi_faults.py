"""kill -9 of the engine, and in another run of the trainer's worker, with each on a GPU of its own: one JSON line a case.

    NCCL_NVLS_ENABLE=0 multi_faults.py [--tiny]

bench_grpo.py with separate placement; the process is killed at step 4 of 10. A case is right when the command ends with 0, every step was
logged once in the trajectory that counts, and, for the engine, one was started anew. Exit code 1 otherwise. --tiny: on CPU processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rayft.observe.log import read

STEPS, KILL_AT, DEADLINE_S = 10, 4, 500
VICTIMS = {"engine": "ray::EngineActor", "trainer": "ray::RayTrainWorker"}


def processes(session: int, title: str) -> list[int]:
    """Living processes of a session whose title starts so."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name = stat.with_name("cmdline").read_text(errors="replace")
            state, _, _, own = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(own) == session and state not in "ZX" and name.startswith(title):
            found.append(int(stat.parent.name))
    return found


def case(victim: str, tiny: bool) -> bool:
    """Run, kill, wait, judge."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, str(Path(__file__).with_name("bench_grpo.py")), "--separate", "--folder", scratch, "--steps", str(STEPS)]
        output = Path(scratch) / "output.log"
        with output.open("wb") as stream:
            run = subprocess.Popen([*command, *["--tiny"] * tiny], stdout=stream, stderr=stream, start_new_session=True)
        clock, killed, began = Path(scratch) / "runs/bench/clock.txt", 0.0, time.monotonic()
        while run.poll() is None and time.monotonic() - began < DEADLINE_S:
            if not killed and clock.exists() and len(clock.read_text().split()) >= KILL_AT:
                for pid in processes(run.pid, VICTIMS[victim])[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed = time.monotonic() - began
            time.sleep(0.02)
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        steps = sorted({record["step"] for record in read(Path(scratch) / "runs/bench/metrics.jsonl") if "train/loss" in record})
        right = run.wait() == 0 and bool(killed) and steps == list(range(1, len(steps) + 1)) and len(steps) == (5 if tiny else STEPS)
        tail = [] if right else output.read_text(errors="replace").splitlines()[-5:]
        seconds = round(time.monotonic() - began, 1)
        print(json.dumps({"bench": "multi-faults", "killed": victim, "at_s": round(killed, 1), "seconds": seconds, "steps": len(steps),
                          "exit": run.returncode, "right": right, "tail": tail}), flush=True)  # fmt: skip
        return right


def main() -> int:
    """Exit code."""
    import torch

    tiny = "--tiny" in sys.argv or torch.cuda.device_count() < 2
    return int(not all([case(victim, tiny) for victim in VICTIMS]))


if __name__ == "__main__":
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    raise SystemExit(main())
