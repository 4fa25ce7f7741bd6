"""Triton bodies of norm + RoPE: query, key and value heads of a batch in one launch each way.

A row is one head of one token, and a program works on a tile of ROWS rows. The columns of a row are taken in three parts, because
the rotation pairs column j of the first part with column j of the second one:

    a = x[:HALF],  b = x[HALF : 2 HALF],  c = x[2 HALF:]        2 HALF columns rotate, the REST passes

so that no element is read twice. Programs are dealt out to the tensors by their number of tiles. In the backward each program keeps
the weight gradient of its tiles in registers and writes one partial row; `_sum_partials` adds those in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

CASTS = {"once": 0, "gemma": 1, "llama": 2}
"""Where values are rounded to the input's type: see op.py."""
TILE = 2048
"""Elements of a forward or backward tile, unless one row is longer."""
LANE = 16
"""Elements of a tile that one thread holds: one 16-byte load of bfloat16 for each half."""
SUM_ROWS, SUM_COLS = 128, 32


@triton.jit
def _locate(tile, rows, positions, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Rows of a tile as (row, whether it exists, batch, position, head), 64 bits wide where offsets are made of them."""
    row = tile * ROWS + tl.arange(0, ROWS)
    token = row // HEADS
    return row.to(tl.int64), row < rows, (token // positions).to(tl.int64), (token % positions).to(tl.int64), (row % HEADS).to(tl.int64)


@triton.jit
def _weight(w_ptr, cols, fits, UNIT: tl.constexpr):
    """The factor of each column in float32: w, or 1 + w."""
    w = tl.load(w_ptr + cols, mask=fits, other=0.0).to(tl.float32)
    if UNIT:
        w += 1.0
    return w[None, :]


@triton.jit
def _scaled(x, rstd, w_ptr, cols, fits, dtype: tl.constexpr, UNIT: tl.constexpr, CAST: tl.constexpr):
    """The norm's output in float32, rounded to `dtype` where CAST says so."""
    n = x * rstd
    if CAST == 2:
        n = n.to(dtype).to(tl.float32)
    if w_ptr is not None:
        n *= _weight(w_ptr, cols, fits, UNIT)
    if CAST != 0:
        n = n.to(dtype).to(tl.float32)
    return n


@triton.jit
def _rounded(x, dtype: tl.constexpr, CAST: tl.constexpr):
    """A product of the rotation, rounded unless there is a single cast at the end."""
    if CAST != 0:
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def _rotation(cos_ptr, sin_ptr, cos_at, sin_at, cols, fits, HALF: tl.constexpr):
    """Cosines and sines of both halves, float32 [ROWS, HALF]."""
    cos_ptr, sin_ptr = cos_ptr + cos_at + cols, sin_ptr + sin_at + cols
    cos_a = tl.load(cos_ptr, mask=fits, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + HALF, mask=fits, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr, mask=fits, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + HALF, mask=fits, other=0.0).to(tl.float32)
    return cos_a, cos_b, sin_a, sin_b


@triton.jit
def _forward_tile(
    x_ptr, y_ptr, w_ptr, cos_ptr, sin_ptr, tile, rows, positions, xb, xs, xh, cb, cs, sb, ss, eps,
    HEADS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, HALF_2: tl.constexpr, REST: tl.constexpr, REST_2: tl.constexpr,
    UNIT: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    row, exists, batch, position, head = _locate(tile, rows, positions, HEADS, ROWS)
    D: tl.constexpr = 2 * HALF + REST
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    cols = tl.arange(0, HALF_2)
    fits = cols < HALF
    mask = exists[:, None] & fits[None, :]
    x_ptr += (batch * xb + position * xs + head * xh)[:, None]
    y_ptr += (row * D)[:, None]
    a = tl.load(x_ptr + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + cols[None, :] + HALF, mask=mask, other=0.0).to(tl.float32)
    square = tl.sum(a * a + b * b, 1)
    if REST:
        rest = 2 * HALF + tl.arange(0, REST_2)
        rest_mask = exists[:, None] & (rest < D)[None, :]
        c = tl.load(x_ptr + rest[None, :], mask=rest_mask, other=0.0).to(tl.float32)
        square += tl.sum(c * c, 1)
    rstd = tl.rsqrt(square / D + eps)[:, None]
    if REST:
        c = _scaled(c, rstd, w_ptr, rest, rest < D, dtype, UNIT, CAST)
        tl.store(y_ptr + rest[None, :], c.to(dtype), mask=rest_mask)
    a = _scaled(a, rstd, w_ptr, cols, fits, dtype, UNIT, CAST)
    b = _scaled(b, rstd, w_ptr, cols + HALF, fits, dtype, UNIT, CAST)
    if cos_ptr is not None:
        cos_at, sin_at = (batch * cb + position * cs)[:, None], (batch * sb + position * ss)[:, None]
        cos_a, cos_b, sin_a, sin_b = _rotation(cos_ptr, sin_ptr, cos_at, sin_at, cols[None, :], mask, HALF)
        ya = _rounded(a * cos_a, dtype, CAST) - _rounded(b * sin_a, dtype, CAST)
        yb = _rounded(b * cos_b, dtype, CAST) + _rounded(a * sin_b, dtype, CAST)
        a, b = ya, yb
    tl.store(y_ptr + cols[None, :], a.to(dtype), mask=mask)
    tl.store(y_ptr + cols[None, :] + HALF, b.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["tokens", "positions", "programs_q", "programs_k"])
def _forward(
    q_ptr, k_ptr, v_ptr, yq_ptr, yk_ptr, yv_ptr, wq_ptr, wk_ptr, cos_ptr, sin_ptr,
    tokens, positions, qb, qs, qh, kb, ks, kh, vb, vs, vh, cb, cs, sb, ss, eps, programs_q, programs_k,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, HALF_2: tl.constexpr,
    REST: tl.constexpr, REST_2: tl.constexpr, FULL: tl.constexpr, FULL_2: tl.constexpr, UNIT: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < programs_q:
        _forward_tile(q_ptr, yq_ptr, wq_ptr, cos_ptr, sin_ptr, tile, tokens * HQ, positions, qb, qs, qh, cb, cs, sb, ss, eps,
                      HQ, ROWS, HALF, HALF_2, REST, REST_2, UNIT, CAST)  # fmt: skip
    elif tile < programs_q + programs_k:
        if HK:
            _forward_tile(k_ptr, yk_ptr, wk_ptr, cos_ptr, sin_ptr, tile - programs_q, tokens * HK, positions, kb, ks, kh, cb, cs, sb, ss,
                          eps, HK, ROWS, HALF, HALF_2, REST, REST_2, UNIT, CAST)  # fmt: skip
    else:
        if HV:
            _forward_tile(v_ptr, yv_ptr, None, None, None, tile - programs_q - programs_k, tokens * HV, positions, vb, vs, vh, 0, 0, 0, 0,
                          eps, HV, ROWS, FULL, FULL_2, 0, 1, UNIT, CAST)  # fmt: skip


@triton.jit
def _dx(x, dn, rstd, mean):
    """Gradient of x from that of x * rstd, given the row's mean of their product."""
    return rstd * (dn - x * rstd * mean)


@triton.jit
def _backward_tiles(
    dy_ptr, x_ptr, dx_ptr, w_ptr, partial_ptr, cos_ptr, sin_ptr, program, programs, rows, positions,
    gb, gs, gh, xb, xs, xh, cb, cs, sb, ss, eps,
    HEADS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, HALF_2: tl.constexpr, REST: tl.constexpr, REST_2: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF + REST
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    cols = tl.arange(0, HALF_2)
    fits = cols < HALF
    rest = 2 * HALF + tl.arange(0, REST_2)
    dw_a = tl.zeros([ROWS, HALF_2], tl.float32)
    dw_b = tl.zeros([ROWS, HALF_2], tl.float32)
    dw_c = tl.zeros([ROWS, REST_2], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row, exists, batch, position, head = _locate(tile, rows, positions, HEADS, ROWS)
        mask = exists[:, None] & fits[None, :]
        g_row = dy_ptr + (batch * gb + position * gs + head * gh)[:, None]
        x_row = x_ptr + (batch * xb + position * xs + head * xh)[:, None]
        dx_row = dx_ptr + (row * D)[:, None]
        a = tl.load(x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_row + cols[None, :] + HALF, mask=mask, other=0.0).to(tl.float32)
        da = tl.load(g_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        db = tl.load(g_row + cols[None, :] + HALF, mask=mask, other=0.0).to(tl.float32)
        if cos_ptr is not None:
            cos_at, sin_at = (batch * cb + position * cs)[:, None], (batch * sb + position * ss)[:, None]
            cos_a, cos_b, sin_a, sin_b = _rotation(cos_ptr, sin_ptr, cos_at, sin_at, cols[None, :], mask, HALF)
            na = da * cos_a + db * sin_b
            nb = db * cos_b - da * sin_a
            da, db = na, nb
        square = tl.sum(a * a + b * b, 1)
        if REST:
            rest_mask = exists[:, None] & (rest < D)[None, :]
            c = tl.load(x_row + rest[None, :], mask=rest_mask, other=0.0).to(tl.float32)
            dc = tl.load(g_row + rest[None, :], mask=rest_mask, other=0.0).to(tl.float32)
            square += tl.sum(c * c, 1)
        rstd = tl.rsqrt(square / D + eps)[:, None]
        if partial_ptr is not None:
            dw_a += da * a * rstd
            dw_b += db * b * rstd
            if REST:
                dw_c += dc * c * rstd
        if w_ptr is not None:
            da *= _weight(w_ptr, cols, fits, UNIT)
            db *= _weight(w_ptr, cols + HALF, fits, UNIT)
            if REST:
                dc *= _weight(w_ptr, rest, rest < D, UNIT)
        dot = tl.sum(da * a + db * b, 1)
        if REST:
            dot += tl.sum(dc * c, 1)
        mean = dot[:, None] * rstd / D
        tl.store(dx_row + cols[None, :], _dx(a, da, rstd, mean).to(dtype), mask=mask)
        tl.store(dx_row + cols[None, :] + HALF, _dx(b, db, rstd, mean).to(dtype), mask=mask)
        if REST:
            tl.store(dx_row + rest[None, :], _dx(c, dc, rstd, mean).to(dtype), mask=rest_mask)
    if partial_ptr is not None:
        out = partial_ptr + program * D
        tl.store(out + cols, tl.sum(dw_a, 0), mask=fits)
        tl.store(out + cols + HALF, tl.sum(dw_b, 0), mask=fits)
        if REST:
            tl.store(out + rest, tl.sum(dw_c, 0), mask=rest < D)


@triton.jit(do_not_specialize=["tokens", "positions", "programs_q", "programs_k", "programs_v"])
def _backward(
    gq_ptr, gk_ptr, gv_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, wq_ptr, wk_ptr, pq_ptr, pk_ptr, cos_ptr, sin_ptr,
    tokens, positions, gqb, gqs, gqh, gkb, gks, gkh, gvb, gvs, gvh, qb, qs, qh, kb, ks, kh, vb, vs, vh, cb, cs, sb, ss, eps,
    programs_q, programs_k, programs_v,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, HALF_2: tl.constexpr,
    REST: tl.constexpr, REST_2: tl.constexpr, FULL: tl.constexpr, FULL_2: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < programs_q:
        _backward_tiles(gq_ptr, q_ptr, dq_ptr, wq_ptr, pq_ptr, cos_ptr, sin_ptr, program, programs_q, tokens * HQ, positions,
                        gqb, gqs, gqh, qb, qs, qh, cb, cs, sb, ss, eps, HQ, ROWS, HALF, HALF_2, REST, REST_2, UNIT)  # fmt: skip
    elif program < programs_q + programs_k:
        if HK:
            _backward_tiles(gk_ptr, k_ptr, dk_ptr, wk_ptr, pk_ptr, cos_ptr, sin_ptr, program - programs_q, programs_k, tokens * HK,
                            positions, gkb, gks, gkh, kb, ks, kh, cb, cs, sb, ss, eps,
                            HK, ROWS, HALF, HALF_2, REST, REST_2, UNIT)  # fmt: skip
    else:
        if HV:
            _backward_tiles(gv_ptr, v_ptr, dv_ptr, None, None, None, None, program - programs_q - programs_k, programs_v, tokens * HV,
                            positions, gvb, gvs, gvh, vb, vs, vh, 0, 0, 0, 0, eps, HV, ROWS, FULL, FULL_2, 0, 1, UNIT)  # fmt: skip


@triton.jit(do_not_specialize=["count_q", "count_k"])
def _sum_partials(pq_ptr, pk_ptr, dwq_ptr, dwk_ptr, count_q, count_k, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Column sums of one weight's partial rows, added tile after tile from the first to the last."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    fits = cols < D
    if tl.program_id(1) == 0:
        if pq_ptr is not None:
            _sum_rows(pq_ptr, dwq_ptr, cols, fits, count_q, D, ROWS, COLS)
    else:
        if pk_ptr is not None:
            _sum_rows(pk_ptr, dwk_ptr, cols, fits, count_k, D, ROWS, COLS)


@triton.jit
def _sum_rows(p_ptr, out_ptr, cols, fits, count, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        total += tl.load(p_ptr + row[:, None] * D + cols[None, :], mask=(row < count)[:, None] & fits[None, :], other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=fits)


@dataclass(frozen=True)
class Tiles:
    """How the rows of a launch are cut: ROWS of `head_dim` elements for a program of `warps` warps."""

    rows: int
    warps: int

    @staticmethod
    @cache
    def of(head_dim: int, rotated: int | None = None) -> Tiles:
        """About TILE elements, a row at least, and 16 for a thread; 8 where a part passes, whose layout costs as many registers again."""
        width = triton.next_power_of_2(head_dim)
        rows = max(1, TILE // width)
        lane = LANE if rotated in (None, head_dim) else LANE // 2
        return Tiles(rows, min(16, max(1, rows * width // (32 * lane))))

    def count(self, x: Tensor | None) -> int:
        """Tiles of one tensor [B, S, H, D]; 0 without it."""
        return 0 if x is None else -(-x.shape[0] * x.shape[1] * x.shape[2] // self.rows)


@cache
def _columns(head_dim: int, rotated: int | None) -> dict[str, int]:
    """How a row splits into halves and rest, each with the power of two that covers it. The dictionary is shared: read it only."""
    half = (head_dim if rotated is None else rotated) // 2
    rest, full = head_dim - 2 * half, head_dim // 2
    power = triton.next_power_of_2
    return {"HALF": half, "HALF_2": power(half), "REST": rest, "REST_2": power(rest) if rest else 1, "FULL": full, "FULL_2": power(full)}


def _row_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, position and head."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _rotation_strides(*tables: Tensor | None) -> list[int]:
    """Strides of batch and position of cos and sin; a batch of 1 serves all."""
    return [stride for t in tables for stride in ((0, 0) if t is None else (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1)))]


def _heads(*tensors: Tensor | None) -> dict[str, int]:
    return {name: 0 if x is None else x.shape[2] for name, x in zip(("HQ", "HK", "HV"), tensors, strict=True)}


def forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    unit_offset: bool,
    casts: str,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Normed and rotated q and k, normed v; contiguous.

    Args:
        q, k, v: [B, S, H, D] of one type, any strides with contiguous columns.
        q_weight, k_weight: [D], contiguous.
        cos, sin: [B or 1, S, n], contiguous columns, n <= D.
        tiles: how to cut the rows; by default as head_dim suggests.
    """
    dim, rotated = q.shape[-1], None if cos is None else cos.shape[-1]
    tiles = tiles or Tiles.of(dim, rotated)
    out = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    counts = [tiles.count(x) for x in (q, k, v)]
    strides = [stride for x in (q, k, v) for stride in _row_strides(x)]
    if sum(counts):
        _forward[(sum(counts),)](
            *(q, k, v), *out, q_weight, k_weight, cos, sin,
            q.shape[0] * q.shape[1], q.shape[1], *strides, *_rotation_strides(cos, sin), eps, counts[0], counts[1],
            **_heads(q, k, v), ROWS=tiles.rows, **_columns(dim, rotated), UNIT=unit_offset, CAST=CASTS[casts], num_warps=tiles.warps,
            # LLVM fuses a rounded product of bfloat16 values into the sum that follows, without the rounding.
            enable_fp_fusion=casts == "once",
        )  # fmt: skip
    assert out[0] is not None
    return out[0], out[1], out[2]


def backward(
    grads: tuple[Tensor, Tensor | None, Tensor | None],
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    unit_offset: bool,
    weight_grads: tuple[bool, bool],
    programs: int,
    tiles: Tiles | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and of the two weights.

    Args:
        grads: of the outputs of `forward`; any strides with contiguous columns.
        q, k, v, q_weight, k_weight, cos, sin, eps, unit_offset, tiles: as in `forward`.
        weight_grads: whether each weight gets a gradient.
        programs: how many programs share the rows; fixes the order in which weight gradients are added.

    Returns:
        (dq, dk, dv, dq_weight, dk_weight); None for what does not exist or was not asked for.
    """
    dim, rotated = q.shape[-1], None if cos is None else cos.shape[-1]
    tiles = tiles or Tiles.of(dim, rotated)
    dx = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    counts = [tiles.count(x) for x in (q, k, v)]
    total = sum(counts)
    shares = [min(n, max(1, programs * n // total)) if n else 0 for n in counts]
    weights = (q_weight, k_weight)
    dw = [torch.empty_like(w) if w is not None and wanted else None for w, wanted in zip(weights, weight_grads, strict=True)]
    partials = [None if d is None else d.new_empty((n, dim), dtype=torch.float32) for d, n in zip(dw, shares[:2], strict=True)]
    strides = [stride for x in (*grads, q, k, v) for stride in _row_strides(x)]
    if total:
        _backward[(sum(shares),)](
            *grads, q, k, v, *dx, *weights, *partials, cos, sin,
            q.shape[0] * q.shape[1], q.shape[1], *strides, *_rotation_strides(cos, sin), eps, *shares,
            **_heads(q, k, v), ROWS=tiles.rows, **_columns(dim, rotated), UNIT=unit_offset, num_warps=tiles.warps,
        )  # fmt: skip
    if any(d is not None for d in dw):
        grid = (-(-dim // SUM_COLS), 2)
        _sum_partials[grid](*partials, *dw, *shares[:2], D=dim, ROWS=SUM_ROWS, COLS=SUM_COLS, num_warps=4)
    return (*dx, *dw)
