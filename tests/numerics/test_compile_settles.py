"""torch.compile per decoder layer: no recompilation after warm-up however the documents lie, and the same losses."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import families
from families import make_batch, write_model
from ranks import run_ranks
from rayft.config.load import load
from rayft.types import Session

WARM_UP, BATCHES = 3, 50


def losses_and_graphs(rank: int, world: int, folder: str, overrides: list[str]) -> tuple[list[float], list[int]]:
    """Loss and number of compiled graphs after each of BATCHES micro-batches, each with other document lengths."""
    import torch

    from rayft.losses.supervised import NEED, next_token
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model
    from rayft.train.step import forward_backward

    cfg: Any = load([], ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", *overrides])
    session = Session(rank=rank, world_size=world, local_rank=rank, device="cpu", run_dir=Path("."), report=lambda *_: None, deadline_s=60)
    mesh = build_mesh("cpu", world)
    model = build_model(cfg, session, mesh)
    rng, losses, graphs = np.random.default_rng(0), [], []
    for index in range(BATCHES):
        cuts = np.sort(rng.choice(np.arange(1, 64), size=rng.integers(0, 9), replace=False))
        lengths = np.diff(np.concatenate([[0], cuts, [64]])).tolist()
        sums, divisor = forward_backward([model], [make_batch([lengths], seed=index)], next_token, NEED, mesh)
        for parameter in model.parameters():
            parameter.grad = None
        losses.append((sums["train/loss"] / divisor).item())
        graphs.append(int(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    return losses, graphs


def test_fifty_batches_of_different_documents_compile_nothing_after_warm_up(tmp_path: Path) -> None:
    folder = str(write_model("qwen3", tmp_path))
    plain, none = run_ranks(1, losses_and_graphs, folder, [])[0]
    for overrides in (["parallel.compile=true"], ["parallel.compile=true", "parallel.activation_checkpointing=full"]):
        compiled, graphs = run_ranks(1, losses_and_graphs, folder, overrides)[0]
        assert none[-1] == 0 < graphs[WARM_UP]
        assert graphs[-1] == graphs[WARM_UP], graphs
        np.testing.assert_allclose(compiled, plain, rtol=1e-5)


def dropped(rank: int, world: int, folder: str, overrides: list[str]) -> tuple[list[float], int]:
    """Losses and norms of the gradient of adapters whose B is not zero, which three batches give, and the number of compiled graphs."""
    import torch

    from rayft.losses.supervised import NEED, next_token
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model
    from rayft.train.step import forward_backward

    torch.compile = partial(torch.compile, backend="aot_eager")  # graphs are counted here, and no code is made of them
    fields = ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", "adapter.type=lora", *overrides]
    session = Session(rank=rank, world_size=world, local_rank=rank, device="cpu", run_dir=Path("."), report=lambda *_: None, deadline_s=60)
    mesh = build_mesh("cpu", world)
    model = build_model(load([], fields), session, mesh)  # type: ignore[arg-type]
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        for index, (_, parameter) in enumerate(trained):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    found: list[float] = []
    for index, lengths in enumerate(([64], [20, 44], [5, 50, 9])):
        sums, divisor = forward_backward([model], [make_batch([lengths], seed=index)], next_token, NEED, mesh)
        found.append((sums["train/loss"] / divisor).item())
        found.append(torch.stack([parameter.grad.norm() for _, parameter in trained if parameter.grad is not None]).norm().item())
        for _, parameter in trained:
            parameter.grad = None
    return found, int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_layers_with_dropout_share_the_graphs_of_those_without(tmp_path: Path) -> None:
    """Each layer drops by its own seed, which is data of the graph; compiled and recomputed it drops what it drops otherwise."""
    with patch.dict(families.SIZES, num_hidden_layers=2):
        folder = str(write_model("qwen3", tmp_path))
    fields, drop = ["kernels.lora=on", "adapter.targets=[q_proj,o_proj]"], "adapter.dropout=0.3"
    on = [*fields, "parallel.compile=true", "parallel.activation_checkpointing=full"]
    kept, graphs = run_ranks(1, dropped, folder, on)[0]
    plain, none = run_ranks(1, dropped, folder, [*fields, drop])[0]
    compiled, found = run_ranks(1, dropped, folder, [*on, drop])[0]
    assert none == 0 < found == graphs
    np.testing.assert_allclose(compiled, plain, rtol=1e-5)
    assert max(abs(a - b) for a, b in zip(kept, plain, strict=True)) > 1e-3


def flex_losses_and_graphs(rank: int, world: int, folder: str) -> tuple[list[float], list[float], list[int]]:
    """Losses by document and by flex attention in compiled layers, and the graphs after each batch.

    Forward only, for flex has no backward on a CPU.
    """
    import torch

    from rayft.losses.supervised import NEED
    from rayft.parallel import attention
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model

    session = Session(rank=rank, world_size=world, local_rank=rank, device="cpu", run_dir=Path("."), report=lambda *_: None, deadline_s=60)
    mesh = build_mesh("cpu", world)
    losses: list[list[float]] = []
    graphs: list[int] = []
    for flex in (False, True):
        overrides = ["parallel.compile=true", "parallel.attention=flex"] if flex else []
        cfg: Any = load([], ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", *overrides])
        if flex:
            attention.choose = lambda *_: ("flex", "")
        model = build_model(cfg, session, mesh)
        rng, found = np.random.default_rng(0), []
        with torch.no_grad():
            for index in range(8):
                cuts = np.sort(rng.choice(np.arange(1, 256), size=rng.integers(2, 9), replace=False))
                lengths = np.diff(np.concatenate([[0], cuts, [256]])).tolist()
                found.append(model.score(make_batch([lengths], seed=index), NEED).nll_sum.item())
                graphs.append(int(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
        losses.append(found)
    return losses[0], losses[1], graphs[8:]


def test_flex_attention_is_part_of_a_layers_one_graph(tmp_path: Path) -> None:
    """One graph for each kind of layer (Gemma 3: with and without a window), whatever the documents."""
    plain, flex, graphs = run_ranks(1, flex_losses_and_graphs, str(write_model("gemma3", tmp_path)))[0]
    assert graphs == [2] * 8
    np.testing.assert_allclose(flex, plain, rtol=1e-5)
