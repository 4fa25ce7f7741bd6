"""Datasets to packed shards: plan the units, pack the missing ones in this process or through Ray Data, commit the folder.

The only file of this room that imports ray, and only inside the function that needs it. The caller has initialised Ray.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rayft.data import shards
from rayft.data.formats import make_encoder
from rayft.data.packing import pack
from rayft.data.units import Unit, plan_units
from rayft.errors import DataError, InfrastructureError, RayftError
from rayft.models.tokenizer import fingerprint, load_tokenizer

if TYPE_CHECKING:
    import numpy as np

    from rayft.config.schema import Data, Dataset, Model, SftRun
    from rayft.data.formats import Document, Encoder

log = logging.getLogger("rayft")

ENCODE_ROWS = 256
"""Input rows that go to the tokenizer together."""
HEARTBEAT_S = 10.0
STALE_S = 60.0
"""A lock file that has not changed for this long belongs to nobody."""
LOG_EVERY_S = 10.0

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What any process needs in order to pack units of a split.

    Attributes:
        directory: where the shards go.
        model: names the tokenizer.
        data: how rows become documents and documents rows.
        datasets: the split's datasets by name.
        units: the whole plan; a unit is named by its index.
    """

    directory: Path
    model: Model
    data: Data
    datasets: dict[str, Dataset]
    units: tuple[Unit, ...]


def prepare(cfg: SftRun, split: Literal["train", "eval"], *, use_ray: bool) -> Path:
    """The folder of a split's packed shards, complete; packs what is missing.

    A killed call goes on where it was: units that were committed are not packed again. Two calls for the same shards do
    not write at once: the second one waits.

    Args:
        cfg: the run; `cfg.data` and `cfg.model` decide the content.
        split: which datasets.
        use_ray: pack in Ray Data actors of the connected cluster instead of this process. The bytes are the same.

    Raises:
        DataError: files are missing or malformed, no row can be used, or shards on disk are damaged.
        InfrastructureError: another process kept the folder's lock for longer than `run.deadline_s`.
    """
    tokenizer = load_tokenizer(cfg.model)
    key = shards.shard_key(cfg, split, fingerprint(tokenizer))
    cache = Path(cfg.data.cache_dir) if cfg.data.cache_dir is not None else Path(cfg.run.dir) / ".shards"
    directory = cache.absolute() / f"{split}-{key[:16]}"
    if not shards.is_complete(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with exclusive(directory / "lock", cfg.run.deadline_s):
            if not shards.is_complete(directory):
                _fill(cfg, split, key, directory, tokenizer, use_ray=use_ray)
    shards.verify(directory, shards.read_manifest(directory).shards)
    return directory


def pack_unit(unit: Unit, encoder: Encoder, *, directory: Path, data: Data, pad_id: int) -> shards.UnitSummary:
    """Read a unit, encode and pack its rows, write its shards, commit it. Holds a window of documents at a time.

    The files it leaves are a function of the arguments: any process may run it, and run it again.
    """
    tally: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    written = []
    documents = _encode(unit, encoder, tally, dropped)
    for rows in _batched(_pack(documents, data), data.shard_rows):
        path = directory / f"{unit.index:06d}-{len(written):05d}.parquet"
        written.append(shards.write_shard(path, rows, source_id=unit.source_id, seq_len=data.seq_len, pad_id=pad_id))
    summary = shards.UnitSummary(unit.index, unit.source, tally["rows"], dict(dropped), tuple(written))
    shards.write_unit(directory, summary)
    return summary
