"""Every optimizer, parameter group and set of frozen rows: on 2 ranks as on 1, and through a resume as without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import families
from families import make_rows, write_model
from numerics.test_step_equals_plain_torch import LENGTHS, RowsInMemory
from ranks import run_ranks
from rayft.config.load import load
from rayft.data.reader import micro_batches
from rayft.types import Session

STEPS, HALF, ROWS = 4, 2, 4
UNFROZEN = "['model.layers.2.', 'model.embed_tokens.weight[250:]', 'model.embed_tokens.weight[:100]', '.*1.mlp.up_proj.weight[7]']"
HELD = ["optim.lr=3e-3", "optim.weight_decay=0.1", f"model.unfrozen={UNFROZEN}"]
CASES = {
    "adamw": ["optim.lr=3e-3", "optim.weight_decay=0.1", "optim.no_decay=['.*k_proj']", "optim.embedding_lr_ratio=0.1"],
    "adamw8bit": ["optim.type=adamw8bit", "optim.lr=3e-3", "optim.weight_decay=0.1"],
    "adafactor": ["optim.type=adafactor", "optim.lr=3e-2", "optim.weight_decay=0.1"],
    "muon": ["optim.type=muon", "optim.lr=3e-3", "optim.weight_decay=0.1", "optim.embedding_lr=1e-3"],
    "wsd": ["optim.lr=3e-3", "optim.schedule=wsd", "optim.decay=2", "optim.warmup=1", "optim.min_lr_ratio=0.1"],
    "loraplus": ["optim.lr=3e-3", "adapter.type=lora", "adapter.r=4", "optim.loraplus_lr_ratio=8.0"],
    "held adamw": HELD,
    "held adamw8bit": ["optim.type=adamw8bit", *HELD],
    "held adafactor": ["optim.type=adafactor", *HELD],
    "held muon": ["optim.type=muon", *HELD],
}
REQUANTISED = 2e-3
"""adamw8bit codes blocks of 256 values of a rank's own rows: on another number of ranks other values share a block."""

Result = dict[str, tuple[Any, dict[str, torch.Tensor], int]]


def trained(rank: int, world: int, folder: str, out: str, begin: int, end: int) -> Result:
    """By case: (loss, gradient norm) of the steps, the weights after them, and how many states are in 8 bits.

    From `begin` > 0 on it goes on from the checkpoint that a call with end = begin has left in `out`.
    """
    from rayft.checkpoint.resume import newest
    from rayft.checkpoint.sharded import Checkpointer
    from rayft.losses.supervised import NEED, next_token
    from rayft.models.load import hf_name, named_trainable
    from rayft.models.select import local
    from rayft.optim.build import build_optimizer, set_lr
    from rayft.optim.groups import embeddings_of
    from rayft.optim.schedules import lr_at
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model
    from rayft.train.step import forward_backward, update

    torch.compiler.set_stance("force_eager")  # torchao compiles its update, which takes half a minute on a CPU
    mesh, reader, results = build_mesh("cpu", world), RowsInMemory(make_rows(LENGTHS)), {}
    for name, overrides in CASES.items():
        cfg: Any = load([], ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", *overrides])
        session = Session(rank, world, rank, "cpu", Path(out) / name, lambda metrics, directory, finish: finish(), 60)
        model = build_model(cfg, session, mesh)
        optimizer = build_optimizer(named_trainable(model), cfg.optim, True, embeddings_of(model), model.trained_rows)
        checkpointer = Checkpointer(session, 1, lambda step: None)
        if begin:
            restored = newest(session.run_dir)
            assert restored is not None and restored.step == begin
            checkpointer.restore(restored.directory, [model], optimizer)
        curve = []
        for step in range(begin, end):
            set_lr(optimizer, lr_at(step, STEPS, cfg.optim))
            batches = micro_batches(reader, step, rows=ROWS, micro_rows=2, rank=rank, world=world)
            sums, divisor = forward_backward([model], batches, next_token, NEED, mesh)
            norm = update([model], optimizer, 1.0)
            curve.append(((sums["train/loss"] / divisor).item(), norm.item()))
        if end < STEPS:
            checkpointer.save(end, [model], optimizer, {}, {})
            checkpointer.wait()
        weights = {hf_name(key): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for key, p in model.named_parameters()}
        coded = sum(hasattr(local(value), "codes") for state in optimizer.state.values() for value in state.values())
        results[name] = (np.array(curve), weights, coded)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose matrices are large enough for 8 bits on two ranks too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.SIZES, "intermediate_size", 128)
        return str(write_model("qwen3", tmp_path_factory.mktemp("model")))


def run(world: int, folder: str, out: Path, begin: int, end: int) -> Result:
    return run_ranks(world, trained, folder, str(out), begin, end)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def undisturbed(folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Result]:
    """Number of ranks -> what they do without a stop."""
    return {world: run(world, folder, tmp_path_factory.mktemp("whole"), 0, STEPS) for world in (1, 2)}


@pytest.fixture(scope="module")
def stopped(folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Checkpoints of two ranks, half-way."""
    out = tmp_path_factory.mktemp("stopped")
    return out, run(2, folder, out, 0, HALF)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one(name: str, undisturbed: dict[int, Result]) -> None:
    (one, _, coded), (two, _, coded_two) = undisturbed[1][name], undisturbed[2][name]
    assert (coded > 0) == (coded_two > 0) == ("8bit" in name)
    np.testing.assert_allclose(two[:, 0], one[:, 0], rtol=REQUANTISED if "8bit" in name else 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_options_change_what_is_learned(name: str, undisturbed: dict[int, Result]) -> None:
    """The frozen rows leave too little to learn to tell their optimizers apart by the loss."""
    whole = {other: curve[:, 0] for other, (curve, _, _) in undisturbed[1].items() if not other.startswith("held")}
    mine = undisturbed[1][name][0][:, 0]
    assert [other for other, curve in whole.items() if other != name and np.allclose(curve, mine, rtol=1e-6)] == []
    assert name.startswith("held") or mine[-1] < mine[0]


def test_a_resume_on_as_many_ranks_leaves_no_trace(folder: str, undisturbed: dict[int, Result], stopped: tuple[Path, Result]) -> None:
    out, first = stopped
    second = run(2, folder, out, HALF, STEPS)
    for name, (curve, weights, _) in undisturbed[2].items():
        np.testing.assert_array_equal(np.concatenate([first[name][0], second[name][0]]), curve, err_msg=name)
        assert [key for key, value in weights.items() if not torch.equal(second[name][1][key], value)] == [], name


def test_another_number_of_ranks_goes_on(folder: str, undisturbed: dict[int, Result], stopped: tuple[Path, Result]) -> None:
    second = run(1, folder, stopped[0], HALF, STEPS)
    for name, (curve, _, _) in undisturbed[2].items():
        rtol = REQUANTISED if "8bit" in name else 1e-5
        np.testing.assert_allclose(second[name][0][:, 0], curve[HALF:, 0], rtol=rtol, err_msg=name)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("held")])
def test_rows_that_are_not_named_stay_to_the_bit(name: str, world: int, folder: str, undisturbed: dict[int, Result]) -> None:
    """Neither gradient nor weight decay reaches them; the others move, all of them."""
    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    after = undisturbed[world][name][1]
    moved = {key: [bool(row) for row in (value != before[key]).reshape(len(value), -1).any(1)] for key, value in after.items()}
    assert moved.pop("model.embed_tokens.weight") == [row < 100 or row >= 250 for row in range(257)]
    assert moved.pop("model.layers.1.mlp.up_proj.weight") == [row == 7 for row in range(128)]
    assert all(all(rows) == any(rows) == key.startswith("model.layers.2.") for key, rows in moved.items())
