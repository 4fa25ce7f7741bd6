"""How many logits exist at once: rows or columns of a chunk, and the bytes that an operation holds beside its inputs and gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20
"""Float32 logits that a chunk of the torch body may hold."""
FAST_BYTES = 610 << 20
"""Logits that a chunk of the CUDA body may hold, with the gradient that is made of them."""
LEAN_BYTES = 352 << 20
"""The same where memory comes first, with the float32 sum of the hidden states' gradient."""
FLOAT32 = 4


class Head(NamedTuple):
    """What turns hidden states into logits z = scale * cap(W h + b): weight [V, H], bias [V] or None, softcap or None, scale."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


def chunk_rows(num_rows: int, vocab: int) -> int:
    """Rows of a chunk of the torch body: float32 logits in CHUNK_BYTES; at least one, at most `num_rows`."""
    return max(1, min(num_rows, CHUNK_BYTES // (4 * vocab)))


def even_share(total: int, most: int, multiple: int) -> int:
    """Size of the chunks that cut `total` into equal ones of at most about `most`, rounded up to a multiple.

    A small last chunk would cost almost as much as a full one: it reads the whole head and adds to the head's whole gradient.
    """
    most = max(multiple, most // multiple * multiple)
    pieces = max(1, -(-total // most))
    return -(-total // pieces // multiple) * multiple if total else multiple


def padded(vocab: int) -> int:
    """Row length of a buffer of logits: a multiple of 16, without which matrix products and loads take slow paths (V = 50257)."""
    return -(-vocab // 16) * 16


def row_chunk(num_rows: int, hidden: int, vocab: int, budget: int, dtype: torch.dtype) -> int:
    """Rows of a chunk of whole logit rows in `budget` bytes, with a float32 and a narrow copy of the hidden states of each."""
    return even_share(num_rows, budget // row_bytes(hidden, vocab, dtype), 128)


def row_bytes(hidden: int, vocab: int, dtype: torch.dtype) -> int:
    """Bytes that a row of a chunk takes."""
    return dtype.itemsize * padded(vocab) + hidden * (FLOAT32 + dtype.itemsize)


def column_chunk(num_rows: int, hidden: int, vocab: int, budget: int, itemsize: int) -> int:
    """Vocabulary entries of a chunk that spans every row, in what the float32 [rows, hidden] sum leaves of `budget` bytes."""
    left = budget - FLOAT32 * num_rows * hidden
    return even_share(vocab, max(512, left // (itemsize * max(1, num_rows))), 64)


def weighted_nll_bytes(num_rows: int, hidden: int, vocab: int, dtype: torch.dtype, *, head_trained: bool, lean: bool = False) -> int:
    """Bytes that weighted_nll_sum holds at its peak on CUDA, beside its inputs and the gradients it returns."""
    size = dtype.itemsize
    rows = row_chunk(num_rows, hidden, vocab, LEAN_BYTES if lean else FAST_BYTES, dtype)
    chunk = min(rows, num_rows) * row_bytes(hidden, vocab, dtype)
    if lean and head_trained:
        return max(chunk, num_rows * (size * column_chunk(num_rows, hidden, vocab, LEAN_BYTES, size) + FLOAT32 * hidden))
    return chunk + (FLOAT32 * vocab * hidden if head_trained and size < FLOAT32 else 0)
