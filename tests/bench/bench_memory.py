"""The memory plan against what a GPU allocates at most in a step, for two shapes and every setting that saves memory: one line a case.

    bench_memory.py [--compile] [--mixed] [--only WORD] [--tiny]

Weights are drawn on the device, rows are random tokens, a worker is this process. A case passes when plan and measurement are within 15%
and its gradient norm is that of its shape's first case within 2%; at last come batch.micro_rows auto and the error of a full card.
--compile runs the compiled cases, --mixed packs several documents in a row (compiled flex attention), --tiny only runs the code, on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rayft.config.schema import SftRun
from rayft.data.reader import Row, collate
from rayft.losses.supervised import NEED, next_token
from rayft.models import load
from rayft.observe.flops import shape_of
from rayft.optim.build import build_optimizer
from rayft.parallel.memory import estimate
from rayft.parallel.mesh import build_mesh
from rayft.train.build import build_model
from rayft.train.room import free_bytes, out_of_memory, with_micro_rows
from rayft.train.step import forward_backward, update
from rayft.types import Session

GIB = 2**30
BAND, NORM_BAND = 0.15, 0.02
SHAPES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "qwen3-0.6b": ("qwen3", 4096, 2, {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "max_position_embeddings": 40960,
    }),
    "llama-135m": ("llama", 2048, 4, {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    }),
}  # fmt: skip
"""Name -> model type, tokens in a row, rows in a micro-batch, sizes."""

TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
LORA, BF16, OFF = (
    {"adapter": {"type": "lora", "r": 16}},
    {"model": {"dtype": "bfloat16"}},
    {"lora": "off", "norm_rope": "off", "glu": "off"},
)
FULL, SELECTIVE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}
CASES: dict[str, dict[str, Any]] = {
    "float32 states": {},
    "float32 states, plain layers": {"kernels": OFF},
    "float32 states, two micro-batches": {"micro_batches": 2},
    "bfloat16 states": BF16,
    "lora": LORA,
    "lora, plain layers": LORA | {"kernels": OFF},
    "selective": {"parallel": SELECTIVE},
    "full": {"parallel": FULL},
    "lora, full": LORA | {"parallel": FULL},
    "activations offloaded": {"parallel": {"activation_offload": True}},
    "selective, activations offloaded": {"parallel": SELECTIVE | {"activation_offload": True}},
    "full, activations offloaded": {"parallel": FULL | {"activation_offload": True}},
    "full, state offloaded": {"parallel": FULL | {"cpu_offload": True}},
}
COMPILED: dict[str, dict[str, Any]] = {
    "compiled": {"parallel": {"compile": True}},
    "compiled, glu off": {"parallel": {"compile": True}, "kernels": OFF},
    "compiled, lora": LORA | {"parallel": {"compile": True}},
    "compiled, selective": {"parallel": SELECTIVE | {"compile": True}},
    "compiled, full": {"parallel": FULL | {"compile": True}},
    "compiled, full, activations offloaded": {"parallel": FULL | {"compile": True, "activation_offload": True}},
}


def main() -> None:
    """Run every case, print the table, exit 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("compile", "mixed", "tiny"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name holds this word")
    args = parser.parse_args()
    load._draw = _draw_here  # type: ignore[assignment]  # the real one draws on the CPU, which takes longer than all the steps
    device = "cpu" if args.tiny else "cuda:0"
    backend = "gloo" if args.tiny else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=600))
    print(f"torch {torch.__version__}, {'CPU' if args.tiny else torch.cuda.get_device_name()}")
    print(f"{'shape':11} {'case':36} {'plan':>7} {'peak':>7} {'ratio':>6} {'norm':>8} {'ms':>7}  GiB by part, highest in")
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(0, 1, 0, device, Path(scratch), lambda *_: None, 600.0)  # type: ignore[arg-type]
        for shape in SHAPES:
            failed += _shape(shape, COMPILED if args.compile else CASES, args, session)
        if not args.tiny and not args.compile:
            failed += _auto(session, args) + _full_card(session, args)
    print("FAIL: " + "; ".join(failed) if failed else "PASS")
    sys.stdout.flush()
    os._exit(1 if failed else 0)


def _shape(shape: str, cases: dict[str, dict[str, Any]], args: argparse.Namespace, session: Session) -> list[str]:
    """Run the cases of one shape; what failed."""
    failed, norms, peaks = [], {}, {}
    for name in (name for name in cases if args.only in name):
        try:
            ratio, norm, peaks[name] = _case(shape, name, cases[name], args, session)
        except Exception as problem:  # a bench goes on
            print(f"{shape:11} {name:36} {type(problem).__name__}: {str(problem)[:300]}")
            failed.append(f"{shape} {name}: {type(problem).__name__}")
            continue
        family = "lora" if "lora" in name else "full"
        if "two micro" not in name and abs(norm / norms.setdefault(family, norm) - 1) > NORM_BAND:
            failed.append(f"{shape} {name}: gradient norm {norm:.4f} instead of {norms[family]:.4f}")
        if not args.tiny and abs(ratio - 1) > BAND:
            failed.append(f"{shape} {name}: plan / peak {ratio:.2f}")
    order = [
        name for name in ("float32 states", "selective", "full", "full, activations offloaded", "full, state offloaded") if name in peaks
    ]
    if not args.tiny and [peaks[name] for name in order] != sorted((peaks[name] for name in order), reverse=True):
        failed.append(f"{shape}: memory does not fall along {', '.join(order)}")
    return failed


def _run(shape: str, case: dict[str, Any], args: argparse.Namespace, folder: Path, **batch: Any) -> SftRun:
    """The configuration, without the rules: an adapter on drawn weights is meant here."""
    from transformers import AutoConfig

    model_type, seq_len, micro_rows, sizes = SHAPES[shape]
    AutoConfig.for_model(model_type, **(sizes | (TINY if args.tiny else {}))).save_pretrained(folder)
    return SftRun.model_validate(
        {
            "method": "sft",
            "run": {"name": "memory"},
            "model": {"path": str(folder), "init": "random"} | case.get("model", {}),
            "data": {"train": {"a": {"path": "none"}}, "seq_len": 128 if args.tiny else seq_len},
            "batch": {"rows": micro_rows * case.get("micro_batches", 1), "micro_rows": micro_rows} | batch,
            **{section: case[section] for section in ("parallel", "adapter", "kernels") if section in case},
        }
    )


def _case(shape: str, name: str, case: dict[str, Any], args: argparse.Namespace, session: Session) -> tuple[float, float, float]:
    """(plan / peak, gradient norm of the first step, peak in bytes), after printing the line."""
    cfg = _run(shape, case, args, Path(session.run_dir))
    before = 0 if args.tiny else torch.cuda.memory_allocated()
    norm, peak, seconds = _steps(cfg, args, session, 3)
    gc.collect()
    config = load.read_config(cfg.model)
    plan = estimate(shape_of(config), cfg, session.device.split(":")[0])  # type: ignore[arg-type]
    peak = peak - before if peak else float("nan")
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in plan.table())
    figures = f"{plan.total / GIB:7.2f} {peak / GIB:7.2f} {plan.total / peak:6.2f} {norm:8.3f} {1e3 * seconds:7.0f}"
    left = f"; {before / GIB:.2f} left by earlier cases" if before > GIB / 8 else ""
    print(f"{shape:11} {name:36} {figures}  {parts}; {plan.moment}{left}", flush=True)
    return plan.total / peak, norm, peak


def _steps(cfg: SftRun, args: argparse.Namespace, session: Session, count: int) -> tuple[float, float, float]:
    """(gradient norm of the first step, peak of the last, its seconds)."""
    if not args.tiny:
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    mesh = build_mesh(session.device.split(":")[0], 1)
    model = build_model(cfg, session, mesh)
    optimizer = build_optimizer(load.named_trainable(model), cfg.optim, fused=True)
    micro_rows, norm, start = int(cfg.batch.micro_rows), 0.0, 0.0
    for _ in range(count):
        batches = [_batch(cfg, micro_rows, args.mixed).to(session.device) for _ in range(-(-cfg.batch.rows // micro_rows))]
        if not args.tiny:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        forward_backward([model], batches, next_token, NEED, mesh)
        total = update([model], optimizer, 1.0)
        norm = norm or total.item()
        del batches
        if not args.tiny:
            torch.cuda.synchronize()
    return norm, 0.0 if args.tiny else torch.cuda.max_memory_allocated(), time.perf_counter() - start


def _batch(cfg: SftRun, rows: int, mixed: bool) -> Any:
    """Random tokens, every one trained: one document a row, or three."""
    rng, length = np.random.default_rng(0), cfg.data.seq_len
    lengths = [length // 2, length // 3, length - length // 2 - length // 3] if mixed else [length]
    row = [
        Row(i, rng.integers(5, 500, length).astype(np.int32), np.ones(length, np.float32), np.array(lengths, np.int32),
            np.zeros(len(lengths), np.int32), length)
        for i in range(rows)
    ]  # fmt: skip
    return collate(row, list(range(rows)), capacity=4 * rows, step=0)


def _draw_here(module: Any, base: Any, seed: int) -> None:
    """The same values wherever a parameter lives, drawn on the GPU when there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    for name in sorted(base):
        local = base[name].to_local() if hasattr(base[name], "to_local") else base[name]
        with torch.no_grad():
            local.copy_(torch.randn(local.shape, generator=generator, device=device) * 0.02 if local.ndim > 1 else torch.ones_like(local))


def _auto(session: Session, args: argparse.Namespace) -> list[str]:
    """batch.micro_rows auto takes a step within the free memory."""
    torch.cuda.empty_cache()
    cfg = _run("llama-135m", {}, args, Path(session.run_dir), rows=512, micro_rows="auto")
    room = free_bytes(session.device)
    try:
        chosen = with_micro_rows(cfg, session)
        _, peak, seconds = _steps(chosen, args, session, 2)
    except torch.OutOfMemoryError as problem:
        return [f"micro_rows auto: {problem}"]
    rows = chosen.batch.micro_rows
    print(f"micro_rows auto: {rows} of 512 rows of {cfg.data.seq_len}, peak {peak / GIB:.1f} of {room / GIB:.1f} GiB free, {seconds:.1f} s")
    return []


def _full_card(session: Session, args: argparse.Namespace) -> list[str]:
    """The sentence of a card that is too small, here by a limit on the process."""
    gc.collect()
    torch.cuda.empty_cache()
    cfg = _run("qwen3-0.6b", {}, args, Path(session.run_dir), rows=16, micro_rows=16)
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        _steps(cfg, args, session, 1)
    except torch.OutOfMemoryError as problem:
        print(f"a full card: {out_of_memory(cfg, session, problem)}")
        return []
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return ["a full card: nothing was raised"]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
