"""Run as a program: the Triton bodies of packed attention, interpreted on CPU tensors, through their checks; see interpreted.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench import check_attention
from bench.check_attention import Case
from bench.checks import failures
from interpreted import allow_scalars_of_one_element
from rayft_kernels.attention import op, triton, wide, workspace
from rayft_kernels.attention.triton import Block, Blocks
from rayft_kernels.attention.wide import Backward, Forward, Product

BLOCKS = Blocks(Block(32, 16, 4, 1), Block(16, 32, 4, 1), Block(32, 16, 4, 1))
FORWARD = Forward(32, 64, Product(128, 0, 4, 1), Product(32, 256, 4, 1))
BACKWARD = Backward(64, 32, Product(256, 0, 4, 1), Product(32, 128, 4, 1), Product(32, 256, 4, 1))
LENGTHS = (1, 15, 17, 1, 33, 48, 5)
CASES = (
    Case(LENGTHS, 32),
    Case(LENGTHS, 24, window=2, heads=3, kv_heads=3),
    Case(LENGTHS, 16, window=17, softcap=3.0, scale=0.2),
    Case((70,), 16, window=33, heads=4, kv_heads=1),
    Case((97,), 32, heads=2, kv_heads=1),
    Case((*(20,) * 9, 40, 13, 25), 272, heads=2, kv_heads=1),
    Case((290, 2), 272, window=17, softcap=3.0, heads=1, kv_heads=1),
    Case((135,), 512, heads=1, kv_heads=1),
)


def run_triton_on_cpu() -> None:
    """Triton bodies as CPU kernels of the operators, in small blocks, wide heads in several chunks of rows."""
    workspace.WORKSPACE, workspace.LEAST_ROWS, wide.HALF, wide.SINGLE = 2**14, 64, (FORWARD, BACKWARD), (FORWARD, BACKWARD)
    triton._blocks = lambda q: BLOCKS

    def on_cpu(body: Any, *args: Any) -> Any:
        return body(*map(op._dense, args))

    op._attention.register_kernel("cpu", partial(on_cpu, triton.forward))
    op._attention_backward.register_kernel("cpu", partial(on_cpu, triton.backward))


def main() -> int:
    """Exit code 1 if a check fails."""
    allow_scalars_of_one_element()
    run_triton_on_cpu()
    for tiles in (FORWARD, BACKWARD):  # several chunks, in a workspace that goes round
        assert len(found := wide.chunks(258, 2, tiles, 8, 40)) > 1
        assert found[0].width < 258
    found = {f"attention {case.name}": partial(check_attention.check_error, case, torch.float32, "cpu") for case in CASES}
    found["attention float16"] = partial(check_attention.check_error, CASES[2], torch.float16, "cpu")
    for dim in (16, 272):
        small = Case((20, 1, 50), dim, heads=2, kv_heads=1, window=18)
        found[f"attention twice D{dim}"] = partial(check_attention.check_twice, small, torch.float32, "cpu")
        found[f"attention isolation D{dim}"] = partial(check_attention.check_isolation, small, torch.float32, "cpu")
    return 1 if failures(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
