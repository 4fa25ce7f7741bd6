"""Triton bodies of packed attention for head_dim above 256, as plain products over a workspace of probabilities.

Flash kernels do not fit such heads. A block of 64 rows x 512 columns of float32 sums is half of an SM's registers, so that is the most
rows a program can hold (one of keys, which has two sums, holds 32), and with so few rows a block does 64 FLOP for each byte it reads from
the L2 cache, at half of the card's rate at best, while 192 of the 227 KB of shared memory are taken by single copies of its operands
and nothing overlaps. The backward would compute the scores of every block two or three times besides.

But a score costs 4 x 512 FLOP forward and 10 x 512 backward: enough to pay for writing it down. So scores, and in the backward their
gradients, go through memory in the type of q, in tiles that products like those of cuBLAS make and use at their full rate:

    forward    P' = exp(S - row maximum within the tile);  out = sum over tiles of P' exp(tile's maximum - row's) / total V
    backward   P = exp(S - lse) and dS, a tile of both in one program;  dQ = dS K;  dV = P^T dO and dK = dS^T Q, summed over a group

Rows are taken in chunks, in order, so that the workspace holds WORKSPACE bytes, or LEAST_ROWS rows of all heads where that is more:
8 heads, 8,192 tokens: 1,024 rows and 268 MB in the backward. Where documents or windows are known to be shorter than the rows, so is the
workspace, and chunks are fewer. dK and dV of keys that more than one chunk sees add up in float32
between launches; nothing is added by atomics, so every run gives the same bits. Tiles outside of documents and windows are neither
computed nor read. Per tile: 2 products forward, 5 backward, which is the least there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayft_kernels.attention.parts import NO_WINDOW, VARYING, highest, load_rows, lowest, roomy, store_rows, to_log2
from rayft_kernels.attention.workspace import TILES, extent


@dataclass(frozen=True)
class Product:
    """One kernel: depth of a step of its loop, columns of head_dim that a program owns, warps, stages."""

    step: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Forward:
    """Rows and keys of a tile of scores, of which the steps of `out` are divisors, and the two kernels."""

    rows: int
    keys: int
    scores: Product
    out: Product


@dataclass(frozen=True)
class Backward:
    """Rows and keys of a tile of scores, of which the steps of `queries` and `values` are divisors, and the three kernels."""

    rows: int
    keys: int
    gradients: Product
    queries: Product
    values: Product


HALF = (
    Forward(TILES[2], TILES[2], Product(64, 0, 8, 3), Product(64, 256, 8, 3)),
    Backward(TILES[2], TILES[2], Product(64, 0, 8, 3), Product(64, 256, 8, 3), Product(64, 256, 8, 3)),
)
"""For types of 16 bits, from `kernels/bench/gpu_k4.py`."""
SMALL = (
    Forward(TILES[2], TILES[2], Product(64, 0, 8, 2), Product(64, 128, 8, 2)),
    Backward(TILES[2], TILES[2], Product(64, 0, 8, 2), Product(64, 128, 8, 2), Product(64, 128, 8, 2)),
)
"""The same within 99 KB of shared memory."""
SINGLE = (
    Forward(TILES[4], TILES[4], Product(32, 0, 4, 1), Product(32, 64, 4, 1)),
    Backward(TILES[4], TILES[4], Product(32, 0, 4, 1), Product(32, 64, 4, 1), Product(32, 64, 4, 1)),
)
"""For float32, which is for checks."""


@triton.jit
def _product(
    a_ptr, b_ptr, m0, n0, tokens, a_token, b_token,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """a[m0:] b[n0:]^T, [ROWS, KEYS], over all columns."""
    acc = tl.zeros((ROWS, KEYS), tl.float32)
    for column in range(0, DIM, STEP):
        a = load_rows(a_ptr, m0, a_token, tokens, column, DIM, ROWS, STEP, True)
        b = load_rows(b_ptr, n0, b_token, tokens, column, DIM, KEYS, STEP, True)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit
def _seen(starts_ptr, m0, n0, tokens, window, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """bool [ROWS, KEYS]."""
    rows, keys = m0 + tl.arange(0, ROWS), n0 + tl.arange(0, KEYS)
    low = tl.maximum(tl.load(starts_ptr + rows, mask=rows < tokens, other=0), rows - window + 1)
    return (keys[None, :] <= rows[:, None]) & (keys[None, :] >= low[:, None]) & (rows < tokens)[:, None]


@triton.jit
def _place(base, head, row, key, height, width, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Pointers to tile (row, key) of a head in a workspace [H, height, width], in which keys go round."""
    column = tl.multiple_of(key % width, 16)  # tiles are; the compiler does not see it
    first = base + ((head * height + row) * width + column)
    return first + (tl.arange(0, ROWS)[:, None] * width + tl.arange(0, KEYS)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _scores(
    q_ptr, k_ptr, starts_ptr, weights_ptr, most_ptr, total_ptr, chunk, height, width, tokens,
    q_token, q_head, k_token, k_head, scale, softcap, window, group,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """exp(scores - their maximum within the tile), with that maximum (in units of log 2) and the sum, [H, tiles of keys, height]."""
    row, head = tl.program_id(1) * ROWS, tl.program_id(2).to(tl.int64)
    m0 = chunk + row
    tile = lowest(starts_ptr, m0, window) // KEYS + tl.program_id(0)
    n0 = tile * KEYS
    if n0 < tl.minimum(m0 + ROWS, tokens):
        acc = _product(q_ptr + head * q_head, k_ptr + head // group * k_head, m0, n0, tokens, q_token, k_token, DIM, ROWS, KEYS, STEP)
        s, _ = to_log2(acc, scale, softcap, CAPPED)
        s = tl.where(_seen(starts_ptr, m0, n0, tokens, window, ROWS, KEYS), s, float("-inf"))
        most = tl.max(s, 1)
        p = tl.exp2(s - tl.where(most == float("-inf"), 0.0, most)[:, None])
        tl.store(_place(weights_ptr, head, row, n0, height, width, ROWS, KEYS), p.to(weights_ptr.dtype.element_ty))
        at = (head * (width // KEYS) + tile % (width // KEYS)) * height + row + tl.arange(0, ROWS)
        tl.store(most_ptr + at, most)
        tl.store(total_ptr + at, tl.sum(p, 1))


@triton.jit(do_not_specialize=VARYING)
def _out(
    weights_ptr, most_ptr, total_ptr, v_ptr, starts_ptr, out_ptr, lse_ptr, chunk, height, width, tokens,
    v_token, v_head, out_token, out_head, window, group,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column, row, head = tl.program_id(0) * COLUMNS, tl.program_id(1) * ROWS, tl.program_id(2).to(tl.int64)
    m0 = chunk + row
    rows = m0 + tl.arange(0, ROWS)
    first = lowest(starts_ptr, m0, window) // KEYS
    end = tl.cdiv(tl.minimum(m0 + ROWS, tokens), KEYS)
    at = head * (width // KEYS) * height + row + tl.arange(0, ROWS)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for i in range(end - first):
        tile = ((first + i) % (width // KEYS)).to(tl.int64)
        here = tl.load(most_ptr + at + tile * height)
        new = tl.maximum(most, here)
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(most - shift) + tl.load(total_ptr + at + tile * height) * tl.exp2(here - shift)
        most = new
    most = tl.where(rows < tokens, most, 0.0)
    share = 1.0 / tl.where(rows < tokens, total, 1.0)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range((end - first) * (KEYS // STEP)):
        n0 = first * KEYS + i * STEP
        here = tl.load(most_ptr + at + (n0 // KEYS % (width // KEYS)).to(tl.int64) * height)
        p = tl.load(_place(weights_ptr, head, row, n0, height, width, ROWS, STEP))
        v = load_rows(v_ptr + head // group * v_head, n0, v_token, tokens, column, DIM, STEP, COLUMNS, True)
        p = p.to(tl.float32) * (tl.exp2(here - most) * share)[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    store_rows(out_ptr + head * out_head, m0, out_token, tokens, column, acc, DIM, ROWS, COLUMNS)
    if column == 0:
        tl.store(lse_ptr + head * tokens + rows, (most - tl.log2(share)) * 0.6931471805599453, mask=rows < tokens)


@triton.jit(do_not_specialize=VARYING)
def _gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, sums_ptr, starts_ptr, weights_ptr, ds_ptr, chunk, height, width, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, g_token, g_head, scale, softcap, window, group,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """A tile of the probabilities and of the gradients of the scaled scores."""
    row, head = tl.program_id(1) * ROWS, tl.program_id(2).to(tl.int64)
    m0 = chunk + row
    n0 = (lowest(starts_ptr, m0, window) // KEYS + tl.program_id(0)) * KEYS
    if n0 < tl.minimum(m0 + ROWS, tokens):
        kv_head, rows = head // group, m0 + tl.arange(0, ROWS)
        acc = _product(q_ptr + head * q_head, k_ptr + kv_head * k_head, m0, n0, tokens, q_token, k_token, DIM, ROWS, KEYS, STEP)
        s, t = to_log2(acc, scale, softcap, CAPPED)
        lse = tl.load(lse_ptr + head * tokens + rows, mask=rows < tokens, other=0.0) * 1.4426950408889634
        p = tl.where(_seen(starts_ptr, m0, n0, tokens, window, ROWS, KEYS), tl.exp2(s - lse[:, None]), 0.0)
        tl.store(_place(weights_ptr, head, row, n0, height, width, ROWS, KEYS), p.to(weights_ptr.dtype.element_ty))
        sums = tl.load(sums_ptr + head * tokens + rows, mask=rows < tokens, other=0.0)
        dp = _product(g_ptr + head * g_head, v_ptr + kv_head * v_head, m0, n0, tokens, g_token, v_token, DIM, ROWS, KEYS, STEP)
        ds = p * (dp - sums[:, None])
        if CAPPED:
            ds = ds * (1.0 - t * t)
        tl.store(_place(ds_ptr, head, row, n0, height, width, ROWS, KEYS), ds.to(ds_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=VARYING)
def _queries(
    ds_ptr, k_ptr, starts_ptr, dq_ptr, chunk, height, width, tokens, k_token, k_head, dq_token, dq_head, scale, window, group,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column, row, head = tl.program_id(0) * COLUMNS, tl.program_id(1) * ROWS, tl.program_id(2).to(tl.int64)
    m0 = chunk + row
    begin = lowest(starts_ptr, m0, window) // KEYS * KEYS
    end = tl.cdiv(tl.minimum(m0 + ROWS, tokens), KEYS) * KEYS
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range((end - begin) // STEP):
        n0 = begin + i * STEP
        ds = tl.load(_place(ds_ptr, head, row, n0, height, width, ROWS, STEP))
        k = load_rows(k_ptr + head // group * k_head, n0, k_token, tokens, column, DIM, STEP, COLUMNS, True)
        acc = tl.dot(ds, k, acc, input_precision="ieee")
    store_rows(dq_ptr + head * dq_head, m0, dq_token, tokens, column, acc * scale, DIM, ROWS, COLUMNS)


@triton.jit(do_not_specialize=VARYING)
def _values(
    weights_ptr, g_ptr, q_ptr, ends_ptr, sums_ptr, dv_ptr, dk_ptr, chunk, height, width, tokens,
    g_token, g_head, q_token, q_head, out_token, out_head, scale, window, group,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """P^T dO and dS^T Q over the rows of the chunk and the heads of a group, [T, K, D] contiguous: on top of `sums` from the second chunk
    on, to the outputs in the last. Both products are one launch, for half a wave of programs would be idle in each of two.
    """
    column, n0 = tl.program_id(0) * COLUMNS, tl.program_id(1) * KEYS
    which, kv_head = tl.program_id(2) % 2, (tl.program_id(2) // 2).to(tl.int64)
    if which == 0:
        x_ptr, x_token, x_head, out_ptr, factor = g_ptr, g_token, g_head, dv_ptr, 1.0
    else:
        x_ptr, x_token, x_head, out_ptr, factor = q_ptr, q_token, q_head, dk_ptr, scale
    weights_ptr += (which * (tl.num_programs(2) // 2 * group)).to(tl.int64) * height * width
    up = highest(ends_ptr, tl.minimum(n0 + KEYS, tokens) - 1, window)
    if up > chunk:
        begin = tl.maximum(n0 // ROWS * ROWS - chunk, 0)
        steps = (tl.minimum(tl.cdiv(up - chunk, ROWS) * ROWS, height) - begin) // STEP
        sum_at = sums_ptr + (which * tokens).to(tl.int64) * out_token + kv_head * out_head
        acc = tl.zeros((KEYS, COLUMNS), tl.float32)
        if n0 < chunk:
            acc = load_rows(sum_at, n0, out_token, tokens, column, DIM, KEYS, COLUMNS, True)
        for i in range(group * steps):
            head, row = kv_head * group + i // steps, begin + i % steps * STEP
            w = tl.load(_place(weights_ptr, head, row, n0, height, width, STEP, KEYS))
            x = load_rows(x_ptr + head * x_head, chunk + row, x_token, tokens, column, DIM, STEP, COLUMNS, True)
            acc = tl.dot(tl.trans(w), x, acc, input_precision="ieee")
        if up > chunk + height:
            store_rows(sum_at, n0, out_token, tokens, column, acc, DIM, KEYS, COLUMNS)
        else:
            store_rows(out_ptr + kv_head * out_head, n0, out_token, tokens, column, acc * factor, DIM, KEYS, COLUMNS)


@dataclass(frozen=True)
class Chunk:
    """Some rows of every head: where they begin, how many, the keys that the workspace holds for each, the grid (tiles of keys, tiles of
    rows, heads) of their scores, and the tiles of keys up to their end.
    """

    begin: int
    height: int
    width: int
    grid: tuple[int, int, int]
    key_tiles: int


def chunks(tokens: int, heads: int, tiles: Forward | Backward, bytes_per_score: int, span: int) -> list[Chunk]:
    """The rows in chunks of one height, whole tiles, within `workspace.WORKSPACE`, where no row sees more than `span` keys."""
    height, width = extent(tokens, heads, tiles.rows, tiles.keys, bytes_per_score, span)
    found = []
    for begin in range(0, tokens, height):
        end = min(begin + height, tokens)
        key_tiles = triton.cdiv(end, tiles.keys)
        grid = (min(key_tiles, width // tiles.keys), triton.cdiv(end - begin, tiles.rows), heads)
        found.append(Chunk(begin, height, width, grid, key_tiles))
    return found


def _tiles(q: Tensor) -> tuple[Forward, Backward]:
    return (HALF if roomy(q.device) else SMALL) if q.element_size() == 2 else SINGLE


def _span(tokens: int, window: int | None, longest: int | None) -> int:
    return min(tokens, window or tokens, longest or tokens)


def _options(product: Product) -> dict[str, int]:
    return {"STEP": product.step, "num_warps": product.warps, "num_stages": product.stages}


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, scale: float, window: int | None, softcap: float | None,
    longest: int | None, tiles: Forward | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As triton.forward."""
    tiles = tiles or _tiles(q)[0]
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    parts = chunks(tokens, heads, tiles, q.element_size(), _span(tokens, window, longest))
    weights = torch.empty((heads, parts[0].height, parts[0].width), dtype=q.dtype, device=q.device)
    most, total = torch.empty((2, heads, parts[0].width // tiles.keys, parts[0].height), dtype=torch.float32, device=q.device)
    common = {"DIM": dim, "ROWS": tiles.rows, "KEYS": tiles.keys}
    window, group = window or NO_WINDOW, heads // k.shape[1]
    for part in parts:
        where = (part.begin, part.height, part.width, tokens)
        _scores[part.grid](
            q, k, starts, weights, most, total, *where, *_strides(q, k), scale, softcap or 0.0, window, group,
            CAPPED=softcap is not None, **common, **_options(tiles.scores),
        )  # fmt: skip
        _out[(triton.cdiv(dim, tiles.out.columns), *part.grid[1:])](
            weights, most, total, v, starts, out, lse, *where, *_strides(v, out), window, group,
            COLUMNS=tiles.out.columns, **common, **_options(tiles.out),
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, starts: Tensor, ends: Tensor,
    scale: float, window: int | None, softcap: float | None, longest: int | None, tiles: Backward | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As triton.backward, from the row sums of grad * out."""
    tiles = tiles or _tiles(q)[1]
    tokens, heads, dim = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    parts = chunks(tokens, heads, tiles, 2 * q.element_size(), _span(tokens, window, longest))
    both = torch.empty((2, heads, parts[0].height, parts[0].width), dtype=q.dtype, device=q.device)
    between = torch.empty((2, *k.shape) if len(parts) > 1 else 0, dtype=torch.float32, device=q.device)
    common = {"DIM": dim, "ROWS": tiles.rows, "KEYS": tiles.keys}
    window, group = window or NO_WINDOW, heads // k.shape[1]
    for part in parts:
        where = (part.begin, part.height, part.width, tokens)
        _gradients[part.grid](
            q, k, v, grad, lse, sums, starts, *both, *where, *_strides(q, k, v, grad), scale, softcap or 0.0, window, group,
            CAPPED=softcap is not None, **common, **_options(tiles.gradients),
        )  # fmt: skip
        _queries[(triton.cdiv(dim, tiles.queries.columns), *part.grid[1:])](
            both[1], k, starts, dq, *where, *_strides(k, dq), scale, window, group,
            COLUMNS=tiles.queries.columns, **common, **_options(tiles.queries),
        )  # fmt: skip
        _values[(triton.cdiv(dim, tiles.values.columns), part.key_tiles, 2 * k.shape[1])](
            both, grad, q, ends, between, dv, dk, *where, *_strides(grad, q, dk), scale, window, group,
            COLUMNS=tiles.values.columns, **common, **_options(tiles.values),
        )  # fmt: skip
    return dq, dk, dv
