"""What a call costs the host: microseconds of Python and launches on tensors so small that the card is always done first.

    PYTHONPATH=.:kernels python kernels/bench/host.py

Beside the way that a training step takes, the way through torch's dispatcher, and plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from unittest import mock

import torch
from torch import Tensor

from bench import check_glu, check_lora, check_norm_rope
from bench.common import DEVICE
from rayft_kernels import glu, lora_mlp, qkv_norm_rope, rms_norm

LOW = torch.bfloat16
OBSERVED = ("norm_rope.op", "glu.op", "lora.glu", "lora.dropout")
"""Modules that ask whether anybody looks on."""
CALLS = 200
HEADER = "host us,forward direct,forward dispatched,forward torch,both direct,both dispatched,both torch"


def microseconds(fn: Callable[[], object]) -> float:
    """Of one call among CALLS that are not waited for; the best of three rounds."""

    def round_of_calls() -> float:
        start = perf_counter()
        for _ in range(CALLS):
            fn()
        taken = perf_counter() - start
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return 1e6 * taken / CALLS

    round_of_calls()
    return min(round_of_calls() for _ in range(3))


def both_ways(fn: Callable[..., Tensor | tuple[Tensor | None, ...]], leaves: Sequence[Tensor]) -> tuple[Callable[[], object], ...]:
    """Calls of the forward, and of forward and backward."""

    def outputs() -> list[Tensor]:
        out = fn(*leaves)
        return [out] if isinstance(out, Tensor) else [y for y in out if y is not None]

    grads = [torch.ones_like(y) for y in outputs()]
    return outputs, lambda: torch.autograd.grad(outputs(), leaves, grads)


def lines() -> Iterator[str]:
    """A row for each op: forward and forward + backward, each directly, by the dispatcher, and in plain torch."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=LOW, requires_grad=True)

    q, k, w, cos, sin = draw(1, 8, 4, 128), draw(1, 8, 2, 128), draw(128), draw(1, 8, 128).detach(), draw(1, 8, 128).detach()
    rows, weight, ones = draw(8, 64), draw(64), check_lora.cases(("plain",) * 3, ((80, 64), (80, 64), (64, 80)), 8, DEVICE)
    ones = [check_lora.converted(one, LOW) for one in ones]
    adapters = [t for one in ones for t in (one.a, one.b) if t is not None]
    plain_norm = partial(check_norm_rope.written_out, eps=1e-6, unit=False, casts="gemma")
    ops = {
        "norm + RoPE of q and k": ((q, k, w), lambda q, k, w: qkv_norm_rope(q, k, None, w, w, cos, sin),
                                 lambda q, k, w: tuple(plain_norm(q, k, None, w, w, cos, sin))),
        "rms_norm": ((rows, weight), rms_norm, lambda x, w: torch.nn.functional.rms_norm(x, (64,), w, 1e-6)),
        "glu": ((rows, draw(8, 64)), glu, partial(check_glu.written_out, activation="silu")),
        "lora_mlp": ((rows, *adapters), lambda x, *_: lora_mlp(x, *ones, "silu"),
                     lambda x, *_: tuple(check_lora.mlp_written_out("silu", x, ones))),
    }  # fmt: skip
    yield HEADER
    for name, (leaves, ours, plain) in ops.items():
        direct = [microseconds(call) for call in both_ways(ours, leaves)]
        with ExitStack() as stack:
            for module in OBSERVED:
                stack.enter_context(mock.patch(f"rayft_kernels.{module}.unobserved", lambda *_: False))
            dispatched = [microseconds(call) for call in both_ways(ours, leaves)]
        torchs = [microseconds(call) for call in both_ways(plain, leaves)]
        (a, d), (b, e), (c, f) = direct, dispatched, torchs
        yield f"{name},{a:.1f},{b:.1f},{c:.1f},{d:.1f},{e:.1f},{f:.1f}"


if __name__ == "__main__":
    for text in lines():
        print(text, flush=True)
