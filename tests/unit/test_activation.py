"""What each kind of checkpointing runs again and what offloading takes away, on small layers; gradients stay equal, bit by bit."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from rayft.parallel import activation, offload

LAYERS, TOKENS, HIDDEN = 3, 24, 32
Recompute = Literal["none", "selective", "full"]
MODES: tuple[Recompute, ...] = ("none", "selective", "full")


class Layer(nn.Module):
    """Attention and an MLP; counts the calls of both."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)
        self.attended = self.forwarded = 0
        self.attention = activation.keeping_attention(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        self.attended += 1
        return torch.tanh(q.contiguous()) * k.contiguous() + v, None  # autograd keeps the first two, and whoever reads the result

    def forward(self, hidden: Tensor, *, shift: Tensor) -> Tensor:
        self.forwarded += 1
        hidden = hidden + self.out(self.attention(*(self.qkv(hidden) * shift).chunk(3, -1))[0])
        return hidden + self.down(torch.tanh(self.up(hidden)))


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(LAYERS))


def backward(model: nn.ModuleList, seed: int = 0) -> list[Tensor]:
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    shift, out = torch.ones(TOKENS, 3 * HIDDEN), hidden
    for layer in model:
        out = layer(out, shift=shift)
    out.square().sum().backward()
    assert hidden.grad is not None
    return [hidden.grad, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize(("recompute", "away"), [*itertools.product(MODES, (False, True))])
def test_gradients_are_equal_and_only_what_is_meant_runs_again(recompute: Recompute, away: bool) -> None:
    expected = backward(layers(), 1)
    model = layers()
    activation.wrap_layers(model, compile_layers=False, recompute=recompute, offload=away)
    backward(model)
    with torch.no_grad():
        model[1](torch.zeros(TOKENS, HIDDEN), shift=torch.ones(TOKENS, 3 * HIDDEN))
    model.zero_grad()
    for layer in model:
        layer.attended = layer.forwarded = 0
    for got, wanted in zip(backward(model, 1), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    again = 1 + (recompute != "none")
    assert [layer.forwarded for layer in model] == [again] * LAYERS
    assert [layer.attended for layer in model] == [2 if recompute == "full" else 1] * LAYERS


@pytest.mark.parametrize("recompute", MODES)
def test_what_is_offloaded_is_saved_once_and_lives_until_its_backward(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[Any]] = []
    sizes: list[int] = []
    init = offload._Copy.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        copies.append(weakref.ref(self))
        sizes.append(self.host.numel())

    monkeypatch.setattr(offload._Copy, "__init__", noted)
    model = layers()
    activation.wrap_layers(model, compile_layers=False, recompute=recompute, offload=True)
    backward(model)
    assert not any(copy() for copy in copies), "a copy outlives its backward"
    one = TOKENS * HIDDEN
    # The layer's input; what attention keeps, and its output; the MLP's input and inner value. No weight, and not what layers share.
    of_a_layer = {"full": [one], "selective": [one] * 4, "none": [*[one] * 5, 2 * one]}[recompute]
    assert sorted(sizes) == sorted(of_a_layer * (LAYERS - 1))


def test_between_forward_and_backward_only_two_layers_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    host = offload.Offload()
    monkeypatch.setattr(activation, "Offload", lambda: host)
    model = layers()
    activation.wrap_layers(model, compile_layers=False, recompute="full", offload=True)
    here: list[int] = []
    packed: list[Any] = []
    pack = host.pack

    def noted(tensor: Tensor) -> Any:
        packed.append(pack(tensor))
        here.append(sum(copy.device is not None for copy in packed))
        return packed[-1]

    host.pack = noted  # type: ignore[method-assign]
    backward(model)
    assert max(here) <= 2
    assert all(copy.device is None for copy in packed)
