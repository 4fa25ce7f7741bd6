"""GRPO on SmolLM2-135M-Instruct: held-out reward before, training, held-out reward after, with 95% intervals, as JSON lines and a plot.

    smollm2_grpo.py chain_sum|gsm8k [--model FOLDER] [--cpu] [--slice SECONDS] [--report] [key=value ...]

What runs is recipes/configs/smollm2/135m_<task>_grpo.yaml with the overrides. Every answer is noted beside its question, so that answers to
held-out questions that training asked too can be told apart. --cpu trains and samples on the CPU. --slice stops the run in order after
that time, with exit code 143; the same command goes on. FOLDER holds the model when the hub is out of reach. Without a task, nothing runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs" / "smollm2"
REWARDS = {"chain_sum": ("sum", "reasoning_gym"), "gsm8k": ("number", "gsm8k")}
"""Task -> (name of the reward in its configuration, the ready reward)."""
ON_CPU = ("parallel.device=cpu", "placement.mode=separate", "rollout.kv_cache_gib=0.5")
STOPPED = 143
Z95 = 1.959964
SHOWN = 4
Key = tuple[Any, Any, str]


def noted(prompt: str, completion: str, row: Mapping[str, Any], ready: str, file: str, **arguments: Any) -> float:
    """A ready reward that appends what was asked, answered and given to a file."""
    value: float = importlib.import_module(f"rayft.rewards.{ready}").reward(prompt, completion, row, **arguments)
    with Path(file).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"key": key_of(row), "wanted": row["answer"], "answer": completion, "reward": value}) + "\n")
    return value


def key_of(row: Mapping[str, Any]) -> Key:
    """What tells a row from others: reasoning-gym's rows are a seed and a place, those of a file a question."""
    return row.get("seed"), row.get("place"), row["question"]


def wilson(right: float, count: int) -> tuple[float, float]:
    """95% interval of a fraction."""
    share, weight = right / count, Z95**2 / count
    middle, half = (share + weight / 2) / (1 + weight), Z95 / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return round(middle - half, 4), round(middle + half, 4)


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean reward, and the fraction of answers that got all of it, with its interval."""
    count, right = len(records), sum(record["reward"] >= 1 for record in records)
    return {
        "count": count,
        "reward": round(sum(record["reward"] for record in records) / count, 4),
        "right": round(right / count, 4),
        "interval": wilson(right, count),
    }


def evaluations(file: Path, held_out: set[Key]) -> dict[str, dict[Key, Mapping[str, Any]]]:
    """(before|after)_(sampled|greedy) -> key -> record, as far as there are. A sampled answer is scored before the greedy one."""
    lines: dict[Key, list[Mapping[str, Any]]] = {}
    for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        key: Key = tuple(record["key"])
        if key in held_out:
            lines.setdefault(key, []).append(record)
    places = {"before_sampled": (0, 2), "before_greedy": (1, 2), "after_sampled": (-2, 4), "after_greedy": (-1, 4)}
    return {name: {key: found[place] for key, found in lines.items() if len(found) >= least} for name, (place, least) in places.items()}


def report(cfg: Any, file: Path) -> None:
    """Print what the run's files say, and write the plot."""
    from rayft.data.prompts import PromptSet, prepare_prompts
    from rayft.observe.log import read
    from rayft.observe.plot import text_plot

    run_dir, asked = Path(cfg.run.dir) / cfg.run.name, cfg.run.max_steps * cfg.rollout.prompts_per_step
    train = PromptSet(prepare_prompts(cfg, "train"), seed=cfg.run.seed, shuffle=cfg.data.shuffle)
    held = PromptSet(prepare_prompts(cfg, "eval"), seed=0, shuffle=False)
    trained = {train.prompt(ordinal).tokens for ordinal in range(asked)}
    prompts = {key_of(prompt.row): prompt.tokens for prompt in map(held.prompt, range(len(held)))}
    new = {key for key, tokens in prompts.items() if tokens not in trained}
    print(json.dumps({"held_out": len(prompts), "of_these_not_in_training": len(new)}))
    for name, records in evaluations(file, set(prompts)).items():
        if not records:
            continue
        print(json.dumps({"when": name, **summary(list(records.values()))}))
        if fresh := [record for key, record in records.items() if key in new]:
            print(json.dumps({"when": name, "not_in_training": True, **summary(fresh)}))
        for record in list(records.values())[:SHOWN] if name.endswith("greedy") else []:
            print(json.dumps({"when": name, "question": record["key"][2], "wanted": record["wanted"], "answer": record["answer"]}))
    metrics = read(run_dir / "metrics.jsonl")
    curve = [(record["step"], record["reward/mean"]) for record in metrics if "reward/mean" in record]
    print(json.dumps({"curve": [[int(step), round(value, 3)] for step, value in curve]}))
    for name in ("perf/step_s", "perf/batch_wait_s", "perf/update_s", "perf/push_s", "train/rollout_logprob_difference", "rollout/length"):
        values = sorted(record[name] for record in metrics if name in record)
        print(json.dumps({"metric": name, "median": round(values[len(values) // 2], 4), "steps": len(values)}))
    plot = text_plot({"reward/mean": curve})
    (run_dir / "reward.txt").write_text(plot + "\n", encoding="utf-8")
    print(plot)


def main() -> int:
    """Exit code: the run's, STOPPED when the slice was over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=REWARDS)
    parser.add_argument("--model")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--slice", type=float)
    parser.add_argument("--report", action="store_true", help="only say what the files of the run say")
    args, overrides = parser.parse_known_args()
    if args.task is None:
        print("smollm2_grpo.py: name a task, chain_sum or gsm8k")
        return 0
    from rayft.config.load import load

    config, (name, ready) = CONFIGS / f"135m_{args.task}_grpo.yaml", REWARDS[args.task]
    overrides = [*(ON_CPU if args.cpu else ()), *([f"model.path={args.model}"] if args.model else []), *overrides]
    cfg = load([config], overrides)
    folder = Path(cfg.run.dir).resolve()
    file = folder / f"{cfg.run.name}-answers.jsonl"
    if not args.report:
        folder.mkdir(parents=True, exist_ok=True)
        field = f"reward.functions.{name}"
        given = [f"{field}.function={Path(__file__).resolve()}:noted", f"{field}.arguments.ready={ready}", f"{field}.arguments.file={file}"]
        with subprocess.Popen([sys.executable, "-m", "rayft", "train", str(config), *overrides, *given]) as run:
            try:
                code = run.wait(args.slice)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGTERM)
                code = run.wait()
        if code:
            return code
    report(cfg, file)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())
