"""Packing of tensors into chunks, and sums of bit patterns."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.weight_sync.wire import ALIGNMENT, bit_sum, differences, from_table, plan_chunks, read_sums, to_table, view

TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int8])
SHAPES = st.lists(st.tuples(TYPES, st.lists(st.integers(0, 5), max_size=3)), min_size=1)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 400))
def test_tensors_survive_the_way_through_chunks(shapes: list[tuple[torch.dtype, list[int]]], limit: int) -> None:
    tensors = {f"w{i}": torch.randn(shape).mul(50).to(dtype) for i, (dtype, shape) in enumerate(shapes)}
    chunks = plan_chunks([(name, t.dtype, t.shape) for name, t in tensors.items()], limit)
    assert [entry.name for chunk in chunks for entry in chunk] == list(tensors)
    for chunk in chunks:
        assert len(chunk) == 1 or chunk[-1].end <= limit
        assert all(entry.offset % ALIGNMENT == 0 for entry in chunk)
        assert all(before.end <= after.offset for before, after in pairwise(chunk))
        buffer = torch.empty(chunk[-1].end, dtype=torch.uint8)
        for entry in chunk:
            view(buffer, entry).copy_(tensors[entry.name])
        for entry in from_table(to_table(chunk)):
            assert torch.equal(view(buffer, entry), tensors[entry.name])


def test_bit_sums_add_up_and_see_every_bit() -> None:
    parts = [torch.randn(3, 7), torch.randn(2, 7)]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cast = [part.to(dtype) for part in parts]
        assert bit_sum(torch.cat(cast)) == bit_sum(cast[0]) + bit_sum(cast[1])
        flipped = cast[0].clone()
        flipped.view(torch.uint8)[1, 5] ^= 1
        assert bit_sum(flipped) != bit_sum(cast[0])
    assert bit_sum(torch.tensor([-0.0])) != bit_sum(torch.tensor([0.0]))
    assert bit_sum(parts[0].t()) == bit_sum(parts[0])
    assert bit_sum(torch.tensor([1.0], dtype=torch.bfloat16)) == 0x3F80
    narrow, wide = torch.tensor(2, dtype=torch.int8), torch.tensor([-1], dtype=torch.int64)
    assert read_sums({"a": bit_sum(narrow), "b": bit_sum(wide)}) == {"a": 2, "b": -1}
    assert read_sums({}) == {}


def test_differences_name_what_is_wrong() -> None:
    sent = {"a": 1, "b": 2, "c": 3}
    assert differences(sent, sent) == []
    assert differences(sent, {"a": 1, "b": 3, "d": 3}) == ["c did not arrive", "d was never sent", "b differs"]
