"""From an optimizer step to its micro-batches: a pure function of (shards, seed, step, rank, world), so resuming is free."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rayft.data.shards import Columns, read_manifest, read_shard
from rayft.data.store import Location
from rayft.types import Batch

T = TypeVar("T")

ROW_ORDER = 0x726F7773
"""Purpose constant of the row permutation among everything that is drawn from the run's seed."""


@dataclass(frozen=True)
class Row:
    """A packed row.

    Attributes:
        id: place in the concatenation of all shards.
        tokens: int32 [seq_len].
        loss_weights: float32 [seq_len], the weight of predicting each token.
        lengths: int32 [D], the documents; they sum to seq_len.
        source_ids: int32 [D].
        num_tokens: tokens before the padding, which extends the last document.
    """

    id: int
    tokens: NDArray[np.int32]
    loss_weights: NDArray[np.float32]
    lengths: NDArray[np.int32]
    source_ids: NDArray[np.int32]
    num_tokens: int


class Reader:
    """Random access to the endless concatenation of epochs of a folder of shards.

    Shards keep their order. With `shuffle`, rows are permuted inside every `window` consecutive shards, differently in
    each epoch. Decoded shards of a window stay in memory. Not for use by several threads at once.

    Attributes:
        num_rows: rows in an epoch.
        seq_len: tokens in a row.
        max_documents: most documents in a row.

    Raises:
        DataError: the folder has no manifest, or (when it is read) a shard is not what was written.
    """

    def __init__(self, directory: Location, *, seed: int, shuffle: bool, window: int) -> None:
        manifest = read_manifest(directory)
        self.seq_len = manifest.seq_len
        self.num_rows = manifest.totals["rows"]
        self.max_documents = manifest.totals["max_documents"]
        self._seed, self._shuffle = seed, shuffle
        self._shard_starts = list(accumulate((shard.rows for shard in manifest.shards), initial=0))
        self._window_starts = [*self._shard_starts[:-1:window], self.num_rows]
        self._decoded: Callable[[int], Columns] = lru_cache(window + 1 if shuffle else 2)(
            lambda index: read_shard(directory, manifest.shards[index], manifest.seq_len)
        )
        self._permutation: Callable[[int, int], NDArray[np.int64]] = lru_cache(2)(self._draw)

    def row(self, position: int) -> Row:
        """The row at a position counted from the start of epoch 0."""
        epoch, place = divmod(position, self.num_rows)
        if self._shuffle:
            window = bisect_right(self._window_starts, place) - 1
            start = self._window_starts[window]
            place = start + int(self._permutation(epoch, window)[place - start])
        shard = bisect_right(self._shard_starts, place) - 1
        columns = self._decoded(shard)
        index = place - self._shard_starts[shard]
        documents = slice(columns.offsets[index], columns.offsets[index + 1])
        return Row(
            place,
            columns.tokens[index],
            columns.loss_weights[index],
            columns.lengths[documents],
            columns.source_ids[documents],
            int(columns.num_tokens[index]),
        )

    def blank(self) -> Row:
        """A row that counts for nothing: one document of zeros at weight 0."""
        return Row(
            -1,
            np.zeros(self.seq_len, np.int32),
            np.zeros(self.seq_len, np.float32),
            np.array([self.seq_len], np.int32),
            np.zeros(1, np.int32),
            0,
        )

    def _draw(self, epoch: int, window: int) -> NDArray[np.int64]:
        size = self._window_starts[window + 1] - self._window_starts[window]
        seeds = np.random.SeedSequence((self._seed, ROW_ORDER, epoch, window))
        return np.random.Generator(np.random.PCG64(seeds)).permutation(size)


def micro_batches(reader: Reader, step: int, *, rows: int, micro_rows: int, rank: int, world: int, limit: int | None = None) -> list[Batch]:
    """What one rank computes in one step.

    The step's rows are the positions step * rows to (step + 1) * rows - 1, whatever the world size: micro-batch m of rank
    r holds the slots m * world * micro_rows + r * micro_rows + i. Every rank gets the same number of micro-batches of
    micro_rows * seq_len tokens; slots without a row are filled with rows of weight 0.

    Args:
        rows: rows in the step, over all ranks.
        micro_rows: rows in a micro-batch.
        limit: positions from here on do not count (the end of an evaluation); None for no end.

    Returns:
        ceil(rows / (world * micro_rows)) batches on the CPU, in pinned memory where there is a GPU.
    """
    start, end = step * rows, (step + 1) * rows
    if limit is not None:
        end = min(end, limit)
    stride = world * micro_rows
    capacity = 1 << (micro_rows * reader.max_documents - 1).bit_length()  # the next power of two
    batches = []
    for micro in range(-(-rows // stride)):
        first = start + micro * stride + rank * micro_rows
        positions = range(first, first + micro_rows)
        packed = [reader.row(position) if position < end else reader.blank() for position in positions]
        batches.append(collate(packed, positions, capacity=capacity, step=step))
    return batches


def collate(rows: Sequence[Row], positions: Sequence[int], *, capacity: int, step: int) -> Batch:
    """Rows laid end to end as a Batch of T = len(rows) * seq_len tokens.

    Args:
        positions: the position of each row, which names its tokens.
        capacity: documents that cu_seqlens has room for.
    """
    tokens = np.concatenate([row.tokens for row in rows]).astype(np.int64)
    weights = np.concatenate([row.loss_weights for row in rows])
    lengths = np.concatenate([row.lengths for row in rows])
    sources = np.concatenate([row.source_ids for row in rows])
    total, ends = len(tokens), np.cumsum(lengths)
    cu_seqlens = np.full(capacity + 1, total, np.int32)
    cu_seqlens[: len(lengths)] = ends - lengths
    # Position t takes the target and weight of token t + 1; the last position of a document and padding have neither.
    targets, shifted = np.roll(tokens, -1), np.roll(weights, -1)
    targets[ends - 1], shifted[ends - 1] = 0, 0
    offsets = np.arange(len(rows[0].tokens), dtype=np.int64)
    num_tokens = np.array([row.num_tokens for row in rows])
    targets[(offsets >= num_tokens[:, None] - 1).reshape(-1)] = 0
    return Batch(
        tokens=_tensor(tokens),
        positions=_tensor(np.arange(total, dtype=np.int64) - np.repeat(ends - lengths, lengths)),
        cu_seqlens=_tensor(cu_seqlens),
        targets=_tensor(targets),
        loss_weights=_tensor(shifted),
        trained=_tensor(np.flatnonzero(shifted)),
        row_keys=_tensor(((np.array(positions, np.int64) << 24)[:, None] + offsets).reshape(-1)),
        source_ids=_tensor(np.repeat(sources, lengths)),
        document_lengths=tuple(lengths.tolist()),
        num_tokens=int(num_tokens.sum()),
        step=step,
    )


def _tensor(array: NDArray[np.generic]) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def prefetch(build: Callable[[int], T], steps: Iterable[int]) -> Generator[tuple[T, float], None, None]:
    """Run `build` for each step, one step ahead, in a thread.

    An error in `build` is raised here, when its step is due. Closing the iterator waits for the step in the works.

    Yields:
        What was built for the step, and the seconds that the caller had to wait for it.
    """
    upcoming = iter(steps)
    with ThreadPoolExecutor(1, thread_name_prefix="rayft-reader") as pool:
        ahead = [pool.submit(build, step) for step in islice(upcoming, 1)]
        while ahead:
            started = time.perf_counter()
            built = ahead.pop().result()
            waited = time.perf_counter() - started
            ahead = [pool.submit(build, step) for step in islice(upcoming, 1)]
            yield built, waited
