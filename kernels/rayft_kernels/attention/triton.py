"""Triton bodies of packed attention for head_dim up to 256: blocks of rows walk over the blocks of keys that they see.

Forward and query gradients: one program for a block of rows and a head. Key and value gradients: one program for a block of keys and a
key head, which sums over the query heads of its group, so nothing is added up by atomics and every run gives the same bits. Blocks
outside of a document or a window are never visited; inside, only blocks on an edge are masked.

    dV = P^T dO,    dS = P * (dO V^T - sums),    dQ = scale dS K,    dK = scale dS^T Q

with P = exp(S - lse) computed anew. head_dim above 256 goes to wide.py, which says why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayft_kernels.attention import wide
from rayft_kernels.attention.parts import (
    NO_WINDOW,
    VARYING,
    edge,
    edges,
    keys_of_rows,
    load_rows,
    roomy,
    row_sums,
    rows_of_keys,
    store_rows,
    to_log2,
)


@dataclass(frozen=True)
class Block:
    """Rows and keys of one step, warps of a program and stages of its loop."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Blocks:
    """The three kernels' blocks."""

    forward: Block
    queries: Block
    keys: Block


HALF = {
    64: Blocks(Block(128, 64, 4, 3), Block(128, 64, 8, 3), Block(64, 128, 8, 3)),
    128: Blocks(Block(128, 64, 8, 3), Block(128, 64, 8, 3), Block(64, 128, 8, 3)),
    256: Blocks(Block(128, 64, 8, 2), Block(64, 64, 4, 2), Block(64, 64, 8, 2)),
}
"""By padded head_dim, for types of 16 bits, from `kernels/bench/gpu_k4.py`."""
SMALL = {
    64: Blocks(Block(64, 64, 4, 2), Block(64, 64, 4, 2), Block(64, 64, 4, 2)),
    128: Blocks(Block(64, 32, 4, 2), Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
    256: Blocks(Block(32, 32, 4, 2), Block(32, 32, 4, 1), Block(16, 32, 4, 2)),
}
"""The same within 99 KB of shared memory."""
SINGLE = Blocks(Block(32, 32, 4, 1), Block(32, 32, 4, 1), Block(32, 32, 4, 1))
"""For float32, which is for checks."""


@triton.jit
def _forward_step(
    acc, most, total, q, k_ptr, v_ptr, n0, rows, low, tokens, k_token, v_token, scale, softcap,
    DIM: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    k = load_rows(k_ptr, n0, k_token, tokens, 0, DIM, KEYS, WIDE, MASKED)
    s, _ = to_log2(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, CAPPED)
    if MASKED:
        keys = n0 + tl.arange(0, KEYS)
        s = tl.where((keys[None, :] <= rows[:, None]) & (keys[None, :] >= low[:, None]), s, float("-inf"))
    new = tl.maximum(most, tl.max(s, 1))
    shift = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
    p = tl.exp2(s - shift[:, None])
    decay = tl.exp2(most - shift)
    v = load_rows(v_ptr, n0, v_token, tokens, 0, DIM, KEYS, WIDE, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new, total * decay + tl.sum(p, 1)


@triton.jit(do_not_specialize=VARYING)
def _forward(
    q_ptr, k_ptr, v_ptr, starts_ptr, out_ptr, lse_ptr, tokens, q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    scale, softcap, window, group,
    DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # long rows first
    head = tl.program_id(1).to(tl.int64)
    k_ptr += head // group * k_head
    v_ptr += head // group * v_head
    rows = m0 + tl.arange(0, ROWS)
    low = tl.maximum(tl.load(starts_ptr + rows, mask=rows < tokens, other=0), rows - window + 1)
    q = load_rows(q_ptr + head * q_head, m0, q_token, tokens, 0, DIM, ROWS, WIDE, True)
    acc = tl.zeros((ROWS, WIDE), tl.float32)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    begin, full_from, full_to, end = keys_of_rows(starts_ptr, m0, tokens, window, ROWS, KEYS)
    for i in range(edges(begin, full_from, full_to, end, KEYS)):
        n0 = edge(i, begin, full_from, full_to, KEYS)
        acc, most, total = _forward_step(
            acc, most, total, q, k_ptr, v_ptr, n0, rows, low, tokens, k_token, v_token, scale, softcap, DIM, WIDE, KEYS, CAPPED, True
        )
    for i in range((full_to - full_from) // KEYS):
        n0 = full_from + i * KEYS
        acc, most, total = _forward_step(
            acc, most, total, q, k_ptr, v_ptr, n0, rows, low, tokens, k_token, v_token, scale, softcap, DIM, WIDE, KEYS, CAPPED, False
        )
    store_rows(out_ptr + head * out_head, m0, out_token, tokens, 0, acc / total[:, None], DIM, ROWS, WIDE)
    tl.store(lse_ptr + head * tokens + rows, (most + tl.log2(total)) * 0.6931471805599453, mask=rows < tokens)


@triton.jit
def _queries_step(
    acc, q, g, lse, sums, k_ptr, v_ptr, n0, rows, low, tokens, k_token, v_token, scale, softcap,
    DIM: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    k = load_rows(k_ptr, n0, k_token, tokens, 0, DIM, KEYS, WIDE, MASKED)
    v = load_rows(v_ptr, n0, v_token, tokens, 0, DIM, KEYS, WIDE, MASKED)
    s, t = to_log2(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, CAPPED)
    p = tl.exp2(s - lse[:, None])
    if MASKED:
        keys = n0 + tl.arange(0, KEYS)
        p = tl.where((keys[None, :] <= rows[:, None]) & (keys[None, :] >= low[:, None]), p, 0.0)
    ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - sums[:, None])
    if CAPPED:
        ds = ds * (1.0 - t * t)
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=VARYING)
def _queries(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, sums_ptr, starts_ptr, dq_ptr, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, g_token, g_head, dq_token, dq_head, scale, softcap, window, group,
    DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1).to(tl.int64)
    k_ptr += head // group * k_head
    v_ptr += head // group * v_head
    rows = m0 + tl.arange(0, ROWS)
    low = tl.maximum(tl.load(starts_ptr + rows, mask=rows < tokens, other=0), rows - window + 1)
    lse = tl.load(lse_ptr + head * tokens + rows, mask=rows < tokens, other=0.0) * 1.4426950408889634
    sums = tl.load(sums_ptr + head * tokens + rows, mask=rows < tokens, other=0.0)
    q = load_rows(q_ptr + head * q_head, m0, q_token, tokens, 0, DIM, ROWS, WIDE, True)
    g = load_rows(g_ptr + head * g_head, m0, g_token, tokens, 0, DIM, ROWS, WIDE, True)
    acc = tl.zeros((ROWS, WIDE), tl.float32)
    begin, full_from, full_to, end = keys_of_rows(starts_ptr, m0, tokens, window, ROWS, KEYS)
    for i in range(edges(begin, full_from, full_to, end, KEYS)):
        n0 = edge(i, begin, full_from, full_to, KEYS)
        acc = _queries_step(
            acc, q, g, lse, sums, k_ptr, v_ptr, n0, rows, low, tokens, k_token, v_token, scale, softcap, DIM, WIDE, KEYS, CAPPED, True
        )
    for i in range((full_to - full_from) // KEYS):
        n0 = full_from + i * KEYS
        acc = _queries_step(
            acc, q, g, lse, sums, k_ptr, v_ptr, n0, rows, low, tokens, k_token, v_token, scale, softcap, DIM, WIDE, KEYS, CAPPED, False
        )
    store_rows(dq_ptr + head * dq_head, m0, dq_token, tokens, 0, acc * scale, DIM, ROWS, WIDE)


@triton.jit
def _keys_step(
    dk, dv, k, v, q_ptr, g_ptr, lse_ptr, sums_ptr, m0, keys, up, tokens, q_token, g_token, scale, softcap,
    DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    rows = m0 + tl.arange(0, ROWS)
    q = load_rows(q_ptr, m0, q_token, tokens, 0, DIM, ROWS, WIDE, MASKED)
    if MASKED:
        lse = tl.load(lse_ptr + rows, mask=rows < tokens, other=0.0)
        sums = tl.load(sums_ptr + rows, mask=rows < tokens, other=0.0)
    else:
        lse, sums = tl.load(lse_ptr + rows), tl.load(sums_ptr + rows)
    s, t = to_log2(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, softcap, CAPPED)
    p = tl.exp2(s - (lse * 1.4426950408889634)[None, :])
    if MASKED:
        p = tl.where((rows[None, :] >= keys[:, None]) & (rows[None, :] < up[:, None]), p, 0.0)
    g = load_rows(g_ptr, m0, g_token, tokens, 0, DIM, ROWS, WIDE, MASKED)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
    ds = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - sums[None, :])
    if CAPPED:
        ds = ds * (1.0 - t * t)
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=VARYING)
def _keys(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, sums_ptr, ends_ptr, dk_ptr, dv_ptr, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, g_token, g_head, dk_token, dk_head, scale, softcap, window, group,
    DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    n0, kv_head = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    keys = n0 + tl.arange(0, KEYS)
    up = tl.minimum(tl.load(ends_ptr + keys, mask=keys < tokens, other=0), keys + window)
    k = load_rows(k_ptr + kv_head * k_head, n0, k_token, tokens, 0, DIM, KEYS, WIDE, True)
    v = load_rows(v_ptr + kv_head * v_head, n0, v_token, tokens, 0, DIM, KEYS, WIDE, True)
    dk = tl.zeros((KEYS, WIDE), tl.float32)
    dv = tl.zeros((KEYS, WIDE), tl.float32)
    begin, full_from, full_to, end = rows_of_keys(ends_ptr, n0, tokens, window, ROWS, KEYS)
    for member in range(group):
        head = kv_head * group + member
        q_at, g_at, lse_at, sums_at = q_ptr + head * q_head, g_ptr + head * g_head, lse_ptr + head * tokens, sums_ptr + head * tokens
        for i in range(edges(begin, full_from, full_to, end, ROWS)):
            m0 = edge(i, begin, full_from, full_to, ROWS)
            dk, dv = _keys_step(
                dk, dv, k, v, q_at, g_at, lse_at, sums_at, m0, keys, up, tokens, q_token, g_token, scale, softcap,
                DIM, WIDE, ROWS, CAPPED, True,
            )  # fmt: skip
        for i in range((full_to - full_from) // ROWS):
            m0 = full_from + i * ROWS
            dk, dv = _keys_step(
                dk, dv, k, v, q_at, g_at, lse_at, sums_at, m0, keys, up, tokens, q_token, g_token, scale, softcap,
                DIM, WIDE, ROWS, CAPPED, False,
            )  # fmt: skip
    store_rows(dk_ptr + kv_head * dk_head, n0, dk_token, tokens, 0, dk * scale, DIM, KEYS, WIDE)
    store_rows(dv_ptr + kv_head * dk_head, n0, dk_token, tokens, 0, dv, DIM, KEYS, WIDE)


def _blocks(q: Tensor) -> Blocks:
    table = HALF if roomy(q.device) else SMALL
    return table[max(64, triton.next_power_of_2(q.shape[-1]))] if q.element_size() == 2 else SINGLE


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, scale: float, window: int | None, softcap: float | None,
    longest: int | None, blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [T, H, D] contiguous, lse float32 [H, T]); arguments as those of the operator, with contiguous columns."""
    tokens, heads, dim = q.shape
    if dim > 256:
        return wide.forward(q, k, v, starts, ends, scale, window, softcap, longest)
    block = (blocks or _blocks(q)).forward
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    _forward[(triton.cdiv(tokens, block.rows), heads)](
        q, k, v, starts, out, lse, tokens, *_strides(q, k, v, out), scale, softcap or 0.0, window or NO_WINDOW, heads // k.shape[1],
        DIM=dim, WIDE=max(16, triton.next_power_of_2(dim)), ROWS=block.rows, KEYS=block.keys,
        CAPPED=softcap is not None, num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, lse_grad: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, ends: Tensor,
    scale: float, window: int | None, softcap: float | None, longest: int | None, blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous."""
    tokens, heads, dim = q.shape
    sums = row_sums(grad, out, lse_grad)
    if dim > 256:
        return wide.backward(grad, sums, q, k, v, lse, starts, ends, scale, window, softcap, longest)
    chosen = blocks or _blocks(q)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    common = {"DIM": dim, "WIDE": max(16, triton.next_power_of_2(dim)), "CAPPED": softcap is not None}
    numbers = (scale, softcap or 0.0, window or NO_WINDOW, heads // k.shape[1])
    block = chosen.keys
    _keys[(triton.cdiv(tokens, block.keys), k.shape[1])](
        q, k, v, grad, lse, sums, ends, dk, dv, tokens, *_strides(q, k, v, grad, dk), *numbers,
        ROWS=block.rows, KEYS=block.keys, num_warps=block.warps, num_stages=block.stages, **common,
    )  # fmt: skip
    block = chosen.queries
    _queries[(triton.cdiv(tokens, block.rows), heads)](
        q, k, v, grad, lse, sums, starts, dq, tokens, *_strides(q, k, v, grad, dq), *numbers,
        ROWS=block.rows, KEYS=block.keys, num_warps=block.warps, num_stages=block.stages, **common,
    )  # fmt: skip
    return dq, dk, dv
