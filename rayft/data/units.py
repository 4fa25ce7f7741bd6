"""Work units: the corpus cut into ranges of files, in an order that is fixed before any work starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from rayft.config.schema import Dataset
from rayft.data.sources import read_rows, resolve_files, split_ranges


@dataclass(frozen=True)
class Unit:
    """A range of one file that one process turns into shards, independently of every other unit.

    Attributes:
        index: place in the plan; shards are named and ordered by it.
        split: "train" or "eval".
        source: name of the dataset.
        source_id: place of the dataset in its split.
        file: the file, by path or URL.
        start, stop: range in the file, in the file format's own measure; stop None is the end.
        limit: rows of the range to use, None for all.
    """

    index: int
    split: str
    source: str
    source_id: int
    file: str
    start: int
    stop: int | None
    limit: int | None = None

    def rows(self) -> Iterator[tuple[int, dict[str, object]]]:
        """(row number, row) of the unit, streamed."""
        return islice(read_rows(self.file, self.start, self.stop), self.limit)


def plan_units(split: str, datasets: dict[str, Dataset], unit_mb: float) -> tuple[Unit, ...]:
    """All units of a split: datasets in the order of the configuration, files sorted, ranges ascending.

    `Dataset.limit` counts rows as they are read, before any is dropped. It is exact: the ranges that it touches, and no
    others, are counted here, at the price of reading those rows twice.

    Args:
        split: "train" or "eval".
        datasets: the datasets of the split by name.
        unit_mb: size of a unit in megabytes (1e6 bytes) of input.

    Raises:
        DataError: no file matches, or a file cannot be read.
    """
    units: list[Unit] = []
    for source_id, (source, dataset) in enumerate(datasets.items()):
        left = dataset.limit
        for file in resolve_files(source, dataset, split):
            for start, stop in split_ranges(file, max(1, int(unit_mb * 1e6))):
                if left == 0:
                    break
                unit = Unit(len(units), split, source, source_id, file, start, stop, left)
                if left is not None:
                    left -= sum(1 for _ in unit.rows())
                units.append(unit)
    return tuple(units)
