"""Weights cast where they are used, against weights cast by hand and against FSDP's mixed precision."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayft.parallel.cast import in_type


def layer(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6, bias=False))


def cast_by_hand(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    low = copy.deepcopy(module).bfloat16()
    out = low(x)
    out.float().square().sum().backward()
    return out.detach(), {name: p.grad for name, p in low.named_parameters() if p.grad is not None}


def test_outputs_and_gradients_are_those_of_cast_weights_and_parameters_stay_themselves() -> None:
    module, x = layer(), torch.randn(5, 6).bfloat16()
    module[2].weight.requires_grad_(False)
    held = dict(module.named_parameters())
    expected, grads = cast_by_hand(module, x)
    for recompute in (False, True):
        module.zero_grad()
        forward = in_type(module.forward, module.modules(), torch.bfloat16)
        out = checkpoint(forward, x, use_reentrant=False) if recompute else forward(x)
        assert {name: id(p) for name, p in module.named_parameters()} == {name: id(p) for name, p in held.items()}
        out.float().square().sum().backward()
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        assert module[2].weight.grad is None
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.dtype == torch.float32
                torch.testing.assert_close(parameter.grad, grads[name].float(), rtol=0, atol=0)


def test_a_frozen_weight_costs_no_gradient_of_its_own() -> None:
    module = layer()
    module.requires_grad_(False)
    module[0].bias.requires_grad_(True)
    out = in_type(module.forward, module.modules(), torch.bfloat16)(torch.randn(5, 6).bfloat16())
    wanted = [node for node, _ in out.grad_fn.next_functions if node is not None]
    assert len(wanted) == 1, "the last product must not lead to its frozen weight"


def test_a_shared_weight_is_cast_once_and_gets_both_gradients() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    x = torch.randn(3, 4).bfloat16()
    seen: list[bool] = []
    module[1].register_forward_pre_hook(lambda part, inputs: seen.append(part.weight is module[0].weight))
    in_type(module.forward, module.modules(), torch.bfloat16)(x).float().sum().backward()
    assert seen == [True]
    low = module[0].weight.detach().bfloat16().requires_grad_()
    (x @ low.t() @ low.t()).float().sum().backward()
    torch.testing.assert_close(module[0].weight.grad, low.grad.float(), rtol=0, atol=0)


def test_weights_are_put_back_when_the_forward_raises_and_nothing_is_wrapped_when_types_agree() -> None:
    module = layer()
    weight = module[0].weight
    try:
        in_type(module.forward, module.modules(), torch.bfloat16)(torch.randn(5, 7).bfloat16())
    except RuntimeError:
        assert module[0].weight is weight
    else:
        raise AssertionError("shapes do not fit")
    assert in_type(module.forward, module.modules(), torch.float32) == module.forward
