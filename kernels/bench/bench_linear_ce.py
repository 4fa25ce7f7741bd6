"""Linear cross entropy forward and backward: rayft, torch, and with the argument `peers` torch.compile, Liger and CCE, as CSV rows.

The limit is that of the matrix products alone, at the rate of the card: three with a trained head, two with a frozen one, four for
log-probabilities, whose logits are computed twice. Memory is the peak above inputs and gradients. The argument `parts` times the
pieces of an operation instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench.check_linear_ce import MEASURED
from bench.common import DEVICE, HEADER, bench, extra_mib, foreign, installed, limits, row
from rayft_kernels import token_logprobs, weighted_nll_sum
from rayft_kernels.linear_cross_entropy.scaling import scaled

DTYPE = torch.bfloat16
TINY = ((32, 16, 256),)
Loss = Callable[[Tensor, Tensor], Tensor]


def step(loss: Loss, hidden: Tensor, weight: Tensor) -> Callable[[], object]:
    """Forward and backward of one implementation, by what of hidden and weight wants a gradient."""
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    return lambda: torch.autograd.grad(loss(hidden, weight), leaves)


def rows(peers: bool, tiny: bool = False) -> Iterator[str]:
    """One row for each case and implementation."""
    for tokens, width, vocab in TINY if tiny else MEASURED:
        hidden = torch.randn(tokens, width, device=DEVICE, dtype=DTYPE).requires_grad_()
        weight = (torch.randn(vocab, width, device=DEVICE, dtype=DTYPE) / width**0.5).requires_grad_()
        targets, ones = torch.randint(0, vocab, (tokens,), device=DEVICE), torch.ones(tokens, device=DEVICE)
        product = 2 * tokens * width * vocab / limits().tflops / 1e9

        def line(impl: str, loss: Loss, products: int, w: Tensor, h: Tensor = hidden, product: float = product) -> str:
            call = step(loss, h, w)
            gradients = (h.numel() + (w.numel() if w.requires_grad else 0)) * h.element_size() / 2**20
            case = f"T{len(h)} H{h.shape[1]} V{len(w)}"
            mib = extra_mib(call) - gradients
            return row("linear_ce", case, impl, DTYPE, bench(call, rep=300), products * product, mib)

        def nll(h: Tensor, w: Tensor, lean: bool = False, y: Tensor = targets, ones: Tensor = ones) -> Tensor:
            return weighted_nll_sum(h, w, y, ones, lean=lean)

        def terms(h: Tensor, w: Tensor, y: Tensor = targets) -> Tensor:
            logprobs, entropy = token_logprobs(h, w, y)
            return logprobs.sum() + entropy.sum()

        yield line("rayft", nll, 3, weight)
        yield line("rayft lean", partial(nll, lean=True), 3, weight)
        yield line("rayft frozen", nll, 2, weight.detach())
        yield line("rayft logprobs", terms, 4, weight)
        yield line("rayft logprobs frozen", terms, 3, weight.detach())
        if peers:
            for name, loss in peer_losses(targets).items():
                yield from foreign(name, partial(map, line, (name, f"{name} frozen"), (loss,) * 2, (3, 2), (weight, weight.detach())))
        del hidden, weight
        torch.cuda.empty_cache()


def peer_losses(targets: Tensor) -> dict[str, Loss]:
    """What users would call instead, as far as it is installed."""

    def eager(h: Tensor, w: Tensor) -> Tensor:
        return functional.cross_entropy((h @ w.t()).float(), targets)

    found: dict[str, Loss] = {"torch": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    if DEVICE == "cpu":
        return found
    if liger := installed("liger_kernel.transformers"):
        module = liger.LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda h, w: module(w, h, targets)
    if cce := installed("cut_cross_entropy"):
        found["cce"] = lambda h, w: cce.linear_cross_entropy(h, w, targets)
    return found


def parts() -> Iterator[str]:
    """Rates of the pieces: TFLOP/s of the products for several chunks, TB/s of the passes over a chunk for several blocks."""
    for _, width, vocab in MEASURED:
        hidden, weight = (torch.randn(n, width, device="cuda", dtype=DTYPE) for n in (4096, vocab))
        total = torch.zeros(vocab, width, device="cuda")
        yield f"H{width} V{vocab}, TB/s: sum to bfloat16 {6 * total.numel() / bench(partial(scaled, total, total[0, 0], DTYPE)) / 1e9:.2f}"
        low = torch.randn(4096, vocab, device="cuda", dtype=DTYPE)
        wide = torch.empty(4096, vocab, device="cuda")
        for count in (1024, 1664, 2048, 4096):
            rates = ", ".join(products(hidden[:count], weight, low[:count], wide[:count], total))
            yield f"  {count} rows, TFLOP/s: {rates}"
        yield from passes(low[:2048], wide[:2048])
        del hidden, weight, total, low, wide
        torch.cuda.empty_cache()


def products(states: Tensor, weight: Tensor, low: Tensor, wide: Tensor, total: Tensor) -> Iterator[str]:
    """Name and TFLOP/s of each matrix product of a chunk."""
    from rayft_kernels.linear_cross_entropy import cuda_body

    product = torch.empty(states.shape, device="cuda")
    calls = {
        "logits": lambda: cuda_body._mm(states, weight.t(), low),
        "float32 logits": lambda: cuda_body._mm(states, weight.t(), wide),
        "hidden": lambda: cuda_body._mm(low, weight, product),
        "head": lambda: cuda_body._mm(low.t(), states, total),
        "head, added": lambda: cuda_body._mm(low.t(), states, total, add=True),
    }
    for name, call in calls.items():
        yield f"{name} {2 * low.numel() * states.shape[1] / bench(call, rep=60) / 1e9:.0f}"


def passes(low: Tensor, wide: Tensor) -> Iterator[str]:
    """TB/s of the row kernels, bytes counted once for each load and store."""
    from rayft_kernels.linear_cross_entropy import triton as kernels

    count, vocab = low.shape
    targets = torch.randint(0, vocab, (count,), device="cuda")
    floats = torch.ones(5, count, device="cuda")
    fresh = low.clone()
    for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16)):
        kernels.BLOCK, kernels.WARPS = block, warps
        calls = {
            "exponentials": (4, lambda: kernels.exponentials(fresh, targets, floats[0], None, floats[1], floats[2], None, 1.0)),
            "statistics": (2, lambda: kernels.statistics(low, targets, None, floats[:4], None, 1.0)),
            "statistics float32": (4, lambda: kernels.statistics(wide, targets, None, floats[:4], None, 1.0)),
            "gradients": (4, lambda: kernels.gradients(low, fresh, targets, None, floats, 0, None, 1.0)),
            "gradients float32": (6, lambda: kernels.gradients(wide, fresh, targets, None, floats, 0, None, 1.0)),
        }
        yield f"  block {block} warps {warps}, TB/s: " + ", ".join(
            f"{name} {size * low.numel() / bench(call, rep=40) / 1e9:.2f}" for name, (size, call) in calls.items()
        )


if __name__ == "__main__":
    if "parts" in sys.argv:
        print(*parts(), sep="\n", flush=True)
    else:
        print(HEADER, flush=True)
        for text in rows("peers" in sys.argv, DEVICE == "cpu"):
            print(text, flush=True)
