"""Packed attention's operator: gradients in float64, and the checks of the torch bodies. Triton bodies: test_attention_kernel.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.check_attention import Case, check_error, check_isolation, check_operator, check_surroundings, check_twice
from rayft_kernels.attention import workspace
from rayft_kernels.attention.op import document_bounds, packed_attention
from rayft_kernels.attention.wide import HALF, SINGLE, chunks

CASES = (
    Case((1, 7, 16, 3, 40), 8),
    Case((1, 7, 16, 3, 40), 8, window=7),
    Case((5, 30), 16, heads=6, kv_heads=2, window=8, softcap=2.0, scale=0.5),
    Case((33,), 4, heads=3, kv_heads=3),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_body_is_as_exact_as_torch(case: Case, dtype: torch.dtype) -> None:
    check_error(case, dtype, "cpu")


def test_torch_body_in_other_surroundings() -> None:
    check_twice(CASES[1], torch.float32, "cpu")
    check_isolation(CASES[0], torch.float32, "cpu")
    check_operator(CASES[2], "cpu")
    check_surroundings(CASES[2], "cpu", "aot_eager")


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 1.5)])
def test_gradients_in_float64(window: int | None, softcap: float | None) -> None:
    case = Case((4, 1, 5), 3, heads=2, kv_heads=1)
    leaves = tuple(t.detach().requires_grad_() for t in case.tensors("cpu", torch.float64))
    bounds = case.bounds("cpu")
    assert torch.autograd.gradcheck(lambda q, k, v: packed_attention(q, k, v, bounds, window=window, softcap=softcap), leaves)


def test_bounds_of_padded_boundaries() -> None:
    starts, ends = document_bounds(torch.tensor([0, 2, 2, 3, 6, 6, 6]), 6)
    assert starts.tolist() == [0, 0, 2, 3, 3, 3]
    assert ends.tolist() == [2, 2, 3, 6, 6, 6]


@pytest.mark.parametrize("tiles", [*HALF, *SINGLE])
@pytest.mark.parametrize(("tokens", "heads", "span"), [(1, 1, 1), (8192, 8, 8192), (16385, 8, 16385), (16384, 8, 4096), (131072, 32, 500)])
def test_chunks_cover_the_rows_once_in_whole_tiles(tokens: int, heads: int, span: int, tiles: object) -> None:
    parts = chunks(tokens, heads, tiles, 4, span)
    assert [part.begin for part in parts] == list(range(0, tokens, parts[0].height))
    for part in parts:
        rows = min(part.height, tokens - part.begin)
        assert part.height % tiles.rows == part.width % tiles.keys == 0
        assert part.grid[1] * tiles.rows >= rows > (part.grid[1] - 1) * tiles.rows
        assert part.key_tiles * tiles.keys >= part.begin + rows > (part.key_tiles - 1) * tiles.keys
        assert heads * part.height * part.width * 4 <= 2**28 or heads * part.height <= 4096 or part.height == tiles.rows


@pytest.mark.parametrize("span", [1, 2, 127, 128, 129, 255, 256, 257, 1000])
@pytest.mark.parametrize("tiles", [*HALF, replace(HALF[0], keys=256)])
def test_the_keys_of_a_tile_of_rows_fit_into_the_workspace(span: int, tiles: object) -> None:
    tokens = 1 << 14
    (part, *_) = chunks(tokens, 8, tiles, 4, span)
    for first in range(0, tokens, tiles.rows):
        lowest, last = max(first - span + 1, 0), first + tiles.rows - 1
        assert (last // tiles.keys - lowest // tiles.keys + 1) * tiles.keys <= part.width


def test_wrong_arguments_are_named() -> None:
    case = CASES[0]
    (q, k, v), bounds = case.tensors("cpu", torch.float32), case.bounds("cpu")
    for arguments, words in (
        ((q, k[:-1], v[:-1], bounds), "K a divisor of H"),
        ((q[:, :3], k, v, bounds), "K a divisor of H"),
        ((q, k, v.double(), bounds), "one type"),
        ((q, k, v, (bounds[0][:-1], bounds[1])), "q has 67"),
    ):
        with pytest.raises(ValueError, match=words):
            packed_attention(*arguments)
    with pytest.raises(ValueError, match="longest is -1"):
        packed_attention(q, k, v, bounds, longest=-1)
    with pytest.raises(ValueError, match="window is 0"):
        packed_attention(q, k, v, bounds, window=0)
    wide = torch.zeros(4, 1, 1024)
    with pytest.raises(ValueError, match="head_dim is 1024"):
        packed_attention(wide, wide, wide, document_bounds(torch.tensor([0, 4]), 4))


def test_bytes_beside_the_outputs_of_wide_heads() -> None:
    """8,192 tokens of 8 query and 2 key heads of 512 allocate 328 MiB in the forward, and 480 with the backward, outputs included."""
    shape, mib = (8192, 8), 2**20
    of_queries, of_keys = 64 * mib, 16 * mib
    assert workspace.forward_bytes(*shape, 2, 8192) + of_queries == 328 * mib
    more = workspace.backward_bytes(*shape, 2, 512, 2, 8192) - 4 * 8 * 8192  # row sums, below the precision of what was measured
    assert more + 2 * of_queries + 2 * of_keys == 480 * mib


@pytest.mark.parametrize(("tokens", "heads", "span"), [(8192, 8, 8192), (300, 1, 300), (16384, 8, 4096), (131072, 32, 500)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_planned_bytes_are_those_of_the_chunks(tokens: int, heads: int, span: int, itemsize: int) -> None:
    (forward, backward), between = (HALF if itemsize == 2 else SINGLE), 2 * 4 * tokens * 512
    first = chunks(tokens, heads, forward, itemsize, span)[0]
    scores = heads * first.height * first.width
    assert workspace.forward_bytes(tokens, heads, itemsize, span) == scores * itemsize + 2 * 4 * scores // forward.keys
    parts = chunks(tokens, heads, backward, 2 * itemsize, span)
    scores = heads * parts[0].height * parts[0].width
    wanted = 2 * itemsize * scores + 4 * heads * tokens + (between if len(parts) > 1 else 0)
    assert workspace.backward_bytes(tokens, heads, 1, 512, itemsize, span) == wanted
