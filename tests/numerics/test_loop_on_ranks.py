"""What all ranks of a run do together beside the step: the parts of the loss by source, texts, and what is asked of them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from families import make_rows, write_model
from numerics.test_step_equals_plain_torch import LENGTHS, RowsInMemory
from ranks import run_ranks
from rayft.config.load import load
from rayft.data.reader import micro_batches
from rayft.types import Session

SOURCES = ["code", "prose", "unused"]
PROMPTS = [[5, 9, 77, 30], [8], [100, 101, 102, 103, 104, 105, 106]]
NEW_TOKENS = 12


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def session_of(rank: int, world: int, folder: Path) -> Session:
    return Session(rank, world, rank, "cpu", folder, lambda metrics, directory, finish: finish(), 60)


def built(rank: int, world: int, folder: str) -> tuple[Any, Any]:
    """(model, mesh) of a run of the model."""
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model

    cfg: Any = load([], ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x"])
    mesh = build_mesh("cpu", world)
    return build_model(cfg, session_of(rank, world, Path(".")), mesh), mesh


def by_source(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Values of a step and of an evaluation over rows of two sources, and the gradient norm, with and without telling them apart."""
    from rayft.losses.supervised import NEED, next_token, supervised_loss
    from rayft.observe.metrics import finish
    from rayft.train.evaluate import evaluate
    from rayft.train.step import forward_backward

    model, mesh = built(rank, world, folder)
    reader = RowsInMemory([replace(row, source_ids=row.source_ids + row.id % 2) for row in make_rows(LENGTHS)])
    batches = micro_batches(reader, 0, rows=6, micro_rows=2, rank=rank, world=world)  # a micro-batch has rows of both sources
    results: dict[str, Any] = {}
    for name, (loss, need) in {"parts": supervised_loss(SOURCES), "plain": (next_token, NEED)}.items():
        sums, divisor = forward_backward([model], batches, loss, need, mesh)
        values = finish({key: value.item() for key, value in sums.items()}, divisor.item())
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])).item()
        for parameter in model.parameters():
            parameter.grad = None
        results[name] = values | evaluate(model, batches, loss, need, mesh) | {"norm": norm}
    return results


def texts(rank: int, world: int, folder: str) -> tuple[list[list[int]], bool]:
    """Continuations, and whether the model trains as before afterwards."""
    from rayft.train.samples import continue_greedily

    model, _ = built(rank, world, folder)
    before = whole(next(model.parameters())).clone()
    answers = continue_greedily(model, PROMPTS, NEW_TOKENS, end=2, device="cpu")
    return answers, model.training and torch.equal(whole(next(model.parameters())), before)


def asked(rank: int, world: int, folder: str) -> list[tuple[int, str]]:
    """(step, what was taken up) on this rank, of files that rank 1 makes at other times than rank 0 steps."""
    from rayft.parallel.mesh import build_mesh
    from rayft.train.requests import SAVE_NOW, STOP_NOW, Requests

    home = Path(folder)
    requests, seen, pending = Requests(session_of(rank, world, home), build_mesh("cpu", world).loss, trigger=True), [], None
    for step in range(1000):
        if pending is not None:
            stop, save = requests.read(pending.item())
            seen += [(step, name) for name, found in (("save", save), ("stop", stop)) if found]
            if stop:
                break
        pending = requests.agree()
        if rank == 1 and step in (5, 60):
            (home / SAVE_NOW).touch()
        if rank == 1 and step == 150:
            (home / STOP_NOW).touch()
        time.sleep(0.03 * rank)
    requests.close()
    assert not (home / SAVE_NOW).exists()
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model("qwen3", tmp_path_factory.mktemp("model")))


def test_the_parts_of_the_loss_are_those_of_the_sources_alone(folder: str) -> None:
    one, two = run_ranks(1, by_source, folder)[0], run_ranks(2, by_source, folder)[0]
    for found in (one, two):
        parts, plain = found["parts"], found["plain"]
        assert {name for name in parts if name.count("/") == 2} == {
            *(f"train/loss/{name}" for name in SOURCES[:2]), *(f"train/weights/{name}" for name in SOURCES),
            *(f"eval/loss/{name}" for name in SOURCES[:2]),
        }  # fmt: skip
        for name in ("train/loss", "norm", "eval/loss", "eval/num_tokens", "train/num_tokens"):
            assert parts[name] == pytest.approx(plain[name], rel=1e-5)
        weights = [parts[f"train/weights/{name}"] for name in SOURCES]
        assert weights[2] == 0 and sum(weights) == pytest.approx(plain["eval/num_tokens"], rel=1e-6)
        for kind in ("train", "eval"):
            mean = sum(parts[f"{kind}/loss/{name}"] * weight for name, weight in zip(SOURCES[:2], weights, strict=False)) / sum(weights)
            assert mean == pytest.approx(plain["train/loss"], rel=1e-5)
        assert abs(parts["train/loss/code"] - parts["train/loss/prose"]) > 1e-3
    assert two["parts"] == pytest.approx(one["parts"], rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_texts_are_those_of_plain_transformers_on_any_number_of_ranks(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = str(write_model(family, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    expected = []
    for prompt in PROMPTS:
        found = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0)
        answer = found[0, len(prompt) :].tolist()
        expected.append(answer[: answer.index(2)] if 2 in answer else answer)
    assert len({tuple(answer) for answer in expected}) > 1
    for world in (1, 2):
        for answers, as_before in run_ranks(world, texts, path):
            assert answers == expected and as_before


def test_ranks_take_up_a_request_at_the_same_step(tmp_path: Path) -> None:
    zero, one = run_ranks(2, asked, str(tmp_path))
    assert zero == one
    assert [what for _, what in zero] == ["save", "save", "stop"], "each request once"
    assert np.all(np.diff([step for step, _ in zero]) > 1)
