"""Training a tiny model with experts: loading, steps with and without the fused operation, on one rank and on two, exports and reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import families
from families import make_batch, make_rows, write_model
from numerics.test_step_equals_plain_torch import LENGTHS, RowsInMemory, close, plain, trained
from ranks import run_ranks
from rayft.config.load import load
from rayft.types import Session
from tiny import tiny_tokenizer

SIZES = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1], "norm_topk_prob": True}
"""Gate and up are 64 x 64 as the hidden size is: square, so that a wrong orientation shows in no shape."""
LORA = [
    "adapter.type=lora", "adapter.r=4", "adapter.alpha=8", "optim.lr=5e-3",
    'adapter.target_parameters=["experts.gate_up_proj","experts.down_proj"]',
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    with patch.dict(families.FAMILIES, {"experts": ("qwen3_moe", SIZES)}):
        write_model("experts", path)
    tiny_tokenizer(path)
    return str(path)


def test_full_fine_tuning_follows_the_plain_loop(folder: str) -> None:
    """Weights come from names of single experts; transformers' own experts, and the fused operation with its base trained."""
    expected = plain(folder, steps=6)
    cases = [{"overrides": [f"kernels.experts={on}"], "micro_rows": 2, "steps": 6} for on in ("off", "on")]
    for world in (1, 2):
        for curve in run_ranks(world, trained, folder, cases)[0]:
            close(curve, expected)


def test_adapters_train_alike_fused_and_not_on_any_ranks(folder: str) -> None:
    cases = [{"overrides": [*LORA, f"kernels.experts={on}"], "micro_rows": 2, "steps": 30} for on in ("off", "on")]
    expected, fused = run_ranks(1, trained, folder, cases)[0]
    assert expected[-1][0] < expected[0][0] - 0.05, "the loss falls"
    close(fused, expected, rtol=1e-4)
    short = [{"overrides": LORA[:4], "micro_rows": 2, "steps": 4}]
    without = run_ranks(1, trained, folder, short)[0][0]
    assert abs(without[3][0] - expected[3][0]) > 1e-3, "adapters of experts matter"
    more = [["parallel.activation_checkpointing=full"], ["parallel.compile=true"]]
    cases = [{"overrides": [*LORA, *other], "micro_rows": 2, "steps": 4} for other in ([], *more)]
    for curve in run_ranks(2, trained, folder, cases)[0]:
        close(curve, expected[:4], rtol=3e-5)


def exported(rank: int, world: int, folder: str, home: str) -> tuple[torch.Tensor, list[str]]:
    """Log-probabilities of a batch under the trained model, which is exported in both ways; what its layers run on."""
    from rayft.checkpoint.huggingface import export_adapter, export_full
    from rayft.data.reader import micro_batches
    from rayft.losses.supervised import NEED, next_token
    from rayft.models.load import named_trainable
    from rayft.optim.build import build_optimizer
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model
    from rayft.train.step import forward_backward, update

    cfg: Any = load([], ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", *LORA])
    session = Session(rank, world, rank, "cpu", Path(home), lambda *_: None, 60)
    mesh, reader = build_mesh("cpu", world), RowsInMemory(make_rows(LENGTHS))
    model = build_model(cfg, session, mesh)
    optimizer = build_optimizer(named_trainable(model), cfg.optim, fused=True)
    for step in range(5):
        batches = micro_batches(reader, step, rows=4, micro_rows=2, rank=rank, world=world)  # type: ignore[arg-type]
        forward_backward([model], batches, next_token, NEED, mesh)
        update([model], optimizer, 1.0)
    export_adapter(model, cfg.model, cfg.adapter, Path(home, "adapter"), 5)
    export_full(model, cfg.model, torch.float32, Path(home, "merged"), 5)
    export_full(model, cfg.model, torch.float32, f"file://{home}/stored", 5)
    model.eval()
    with torch.no_grad():
        logprobs = model.score(make_batch([[40]]), "logprobs").logprobs
    assert isinstance(logprobs, torch.Tensor)
    return logprobs.view(-1), [name for name, _ in named_trainable(model)]


@pytest.mark.parametrize("world", [1, 2])
def test_exports_are_read_by_peft_and_transformers(world: int, folder: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    (tmp_path / "stored").mkdir()
    (ours, names), *_ = run_ranks(world, exported, folder, str(tmp_path))
    assert len(set(names)) == len(names) == 2 * (3 * 4 + 2 * 2), "attention of 3 layers, two stacks of 2 layers"
    batch = make_batch([[40]])
    tokens, targets = batch.tokens.view(1, -1).long(), batch.targets.view(-1)
    counted = (targets >= 0) & (batch.loss_weights.view(-1) > 0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logprobs(model: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens).logits[0, counted]
        return logits.log_softmax(-1).gather(-1, targets[counted, None].long())[:, 0]

    untrained = logprobs(base)
    assert (untrained - ours).abs().max() > 0.05
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), str(tmp_path / "adapter"))
    torch.testing.assert_close(logprobs(adapted), ours, rtol=1e-4, atol=1e-4)
    for kind in ("merged", "stored"):
        merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / kind), dtype=torch.float32)
        torch.testing.assert_close(logprobs(merged), ours, rtol=1e-4, atol=1e-4)
        with safe_open(tmp_path / kind / "model.safetensors", "pt") as file, safe_open(Path(folder) / "model.safetensors", "pt") as first:
            assert set(file.keys()) == set(first.keys())
