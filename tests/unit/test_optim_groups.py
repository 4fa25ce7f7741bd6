"""Which parameters share a learning rate and a weight decay, and which rows of them are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rayft.config.schema import Optim
from rayft.errors import ConfigError
from rayft.models.select import hold_rows, unfreeze
from rayft.optim.build import build_optimizer, set_lr
from rayft.optim.groups import parameter_groups

SHAPES = {
    "embed.weight": (9, 4),
    "layers.0.q.weight": (4, 4),
    "layers.0.q.lora_A.weight": (2, 4),
    "layers.0.q.lora_B.weight": (4, 2),
    "layers.0.norm.weight": (4,),
    "experts": (2, 4, 4),
    "head.weight": (9, 4),
}
NAMED = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in SHAPES.items()]
ENDS = {"embed.weight", "head.weight"}


def groups(**fields: Any) -> list[tuple[list[str], float, float, bool]]:
    """(names, lr over optim.lr, weight decay, orthogonal) of each group."""
    names = {id(parameter): name for name, parameter in NAMED}
    made = parameter_groups(NAMED, Optim(**{"lr": 1e-3, "weight_decay": 0.5} | fields), ENDS)
    assert sorted(names[id(p)] for group in made for p in group["params"]) == sorted(SHAPES)
    return [([names[id(p)] for p in g["params"]], g["lr_ratio"], g["weight_decay"], g.get("orthogonal", False)) for g in made]


def test_matrices_decay_and_vectors_do_not() -> None:
    matrices = [name for name in SHAPES if "norm" not in name]
    assert groups() == [(matrices, 1.0, 0.5, False), (["layers.0.norm.weight"], 1.0, 0.0, False)]


def test_every_field_makes_its_group() -> None:
    found = groups(embedding_lr=2e-4, loraplus_lr_ratio=16.0, no_decay=("experts", ".*q.weight"))
    assert found == [
        (["layers.0.q.lora_A.weight"], 1.0, 0.5, False),
        (["layers.0.q.weight", "layers.0.norm.weight", "experts"], 1.0, 0.0, False),
        (["embed.weight", "head.weight"], pytest.approx(0.2), 0.5, False),
        (["layers.0.q.lora_B.weight"], 16.0, 0.5, False),
    ]
    assert groups(embedding_lr_ratio=0.2)[2:] == [(["embed.weight", "head.weight"], 0.2, 0.5, False)]


def test_muon_takes_hidden_matrices_only() -> None:
    hidden = ["layers.0.q.weight", "layers.0.q.lora_A.weight", "layers.0.q.lora_B.weight"]
    assert groups(type="muon")[0] == (hidden, 1.0, 0.5, True)
    assert all(not orthogonal for _, _, _, orthogonal in groups(type="muon")[1:])


def test_ratios_hold_at_every_step() -> None:
    optimizer = build_optimizer(NAMED, Optim(lr=1e-3, embedding_lr=2e-4, loraplus_lr_ratio=4.0), fused=False, embeddings=ENDS)
    for lr in (1e-3, 1e-5, 0.0):
        set_lr(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr, lr * 0.2, lr * 4])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"no_decay": ("norm",)}, r"optim.no_decay = 'norm': matches none of the parameters .*, whose names are like embed.weight"),
        ({"no_decay": ("(",)}, r"optim.no_decay = '\(': is not a regular expression"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        groups(**fields)


def test_a_rate_for_frozen_embeddings_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim.embedding_lr_ratio = 0.1: is for input embeddings .* neither is trained"):
        parameter_groups(NAMED[1:4], Optim(embedding_lr_ratio=0.1), ENDS)


def model() -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(9, 4), "a": nn.Linear(4, 6), "b": nn.Linear(4, 6)})


@pytest.mark.parametrize(
    ("patterns", "trained", "rows"),
    [
        (["a"], ["a.weight", "a.bias"], {}),
        ([".*weight"], ["embed.weight", "a.weight", "b.weight"], {}),
        ([r"embed\.weight[2:5]"], ["embed.weight"], {"embed.weight": ((2, 5),)}),
        (["embed.weight[7:]", "embed.weight[:2]", "embed.weight[1:3]"], ["embed.weight"], {"embed.weight": ((0, 3), (7, 9))}),
        (["embed.weight[3]", "embed.weight[4]", "b.bias"], ["embed.weight", "b.bias"], {"embed.weight": ((3, 5),)}),
        (["embed.weight[:5]", "embed.weight[5:]"], ["embed.weight"], {}),
        (["[ab].weight[1]"], ["a.weight", "b.weight"], {"a.weight": ((1, 2),), "b.weight": ((1, 2),)}),
    ],
)
def test_unfrozen(patterns: list[str], trained: list[str], rows: dict[str, Any]) -> None:
    module = model()
    assert unfreeze(module, patterns) == rows
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == trained


@pytest.mark.parametrize("pattern", ["weight", "embed.weight[9]", "embed.weight[5:10]", "embed.weight[3:3]", "embed.weight[9:]", "(["])
def test_unfrozen_that_selects_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"model.unfrozen = "):
        unfreeze(model(), [pattern])


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_other_rows_stay_as_they_are(weight_decay: float) -> None:
    module = model()
    rows = unfreeze(module, ["embed.weight[2:5]", "a"])
    hold_rows(module, rows)
    optim = Optim(lr=1e-2, weight_decay=weight_decay)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(module.named_parameters(), optim, fused=False, partial=rows)
    for _ in range(2):
        sum(parameter.square().sum() for parameter in module.parameters() if parameter.requires_grad).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (module["embed"].weight != before["embed.weight"]).any(1).tolist()
    assert moved == [2 <= row < 5 for row in range(9)]
    reference = nn.Parameter(before["embed.weight"][2:5].clone())
    plain = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.95), weight_decay=weight_decay)
    for _ in range(2):
        plain.zero_grad()
        reference.square().sum().backward()
        plain.step()
    torch.testing.assert_close(module["embed"].weight[2:5], reference)
