"""Adafactor and Muon on whole tensors against torch's own, and 8-bit states through their plain form."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rayft.config.schema import Optim
from rayft.errors import ConfigError
from rayft.optim.build import build_optimizer, set_lr
from rayft.optim.eight_bit import as_float, take_float
from rayft.optim.muon import orthogonalise

SHAPES = {"experts.weight": (2, 3, 4), "tall.weight": (12, 5), "wide.weight": (5, 12), "bias": (7,)}


def parameters() -> dict[str, torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(0.3 * torch.randn(shape, generator=g)) for name, shape in SHAPES.items()}


def after(make: Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer], lrs: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """The weights after a step for each learning rate, on the same gradients."""
    named, g = parameters(), torch.Generator().manual_seed(1)
    optimizer = make(named)
    for lr in lrs:
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=g)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in named.items()}


def test_adafactor_equals_torch_s() -> None:
    section = Optim(type="adafactor", lr=1e-2, weight_decay=0.2)
    ours = after(lambda named: build_optimizer(named.items(), section, fused=True), (1e-2, 0.5, 3.0, 1e-3))

    def reference(named: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        matrices = [p for p in named.values() if p.ndim > 1]
        return torch.optim.Adafactor([{"params": matrices, "weight_decay": 0.2}, {"params": [named["bias"]], "weight_decay": 0.0}])

    for name, value in after(reference, (1e-2, 0.5, 3.0, 1e-3)).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_muon_equals_torch_s_up_to_its_bfloat16_iteration() -> None:
    section = Optim(type="muon", lr=1e-2, weight_decay=0.2, beta2=0.95)
    ours = after(lambda named: build_optimizer(named.items(), section, fused=True), (1e-2, 2e-2))

    def reference(named: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Muon([named["tall.weight"], named["wide.weight"]], weight_decay=0.2, adjust_lr_fn="match_rms_adamw")

    theirs = after(reference, (1e-2, 2e-2))
    for name in ("tall.weight", "wide.weight"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0.05 * 1e-2 * 0.2 * math.sqrt(12))
    rest = after(lambda named: torch.optim.AdamW(named.values(), betas=(0.9, 0.95), weight_decay=0.0), (1e-2, 2e-2))
    torch.testing.assert_close(ours["bias"], rest["bias"])
    moved = after(lambda named: torch.optim.AdamW(named.values(), betas=(0.9, 0.95), weight_decay=0.2), (1e-2, 2e-2))
    torch.testing.assert_close(ours["experts.weight"], moved["experts.weight"])


def test_orthogonalised_singular_values_are_near_one() -> None:
    for shape in ((40, 16), (16, 40), (16, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(2))))
        assert values.min() > 0.5 and values.max() < 1.3
    assert torch.equal(orthogonalise(torch.zeros(4, 8)), torch.zeros(4, 8))


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bit_states_come_back_to_the_bit(signed: bool) -> None:
    """Also blocks whose largest value is negative, which the plain values of the map would shrink each time."""
    pytest.importorskip("torchao")
    from torchao.optim.subclass_8bit import OptimState8bit

    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) ** 3
    values[:4] = 0
    state, copy = (OptimState8bit.zeros((64, 64), signed, 256) for _ in range(2))
    state.copy_(values if signed else values.abs())
    blocks = values.view(-1, 256)
    assert (blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) < 0).any()
    for _ in range(2):
        take_float(copy, as_float(state))
        assert torch.equal(copy.codes, state.codes) and torch.equal(copy.scale, state.scale)
        state, copy = copy, OptimState8bit.zeros((64, 64), signed, 256)
    plain = torch.ones(3)
    assert as_float(plain) is plain


def test_a_learning_rate_of_torchao_is_set_in_place() -> None:
    pytest.importorskip("torchao")
    optimizer: Any = build_optimizer(parameters().items(), Optim(type="adamw8bit"), fused=True)
    rate = optimizer.param_groups[0]["lr"]
    set_lr(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.25


def test_a_missing_torchao_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"optim.type = 'adamw8bit': needs the package torchao, .*pip install 'rayft\[optim8bit\]'"):
        build_optimizer(parameters().items(), Optim(type="adamw8bit"), fused=True)
