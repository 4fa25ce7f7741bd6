"""What the parts of a full fine-tuning step take by themselves, at the shapes of bench_sft.py: the least that a step could last.

    sum_of_parts.py [--step-ms 187]

Matrix products by cuBLAS, attention by SDPA's choice, AdamW fused over float32 states: each measured alone in this run, forward and
backward. Everything else is counted as bytes, with every chain of elementwise operations reading its inputs and writing its outputs once,
at the rate of a device copy in this run. --step-ms is a step's time from bench_sft.py, of which the share is printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from triton.testing import do_bench

ROWS, LENGTH, LAYERS = 4, 4096, 28
HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB = 1024, 3072, 16, 8, 128, 151936
TOKENS, HEAD_CHUNK = ROWS * LENGTH, 2048


def milliseconds(call: Callable[[], object]) -> float:
    """Median of do_bench."""
    return float(do_bench(call, warmup=10, rep=60, return_mode="median"))


def products(rows: int, inputs: int, outputs: int) -> float:
    """x @ W.T, dY @ W and dY.T @ x."""
    x, w, dy = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    return milliseconds(lambda: x @ w.T) + milliseconds(lambda: dy @ w) + milliseconds(lambda: dy.T @ x)


def attention() -> float:
    """Forward and backward of one layer."""
    numbers = (torch.randn(ROWS, heads, LENGTH, DIM, device="cuda", dtype=torch.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q, k, v = (x.requires_grad_() for x in numbers)
    gradient = torch.randn_like(q)

    def step() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), gradient)

    return milliseconds(step)


def parameters() -> int:
    """Of the model; its head is its embedding."""
    layer = HIDDEN * DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER
    return LAYERS * layer + VOCAB * HIDDEN


def adamw() -> float:
    """One update of all parameters."""
    weights = [torch.zeros(HIDDEN, INNER, device="cuda", requires_grad=True) for _ in range(parameters() // (HIDDEN * INNER))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW(weights, fused=True)
    optimizer.step()
    return milliseconds(optimizer.step)


def copy_rate() -> float:
    """Bytes per millisecond of a device copy, read and written."""
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))


def elementwise_bytes() -> float:
    """Of everything but products, attention and AdamW."""
    qk = DIM * (HEADS + KV_HEADS)
    # forward: two additions with their norm (read 2, write 2), norm and rotation of queries and keys, the gate;
    # backward: the same with one more input each; the gate also writes what the down projection's gradient reads
    layer = 2 * 4 * HIDDEN + 2 * qk + 3 * INNER + 2 * 4 * HIDDEN + 3 * qk + 6 * INNER
    activations = 2 * TOKENS * LAYERS * layer
    head = 2 * 2 * TOKENS * VOCAB  # logits in bfloat16, read, their gradient written
    weights = (parameters() - VOCAB * HIDDEN) * (4 + 2 + 2 + 4) + VOCAB * HIDDEN * (4 + 2)  # cast, and gradients cast back
    clipping = parameters() * (4 + 4 + 4)  # the norm, then scaling
    return float(activations + head + weights + clipping)


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float)
    args = parser.parse_args()
    width = DIM * HEADS
    shapes = ((HIDDEN, width), *2 * [(HIDDEN, DIM * KV_HEADS)], (width, HIDDEN), *2 * [(HIDDEN, INNER)], (INNER, HIDDEN))
    one_layer = sum(products(TOKENS, inputs, outputs) for inputs, outputs in shapes)
    parts = {
        "layer_products": LAYERS * one_layer, "head_products": TOKENS / HEAD_CHUNK * products(HEAD_CHUNK, HIDDEN, VOCAB),
        "attention": LAYERS * attention(), "adamw": adamw(), "elementwise": elementwise_bytes() / copy_rate(),
    }  # fmt: skip
    total = sum(parts.values())
    share = {"share_of_step": round(total / args.step_ms, 3)} if args.step_ms else {}
    print(json.dumps({"bench": "sum-of-parts", **{name: round(ms, 1) for name, ms in parts.items()}, "total_ms": round(total, 1), **share}))


if __name__ == "__main__":
    main()
