"""Checks of the decoder norm on any device: against float64, against itself in other surroundings, beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.checks import assert_as_exact_as, assert_equal, poisoned_memory, randn, results
from rayft_kernels import rms_norm

SHAPES = ((1, 2), (3, 192), (2, 5, 760), (199, 1128), (17, 4096), (0, 64))


def written_out(x: Tensor, weight: Tensor) -> Tensor:
    """The norm in plain torch, in float32 or wider with one cast at the end, as Gemma's."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * weight.to(wide)).to(x.dtype)


def check_error(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """At most twice the error of torch in the same type."""
    make = partial(randn, device=device, dtype=dtype)
    inputs, grad = [make(*shape), make(shape[-1], seed=1)], make(*shape, seed=2)
    exact = results(written_out, [x.double() for x in inputs], [grad.double()])
    assert_as_exact_as(results(rms_norm, inputs, [grad]), results(written_out, inputs, [grad]), exact)


def check_twice(dtype: torch.dtype, device: str) -> None:
    """Equal to the bit: run again, on memory full of NaN, with an expanded gradient; to rounding from strided rows or columns."""
    make = partial(randn, device=device, dtype=dtype)
    x, weight, grad = make(37, 96), make(96, seed=1), make(37, 96, seed=2)
    first = results(rms_norm, [x, weight], [grad])
    with poisoned_memory():
        assert_equal(results(rms_norm, [x, weight], [grad]), first)
    wide = torch.cat((x, x), -1)
    for view in (wide[:, :96], x.t().contiguous().t()):
        for a, b in zip(results(rms_norm, [view, weight], [grad.t().contiguous().t()]), first, strict=True):
            assert (a.double() - b.double()).norm() <= 8 * torch.finfo(dtype).eps * b.double().norm()
    ones = torch.ones((), device=device, dtype=dtype).expand(37, 96)
    assert_equal(results(rms_norm, [x, weight], [ones]), results(rms_norm, [x, weight], [ones.contiguous()]))


def check_surroundings(device: str, backend: str) -> None:
    """Compiled without a graph break, or checkpointed: the same numbers."""
    make = partial(randn, device=device, dtype=torch.float32)
    inputs, grad = [make(2, 9, 64), make(64, seed=1)], make(2, 9, 64, seed=2)
    plain = results(rms_norm, inputs, [grad])
    assert_equal(results(torch.compile(rms_norm, fullgraph=True, backend=backend), inputs, [grad]), plain)
    assert_equal(results(partial(checkpoint, rms_norm, use_reentrant=False), inputs, [grad]), plain)


def check_large(device: str) -> None:
    """More than 2^31 elements: the last rows are those of a small call."""
    x = torch.empty(2**19 + 8, 4104, device=device, dtype=torch.bfloat16).normal_()
    weight = torch.ones(4104, device=device, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    y, dx, _ = results(rms_norm, [x, weight], [x])
    assert_equal([y[-8:], dx[-8:]], results(rms_norm, [x[-8:], weight], [x[-8:]])[:2])


def checks(
    device: str, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...] = SHAPES, backend: str = "inductor"
) -> dict[str, Callable[[], None]]:
    """Every check by name; that of memory beyond 2^31 elements is left to the caller."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        found |= {f"rms_norm error {kind} {'x'.join(map(str, shape))}": partial(check_error, shape, dtype, device) for shape in shapes}
        found[f"rms_norm twice {kind}"] = partial(check_twice, dtype, device)
    found["rms_norm compile, checkpoint"] = partial(check_surroundings, device, backend)
    return found
