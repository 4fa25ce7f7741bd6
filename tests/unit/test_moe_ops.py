"""The experts' operation on the CPU: values and gradients in float64, operators as torch wants them, refusals, routing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import check_moe
from bench.check_moe import Case
from rayft_kernels import ExpertAdapter, moe_lora
from rayft_kernels.moe_lora import steps
from rayft_kernels.moe_lora.routing import TILE, route

SMALL = {"tokens": 9, "experts": 4, "hidden": 5, "inter": 3, "rank": 2}


@pytest.mark.parametrize("name", [name for name in check_moe.CASES if name != "many experts, top 8"])
def test_values_and_gradients_in_float64(name: str) -> None:
    check_moe.check_against(check_moe.CASES[name], torch.float64, "cpu")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_finite_differences(activation: str, transposed: bool) -> None:
    case = Case(**SMALL, trained=True, transposed=transposed, activation=activation)  # type: ignore[arg-type]
    given, index = check_moe.made(case, "cpu"), check_moe.choices(case, "cpu")
    leaves = [value.clone().requires_grad_() for value in given if value is not None]
    assert torch.autograd.gradcheck(lambda *values: check_moe.ours(case, index, check_moe.Inputs(*values)), leaves, fast_mode=True)


def test_operators_are_as_torch_wants_them() -> None:
    case = Case(**SMALL)  # type: ignore[arg-type]
    x, weights, gate_up, *_ = check_moe.cast(check_moe.made(case, "cpu"), torch.float32)
    way = route(check_moe.choices(case, "cpu"), case.experts)
    rows = way.order.numel()
    factor = {width: torch.randn(case.experts, 16, width) for width in (case.hidden, case.inter, 2 * case.inter)}
    sorting = (way.order, way.ends, way.tiles)
    low, packed, h = torch.randn(rows, 16), torch.randn(rows, 2 * case.inter), torch.randn(rows, case.inter)
    calls = {
        steps.low: (x, factor[case.hidden], *sorting, 0.5, 2),
        steps.product: (x, gate_up, low, factor[2 * case.inter], *sorting, 2),
        steps.activate: (packed, factor[case.inter], way.ends, way.tiles, 0.5, "silu"),
        steps.activate_backward: (h, packed, torch.rand(rows), factor[2 * case.inter], way.ends, way.tiles, 0.5, "silu", True),
        steps.gram: (x, low, way.order, way.ends, 2, 0, torch.float32),
        steps.combine: (torch.randn(rows, case.hidden), way.place, weights, 2),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(operator, arguments)


def test_routing_sorts_by_expert_and_cuts_tiles_of_one_expert() -> None:
    torch.manual_seed(0)
    index = torch.randint(0, 7, (300, 3)) * torch.randint(0, 2, (300, 3))  # expert 0 has most
    index[index == 4] = 5
    way = route(index, 9)
    chosen = index.flatten()[way.order.long()]
    assert torch.equal(chosen, index.flatten().sort().values)
    assert torch.equal(way.order[way.place.long()].long(), torch.arange(900))
    assert way.ends.tolist() == [int((index <= expert).sum()) for expert in range(9)]
    covered: list[int] = []
    for expert, first, stop in way.tiles.tolist():
        if expert >= 0:
            rows = range(first, min(first + TILE, stop))
            assert rows and (chosen[rows.start : rows.stop] == expert).all()
            covered += rows
    assert covered == list(range(900))


def _call(**changed: object) -> Tensor:
    given = {"x": torch.randn(2, 4), "index": torch.zeros(2, 1).long(), "weights": torch.ones(2, 1)}
    stacks = {"gate_up": torch.randn(3, 10, 4), "down": torch.randn(3, 4, 5)}
    return moe_lora(**(given | stacks | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation": "relu"}, "must be one of"),
        ({"transposed": True}, "Check `transposed`"),
        ({"down": torch.randn(3, 5, 4)}, "are no stacks"),
        ({"gate_up_adapter": ExpertAdapter(torch.randn(7, 4), torch.randn(10, 7), 1.0)}, "must be"),
        ({"down_adapter": ExpertAdapter(torch.randn(3 * 129, 5), torch.randn(4, 3 * 129), 1.0)}, "at most 128"),
    ],
)
def test_what_does_not_belong_together_is_refused(changed: dict[str, object], message: str) -> None:
    assert _call().shape == (2, 4)
    with pytest.raises(ValueError, match=message):
        _call(**changed)
