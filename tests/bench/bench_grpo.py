"""Time of a GRPO step, trainer and vLLM on one card or on cards of their own: one JSON line.

    bench_grpo.py [--prompts 32] [--group 8] [--tokens 512] [--steps 8] [--staleness 0] [--separate] [--eager] [--tiny]
                  [--micro-tokens 16384] [--kv-gib 22] [--folder KEPT]

A body of Qwen3-0.6B with the vocabulary of SmolLM2 and drawn weights, prompts of 150 random words, answers of `tokens` each, but for
the one in a hundred that draws the end token. TOKENIZER is a folder with a tokenizer of at most 49,152 tokens; without it, one is fitted to
the words. A step lasts from the end of an update to the end of the next, so it holds all of generation, rewards, training and push. Medians
leave the first two steps out. --tiny runs the whole path with small shapes and the local engine on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rayft.recipes.grpo import train

from rayft.actors.online import open_flow
from rayft.actors.run import open_run
from rayft.actors.trainer_group import fit
from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.observe.log import read

WARM_UP = 2
SHAPES: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = SHAPES | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
USER_CODE = """
import time

def distinct(prompt, completion, row):
    return float(len(set(completion.split())) % 7)

SHOWN = ("perf/step_s", "perf/batch_wait_s", "perf/push_s", "perf/update_s", "perf/tokens_per_s", "perf/recompiles", "perf/peak_memory_gib",
         "train/num_tokens", "train/rollout_logprob_difference")

def clock(event, state):
    if event == "logged" and state["rank"] == 0:  # a run that is cut off has said this much
        values = ", ".join(f"{name.split('/')[1]} {state['values'].get(name, 0.0):.4g}" for name in SHOWN)
        print(f"{time.strftime('%X')} step {state['step']}: {values}", flush=True)
    if event == "step_end" and state["rank"] == 0:
        with (state["run_dir"] / "clock.txt").open("a") as file:
            file.write(f"{time.time()}\\n")
"""


def write_inputs(folder: Path, args: argparse.Namespace) -> None:
    """Model, tokenizer, prompts and the functions of the run."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from rayft.models.tiny import write_tiny_model

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 8))) for _ in range(500)]
    if source := os.environ.get("TOKENIZER"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        words = [word for word in tokenizer.get_vocab() if word.isalpha() and 3 < len(word) < 9]
        tokenizer.save_pretrained(folder / "model")
    else:
        write_tiny_model(folder / "model", words, vocab_size=500)
    config = Qwen3Config(**(TINY if args.tiny else SHAPES), architectures=["Qwen3ForCausalLM"], dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device("cpu" if args.tiny else "cuda"):
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    if not args.tiny:
        torch.cuda.empty_cache()  # the card is for the engine and the trainer
    count = args.prompts * (args.steps + args.staleness + 1)
    rows = [{"text": " ".join(rng.choices(words, k=20 if args.tiny else 150))} for _ in range(count)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "user.py").write_text(USER_CODE)


def configuration(args: argparse.Namespace, folder: Path) -> GrpoRun:
    """The run."""
    return load(
        [],
        [
            "method=grpo", "run.name=bench", f"run.dir={folder / 'runs'}", f"run.max_steps={args.steps}", f"model.path={folder / 'model'}",
            f"run.callbacks=[{folder / 'user.py'}:clock]", f"reward.functions.distinct.function={folder / 'user.py'}:distinct",
            f"data.train.words.path={folder / 'prompts.jsonl'}", "data.train.words.format=text",
            f"rollout.engine={'local' if args.tiny else 'vllm'}",
            f"rollout.prompts_per_step={args.prompts}", f"rollout.group_size={args.group}",
            f"rollout.max_prompt_tokens={256 if args.tiny else 480}", f"rollout.max_tokens={args.tokens}",
            f"rollout.eager={str(args.eager).lower()}", f"rollout.max_staleness={args.staleness}", f"rollout.kv_cache_gib={args.kv_gib}",
            f"placement.mode={'separate' if args.separate or args.tiny else 'colocated'}", f"batch.micro_tokens={args.micro_tokens}",
            "optim.lr=1e-6", f"parallel.compile={str(not args.tiny).lower()}", "export.at_end=false",
        ],
    )  # fmt: skip


def main() -> None:
    """Run and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompts", 32), ("group", 8), ("tokens", 512), ("steps", 8), ("staleness", 0), ("micro-tokens", 16384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kv-gib", type=float, default=22.0)
    parser.add_argument("--folder", help="where the run's inputs and directory are kept")
    for name in ("separate", "eager", "tiny"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.prompts, args.group, args.tokens, args.steps, args.micro_tokens = 4, 2, 16, 5, 512
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(folder, args)
        print(f"{time.strftime('%X')} inputs written", flush=True)
        with open_run(configuration(args, folder), False) as run, open_flow(run) as launch:
            print(f"{time.strftime('%X')} engines and controller made", flush=True)
            fit(train, launch)
            print(f"{time.strftime('%X')} trained", flush=True)
        ends = [float(line) for line in (run.run_dir / "clock.txt").read_text().split()]
        records = [record for record in read(run.run_dir / "metrics.jsonl") if record.get("step", 0) > WARM_UP]
    lasted = [later - earlier for earlier, later in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]
    by_name: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, float | int):
                by_name.setdefault(name, []).append(value)
    middle = {
        name: round(statistics.median(by_name[name]), 4) for name in sorted(by_name) if name.startswith(("perf/", "rollout/", "staleness/"))
    }
    case = {name: value for name, value in vars(args).items() if name != "folder"}
    step = statistics.median(lasted)
    answers = args.prompts * args.group
    gap = statistics.median(by_name["train/rollout_logprob_difference"])
    print(json.dumps(middle | {"rollout_logprob_difference": gap}))
    print(json.dumps({"bench": "rayft-grpo", **case, "step_s": round(step, 2), "all": [round(x, 2) for x in lasted],
                      "completion_tok_s": round(answers * statistics.median(by_name["rollout/length"]) / step)}))  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
