"""Training throughput through Ray Train, with full rows of random tokens: one JSON line per case.

    bench_sft.py [--adapter lora] [--mixed] [--compile] [--seq 4096] [--rows 4] [--steps 30] [--states float32|bfloat16] [--bare] [--tiny]
                 [--workers 1] [--replicas 1] [--kernels off] [--callback ./profile.py:on]

Shapes are those of Qwen3-0.6B, weights are drawn. --mixed packs documents of 512 to 4,096 tokens; --bare runs the same loop in
this process, without Ray; --kernels off leaves the families' own layers in place of every fused one (the loss has only its own way);
--tiny runs the whole path with small shapes on a CPU. The figures are medians after 8 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rayft.recipes.sft import train

from rayft.actors.run import open_run
from rayft.actors.trainer_group import fit
from rayft.config.load import load
from rayft.config.schema import Kernels, SftRun
from rayft.data import shards
from rayft.data.formats import Document
from rayft.observe.log import read

WARM_UP = 8
SHAPES: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "max_position_embeddings": 40960,
}  # fmt: skip
TINY = SHAPES | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip

KERNELS = tuple(name for name, field in Kernels.model_fields.items() if "off" in get_args(field.annotation))
"""The options that can be off."""


def write_model(folder: Path, sizes: dict[str, Any], *, weights: bool) -> None:
    """A configuration and a tokenizer, and for adapters, which need a base, random weights in bfloat16."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rayft.models.tiny import write_tiny_model

    write_tiny_model(folder, ["a few words to fit the tokenizer to"], vocab_size=300)
    config = Qwen3Config(**sizes, architectures=["Qwen3ForCausalLM"])
    config.save_pretrained(folder)
    if weights:
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_rows(folder: Path, count: int, seq_len: int, vocab: int, mixed: bool) -> None:
    """Packed rows of random tokens, every one trained: one document a row, or several of 512 to 4,096 tokens."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        cuts: list[int] = []
        while mixed and sum(cuts) < seq_len - 512:
            cuts.append(int(min(rng.integers(512, 4097), seq_len - sum(cuts))))
        lengths = [*cuts, seq_len - sum(cuts)] if seq_len > sum(cuts) else cuts
        rows.append([Document(rng.integers(5, vocab, n).astype(np.int32), np.ones(n, np.float32)) for n in lengths])
    folder.mkdir(parents=True)
    shard = shards.write_shard(folder / "000000-00000.parquet", rows, source_id=0, seq_len=seq_len, pad_id=0)
    totals = {"rows": shard.rows, "documents": shard.documents, "tokens": shard.tokens, "trained_tokens": shard.trained_tokens,
              "max_documents": shard.max_documents, "rows_read": count}  # fmt: skip
    shards.write_manifest(folder, shards.Manifest(shards.DATA_VERSION, "bench", "train", seq_len, "", None, {}, totals, {}, (shard,)))


def configuration(args: argparse.Namespace, folder: Path) -> SftRun:
    """The run of one case."""
    return load(
        [],
        [
            "method=sft", "run.name=bench", f"run.dir={folder / 'runs'}", f"run.max_steps={args.steps}", f"model.path={folder / 'model'}",
            f"model.init={'pretrained' if args.adapter == 'lora' else 'random'}",
            f"model.dtype={args.states}", "data.train.none.path=none", f"data.seq_len={args.seq}",
            f"batch.rows={args.rows * args.workers}", f"batch.micro_rows={args.rows}", "optim.lr=1e-5", "export.at_end=false",
            f"parallel.workers={args.workers}", f"parallel.replicas={args.replicas}", f"parallel.compile={str(args.compile).lower()}",
            f"parallel.activation_checkpointing={'full' if args.checkpointing else 'none'}",
            *(f"kernels.{name}=off" for name in KERNELS if args.kernels == "off"),
            *([f"run.callbacks=[{args.callback}]"] if args.callback else []),
            *(["adapter.type=lora", "adapter.r=16"] if args.adapter == "lora" else []),
        ],
    )  # fmt: skip


def write_inputs(args: argparse.Namespace, folder: Path) -> None:
    """Model and rows of a case."""
    sizes = TINY if args.tiny else SHAPES
    write_model(folder / "model", sizes, weights=args.adapter == "lora")
    write_rows(folder / "shards", args.rows * args.workers * args.steps, args.seq, sizes["vocab_size"], args.mixed)


def records_of(cfg: SftRun, shards_folder: Path, *, local: bool = False) -> list[dict[str, Any]]:
    """Run, and the records of its steps."""
    with open_run(cfg, local=local) as run:
        fit(train, run.launch(shards_folder, None))
    return [record for record in read(run.run_dir / "metrics.jsonl") if "train/loss" in record]


def figures_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians after the warm-up."""
    records = records[WARM_UP:]
    middle = {name: statistics.median(record[name] for record in records if name in record) for name in records[0] if "/" in name}
    return {
        "tok_s": round(middle["perf/tokens_per_s"]), "step_ms": round(1e3 * middle["perf/step_s"], 1), "mfu": middle.get("perf/mfu"),
        "peak_gib": round(max(record["perf/peak_memory_gib"] for record in records), 2),
        "recompiled": records[-1]["perf/recompiles"] - records[0]["perf/recompiles"],
    }  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """A case; with small shapes where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seq", 4096), ("rows", 4), ("steps", 30), ("workers", 1), ("replicas", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("mixed", "compile", "checkpointing", "bare", "tiny"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--adapter", choices=("none", "lora"), default="none")
    parser.add_argument("--states", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--kernels", choices=("auto", "off"), default="auto")
    parser.add_argument("--callback", help="a user function called on the trainer's events, such as a profiler's")
    args = parser.parse_args(arguments)
    if args.tiny or not _has_gpu():
        args.tiny, args.seq, args.steps = True, min(args.seq, 1024), min(args.steps, 12)
    return args


def main() -> None:
    """Run one case and print its line."""
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(args, folder)
        records = records_of(configuration(args, folder), folder / "shards", local=args.bare)
    case = {name: value for name, value in vars(args).items() if name not in ("steps", "callback")}
    print(json.dumps({"bench": "rayft-sft", **case, **figures_of(records)}))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
