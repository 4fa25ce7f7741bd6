"""A vLLM engine and a trainer on one GPU: start, log-probabilities, pushes by CUDA IPC, verification, a push in mid-generation.

    python tests/bench/gpu_engine.py [--layers 28] [--kv-gib 4]

Prints one line per check, PASS or FAIL, with seconds; exits 1 when one failed. Needs a CUDA device and vLLM, no Ray and no network:
the model is a random one of Qwen3-0.6B's shape with an odd vocabulary, so that vLLM pads it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

PROMPT = tuple(range(100, 164))
MEAN_GAP = 0.03
"""Mean difference of log-probabilities, vLLM's kernels against transformers', both in bfloat16."""
OTHER_GAP = 0.3
"""Least mean difference to another model's, so that a stale weight shows."""


def write_model(folder: Path, layers: int) -> Any:
    """The trainer's model, on the GPU, and its folder."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=151900, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model.requires_grad_(False).eval()


def move(model: Any, seed: int) -> None:
    """Another policy: half of each matrix' variance is drawn anew, so weights stay as large as they are."""
    import torch

    generator = torch.Generator(device="cuda").manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, device="cuda", dtype=parameter.dtype, generator=generator)
        parameter.mul_(0.7).add_(noise * 0.014) if parameter.ndim > 1 else parameter.add_(noise * 0.02)


def mean_gap(model: Any, group: Any, span: slice = slice(None)) -> float:
    """Mean difference of log-probabilities between engine and trainer over all tokens of the span."""
    import torch

    gaps = []
    for trajectory in group.trajectories:
        ids = torch.tensor([[*PROMPT, *trajectory.tokens]], device="cuda")
        logits = model(ids, use_cache=False).logits[0, len(PROMPT) - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(trajectory.tokens, device="cuda")[:, None])[:, 0].cpu()
        gaps.append((chosen - torch.tensor(trajectory.logprobs)).abs()[span])
    return float(torch.cat(gaps).mean())


class Bench:
    """The engine, the trainer's model, and what was found."""

    def __init__(self, folder: Path, layers: int, kv_gib: float) -> None:
        from rayft.rollout.engine import EngineOptions, EngineThread

        self.folder, self.failed, self.version = folder, 0, 0
        began = time.monotonic()
        self.model = write_model(folder / "model", layers)
        print(f"     model written in {time.monotonic() - began:.1f} s", flush=True)
        began = time.monotonic()
        cache = int(kv_gib * 2**30)
        options = EngineOptions(folder / "model", context=2048, kv_cache_bytes=cache, version="1.0", deadline_s=60, eager=False)
        self.thread = EngineThread(options, start_s=300)
        self.children = list(self.thread.engine._children)
        print(f"     engine started in {time.monotonic() - began:.1f} s", flush=True)

    def check(self, name: str, action: Callable[[], tuple[bool, str]]) -> None:
        """Run one case; an error is a failure and not the end."""
        began = time.monotonic()
        try:
            passed, note = action()
        except Exception as problem:  # a case that breaks must not hide the others
            traceback.print_exc()
            passed, note = False, f"{type(problem).__name__}: {str(problem)[:300]}"
        self.failed += not passed
        print(f"{'PASS' if passed else 'FAIL'} {name}: {note} ({time.monotonic() - began:.1f} s)", flush=True)

    def draw(self, n: int = 8, tokens: int = 64) -> Any:
        """Start drawing a group; its future."""
        from rayft.rollout.agent import Sampling, rollout
        from rayft.types import Prompt

        prompt = Prompt(f"0-{self.version}", 0, PROMPT, {})
        return self.thread.run(rollout(self.thread.engine, prompt, n, Sampling(tokens, 2048)))

    def push(self, transport: str, call: Any = None, **options: Any) -> Any:
        """Push the trainer's model."""
        import torch

        from rayft.weight_sync.protocol import EngineHandle, Sender

        self.version += 1
        sender = Sender(transport, dtype=torch.bfloat16, device="cuda:0", deadline_s=60, folder=self.folder / "weights", **options)  # type: ignore[arg-type]
        try:
            return sender.push(self.model, f"1.{self.version}", [EngineHandle("engine", call or self.thread.call)])
        finally:
            sender.close()

    def agrees(self) -> tuple[bool, str]:
        """Tokens of the engine against the trainer."""
        began = time.monotonic()
        group = self.draw().result(60)
        seconds = time.monotonic() - began
        gap = mean_gap(self.model, group)
        return gap < MEAN_GAP, f"mean gap {gap:.4f}, {sum(len(t.tokens) for t in group.trajectories) / seconds:.0f} tokens/s"

    def pushes(self, transport: str) -> tuple[bool, str]:
        """A moved policy: unlike before the push, alike after; every loaded weight compared."""
        move(self.model, self.version + 1)
        before = mean_gap(self.model, self.draw().result(60))
        report = self.push(transport)
        after = mean_gap(self.model, self.draw().result(60))
        note = f"{report.bytes / 1e9:.2f} GB in {report.seconds:.3f} s verified, gap {before:.2f} -> {after:.4f}"
        passed = report.verified and not report.unchecked and not report.lost and after < MEAN_GAP and before > OTHER_GAP
        return passed, f"{note}, unchecked {list(report.unchecked)[:3]}, lost {dict(report.lost)}"

    def speed(self, chunk_mib: int) -> tuple[bool, str]:
        """Seconds of pushes by IPC with and without verification, one sender."""
        import torch

        from rayft.weight_sync.protocol import EngineHandle, Sender

        sender = Sender("ipc", dtype=torch.bfloat16, device="cuda:0", deadline_s=60, verify_every=3, chunk_bytes=chunk_mib << 20)
        reports = []
        for _ in range(6):
            self.version += 1
            torch.cuda.synchronize()
            reports.append(sender.push(self.model, f"1.{self.version}", [EngineHandle("engine", self.thread.call)]))
        seconds = {kind: min(r.seconds for r in reports if r.verified == kind) for kind in (True, False)}
        peak = torch.cuda.max_memory_allocated() / 2**30
        rate = reports[0].bytes / 1e9 / seconds[False]
        return True, f"{seconds[False]:.3f} s plain ({rate:.1f} GB/s), {seconds[True]:.3f} s verified, trainer peak {peak:.2f} GiB"

    def tampered(self) -> tuple[bool, str]:
        """Two tensors swapped on the way: the push must stop the run, and a good push must heal the engine."""
        from rayft.errors import TrainingError

        names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")]

        def call(method: str, *arguments: Any) -> Any:
            if method == "receive" and arguments[1]["phase"] == "chunk":
                swap = dict(zip(names, reversed(names), strict=True))
                table = [[swap.get(name, name), *rest] for name, *rest in arguments[1]["table"]]
                arguments = (arguments[0], arguments[1] | {"table": table})
            return self.thread.call(method, *arguments)

        try:
            self.push("ipc", call)
        except TrainingError as problem:
            self.push("ipc")
            gap = mean_gap(self.model, self.draw().result(60))
            return gap < MEAN_GAP, f"stopped by: {str(problem)[:150]}; healed, gap {gap:.4f}"
        return False, "nothing was noticed"

    def crosses(self) -> tuple[bool, str]:
        """A push while requests run: spans on both sides of it, each alike its own model."""
        drawing = self.draw(8, 1500)
        time.sleep(1.0)
        running = self.thread.call("load").result(10)
        import copy

        old = copy.deepcopy(self.model)
        move(self.model, 99)
        report = self.push("ipc")
        group = drawing.result(120)
        crossed = [t for t in group.trajectories if len(t.versions) == 2]
        if not crossed:
            return False, f"no request was under way: {[t.versions for t in group.trajectories]}, {running}"
        middle = crossed[0].versions[0][2]
        kind = type(group)(group.prompt, tuple(crossed))
        before = mean_gap(old, kind, slice(0, min(t.versions[0][2] for t in crossed)))
        after = mean_gap(self.model, kind, slice(max(t.versions[0][2] for t in crossed), None))
        load = self.thread.call("load").result(10)
        passed = before < MEAN_GAP and after < MEAN_GAP and load["preemptions"] == 0
        return passed, f"{len(crossed)} of 8 crossed at {middle}, gaps {before:.4f} | {after:.4f}, {report.seconds:.3f} s, {dict(load)}"

    def closes(self) -> tuple[bool, str]:
        """No process is left."""
        self.thread.close()
        alive = [child.pid for child in self.children if child.is_alive()]
        return bool(self.children) and not alive, f"{len(self.children)} children, alive {alive}"


def main() -> int:
    """All checks; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--kv-gib", type=float, default=4.0)
    arguments = parser.parse_args()
    try:
        import torch
        import vllm
    except ImportError as problem:
        print(f"skipped: {problem}")
        return 0
    if not torch.cuda.is_available():
        print("skipped: needs a CUDA device")
        return 0
    print(f"     {torch.cuda.get_device_name()}, torch {torch.__version__}, vllm {vllm.__version__}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bench = Bench(Path(folder), arguments.layers, arguments.kv_gib)
        bench.check("tokens and log-probabilities", bench.agrees)
        bench.check("push by ipc", lambda: bench.pushes("ipc"))
        bench.check("seconds of ipc, chunks of 256 MiB", lambda: bench.speed(256))
        bench.check("seconds of ipc, chunks of 1024 MiB", lambda: bench.speed(1024))
        bench.check("push by disk", lambda: bench.pushes("disk"))
        bench.check("swapped tensors", bench.tampered)
        bench.check("push in mid-generation", bench.crosses)
        bench.check("close", bench.closes)
    print(f"     {time.monotonic() - began:.1f} s in all, {bench.failed} failed", flush=True)
    return bench.failed and 1


if __name__ == "__main__":
    sys.exit(main())
