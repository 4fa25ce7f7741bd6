"""The Triton bodies of packed attention: interpreted on a CPU, and on a CUDA device, each check of kernels/bench."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import check_attention
from families import make_batch, write_model
from rayft.config.load import load
from rayft.losses.supervised import NEED
from rayft.models import heads
from rayft.models import load as loading
from rayft.parallel import activation, attention
from rules.source_tree import ROOT

CHECKS = {dim: check_attention.checks("cuda", (torch.bfloat16,), (dim,)) for dim in (64, 128, 256, 512)}


def test_interpreted_bodies_pass_their_checks() -> None:
    pytest.importorskip("triton")
    environment = {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    program = str(ROOT / "tests" / "interpreted_attention.py")
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") >= 13


def loss_and_gradients(folder: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Of a model whose layers are wrapped as in a run, on packed rows."""
    cfg = load([], ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", *overrides])
    loading.register_attention(attention.packed_attention)
    module: Any = loading.build(cfg.model, loading.read_config(cfg.model), torch.float32)
    layers = loading.layers_of(module, "model.layers")
    activation.wrap_layers(layers, compile_layers=cfg.parallel.compile, recompute=cfg.parallel.activation_checkpointing, offload=False)
    heads.attach_score(module, attention.layouts(module, "auto"), 0)
    loading.materialise(module, cfg.model, 0, "cpu")
    loss = module.score(make_batch([[5, 1, 1, 20, 37], [64]]), NEED).nll_sum
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters()} | {"loss": loss.detach()}


def test_a_model_on_the_operator_is_the_one_on_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows in every other layer and a softcap; the operator inside of compiled and recomputed layers."""
    folder = write_model("gemma2", tmp_path)
    expected = loss_and_gradients(folder, [])
    monkeypatch.setattr(attention, "choose", lambda *_: ("triton", ""))
    for overrides in ([], ["parallel.compile=true", "parallel.activation_checkpointing=full"]):
        got = loss_and_gradients(folder, overrides)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert (got[name] - value).norm() <= 1e-5 * value.norm() + 1e-7, name


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "name"), [(dim, name) for dim, found in CHECKS.items() for name in found])
def test_check(dim: int, name: str) -> None:
    CHECKS[dim][name]()


@pytest.mark.gpu
def test_beyond_32_bits() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GiB")
    check_attention.check_large("cuda")
