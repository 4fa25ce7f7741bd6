"""Operations go round torch's dispatcher only where nobody looks on, and give the same there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rayft_kernels import Projection, TokenDropout, glu, glu_packed, lora_mlp, qkv_norm_rope, rms_norm
from rayft_kernels.direct import unobserved


class Names(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def low_rank(out: int, width: int) -> Projection:
    dropout = TokenDropout(torch.arange(4), torch.tensor(3), 0.25)
    return Projection(torch.ones(out, width), a=torch.ones(2, width), b=torch.ones(out, 2), dropout=dropout)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "norm_rope": lambda x: qkv_norm_rope(x[:, None], x[:, None], None, x[0], None, x.detach(), x.detach())[0],
    "rms_norm": lambda x: rms_norm(x, x[0]),
    "glu": lambda x: glu(x, x),
    "glu_packed": lambda x: glu_packed(x),
    "lora_mlp": lambda x: lora_mlp(x, low_rank(6, 8), low_rank(6, 8), low_rank(8, 6), "silu"),
}


def outputs_and_gradients(call: Callable[[Tensor], Any]) -> list[Tensor]:
    x = torch.linspace(-2, 2, 32).view(4, 8).requires_grad_()
    y = call(x)
    return [y, *torch.autograd.grad(y.square().sum(), x)]


def test_what_looks_on_is_seen() -> None:
    x = torch.ones(2)
    assert unobserved(x, None, nn.Parameter(x))
    with FakeTensorMode() as mode:
        assert not unobserved(x)
    assert not unobserved(x, mode.from_tensor(x))
    found: list[bool] = []
    torch.func.grad(lambda y: (found.append(unobserved(y)), y.sum())[1])(x)
    assert found == [False]
    assert torch.compile(lambda y: y + unobserved(y), backend="eager", fullgraph=True)(x).equal(x)


@pytest.mark.parametrize("name", CALLS)
def test_both_ways_give_the_same(name: str) -> None:
    plain = outputs_and_gradients(CALLS[name])
    with Names() as names:
        observed = outputs_and_gradients(CALLS[name])
    assert any("rayft_kernels" in seen for seen in names.seen) == (name != "lora_mlp")  # on a CPU that is plain torch
    assert all(torch.equal(a, b) for a, b in zip(observed, plain, strict=True))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "lora_mlp"])
def test_a_gradient_of_a_gradient_is_refused(name: str) -> None:
    x = torch.linspace(-2, 2, 32).view(4, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(CALLS[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_shapes_are_found_without_values() -> None:
    with FakeTensorMode():
        assert all(call(torch.ones(4, 8)).shape == outputs_and_gradients(call)[0].shape for call in list(CALLS.values())[:4])
