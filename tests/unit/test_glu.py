"""Gated activations: gradients in float64, and the checks of the torch bodies. Triton bodies: test_kernel_bodies.py."""

from __future__ import annotations

import pytest
import torch

from bench.check_glu import ACTIVATIONS, checks
from rayft_kernels import glu, glu_packed

CHECKS = checks("cpu", (torch.float32, torch.bfloat16), ((1, 1), (7, 96), (3, 5, 257), (0, 64)), backend="aot_eager")


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name]()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_in_float64(activation: str) -> None:
    gate, up = (2 * torch.randn(3, 5, dtype=torch.float64)).requires_grad_(), torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda g, u: glu(g, u, activation), (gate, up))
    assert torch.autograd.gradcheck(lambda x: glu_packed(x, activation), (torch.cat((gate, up), -1).detach().requires_grad_(),))


def test_wrong_arguments_are_named() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="'relu'"):
        glu(x, x, "relu")
    with pytest.raises(ValueError, match="must be alike"):
        glu(x, x.double())
    with pytest.raises(ValueError, match="3 columns"):
        glu_packed(x)
