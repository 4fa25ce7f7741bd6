"""Packed attention: every document attends to itself alone. The backend is chosen per layer and per kind of rows.

Registered with transformers under one name (`models.load`), so a model built for it cannot fall back to a mask that mixes documents. The
layer's own head_dim, window and softcap decide, not the model's single setting.

Choice on CUDA, from measurements of the backends alone on an H100 (bf16, head_dim 128); not yet measured inside rayft:
rows of one document take causal SDPA, which picks cuDNN there, and packed rows compiled flex attention with a document mask;
varlen FlashAttention 2 was slower than either. A head_dim above 256 goes to our own Triton kernels, whatever the
rows: 8 query and 2 key heads of 512, 8,192 tokens, forward and backward, take 4.9 ms there, 46.7 in flex and 79.1 in SDPA. On CPU: SDPA
per document, which is 6 to 14 times faster than one call with a block-diagonal mask (docs/benchmarks.md), and flex has no backward there.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayft.types import Batch
from rayft_kernels.attention.op import MOST_COLUMNS, document_bounds
from rayft_kernels.attention.op import packed_attention as triton_attention

Backend = Literal["documents", "flex", "triton"]

MASK_BLOCK = 128
"""Side of the blocks in which flex_attention skips what is masked; its own default."""


class Layout:
    """The documents of one micro-batch as attention reads them.

    Compiled layers look inside and guard on what they find: only `uniform`, `wanted`, `longest` and the shapes of the masks and bounds
    may be read there, since whatever else differs from batch to batch would compile them anew.

    Attributes:
        lengths: document lengths on the host; they sum to T.
        uniform: length of the documents when all are equally long, else None.
        wanted: parallel.attention.
        masks: window -> flex_attention's mask, for every window of a layer that takes flex.
        bounds: first token of each token's document and the one after its last, on the device, where some layer takes triton.
        longest: a power of two that no document is longer than, so that there are few.
    """

    __slots__ = ("bounds", "lengths", "longest", "masks", "uniform", "wanted")

    def __init__(self, batch: Batch, wanted: str, layers: Iterable[tuple[int, int | None]] = (), *, capped: bool = False) -> None:
        self.lengths = batch.document_lengths
        self.uniform = self.lengths[0] if len(set(self.lengths)) == 1 else None
        self.longest = 1 << (max(self.lengths) - 1).bit_length()
        self.wanted = wanted
        chosen = {(choose(head_dim, batch.tokens.device.type, wanted)[0], window) for head_dim, window in layers}
        needed = [window for backend, window in chosen if backend == "flex" and (capped or not _whole_rows(self.uniform, window))]
        self.masks = {window: _document_mask(batch.cu_seqlens, self.lengths, window) for window in needed}
        triton = any(backend == "triton" for backend, _ in chosen)
        self.bounds = document_bounds(batch.cu_seqlens, sum(self.lengths)) if triton else None


def layouts(module: nn.Module, wanted: str) -> Callable[[Batch], Layout]:
    """What turns a batch into its layout, for the head_dims, windows and caps of this model's layers.

    Args:
        module: a transformers model.
        wanted: parallel.attention.
    """
    config: Any = module.config
    everywhere = getattr(config, "sliding_window", None)
    parts: Iterable[Any] = (part for part in module.modules() if _is_attention(part))
    layers = {(int(part.head_dim), getattr(part, "sliding_window", everywhere)) for part in parts}
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return functools.partial(Layout, wanted=wanted, layers=layers, capped=capped)


def _is_attention(part: nn.Module) -> bool:
    return hasattr(part, "head_dim") and hasattr(part, "o_proj")


def _whole_rows(uniform: int | None, window: int | None) -> bool:
    """Whether plain causal attention of each row is right."""
    return uniform is not None and (window is None or window >= uniform)


def choose(head_dim: int, device_type: str, wanted: str) -> tuple[Backend, str]:
    """The backend of a layer for packed rows, and why. Rows of one document each take SDPA where it serves them up to a head_dim of 256.

    Args:
        head_dim: of this layer.
        device_type: "cpu" or "cuda".
        wanted: parallel.attention.
    """
    if device_type == "cpu":
        return "documents", "SDPA per document: on CPU 6 to 14 times faster than a mask, and flex has no backward there"
    if wanted == "sdpa":
        return "documents", "asked for by parallel.attention"
    if wanted == "flex" or (wanted == "triton" and head_dim <= MOST_COLUMNS):
        return ("flex" if wanted == "flex" else "triton"), "asked for by parallel.attention"
    if head_dim > MOST_COLUMNS:
        return "flex", f"a head_dim above {MOST_COLUMNS} is left to flex"
    if head_dim > 256:
        return "triton", "FlashAttention refuses a head_dim above 256, and flex has room for small blocks only"
    return "flex", "faster than varlen FlashAttention 2 for packed rows on Hopper, measured apart from training"


def choices(module: nn.Module, device_type: str, wanted: str) -> dict[str, tuple[Backend, str]]:
    """Layer name -> (backend, reason) for every attention layer of a model, in order."""
    return {name: choose(int(part.head_dim), device_type, wanted) for name, part in module.named_modules() if _is_attention(part)}


def summary(module: nn.Module, device_type: str, wanted: str) -> list[str]:
    """`choices` in words, a line for each backend and reason."""
    counts = Counter(choices(module, device_type, wanted).values())
    return [f"{backend} on {count} layers: {reason}" for (backend, reason), count in counts.items()]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed documents, in the form that transformers calls.

    Args:
        query: [1, heads, T, head_dim]; key, value: [1, kv_heads, T, head_dim].
        attention_mask: None; any mask would be a sign that the model thinks it is not packed.
        layout: the documents.
        scaling: of the scores; None is head_dim ** -0.5.
        dropout: of the probabilities; must be 0.
        sliding_window: a position sees itself and the window - 1 positions before it.
        softcap: scores are softcap * tanh(scores / softcap).

    Returns:
        ([1, T, heads, head_dim], None).
    """
    if attention_mask is not None or dropout:
        raise RuntimeError("packed attention takes neither a mask nor attention dropout")
    backend = choose(query.shape[-1], query.device.type, layout.wanted)[0]
    rows = softcap is None and _whole_rows(layout.uniform, sliding_window)
    if backend == "triton" and (query.shape[-1] > 256 or not rows):
        return _triton(query, key, value, layout, scaling, sliding_window, softcap), None
    if rows:
        out = _rows(query, key, value, layout.uniform, scaling)
    elif backend == "documents":
        out = _documents(query, key, value, layout, scaling, sliding_window, softcap)
    else:
        out = _flex(query, key, value, layout.masks[sliding_window], scaling, softcap)
    return out.transpose(1, 2).contiguous(), None


def _triton(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    assert layout.bounds is not None
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return triton_attention(q, k, v, layout.bounds, scale=scaling, window=window, softcap=softcap, longest=layout.longest)[0][None]


def _rows(query: Tensor, key: Tensor, value: Tensor, length: int | None, scaling: float | None) -> Tensor:
    """Equally long documents as a batch: plain causal SDPA."""
    # squeeze, because the backward of indexing with 0 would fill a whole tensor with zeros and copy into it
    assert length is not None
    q, k, v = (x.squeeze(0).unflatten(1, (-1, length)).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(0, 1).flatten(1, 2)[None]


@torch.compiler.disable
def _documents(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """SDPA per document, with a band mask where a window bites and written-out scores where they are capped.

    Never compiled: its shapes are the documents' own.
    """
    parts = []
    for q, k, v in zip(*(x.split(layout.lengths, dim=2) for x in (query, key, value)), strict=True):
        gqa = q.shape[1] != k.shape[1]
        if softcap is not None:
            parts.append(_capped(q, k, v, scaling, window, softcap))
        elif window is not None and q.shape[2] > window:
            mask = _band(q.shape[2], window, q.device)
            parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=gqa))
        else:
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa))
    return torch.cat(parts, dim=2)


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [L, L]: causal, and at most window - 1 positions back."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() if window is None else ones.tril().triu(1 - window)


def _capped(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, softcap: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_band(query.shape[2], window, query.device), float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None, softcap: float | None) -> Tensor:
    options = (
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_M1": 32, "BLOCK_N1": 32, "BLOCK_M2": 32, "BLOCK_N2": 32, "num_stages": 1}
        if query.shape[-1] > 256
        else None
    )
    out: Tensor = _flex_attention()(
        query,
        key,
        value,
        score_mod=None if softcap is None else _softcap_mod(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=options,
    )
    return out


def _flex_attention() -> Any:
    """flex_attention: part of the layer's graph where that is compiled, else a graph of its own, for uncompiled it holds all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled_flex()


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _softcap_mod(softcap: float) -> Any:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _document_mask(cu_seqlens: Tensor, lengths: tuple[int, ...], window: int | None) -> Any:
    """flex_attention's block mask, causal within documents.

    Which blocks of it are empty or full follows from the lengths on the host, in microseconds; create_block_mask would try every pair of
    positions, and Triton does not come to an end compiling that for captured documents (torch 2.11, triton 3.6). Inside of blocks, document
    numbers come from the padded boundaries on the device, so shapes never change.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device, tokens = cu_seqlens.device, sum(lengths)
    document = torch.searchsorted(cu_seqlens, torch.arange(tokens, device=device, dtype=torch.int32), right=True)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = (document[q] == document[k]) & (q >= k)
        return inside if window is None else inside & (q - k < window)

    partly, part, fully, full = (torch.from_numpy(x).to(device, non_blocking=True)[None, None] for x in _blocks(lengths, window))
    return BlockMask.from_kv_blocks(partly, part, fully, full, MASK_BLOCK, mask_mod=mask, seq_lengths=(tokens, tokens))


def _blocks(lengths: tuple[int, ...], window: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Key blocks of each query block that are allowed in part, and in full: (counts [n], indices [n, n]) of either, int32.

    The keys of a query reach from its lower bound, the start of its document or of its window, to itself, and lower bounds never fall. So
    the keys of a block of queries are one interval, and full are those blocks that lie above all its lower bounds and before itself.
    """
    tokens = sum(lengths)
    lower = np.repeat(np.cumsum((0, *lengths[:-1])), lengths)
    if window is not None:
        lower = np.maximum(lower, np.arange(tokens) + 1 - window)
    count = -(-tokens // MASK_BLOCK)
    row, column = np.arange(count), np.arange(count)[None]
    first = row * MASK_BLOCK
    lowest = lower[first] // MASK_BLOCK
    full_from = -(-lower[np.minimum(first + MASK_BLOCK, tokens) - 1] // MASK_BLOCK)
    partly = np.maximum(np.minimum(full_from, row) - lowest, 0)
    part = np.where(column < partly[:, None], lowest[:, None] + column, row[:, None])
    full = np.minimum(full_from[:, None] + column, count - 1)
    found = (partly + 1, part, np.maximum(row - full_from, 0), full)
    return tuple(np.ascontiguousarray(x, dtype=np.int32) for x in found)  # type: ignore[return-value]
