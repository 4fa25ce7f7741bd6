"""Run as a program: the Triton body of 4-bit weights, interpreted on CPU tensors, through its checks; see tests/interpreted.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from bench import check_nf4
from bench.checks import failures
from interpreted import allow_scalars_of_one_element
from rayft_kernels import NF4
from rayft_kernels.nf4 import triton as body

TILES = (body.Tile(blocks=16, warps=4), body.TILE)


def made(weights: Sequence[NF4], dtype: torch.dtype, tile: body.Tile) -> list[Tensor]:
    """`dequantise` by the kernel."""
    flat = body.dequantise([w.codes for w in weights], [w.scales for w in weights], [w.outer for w in weights], dtype, tile)
    pieces = flat.split([2 * w.codes.numel() for w in weights])
    return [piece.view(len(w.codes), -1) for piece, w in zip(pieces, weights, strict=True)]


def main() -> int:
    """Exit code 1 if a check fails."""
    allow_scalars_of_one_element()
    found = {
        f"nf4 {kind} {number} {tile.blocks}": partial(check_nf4.check_values, shapes, getattr(torch, kind), "cpu", partial(made, tile=tile))
        for kind in ("float32", "float16")
        for number, shapes in enumerate(check_nf4.GROUPS)
        for tile in TILES
    }
    return 1 if failures(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
