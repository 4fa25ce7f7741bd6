"""Norm + RoPE forward and backward: rayft, torch, and with the argument `peers` torch.compile and Liger, as CSV rows.

The limit counts q, k and v once in and once out forward, gradient and input once in and once out backward, at the card's copy speed; not
the tables and weights. `graph` rows replay a CUDA graph, `python` rows call as a training step does.
The argument `sweep` times how rows may be cut instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.check_norm_rope import Case, Inputs, written_out
from bench.common import DEVICE, HEADER, bench, bench_graph, extra_mib, installed, limits, row
from rayft_kernels import qkv_norm_rope, rms_norm

CASES = {
    "D128 33.5M": Case(batch=4, seq=4096, heads=(16, 0, 0), dim=128, rotated=128, shared_table=False),
    "D256 33.5M": Case(batch=2, seq=4096, heads=(16, 0, 0), dim=256, rotated=256, shared_table=False),
    "D512 33.5M": Case(batch=2, seq=4096, heads=(8, 0, 0), dim=512, rotated=512, shared_table=False),
    "Qwen3-8B T8192 32+8 heads D128": Case(batch=1, seq=8192, heads=(32, 8, 0), dim=128, rotated=128),
    "Qwen3.5 T8192 16+2 heads D256 n64": Case(batch=1, seq=8192, heads=(16, 2, 0), dim=256, rotated=64),
    "Gemma4 T8192 8+4+4 heads D256": Case(batch=1, seq=8192, heads=(8, 4, 4), dim=256, rotated=256),
}
TINY = {"D32": Case(batch=1, seq=8, heads=(2, 1, 0), dim=32, rotated=32)}
DTYPE = torch.bfloat16
TILES = ((1024, 2), (1024, 4), (2048, 2), (2048, 4), (4096, 4), (4096, 8))
PROGRAMS = (4, 6, 8, 12, 16, 32)


def step(inputs: Inputs, fn: Callable[..., object], **options: object) -> Callable[[], object]:
    """Forward and backward of one implementation, on leaves that are there already as in a training step."""
    named = {name: x.detach().requires_grad_() for name, x in inputs.named.items()}
    arguments, leaves = [named.get(name) for name in ("q", "k", "v", "q_weight", "k_weight")], list(named.values())

    def run() -> object:
        out: Any = fn(*arguments, inputs.cos, inputs.sin, **options)
        return torch.autograd.grad([y for y in out if y is not None], leaves, inputs.grads)

    return run


def bytes_moved(inputs: Inputs) -> int:
    """Two passes over q, k and v forward, three backward."""
    return 5 * sum(x.numel() * x.element_size() for name, x in inputs.named.items() if not name.endswith("weight"))


def rows(peers: bool, tiny: bool = False) -> Iterator[str]:
    """One row for each case and implementation."""
    yield from norm_rope_rows(peers, tiny)
    yield from rms_norm_rows(peers, *((16, 32) if tiny else (16384, 4096)))


def norm_rope_rows(peers: bool, tiny: bool) -> Iterator[str]:
    """Heads of attention, in several layouts."""
    options = {"eps": 1e-6, "unit": False, "casts": "gemma"}
    for name, case in (TINY if tiny else CASES).items():
        inputs = Inputs.of(case, DEVICE, DTYPE).copied()
        limit = bytes_moved(inputs) / limits().tbs / 1e9
        ours, eager = step(inputs, qkv_norm_rope), step(inputs, written_out, **options)
        line = partial(row, "norm_rope", name, dtype=DTYPE, limit_ms=limit)
        yield line("rayft graph", ms=bench_graph(ours), mib=extra_mib(ours))
        yield line("rayft python", ms=bench(ours), mib=0.0)
        yield line("torch graph", ms=bench_graph(eager), mib=extra_mib(eager))
        yield line("torch python", ms=bench(eager), mib=0.0)
        if peers:
            fused = step(inputs, torch.compile(written_out, dynamic=False), **options)
            yield line("torch.compile python", ms=bench(fused), mib=extra_mib(fused))
            yield line("torch.compile graph", ms=bench_graph(fused), mib=0.0)


def rms_norm_rows(peers: bool, tokens: int, width: int) -> Iterator[str]:
    """The decoder norm beside torch's own, torch.compile's and Liger's."""
    x, w, g = (torch.randn(*s, device=DEVICE, dtype=DTYPE) for s in ((tokens, width), (width,), (tokens, width)))
    limit = 5 * x.numel() * x.element_size() / limits().tbs / 1e9
    leaves = [x.requires_grad_(), w.requires_grad_()]

    def run(fn: Callable[[Tensor, Tensor], Tensor]) -> object:
        return torch.autograd.grad(fn(*leaves), leaves, g)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (width,), w, 1e-6)

    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"rayft": rms_norm, "torch": plain}
    if peers:
        ways["torch.compile"] = torch.compile(plain, dynamic=False)
        if DEVICE == "cuda" and (liger := installed("liger_kernel.ops.rms_norm")):
            ways["liger"] = lambda x, w: liger.LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)
    line = partial(row, "rms_norm", f"T{tokens} H{width}", dtype=DTYPE, limit_ms=limit)
    for impl, fn in ways.items():
        call = partial(run, fn)
        yield line(f"{impl} graph", ms=bench_graph(call), mib=extra_mib(call))
        yield line(f"{impl} python", ms=bench(call), mib=0.0)


def sweep() -> Iterator[str]:
    """Milliseconds of forward and backward bodies for tiles of several sizes and several programs for each multiprocessor."""
    from rayft_kernels.norm_rope import triton as body

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for name, case in list(CASES.items())[:3]:
        inputs = Inputs.of(case, "cuda", DTYPE)
        q, w, grads = inputs.named["q"], inputs.named["q_weight"], (inputs.grads[0].contiguous(), None, None)
        common = (q, None, None, w, None, inputs.cos, inputs.sin, 1e-6, False)
        for tiles in (body.Tiles(size // case.dim, warps) for size, warps in TILES):
            forward = bench_graph(partial(body.forward, *common, "once", tiles), rep=20)
            calls = (partial(body.backward, grads, *common, (True, False), n * processors, tiles) for n in PROGRAMS)
            back = [bench_graph(call, rep=20) for call in calls]
            yield f"{name} {tiles.rows} rows {tiles.warps} warps: forward {forward:.4f}, backward {' '.join(f'{ms:.4f}' for ms in back)}"


if __name__ == "__main__":
    if "sweep" in sys.argv:
        print(f"backward columns: {PROGRAMS} programs for each multiprocessor")
        print(*sweep(), sep="\n", flush=True)
    else:
        print(HEADER, *rows("peers" in sys.argv, DEVICE == "cpu"), sep="\n", flush=True)
