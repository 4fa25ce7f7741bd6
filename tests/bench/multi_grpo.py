"""GRPO with the trainer on one GPU and the engine on another: step times, the push over NCCL, agreement of log-probabilities.

    NCCL_NVLS_ENABLE=0 multi_grpo.py [--tiny]

bench_grpo.py with separate placement, synchronous and with staleness 1; each prints its two lines. Exit code 1 when a run fails or
engine and trainer differ by more than BAND. --tiny: the same on CPU processes, with the local engine and gloo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BAND = 0.03
"""Largest mean difference of a token's log-probability, in nats: vLLM's kernels against rayft's, both in bfloat16."""


def main() -> int:
    """Exit code."""
    import torch

    tiny = ["--tiny"] if "--tiny" in sys.argv or torch.cuda.device_count() < 2 else []
    script, failed = str(Path(__file__).with_name("bench_grpo.py")), False
    for staleness in (0, 1):
        command = [sys.executable, script, "--separate", "--staleness", str(staleness), *tiny]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        if len(found) < 2:
            print(json.dumps({"bench": "multi-grpo", "staleness": staleness, "failed": lines[-3:]}), flush=True)
            failed = True
            continue
        gap = found[0]["rollout_logprob_difference"]
        rate = round(found[0]["perf/push_gib"] * 2**30 / 1e9 / found[0]["perf/push_s"], 1)
        failed |= gap > BAND or found[0]["staleness/max"] > staleness
        print(json.dumps({"bench": "multi-grpo", **found[1], **found[0], "push_gb_s": rate}), flush=True)
    return int(failed)


if __name__ == "__main__":
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    raise SystemExit(main())
