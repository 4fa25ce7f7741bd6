"""Where each token goes: rows sorted by expert, found without asking the device for a number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128
"""Rows of one tile of the Triton kernels; no tile holds rows of two experts."""


class Route(NamedTuple):
    """The (token, choice) pairs of a batch sorted by expert; S = T k rows.

    Attributes:
        order: int32 [S], sorted row -> pair; the token is pair // k. Pairs of one expert stay in the order of the tokens.
        place: int32 [S], pair -> sorted row.
        ends: int32 [E], the row after each expert's last.
        tiles: int32 [S / TILE + E, 3], (expert, first row, row after the expert's last) of each tile; expert -1 where there is none.
        top_k: choices of a token.
    """

    order: Tensor
    place: Tensor
    ends: Tensor
    tiles: Tensor
    top_k: int


def route(index: Tensor, experts: int) -> Route:
    """Sort the choices [T, k] of tokens by expert; numbers in [0, experts)."""
    order, place, ends, tiles = _route(index, experts)
    return Route(order, place, ends, tiles, index.shape[1])


@torch.library.custom_op("rayft_kernels::moe_route", mutates_args=())
def _route(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a Route."""
    flat = index.reshape(-1)
    chosen, order = torch.sort(flat.to(torch.int16 if experts < 2**15 else torch.int32), stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(flat.numel(), device=flat.device))
    numbers = torch.arange(experts, device=flat.device, dtype=chosen.dtype)
    ends = torch.searchsorted(chosen, numbers, right=True)
    return order.int(), place.int(), ends.int(), _tiles(ends, flat.numel() // TILE + experts)


def _tiles(ends: Tensor, count: int) -> Tensor:
    """The tiles of a Route: at most `count`, as every expert has at most one that is not full."""
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    of_expert = (ends - starts + TILE - 1) // TILE
    last = of_expert.cumsum(0)
    tile = torch.arange(count, device=ends.device)
    expert = torch.searchsorted(last, tile, right=True)
    exists = expert < ends.numel()
    expert = expert.clamp(max=ends.numel() - 1)
    first = starts[expert] + (tile - (last - of_expert)[expert]) * TILE
    return torch.stack((torch.where(exists, expert, -1), first, ends[expert]), 1).int()


@_route.register_fake
def _(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = index.numel()
    sizes = ((rows,), (rows,), (experts,), (rows // TILE + experts, 3))
    order, place, ends, tiles = (index.new_empty(size, dtype=torch.int32) for size in sizes)
    return order, place, ends, tiles
