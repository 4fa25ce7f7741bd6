"""AdamW as built against its update written out in float64."""

from __future__ import annotations

import pytest
import torch

from rayft.config.schema import Optim
from rayft.errors import ConfigError
from rayft.optim.build import build_optimizer, set_lr

OPTIM = Optim(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)


def parameters() -> list[tuple[str, torch.nn.Parameter]]:
    g = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (5, 3), "norm.weight": (3,), "frozen.weight": (2, 2), "experts.weight": (2, 3, 4), "bias": (4,)}
    named = [(name, torch.nn.Parameter(torch.randn(shape, generator=g))) for name, shape in shapes.items()]
    dict(named)["frozen.weight"].requires_grad_(False)
    return named


@pytest.mark.parametrize("fused", [False, True])
def test_three_steps_equal_the_written_out_update(fused: bool) -> None:
    named = parameters()
    optimizer = build_optimizer(named, OPTIM, fused=fused)
    expected = {name: p.detach().double().clone() for name, p in named}
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in expected.items()}
    g = torch.Generator().manual_seed(1)
    for step, lr in enumerate((1e-2, 5e-2, 3e-3), start=1):
        set_lr(optimizer, lr)
        for name, p in named:
            gradient = torch.randn(p.shape, generator=g)
            if not p.requires_grad:
                continue
            p.grad = gradient
            first, second = moments[name]
            first.mul_(0.8).add_(0.2 * gradient.double())
            second.mul_(0.9).add_(0.1 * gradient.double() ** 2)
            unbiased, scale = first / (1 - 0.8**step), (second / (1 - 0.9**step)).sqrt() + 1e-6
            decay = 1 - lr * 0.3 if p.ndim >= 2 else 1.0
            expected[name] = expected[name] * decay - lr * unbiased / scale
        optimizer.step()
    for name, p in named:
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_groups_hold_the_trainable_in_order() -> None:
    named = parameters()
    by_name = dict(named)
    matrices, vectors = build_optimizer(named, OPTIM, fused=False).param_groups
    assert [id(p) for p in matrices["params"]] == [id(by_name[name]) for name in ("embed.weight", "experts.weight")]
    assert [id(p) for p in vectors["params"]] == [id(by_name[name]) for name in ("norm.weight", "bias")]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)


def test_adapters_alone_make_one_group_whose_state_can_be_saved_and_loaded() -> None:
    named = [("lora_A", torch.nn.Parameter(torch.ones(2, 3))), ("norm", torch.nn.Parameter(torch.ones(3), requires_grad=False))]
    optimizer = build_optimizer(named, OPTIM, fused=False)
    assert len(optimizer.param_groups) == 1
    other = build_optimizer(named, OPTIM, fused=False)
    other.load_state_dict(optimizer.state_dict())


def test_nothing_to_train_is_refused() -> None:
    frozen = [("weight", torch.nn.Parameter(torch.ones(2, 2), requires_grad=False))]
    with pytest.raises(ConfigError, match="no parameter to train"):
        build_optimizer(frozen, OPTIM, fused=False)
