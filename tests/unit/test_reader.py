"""The reader: order of rows, independence of ranks and of where it starts, and the layout of a batch."""

from __future__ import annotations

import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayft.data.formats import Document
from rayft.data.reader import Reader, Row, collate, micro_batches, prefetch
from rayft.data.shards import DATA_VERSION, Manifest, write_manifest, write_shard
from rayft.errors import DataError
from rayft.types import Batch

SEQ_LEN = 8
SHARD_ROWS = (5, 3, 4, 1, 6, 2, 2)
NUM_ROWS = sum(SHARD_ROWS)
WINDOW = 3


def document(token: int, length: int) -> Document:
    return Document(np.full(length, token, np.int32), np.ones(length, np.float32))


def write_folder(directory: Path) -> Path:
    """Rows whose first token is their id + 1; every third row holds two documents."""
    directory.mkdir()
    shards, row = [], 0
    for index, count in enumerate(SHARD_ROWS):
        rows = [[document(r + 1, 3), document(r + 1, 4)] if r % 3 == 0 else [document(r + 1, 6)] for r in range(row, row + count)]
        shards.append(write_shard(directory / f"{index}.parquet", rows, source_id=index % 2, seq_len=SEQ_LEN, pad_id=0))
        row += count
    totals = {"rows": row, "max_documents": max(shard.max_documents for shard in shards)}
    write_manifest(directory, Manifest(DATA_VERSION, "key", "train", SEQ_LEN, "print", None, {}, totals, {}, tuple(shards)))
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("reader") / "shards")


def reader(folder: Path, *, seed: int = 0, shuffle: bool = True, window: int = WINDOW) -> Reader:
    return Reader(folder, seed=seed, shuffle=shuffle, window=window)


def epoch_order(source: Reader, epoch: int) -> list[int]:
    return [source.row(epoch * source.num_rows + place).id for place in range(source.num_rows)]


def step_rows(source: Reader, step: int, *, rows: int, micro_rows: int, world: int, limit: int | None = None) -> list[tuple[int, int]]:
    """(position, row id) of every counted row of a step, over all ranks, in the order of positions."""
    seen = []
    for rank in range(world):
        for batch in micro_batches(source, step, rows=rows, micro_rows=micro_rows, rank=rank, world=world, limit=limit):
            for first in range(0, len(batch.tokens), SEQ_LEN):
                if batch.loss_weights[first : first + SEQ_LEN].any():
                    seen.append((int(batch.row_keys[first]) >> 24, int(batch.tokens[first]) - 1))
    return sorted(seen)


def same(left: Batch, right: Batch) -> bool:
    return all(
        torch.equal(value, getattr(right, name)) if isinstance(value, torch.Tensor) else value == getattr(right, name)
        for name, value in vars(left).items()
    )


def test_without_shuffle_rows_come_in_the_order_of_the_shards(folder: Path) -> None:
    assert epoch_order(reader(folder, shuffle=False), 2) == list(range(NUM_ROWS))


@pytest.mark.parametrize("window", [1, 3, 100])
def test_each_epoch_permutes_every_window_anew(folder: Path, window: int) -> None:
    source = reader(folder, window=window)
    orders = [epoch_order(source, epoch) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        start = 0
        for first in range(0, len(SHARD_ROWS), window):
            stop = start + sum(SHARD_ROWS[first : first + window])
            assert sorted(order[start:stop]) == list(range(start, stop))
            start = stop


def test_the_order_is_a_function_of_the_seed(folder: Path) -> None:
    assert epoch_order(reader(folder, seed=7), 1) == epoch_order(reader(folder, seed=7), 1)
    assert epoch_order(reader(folder, seed=7), 1) != epoch_order(reader(folder, seed=8), 1)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 12), micro_rows=st.integers(1, 4), world=st.integers(1, 4), epochs=st.integers(1, 3))
def test_every_row_once_per_epoch_for_any_batch_shape(folder: Path, rows: int, micro_rows: int, world: int, epochs: int) -> None:
    source = reader(folder)
    counted = Counter[tuple[int, int]]()
    for step in range(-(-epochs * NUM_ROWS // rows)):
        for position, row in step_rows(source, step, rows=rows, micro_rows=micro_rows, world=world):
            if position < epochs * NUM_ROWS:
                counted[position // NUM_ROWS, row] += 1
    assert counted == Counter((epoch, row) for epoch in range(epochs) for row in range(NUM_ROWS))


@pytest.mark.parametrize("step", [0, 3, 4])
def test_the_rows_of_a_step_do_not_depend_on_how_it_is_split(folder: Path, step: int) -> None:
    source = reader(folder)
    whole = step_rows(source, step, rows=6, micro_rows=6, world=1)
    assert [position for position, _ in whole] == list(range(6 * step, 6 * step + 6))
    for micro_rows, world in [(1, 1), (2, 1), (1, 2), (1, 3), (2, 3), (4, 1), (1, 5), (2, 4)]:
        assert step_rows(source, step, rows=6, micro_rows=micro_rows, world=world) == whole


def test_ranks_hold_the_slots_that_the_contract_names(folder: Path) -> None:
    source = reader(folder, shuffle=False)
    ranks = [micro_batches(source, 0, rows=9, micro_rows=2, rank=rank, world=3) for rank in range(3)]
    tokens = [[[int(batch.tokens[0]) - 1, int(batch.tokens[SEQ_LEN]) - 1] for batch in batches] for batches in ranks]
    assert tokens == [[[0, 1], [6, 7]], [[2, 3], [8, -1]], [[4, 5], [-1, -1]]]


def test_starting_anywhere_equals_the_straight_run(folder: Path) -> None:
    shape = {"rows": 5, "micro_rows": 2, "rank": 1, "world": 2}
    straight = reader(folder)
    run = [micro_batches(straight, step, **shape) for step in range(12)]
    for step in (11, 3, 7, 0):
        fresh = micro_batches(reader(folder), step, **shape)
        assert len(fresh) == len(run[step]) == 2
        assert all(same(a, b) for a, b in zip(fresh, run[step], strict=True))


def test_a_limit_ends_an_evaluation_inside_its_last_step(folder: Path) -> None:
    source = reader(folder, shuffle=False)
    seen = [pair for step in range(5) for pair in step_rows(source, step, rows=5, micro_rows=2, world=2, limit=NUM_ROWS)]
    assert seen == [(row, row) for row in range(NUM_ROWS)]


def test_row_keys_differ_between_epochs(folder: Path) -> None:
    source = reader(folder)
    keys = [batch.row_keys for step in range(2) for batch in micro_batches(source, step, rows=NUM_ROWS, micro_rows=1, rank=0, world=1)]
    flat = torch.cat(keys)
    assert len(flat.unique()) == len(flat) == 2 * NUM_ROWS * SEQ_LEN
    assert keys[1].tolist() == [(1 << 24) + offset for offset in range(SEQ_LEN)]


def test_a_batch_holds_the_shifted_documents_end_to_end() -> None:
    first = Row(
        4,
        np.array([11, 12, 13, 21, 22], np.int32),
        np.array([0, 0, 0.5, 1, 1], np.float32),
        np.array([3, 2], np.int32),
        np.array([0, 1], np.int32),
        5,
    )
    padded = np.array([31, 32, 33, 7, 7], np.int32), np.array([0, 1, 1, 0, 0], np.float32)
    second = Row(9, *padded, np.array([5], np.int32), np.array([2], np.int32), 3)
    batch = collate([first, second], [40, 41], capacity=4, step=8)
    assert batch.tokens.tolist() == [11, 12, 13, 21, 22, 31, 32, 33, 7, 7]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4]
    assert batch.targets.tolist() == [12, 13, 0, 22, 0, 32, 33, 0, 0, 0]
    assert batch.loss_weights.tolist() == [0, 0.5, 0, 1, 0, 1, 1, 0, 0, 0]
    assert batch.trained.tolist() == [1, 3, 5, 6]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 10, 10]
    assert batch.source_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert batch.row_keys.tolist() == [(40 << 24) + i for i in range(5)] + [(41 << 24) + i for i in range(5)]
    assert (batch.document_lengths, batch.num_tokens, batch.step) == ((3, 2, 5), 8, 8)
    dtypes = {name: value.dtype for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert {name for name, dtype in dtypes.items() if dtype == torch.int32} == {"cu_seqlens", "source_ids"}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"loss_weights"}
    assert {name for name, dtype in dtypes.items() if dtype == torch.int64} == {"tokens", "positions", "targets", "trained", "row_keys"}


def test_every_micro_batch_has_the_same_shapes(folder: Path) -> None:
    source = reader(folder)
    batches = [batch for step in range(9) for batch in micro_batches(source, step, rows=7, micro_rows=3, rank=1, world=2)]
    assert {(len(batch.tokens), len(batch.cu_seqlens)) for batch in batches} == {(3 * SEQ_LEN, 8 + 1)}
    assert all(sum(batch.document_lengths) == 3 * SEQ_LEN for batch in batches)


def test_rows_that_do_not_count_are_blank(folder: Path) -> None:
    (batch,) = micro_batches(reader(folder), 0, rows=2, micro_rows=2, rank=1, world=2)
    for name in ("tokens", "targets", "loss_weights"):
        assert not getattr(batch, name).any()
    assert (batch.document_lengths, batch.num_tokens, len(batch.trained)) == ((SEQ_LEN, SEQ_LEN), 0, 0)


def test_prefetch_yields_the_steps_in_order_one_ahead() -> None:
    built: list[int] = []

    def build(step: int) -> str:
        built.append(step)
        return f"step {step}"

    steps = prefetch(build, range(3, 6))
    assert next(steps)[0] == "step 3"
    time.sleep(0.2)
    assert built == [3, 4]
    assert [result for result, _ in steps] == ["step 4", "step 5"]


def test_prefetch_counts_the_seconds_that_it_was_waited_for() -> None:
    def build(step: int) -> None:
        time.sleep(0.2)

    waits = []
    for _, waited in prefetch(build, range(2)):
        waits.append(waited)
        time.sleep(0.4)
    assert waits[0] > 0.15
    assert waits[1] < 0.1


def test_an_error_in_the_thread_reaches_the_trainer_with_its_type(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "shards")
    source = reader(folder, shuffle=False)
    (folder / "2.parquet").unlink()
    steps = prefetch(partial(micro_batches, source, rows=4, micro_rows=4, rank=0, world=1), range(5))
    assert len(next(steps)[0]) == len(next(steps)[0]) == 1
    with pytest.raises(DataError, match=r"2\.parquet: the file is missing"):
        next(steps)


def test_prefetch_leaves_no_thread_behind() -> None:
    steps = prefetch(lambda step: step, range(1000))
    next(steps)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rayft-reader")]
