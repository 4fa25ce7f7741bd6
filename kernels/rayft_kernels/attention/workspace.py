"""How large the workspace of packed attention is at a head_dim above 256, which `wide.py` describes; without Triton, so plans can ask."""

from __future__ import annotations

WORKSPACE = 2**28
LEAST_ROWS = 4096
"""Rows of all heads together in a chunk, so that each launch has programs for the whole card."""
TILES = {2: 128, 4: 32}
"""Bytes of a value -> rows and keys of a tile of scores."""


def extent(tokens: int, heads: int, rows: int, keys: int, bytes_per_score: int, span: int) -> tuple[int, int]:
    """(rows of every head, keys) that the workspace holds at once.

    The keys of a tile of rows are at most span + rows - 1, and lie in one tile of keys more than these fill.

    Args:
        tokens: T.
        heads: of the queries.
        rows, keys: of a tile of scores.
        bytes_per_score: that are written for one score.
        span: no row sees more keys.
    """
    width = min(-(-tokens // keys), -(-(span + rows) // keys) + 1) * keys
    wanted = max(WORKSPACE // (heads * width * bytes_per_score), LEAST_ROWS // heads) // rows * rows
    return min(max(wanted, rows), -(-tokens // rows) * rows), width


def forward_bytes(tokens: int, heads: int, itemsize: int, span: int) -> int:
    """Bytes that the forward allocates beside its outputs: weights, and two float32 statistics of each row and tile of keys."""
    tile = TILES[itemsize]
    height, width = extent(tokens, heads, tile, tile, itemsize, span)
    return heads * height * (width * itemsize + 2 * 4 * width // tile)


def backward_bytes(tokens: int, heads: int, kv_heads: int, dim: int, itemsize: int, span: int) -> int:
    """Bytes that the backward allocates beside its outputs: weights and their gradients, row sums, and what chunks of rows add up in."""
    tile = TILES[itemsize]
    height, width = extent(tokens, heads, tile, tile, 2 * itemsize, span)
    between = 2 * 4 * tokens * kv_heads * dim if height < tokens else 0
    return 2 * itemsize * heads * height * width + 4 * heads * tokens + between
