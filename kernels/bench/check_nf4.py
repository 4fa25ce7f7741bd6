"""Checks of the 4-bit weights on any device: the kernel against the torch body, bit for bit, and LoRA nodes on 4-bit weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.checks import assert_equal, poisoned_memory, randn
from rayft_kernels import NF4, Projection, dequantise, lora_linears, lora_mlp, quantise
from rayft_kernels.nf4.op import dequantise_rows

GROUPS = (
    ((64, 64),),
    ((300, 192), (7, 64)),
    ((256, 128), (65, 128), (130, 128)),
    ((96, 64), (5, 640), (33, 64), (1, 64), (210, 128)),
)
"""Weights that are made together: fewer, as many and more than a launch takes, of whole and broken tiles."""


def drawn(shapes: Sequence[tuple[int, int]], device: str) -> list[NF4]:
    """One weight for each (out, in), quantised on a CPU, so that every device has the same."""
    return [
        NF4(*(part.to(device) for part in quantise(randn(*shape, device="cpu", dtype=torch.float32, seed=i))))
        for i, shape in enumerate(shapes)
    ]


def check_values(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: str, make: Callable[..., list[Tensor]] = dequantise
) -> None:
    """Bit for bit the torch body's on a CPU, with memory poisoned."""
    weights = drawn(shapes, device)
    with poisoned_memory():
        found = make(weights, dtype)
    assert_equal([value.cpu() for value in found], [dequantise_rows(NF4(*(part.cpu() for part in w)), dtype, 0) for w in weights])


def check_quantise(device: str) -> None:
    """A device quantises as a CPU does; the mean of scales may differ in its last bit, by the order of its sum."""
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        weight = randn(512, 320, device="cpu", dtype=dtype, seed=seed)
        here, there = quantise(weight), quantise(weight.to(device))
        assert torch.equal(here.codes, there.codes.cpu()), "codes differ"
        torch.testing.assert_close(there.outer.cpu(), here.outer, rtol=1e-6, atol=1e-7)
        off = (there.scales.cpu().int() - here.scales.int()).abs()
        assert off.max() <= 1 and off.count_nonzero() <= len(off) // 50, f"{off.count_nonzero()} scales differ"


def check_linears(dtype: torch.dtype, device: str) -> None:
    """LoRA projections and MLP on 4-bit weights are those on the same weights made dense."""
    shapes = ((128, 64), (128, 64), (64, 128))
    weights = drawn(shapes, device)
    ones = [
        Projection(
            dense,
            None,
            randn(4, shape[1], device=device, dtype=dtype, seed=10 + i).requires_grad_(),
            (randn(shape[0], 4, device=device, dtype=dtype, seed=20 + i) / 8).requires_grad_(),
            2.0,
        )
        for i, (dense, shape) in enumerate(zip(dequantise(weights, dtype), shapes, strict=True))
    ]
    held = [one._replace(weight=weight) for one, weight in zip(ones, weights, strict=True)]
    x = randn(37, 64, device=device, dtype=dtype, seed=5).requires_grad_()

    def run(some: Sequence[Projection]) -> list[Tensor]:
        outs = [lora_mlp(x, *some, "silu"), *lora_linears(x, some[:2])]
        leaves = [x, *(tensor for one in some for tensor in (one.a, one.b) if tensor is not None)]
        return [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])]

    assert_equal(run(held), run(ones))


def checks(device: str) -> dict[str, Callable[[], None]]:
    """Every check by name."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        kind = str(dtype).removeprefix("torch.")
        for shapes in GROUPS:
            found[f"nf4 {kind} {'+'.join(f'{rows}x{columns}' for rows, columns in shapes)}"] = partial(check_values, shapes, dtype, device)
    found["nf4 quantise"] = partial(check_quantise, device)
    found["nf4 lora bfloat16"] = partial(check_linears, torch.bfloat16, device)
    found["nf4 lora float32"] = partial(check_linears, torch.float32, device)
    return found
