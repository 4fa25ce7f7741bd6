"""Fine-tuning on several GPUs of one host, through Ray Train: one JSON line a case.

    NCCL_NVLS_ENABLE=0 multi_sft.py [--tiny]

Full and LoRA at Qwen3-0.6B shapes on 1, 2, 4 and 8 GPUs, as many as there are, the same rows for each GPU: tokens/s, memory, and the share
of linear scaling. Then, with the same 8 rows a step on one GPU and on two: losses, plain and HSDP, and a run that is stopped on two
and goes on on one. Exit code 1 when losses differ by more than BAND. --tiny runs everything on two CPU processes over gloo.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import bench_sft

from rayft.errors import Stopped

BAND = 2e-2
"""Largest relative difference of a step's loss: products in bfloat16, sums over ranks in another order."""
ROWS, STEPS, STOP_AT = 8, 16, 6
HOOK = """
def stop(event, state):
    if event == "step_end" and state["rank"] == 0 and state["step"] == {step}:
        (state["run_dir"] / "STOP_NOW").touch()
"""


def scaling(tiny: bool, gpus: int) -> None:
    """Throughput on growing numbers of GPUs."""
    for adapter in ("none", "lora"):
        alone = 0.0
        for workers in (n for n in (1, 2, 4, 8) if n <= gpus):
            args = bench_sft.parse(["--adapter", adapter, "--workers", str(workers), *(["--tiny"] if tiny else ["--compile"])])
            with tempfile.TemporaryDirectory() as scratch:
                bench_sft.write_inputs(args, Path(scratch))
                records = bench_sft.records_of(bench_sft.configuration(args, Path(scratch)), Path(scratch) / "shards")
            found = bench_sft.figures_of(records)
            alone = alone or found["tok_s"]
            report("scaling", adapter=adapter, gpus=workers, scaling=round(workers * found["tok_s"] / alone, 3), **found)


def same_rows(tiny: bool) -> bool:
    """Whether two GPUs, HSDP and a resume on one follow the losses of one GPU."""
    cases: dict[str, list[tuple[int, int, str]]] = {
        "one": [(1, 1, "")], "two": [(2, 1, "")], "two replicas": [(2, 2, "")],
        "stopped on two, resumed on one": [(2, 1, "stop"), (1, 1, "")],
    }  # fmt: skip
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shared = ["--rows", str(ROWS), "--steps", str(STEPS), "--seq", "2048", *(["--tiny"] if tiny else [])]
        bench_sft.write_inputs(bench_sft.parse(shared), folder)
        (folder / "hook.py").write_text(HOOK.format(step=STOP_AT))
        for name, starts in cases.items():
            for workers, replicas, hook in starts:
                args = bench_sft.parse([*shared, "--workers", str(workers), "--replicas", str(replicas)])
                args.rows, args.callback = ROWS // workers, f"{folder / 'hook.py'}:{hook}" if hook else None
                cfg = bench_sft.configuration(args, folder)
                cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update={"name": name.replace(", ", "-").replace(" ", "-")})})
                losses = {}
                with suppress(Stopped):
                    losses = {record["step"]: record["train/loss"] for record in bench_sft.records_of(cfg, folder / "shards")}
            found[name] = [losses[step] for step in sorted(losses)]
    good = True
    for name, curve in found.items():
        worst = max(abs(a / b - 1) for a, b in zip(curve, found["one"], strict=True))
        good &= worst <= BAND
        report("same rows", case=name, steps=len(curve), first=curve[0], last=curve[-1], difference=worst, within=worst <= BAND)
    return good


def report(bench: str, **values: Any) -> None:
    """Print a line."""
    print(json.dumps({"bench": f"multi-sft {bench}", **values}), flush=True)


def main() -> int:
    """Exit code."""
    import torch

    tiny = "--tiny" in sys.argv or torch.cuda.device_count() < 2
    scaling(tiny, 2 if tiny else torch.cuda.device_count())
    return 0 if same_rows(tiny) else 1


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    raise SystemExit(main())
