"""A sharded, adapted policy on two ranks pushes to an engine: the engine's weights equal the merged full ones bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from families import write_model
from ranks import run_ranks

LORA = ["adapter.type=lora", "adapter.r=4", "adapter.targets=[q_proj,o_proj,up_proj]"]
EXPERTS = ["adapter.type=lora", "adapter.r=4", "adapter.targets=[q_proj]"]
EXPERTS += ["adapter.target_parameters=[experts.gate_up_proj,experts.down_proj]"]
NF4 = [*LORA, "model.quantize=nf4"]


def policy(rank: int, world: int, folder: str, overrides: list[str]) -> Any:
    """The sharded model, every trainable weight moved by noise that does not depend on the sharding.

    Its root is left gathered with the values from before, as a forward without backward leaves it.
    """
    from rayft.config.load import load
    from rayft.models.load import _copy_rows, named_trainable, seed_of
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model
    from rayft.types import Session

    cfg = load([], ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", *overrides])
    session = Session(rank=rank, world_size=world, local_rank=rank, device="cpu", run_dir=Path("."), report=lambda *_: None, deadline_s=60)
    model = build_model(cfg, session, build_mesh("cpu", world))
    shards = list(named_trainable(model))
    if world > 1:
        model.unshard()
    for name, parameter in shards:
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed_of(name)))
        _copy_rows(parameter, 0.1 * noise)
    return model


def pushed(rank: int, world: int, folder: str, overrides: list[str], transports: list[tuple[str, str]]) -> list[Any]:
    """Per transport, what the engine on rank 0 holds after a push, and the error of a second push that is tampered with."""
    from rayft.errors import RayftError
    from rayft.rollout.engine import EngineOptions, EngineThread
    from rayft.weight_sync.protocol import EngineHandle, Sender

    model, results = policy(rank, world, folder, overrides), []
    for transport, payload in transports:
        place = Path(folder) / f"{transport}-{payload}"
        sender = Sender(transport, dtype=torch.bfloat16, device="cpu", deadline_s=20, payload=payload, folder=place, chunk_bytes=30_000)
        thread = EngineThread(EngineOptions(Path(folder), "local", "bfloat16", context=32)) if rank == 0 else None
        report = sender.push(model, "1.1", [EngineHandle("e", thread.call)] if thread else [])
        weights = {name: p.clone() for name, p in thread.engine._model.named_parameters()} if thread else {}

        def call(method: str, *arguments: Any, to: EngineThread | None = thread) -> Any:
            if method == "receive" and arguments[1]["phase"] == "chunk":
                arguments = (arguments[0], arguments[1] | {"table": arguments[1]["table"][1:]})
            return to.call(method, *arguments) if to else None

        error = ""
        try:
            sender.push(model, "1.2", [EngineHandle("tampered", call)] if thread else [])
        except RayftError as problem:
            error = type(problem).__name__
        results.append((weights, report.verified, report.unchecked, error))
        sender.close()
        if thread:
            thread.close()
    return results


CASES = [("qwen3", []), ("qwen3", LORA), ("qwen3_moe", EXPERTS), ("qwen3", NF4)]


@pytest.mark.parametrize(("family", "overrides"), CASES, ids=["full", "lora", "experts", "nf4"])
def test_two_ranks_push_what_one_rank_would(tmp_path: Path, family: str, overrides: list[str]) -> None:
    write_model(family, tmp_path)
    transports = [("disk", "full"), ("gloo", "full")] + ([("gloo", "adapter")] if overrides == LORA else [])
    alone = run_ranks(1, pushed, str(tmp_path), overrides, transports[:1])[0][0][0]
    ranks = run_ranks(2, pushed, str(tmp_path), overrides, transports)
    for weights, verified, unchecked, error in ranks[0]:
        assert weights.keys() == alone.keys() and all(torch.equal(value, alone[name]) for name, value in weights.items())
        assert (verified, unchecked, error) == (True, (), "TrainingError")
    assert [error for *_, error in ranks[1]] == ["TrainingError"] * len(transports)
