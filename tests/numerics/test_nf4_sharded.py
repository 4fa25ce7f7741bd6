"""QLoRA on one rank and on two: the steps of a LoRA run whose files hold the 4-bit values, its exports, and the same after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import DTensor

import families
from families import make_batch, make_rows, write_model
from numerics.test_step_equals_plain_torch import LENGTHS, RowsInMemory, close, trained
from ranks import run_ranks
from rayft.config.load import load
from rayft.types import Session
from tiny import tiny_tokenizer
from unit.test_nf4_ops import values_of

LORA = ["adapter.type=lora", "adapter.r=4", "adapter.alpha=8", "optim.lr=2e-2"]
NF4 = [*LORA, "model.quantize=nf4"]
SIZES = {"tie_word_embeddings": False, "intermediate_size": 128}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model, and the same with the linear layers of its blocks replaced by what 4 bits keep of them."""
    from safetensors.torch import load_file, save_file

    folder, rounded = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("rounded")
    with patch.dict(families.FAMILIES, {"small": ("qwen3", SIZES)}):
        write_model("small", folder)
    tiny_tokenizer(folder)
    stored = load_file(folder / "model.safetensors")
    weights = {name: 4 * w if name.endswith("_proj.weight") else w for name, w in stored.items()}  # so that their rounding shows
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        (rounded / file.name).write_bytes(file.read_bytes())
    changed = {name: torch.from_numpy(values_of(w.numpy())) if name.endswith("_proj.weight") else w for name, w in weights.items()}
    assert sum(not torch.equal(changed[name], weights[name]) for name in weights) == 3 * 7
    save_file(changed, rounded / "model.safetensors", metadata={"format": "pt"})
    return str(folder), str(rounded)


def test_steps_are_those_of_lora_on_the_values_that_4_bits_stand_for(folders: tuple[str, str]) -> None:
    folder, rounded = folders
    expected = run_ranks(1, trained, rounded, [{"overrides": LORA, "micro_rows": 2}])[0][0]
    assert expected[-1][0] < expected[0][0] - 0.05, "the loss falls"
    other = run_ranks(1, trained, folder, [{"overrides": LORA, "micro_rows": 2, "steps": 1}])[0][0]
    assert abs(other[0][0] - expected[0][0]) > 3e-3, "4 bits change something"
    fused = [*NF4, "kernels.lora=on"]
    cases = [{"overrides": overrides, "micro_rows": 2} for overrides in (NF4, fused, [*fused, "parallel.activation_checkpointing=full"])]
    for world in (1, 2):
        for curve in run_ranks(world, trained, folder, cases)[0]:
            close(curve, expected, rtol=3e-5)


def test_compiled_layers_change_nothing(folders: tuple[str, str]) -> None:
    folder, rounded = folders
    expected = run_ranks(1, trained, rounded, [{"overrides": LORA, "micro_rows": 2, "steps": 3}])[0][0]
    case = {"overrides": [*NF4, "parallel.compile=true", "kernels.lora=on"], "micro_rows": 2, "steps": 3}
    (curve,) = run_ranks(2, trained, folder, [case])[0]
    close(curve, expected, rtol=3e-5)


def _model(rank: int, world: int, folder: str, home: str, *overrides: str) -> tuple[Any, Any, Any, Any]:
    from rayft.models.load import named_trainable
    from rayft.optim.build import build_optimizer
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model

    given = ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", *NF4, *overrides]
    cfg: Any = load([], given)
    session = Session(rank, world, rank, "cpu", Path(home), lambda metrics, directory, finish: finish(), 60)
    mesh = build_mesh("cpu", world)
    model = build_model(cfg, session, mesh)
    return cfg, (session, mesh), model, build_optimizer(named_trainable(model), cfg.optim, fused=True)


def _steps(model: Any, optimizer: Any, mesh: Any, numbers: range, rank: int, world: int) -> None:
    from rayft.data.reader import micro_batches
    from rayft.losses.supervised import NEED, next_token
    from rayft.train.step import forward_backward, update

    reader: Any = RowsInMemory(make_rows(LENGTHS))
    for step in numbers:
        batches = micro_batches(reader, step, rows=4, micro_rows=2, rank=rank, world=world)
        forward_backward([model], batches, next_token, NEED, mesh)
        update([model], optimizer, 1.0)


def resumed(rank: int, world: int, folder: str, home: str) -> tuple[bool, list[str]]:
    """Whether two steps, a checkpoint, a new model and two more are bit for bit four steps; names in the checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader

    from rayft.checkpoint.sharded import Checkpointer
    from rayft.models.load import named_trainable
    from rayft.optim.build import set_lr

    _, (session, mesh), model, optimizer = _model(rank, world, folder, home)
    _steps(model, optimizer, mesh, range(2), rank, world)
    keeper = Checkpointer(session, 0, lambda step: None)
    keeper.save(2, [model], optimizer, {}, {})
    keeper.wait()
    _steps(model, optimizer, mesh, range(2, 4), rank, world)
    torch.distributed.barrier()
    _, _, again, its_optimizer = _model(rank, world, folder, home)
    (saved,) = (Path(home) / "checkpoints").glob("step-*")
    keeper.restore(saved, [again], its_optimizer)
    set_lr(its_optimizer, 2e-2)
    _steps(again, its_optimizer, mesh, range(2, 4), rank, world)
    pairs = zip(named_trainable(model), named_trainable(again), strict=True)
    same = all(torch.equal(_local(a), _local(b)) for (_, a), (_, b) in pairs)
    return same, list(FileSystemReader(saved).read_metadata().state_dict_metadata)


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


def test_a_resume_continues_exactly_and_saves_no_base(folders: tuple[str, str], tmp_path: Path) -> None:
    for same, names in run_ranks(2, resumed, folders[0], str(tmp_path)):
        assert same
        assert names and all(".lora_" in name for name in names)


def exported(rank: int, world: int, folder: str, home: str) -> torch.Tensor:
    """Log-probabilities of a batch under the trained model, which is exported in both ways."""
    from rayft.checkpoint.huggingface import export_adapter, export_full

    cfg, (_, mesh), model, optimizer = _model(rank, world, folder, home)
    _steps(model, optimizer, mesh, range(3), rank, world)
    export_adapter(model, cfg.model, cfg.adapter, Path(home, "adapter"), 3)
    export_full(model, cfg.model, torch.float32, Path(home, "merged"), 3)
    model.eval()
    with torch.no_grad():
        logprobs = model.score(make_batch([[40]]), "logprobs").logprobs
    assert isinstance(logprobs, torch.Tensor)
    return logprobs.float()


@pytest.mark.parametrize("world", [1, 2])
def test_exports_are_what_was_trained_for_plain_transformers_and_peft(world: int, folders: tuple[str, str], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, rounded = folders
    expected = run_ranks(world, exported, folder, str(tmp_path))[0]
    batch = make_batch([[40]])
    tokens = batch.tokens.view(1, -1)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == folder
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(rounded, dtype=torch.float32), tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for model in (adapted, merged):
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens, use_cache=False).logits[0, :-1]
        found = torch.log_softmax(logits, -1).gather(-1, tokens[0, 1:, None])[:, 0]
        torch.testing.assert_close(found[batch.trained], expected.view(-1), atol=2e-5, rtol=1e-4)
