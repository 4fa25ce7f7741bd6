"""Checkpoints whose linear layers are stored in 8 bits with a scale for each block of weights (`quant_method: fp8`), made dense on reading.

A weight W of float8_e4m3 codes lies beside `<W>_scale_inv`: one factor, or one for each block of rows and columns. arXiv 2412.19437 sec.
3.3.2. Training computes with code x factor, in whatever type the weight is held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rayft.errors import ConfigError

CODES = "F8_E4M3"
"""Type of the codes, as safetensors names it."""
FACTORS = ("F32", "BF16", "F16", "F8_E8M0")
"""Types of the factors."""
ENDING = "_scale_inv"
"""Of the name of a weight's factors, after the weight's own."""


def refuse_others(path: str, quantisation: Mapping[str, Any] | None) -> None:
    """Refuse a checkpoint that is quantised in a way that is not understood.

    Args:
        path: the model, as the user named it.
        quantisation: `quantization_config` of its configuration, if any.

    Raises:
        ConfigError: naming the method.
    """
    if not quantisation:
        return
    method = str(quantisation.get("quant_method"))
    blocks = quantisation.get("weight_block_size")
    layout = method == "fp8" and (blocks is None or (len(blocks) == 2 and min(blocks) > 0))
    if not layout or quantisation.get("fmt") not in (None, "e4m3") or quantisation.get("expert_dtype") not in (None, "fp8"):
        rule = f"is quantised by {method} in a way that is not read; of quantised checkpoints only fp8 with e4m3 codes is, made dense"
        raise ConfigError("model.path", path, rule, "Name the folder of the model's dense weights; model.quantize=nf4 makes 4 bits of them")


def block_of(quantisation: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a factor; None when a weight has one."""
    blocks = quantisation.get("weight_block_size")
    return None if blocks is None else (int(blocks[0]), int(blocks[1]))


def factors_shapes(shape: Sequence[int], block: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """The shapes that the factors of a weight [out, in] may have."""
    if block is None:
        return [(), (1,), (1, 1)]
    return [(-(-shape[0] // block[0]), -(-shape[1] // block[1]))]


@torch.no_grad()
def apply_factors(codes: Tensor, factors: Tensor, block: tuple[int, int] | None, first: tuple[int, int] = (0, 0)) -> None:
    """Multiply a part of a weight by its factors, in place; each product is computed in float32 and rounded once.

    Args:
        codes: [rows, columns], in a type that is at least bfloat16, so the codes are exact.
        factors: of the whole weight, see `factors_shapes`.
        block: see `block_of`.
        first: row and column of the whole weight that the part begins at.
    """
    factors = factors.to(codes.device, torch.float32)
    if block is None:
        codes.mul_(factors.reshape(1))
        return
    (rows, columns), (row, column) = block, first
    by_column = factors.repeat_interleave(columns, 1)[:, column : column + codes.shape[1]]
    for index in range(row // rows, factors.shape[0]):
        start = max(index * rows - row, 0)
        codes[start : (index + 1) * rows - row].mul_(by_column[index])
