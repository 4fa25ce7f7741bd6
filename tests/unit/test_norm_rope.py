"""Norm + RoPE: gradients, equality with the formula written out, and what surrounds a call. Triton bodies: test_kernel_bodies.py."""

from __future__ import annotations

import math

import pytest
import torch

from bench import check_rms_norm
from bench.check_norm_rope import CASES, Case, checks
from rayft_kernels import norm_rope, qkv_norm_rope, rms_norm

SMALL = tuple(case for case in CASES if case.seq < 100)
CHECKS = checks("cpu", (torch.float32, torch.bfloat16), SMALL, casts_case=Case(heads=(4, 2, 2)), backend="aot_eager")
CHECKS |= check_rms_norm.checks("cpu", (torch.float32, torch.bfloat16), ((1, 2), (2, 5, 760), (0, 64)), backend="aot_eager")


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name]()


@pytest.mark.parametrize(
    ("rotated", "absent", "unit_offset"),
    [(8, "", False), (4, "", True), (0, "", False), (8, "k", True), (4, "v", False), (8, "weights", False)],
)
def test_gradients_in_float64(rotated: int, absent: str, unit_offset: bool) -> None:
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

    q, k, v, wq, wk = leaf(2, 2, 2, 8), leaf(2, 2, 1, 8), leaf(2, 2, 1, 8), leaf(8), leaf(8)
    cos, sin = (torch.randn(1, 2, rotated, generator=g, dtype=torch.float64) if rotated else None for _ in range(2))
    given = {"q": q, "k": k, "v": v, "q_weight": wq, "k_weight": wk}
    hidden = {"": (), "k": ("k", "k_weight"), "v": ("v",), "weights": ("q_weight", "k_weight")}[absent]
    leaves = {name: x for name, x in given.items() if name not in hidden}

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        named = dict.fromkeys(given) | dict(zip(leaves, tensors, strict=True))
        out = qkv_norm_rope(*named.values(), cos, sin, unit_offset=unit_offset)
        return [y for y in out if y is not None]

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


def test_rotation_is_a_turn_of_the_complex_plane() -> None:
    """Columns j and j + n/2 are the parts of a complex number that is turned by the position's angle; the rest stays."""
    x = torch.randn(5, 3, 16, dtype=torch.float64)
    angle = torch.arange(5)[:, None] * torch.logspace(0, -2, 4, dtype=torch.float64)
    tables = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    y = norm_rope(x, None, *tables, eps=1e-12)
    n = x * math.sqrt(16) / x.norm(dim=-1, keepdim=True)
    turned = torch.complex(n[..., :4], n[..., 4:8]) * torch.exp(1j * angle)[:, None]
    torch.testing.assert_close(y, torch.cat((turned.real, turned.imag, n[..., 8:]), -1))


def test_packed_rows_equal_a_batch_of_one() -> None:
    q, k, cos, sin = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 8), torch.randn(7, 8)
    flat = qkv_norm_rope(q, k, None, None, None, cos, sin)
    batch = qkv_norm_rope(q[None], k[None], None, None, None, cos[None], sin[None])
    assert torch.equal(flat[0], batch[0][0]) and torch.equal(flat[1], batch[1][0]) and flat[2] is None


@pytest.mark.parametrize("unit_offset", [False, True])
def test_gradients_of_rms_norm_in_float64(unit_offset: bool) -> None:
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (6,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, unit_offset=unit_offset), (x, w))
    assert torch.autograd.gradcheck(rms_norm, (x,))


@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_is_that_of_torch(unit_offset: bool) -> None:
    x, w = torch.randn(2, 3, 64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(x, (64,), w + 1 if unit_offset else w, 1e-5)
    torch.testing.assert_close(rms_norm(x, w, eps=1e-5, unit_offset=unit_offset), expected)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"cos": torch.ones(2, 4, 8)}, "cos has shape"),
        ({"sin": None}, "together"),
        ({"q_weight": torch.ones(4)}, "q_weight has shape"),
        ({"k": torch.ones(1, 3, 2, 6)}, "k is"),
        ({"k": torch.ones(1, 3, 2, 8, dtype=torch.float64)}, "k is"),
        ({"eps": 0.0}, "eps 0.0"),
        ({"casts": "twice"}, "'twice'"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, object], sentence: str) -> None:
    right = {"q": torch.ones(1, 3, 2, 8), "k": None, "v": None, "q_weight": None, "k_weight": None, "cos": torch.ones(1, 3, 8)}
    right |= {"sin": torch.ones(1, 3, 8)}
    with pytest.raises(ValueError, match=sentence):
        qkv_norm_rope(**right | changed)
