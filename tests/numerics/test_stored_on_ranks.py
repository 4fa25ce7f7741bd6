"""Buffers that checkpoints keep, and weights in 8 bits, on several ranks: read on each, and in every export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from families import make_batch, write_in_8_bits, write_model
from ranks import run_ranks
from rayft.config.load import load
from rayft.types import Session
from tiny import tiny_tokenizer

LORA = ["adapter.type=lora", "adapter.r=2", "adapter.targets=[q_proj]"]


def exported(rank: int, world: int, jobs: list[tuple[str, list[str], str]]) -> list[tuple[dict[str, Tensor], Tensor]]:
    """For each (model, overrides, home): this rank's persistent buffers and log-probabilities of a batch, after an export to
    `home`/files and one to `home`/stored as to an object store."""
    from rayft.checkpoint.huggingface import export_full
    from rayft.models.load import hf_name, persistent_buffers
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model

    mesh, results = build_mesh("cpu", world), []
    for folder, overrides, home in jobs:
        cfg: Any = load([], ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", *overrides])
        model = build_model(cfg, Session(rank, world, rank, "cpu", Path(home), lambda *_: None, 60), mesh)
        model.eval()
        with torch.no_grad():
            logprobs = model.score(make_batch([[40]]), "logprobs").logprobs
        export_full(model, cfg.model, torch.bfloat16, Path(home, "files"), 1)
        export_full(model, cfg.model, torch.float32, f"file://{home}/stored", 1)
        results.append(({hf_name(name): buffer for name, buffer in persistent_buffers(model)}, logprobs))
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_every_rank_and_export_has_the_buffers_of_the_base(world: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    jobs = []
    for family, overrides in (("gemma4", []), ("glm4_moe", []), ("glm4_moe", LORA)):
        home = tmp_path / f"{family}-{len(overrides)}"
        write_model(family, home / "model")
        tiny_tokenizer(home / "model")
        (home / "stored").mkdir()
        jobs.append((str(home / "model"), overrides, str(home)))
    for results in run_ranks(world, exported, jobs):
        for (folder, _, home), (buffers, _) in zip(jobs, results, strict=True):
            base = load_file(f"{folder}/model.safetensors")
            files, stored = (load_file(f"{home}/{kind}/model.safetensors") for kind in ("files", "stored"))
            assert files.keys() == stored.keys() == base.keys()
            loaded = dict(AutoModelForCausalLM.from_pretrained(f"{home}/files", dtype=torch.bfloat16).named_buffers())
            for name, buffer in buffers.items():
                assert torch.equal(buffer, base[name]) and torch.equal(stored[name], base[name])
                assert torch.equal(files[name], base[name].to(loaded[name].dtype)) and torch.equal(loaded[name], files[name])


@pytest.mark.parametrize("block", [(40, 48), None])
def test_weights_in_8_bits_are_sharded_as_what_they_stand_for_and_exported_dense(block: tuple[int, int] | None, tmp_path: Path) -> None:
    """Three ranks, whose first rows are inside of blocks; a stack of four experts, of which a rank has one or two."""
    tiny_tokenizer(write_model("qwen3_moe", tmp_path / "model"))
    write_in_8_bits(tmp_path / "model", block, tmp_path)
    jobs = []
    for kind in ("fp8", "dense"):
        (tmp_path / f"{kind}-home" / "stored").mkdir(parents=True)
        jobs.append((str(tmp_path / kind), LORA, str(tmp_path / f"{kind}-home")))
    for (_, ours), (_, dense) in run_ranks(3, exported, jobs):
        assert torch.equal(ours, dense)
    ours, dense = (load_file(tmp_path / f"{kind}-home" / "stored" / "model.safetensors") for kind in ("fp8", "dense"))
    assert ours.keys() == dense.keys() and all(torch.equal(ours[name], value) for name, value in dense.items())
    assert "quantization_config" not in json.loads((tmp_path / "fp8-home" / "files" / "config.json").read_text())
