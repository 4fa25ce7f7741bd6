"""`score` against plain transformers: logits, per-document isolation, and loading on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES, make_batch, write_model
from ranks import run_ranks
from rayft.config.load import load
from rayft.types import Session

LENGTHS = [[5, 1, 1, 20, 37], [64]]


def configuration(folder: str, *overrides: str) -> Any:
    base = ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x"]
    return load([], [*base, *overrides])


def session(rank: int = 0, world: int = 1) -> Session:
    return Session(rank=rank, world_size=world, local_rank=rank, device="cpu", run_dir=Path("."), report=lambda *_: None, deadline_s=60)


def scored(rank: int, world: int, jobs: list[tuple[str, list[str]]]) -> list[tuple[torch.Tensor, bool]]:
    """For each (model folder, overrides): log-probabilities of the targets at trained positions, and whether this rank holds
    nothing but its own rows."""
    from rayft.parallel import fsdp
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model

    mesh, results = build_mesh("cpu", world), []
    for folder, overrides in jobs:
        model = build_model(configuration(folder, *overrides), session(rank, world), mesh)
        model.eval()
        with torch.no_grad():
            terms = model.score(make_batch(LENGTHS), "logprobs")
        fsdp.reshard_root(model)
        results.append((terms.logprobs, all(holds_its_rows(p, world) for p in model.parameters())))
    return results


def holds_its_rows(parameter: Any, world: int) -> bool:
    """Sharded, and its storage is its rows padded to the largest shard, not a view of the full tensor."""
    local = parameter.to_local() if world > 1 else parameter
    rows = -(-parameter.shape[0] // world)
    return local.untyped_storage().nbytes() <= rows * parameter[0:1].numel() * parameter.element_size()


def reference(folder: str) -> torch.Tensor:
    """The same from plain transformers, one document at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    batch = make_batch(LENGTHS)
    logprobs, start = torch.zeros(len(batch.tokens)), 0
    with torch.no_grad():
        for length in batch.document_lengths:
            logits = model(input_ids=batch.tokens[None, start : start + length], use_cache=False).logits[0]
            targets = batch.targets[start : start + length]
            logprobs[start : start + length] = torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0]
            start += length
    return logprobs[batch.trained]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: str(write_model(family, tmp_path_factory.mktemp(family))) for family in FAMILIES}


def test_packed_documents_score_like_transformers_document_by_document_for_every_family(folders: dict[str, str]) -> None:
    results = run_ranks(1, scored, [(folder, []) for folder in folders.values()])[0]
    for (family, folder), (got, tight) in zip(folders.items(), results, strict=True):
        torch.testing.assert_close(got, reference(folder), rtol=2e-5, atol=2e-5, msg=lambda text, name=family: f"{name}: {text}")
        assert tight, family


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_of_any_world_size_scores_the_same(world: int, folders: dict[str, str]) -> None:
    lora = ["adapter.type=lora", "adapter.r=1"]
    jobs = [(folders[family], adapter) for family in ("llama", "llama_tied", "gemma3") for adapter in ([], lora)]
    for results in run_ranks(world, scored, jobs):
        for (folder, _), (got, tight) in zip(jobs, results, strict=True):
            torch.testing.assert_close(got, reference(folder), rtol=2e-5, atol=2e-5)
            assert tight
