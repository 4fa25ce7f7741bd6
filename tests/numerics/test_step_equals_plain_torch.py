"""Training steps against a written-out PyTorch loop, over world sizes, micro-batch splits, packing, recomputation and compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import make_rows, write_model
from ranks import run_ranks
from rayft.config.load import load
from rayft.data.reader import Row, micro_batches
from rayft.types import Session

STEPS, ROWS, LR = 10, 4, 3e-3
LENGTHS = [[20, 12, 31, 1], [64], [7, 7, 7, 43], [30, 34], [64], [5, 59], [16, 16, 16, 16], [1, 1, 61, 1]]


class RowsInMemory:
    """What `micro_batches` reads, from memory."""

    seq_len, max_documents = 64, 4

    def __init__(self, rows: list[Row]) -> None:
        self.rows, self.num_rows = rows, len(rows)

    def row(self, position: int) -> Row:
        return self.rows[position % len(self.rows)]

    def blank(self) -> Row:
        return Row(-1, np.zeros(64, np.int32), np.zeros(64, np.float32), np.array([64], np.int32), np.zeros(1, np.int32), 0)


def trained(rank: int, world: int, folder: str, cases: list[dict[str, Any]]) -> list[list[tuple[float, float]]]:
    """(loss, gradient norm) per step for each case of overrides and micro_rows."""
    from rayft.losses.supervised import NEED, next_token
    from rayft.models.load import named_trainable
    from rayft.optim.build import build_optimizer
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model
    from rayft.train.step import forward_backward, update

    mesh, reader, results = build_mesh("cpu", world), RowsInMemory(make_rows(LENGTHS)), []
    for case in cases:
        cfg = load([], ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", f"optim.lr={LR}", *case["overrides"]])
        session = Session(
            rank=rank, world_size=world, local_rank=rank, device="cpu", run_dir=Path("."), report=lambda *_: None, deadline_s=60
        )
        model = build_model(cfg, session, mesh)
        optimizer = build_optimizer(named_trainable(model), cfg.optim, fused=True)
        curve = []
        for step in range(case.get("steps", STEPS)):
            batches = micro_batches(reader, step, rows=ROWS, micro_rows=case["micro_rows"], rank=rank, world=world, limit=case.get("limit"))
            sums, divisor = forward_backward([model], batches, next_token, NEED, mesh)
            norm = update([model], optimizer, 1.0)
            curve.append(((sums["train/loss"] / divisor).item(), norm.item()))
        results.append(curve)
    return results


def plain(folder: str, steps: int = STEPS) -> list[tuple[float, float]]:
    """The same rows in plain PyTorch: documents one by one, full logits, one process."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    decay = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay}, {"params": [p for p in model.parameters() if p.ndim < 2]}], lr=LR, betas=(0.9, 0.95), weight_decay=0.0
    )
    rows, curve = make_rows(LENGTHS), []
    for step in range(steps):
        chosen = [rows[(step * ROWS + i) % len(rows)] for i in range(ROWS)]
        documents = []
        for row in chosen:
            for start, length in zip(np.cumsum(row.lengths) - row.lengths, row.lengths, strict=True):
                documents.append(
                    (
                        torch.from_numpy(row.tokens[start : start + length]).long(),
                        torch.from_numpy(row.loss_weights[start : start + length]),
                    )
                )
        total = sum(float(weights[1:].sum()) for _, weights in documents)
        loss = torch.zeros(())
        for tokens, weights in documents:
            if len(tokens) > 1:
                logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
                loss = loss + (torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none") * weights[1:]).sum() / total
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve


def close(got: list[tuple[float, float]], expected: list[tuple[float, float]], rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.array(got)[:, 0], np.array(expected)[:, 0], rtol=rtol)
    np.testing.assert_allclose(np.array(got)[:, 1], np.array(expected)[:, 1], rtol=10 * rtol)


@pytest.mark.parametrize("family", ["llama_tied", "qwen3"])
def test_ten_steps_on_any_world_size_and_split_follow_the_plain_loop(family: str, tmp_path: Path) -> None:
    folder = str(write_model(family, tmp_path))
    expected = plain(folder)
    assert expected[-1][0] < expected[0][0]
    cases = [{"overrides": [], "micro_rows": 1}, {"overrides": [], "micro_rows": 2}, {"overrides": [], "micro_rows": 4}]
    for world in (1, 2):
        for curve in run_ranks(world, trained, folder, cases)[0]:
            close(curve, expected)
    close(run_ranks(3, trained, folder, cases[:1])[0][0], expected)


def test_recomputation_and_compile_change_nothing_and_compile_settles(tmp_path: Path) -> None:
    folder = str(write_model("llama", tmp_path))
    expected = plain(folder, steps=4)
    cases = [
        {"overrides": ["parallel.activation_checkpointing=full"], "micro_rows": 2, "steps": 4},
        {"overrides": ["parallel.compile=true"], "micro_rows": 2, "steps": 4},
        {"overrides": ["parallel.compile=true", "parallel.activation_checkpointing=full"], "micro_rows": 2, "steps": 4},
    ]
    for curve in run_ranks(2, trained, folder, cases)[0]:
        close(curve, expected)


def test_adapter_dropout_is_the_same_on_any_world_size_and_split(tmp_path: Path) -> None:
    folder = str(write_model("llama_tied", tmp_path))
    lora = ["adapter.type=lora", "adapter.r=4", "adapter.dropout=0.3"]
    cases = [{"overrides": lora, "micro_rows": 1}, {"overrides": lora, "micro_rows": 2}]
    one, split = run_ranks(1, trained, folder, cases)[0]
    close(split, one)
    for curve in run_ranks(2, trained, folder, cases)[0]:
        close(curve, one)
    without = run_ranks(1, trained, folder, [{"overrides": lora[:2], "micro_rows": 1}])[0][0]
    assert abs(without[3][0] - one[3][0]) > 1e-4
