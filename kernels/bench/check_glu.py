"""Checks of the gated activations on any device: against float64, against themselves in other surroundings, beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bench.checks import assert_as_exact_as, assert_equal, poisoned_memory, randn, results
from rayft_kernels import glu, glu_packed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
}
SHAPES = ((1, 1), (7, 96), (3, 5, 4104), (129, 2049), (0, 64))


def written_out(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The op in plain torch."""
    return ACTIVATIONS[activation](gate) * up


def pair(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    """gate and up as halves of one projection."""
    return list((3 * randn(*shape[:-1], 2 * shape[-1], device=device, dtype=dtype)).chunk(2, -1))


def check_error(activation: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """At most twice the error of torch in the same type; the packed form is equal to the bit."""
    tensors = pair(shape, device, dtype)
    grad = randn(*shape, device=device, dtype=dtype, seed=9)
    ours = results(partial(glu, activation=activation), tensors, [grad])
    reference = partial(written_out, activation=activation)
    exact = results(reference, [t.double() for t in tensors], [grad.double()])
    assert_as_exact_as(ours, results(reference, tensors, [grad]), exact)
    packed = results(partial(glu_packed, activation=activation), [torch.cat(tensors, -1)], [grad])
    assert_equal(packed, [ours[0], torch.cat(ours[1:], -1)])


def check_twice(device: str, dtype: torch.dtype) -> None:
    """Equal to the bit on memory full of NaN, on copies instead of views, and with an expanded gradient written out."""
    tensors, grad = pair((12, 320), device, dtype), torch.ones((), device=device, dtype=dtype).expand(12, 320)
    first = results(glu, tensors, [grad])
    with poisoned_memory():
        assert_equal(results(glu, tensors, [grad]), first)
        results(glu_packed, [torch.cat(tensors, -1)], [grad])
    assert_equal(results(glu, [t.contiguous() for t in tensors], [grad.contiguous()]), first)
    assert_equal(results(glu, [t.contiguous().t().contiguous().t() for t in tensors], [grad]), first)


def check_extremes(device: str, dtype: torch.dtype) -> None:
    """Large gates give finite numbers: the sigmoid ends at 0 and 1."""
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=device, dtype=dtype)
    for activation in ACTIVATIONS:
        ours = results(partial(glu, activation=activation), [gate, torch.ones_like(gate)], [torch.ones_like(gate)])
        exact = results(
            partial(written_out, activation=activation), [gate.double(), torch.ones_like(gate).double()], [torch.ones_like(gate)]
        )
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def check_operator(device: str) -> None:
    """torch's own checks of schema, fake tensors and autograd of the operators."""
    gate, up = (t.contiguous() for t in pair((2, 8), device, torch.float32))
    ops = torch.ops.rayft_kernels
    torch.library.opcheck(ops.glu.default, (gate.requires_grad_(), up.requires_grad_(), "silu"))
    torch.library.opcheck(ops.glu_packed.default, (torch.cat((gate, up), -1).detach().requires_grad_(), "gelu"))
    torch.library.opcheck(ops.glu_backward.default, (gate.detach(), gate.detach(), up.detach(), "gelu_tanh"))
    torch.library.opcheck(ops.glu_packed_backward.default, (gate.detach(), torch.cat((gate, up), -1).detach(), "silu"))


def check_surroundings(device: str, backend: str) -> None:
    """Compiled without a graph break or checkpointed: the same numbers."""
    tensors, grad = pair((9, 64), device, torch.float32), randn(9, 64, device=device, dtype=torch.float32, seed=9)
    plain = results(glu, tensors, [grad])
    assert_equal(results(torch.compile(glu, fullgraph=True, backend=backend), tensors, [grad]), plain)
    assert_equal(results(partial(checkpoint, glu, use_reentrant=False), tensors, [grad]), plain)


def check_large(device: str) -> None:
    """More than 2^31 elements, contiguous and as halves of a packed projection: the last rows are those of a small call."""
    rows, cols = 2**18 + 8, 8200
    packed = torch.empty(rows, 2 * cols, device=device, dtype=torch.bfloat16).normal_()
    for gate, up in (packed.chunk(2, -1), packed.view(2, rows, cols)):
        whole = results(glu, [gate, up], [up])
        assert_equal([t[-8:] for t in whole], results(glu, [gate[-8:], up[-8:]], [up[-8:]]))
        del whole


def checks(
    device: str, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...] = SHAPES, backend: str = "inductor"
) -> dict[str, Callable[[], None]]:
    """Every check by name; that of memory beyond 2^31 elements is left to the caller."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        for shape in shapes:
            name = f"{kind} {'x'.join(map(str, shape))}"
            found |= {f"glu error {act} {name}": partial(check_error, act, shape, dtype, device) for act in ACTIVATIONS}
        found[f"glu twice {kind}"] = partial(check_twice, device, dtype)
        found[f"glu extremes {kind}"] = partial(check_extremes, device, dtype)
    found["glu operator"] = partial(check_operator, device)
    found["glu compile, checkpoint"] = partial(check_surroundings, device, backend)
    return found
