"""Datasets to packed shards: plan the units, pack the missing ones in this process or through Ray Data, commit the folder.

The only file of this room that imports ray, and only inside the function that needs it. The caller has initialised Ray.
"""

from __future__ import annotations

import logging
import math
import pickle
import socket
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rayft.config.environment import Credentials, credentials
from rayft.data import shards, store
from rayft.data.formats import make_encoder
from rayft.data.hub import cache_dir, is_there, with_hub_files
from rayft.data.lock import exclusive
from rayft.data.packing import pack
from rayft.data.sources import row_place
from rayft.data.store import Location
from rayft.data.units import Unit, plan_units
from rayft.data.waiting import silence_told, wait_for_room
from rayft.errors import ConfigError, DataError, RayftError
from rayft.models.tokenizer import fingerprint, load_tokenizer, template_text

if TYPE_CHECKING:
    from rayft.config.schema import Data, Model, SftRun
    from rayft.data.formats import Document, Encoder
    from rayft.models.tokenizer import Tokenizer

log = logging.getLogger("rayft")

ENCODE_ROWS = 256
"""Input rows that go to the tokenizer together."""
LOG_EVERY_S = 10.0

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What any process needs in order to pack units of a split.

    Attributes:
        directory: where the shards go.
        model: names the tokenizer.
        data: how rows become documents and documents rows.
        units: those to pack.
        credentials: for stores.
        start_s: longest wait for a cluster that has no room.
    """

    directory: str
    model: Model
    data: Data
    units: tuple[Unit, ...]
    credentials: Credentials
    start_s: float


def prepare(cfg: SftRun, split: Literal["train", "eval"], *, use_ray: bool) -> str:
    """The folder of a split's packed shards, by path or URL, complete; packs what is missing.

    A killed call goes on where it was: units that were committed are not packed again. Two calls for the same shards do
    not write at once: the second one waits.

    Args:
        cfg: the run, its paths absolute.
        split: which datasets.
        use_ray: pack in Ray Data actors of the connected cluster instead of this process. The bytes are the same.

    Raises:
        DataError: files are missing or malformed, no row can be used, or shards on disk are damaged.
        ConfigError: the folder is not the same on every node.
        InfrastructureError: another process kept the folder's lock for longer than `run.deadline_s`.
        ResourceError: the cluster had no room for a single packing actor within `run.start_s`.
    """
    tokenizer = load_tokenizer(cfg.model)
    cfg = with_hub_files(cfg, split)
    key = shards.shard_key(cfg, split, fingerprint(tokenizer))
    directory = _folder(cfg, split, key)
    store.make_folder(directory)
    shards.note_user(directory, store.join(cfg.run.dir, cfg.run.name))
    if not shards.is_complete(directory):
        with exclusive(f"{directory}.lock", cfg.run.deadline_s):
            if not shards.is_complete(directory):
                store.make_folder(directory)  # who held the lock before may have failed, and deleted it
                try:
                    _fill(cfg, split, key, directory, tokenizer, use_ray=use_ray)
                except DataError:
                    shards.remove_fruitless(directory)
                    raise
    shards.verify(directory, shards.read_manifest(directory).shards)
    return directory


def existing(cfg: SftRun, split: Literal["train", "eval"]) -> shards.Manifest | None:
    """The manifest of a split's packed shards when they are complete already, without packing anything."""
    if not all(is_there(cfg, dataset) for dataset in getattr(cfg.data, split).values()):
        return None
    cfg = with_hub_files(cfg, split)
    key = shards.shard_key(cfg, split, fingerprint(load_tokenizer(cfg.model)))
    directory = _folder(cfg, split, key)
    return shards.read_manifest(directory) if shards.is_complete(directory) else None


def _folder(cfg: SftRun, split: str, key: str) -> str:
    return store.join(cache_dir(cfg), f"{split}-{key[:16]}")


def pack_unit(unit: Unit, encoder: Encoder, directory: Location) -> shards.UnitSummary:
    """Read a unit, encode and pack its rows, write its shards, commit it. Holds a window of documents at a time.

    The files it leaves are a function of the unit and the encoder: any process may run it, and run it again.

    Raises:
        DataError: a row is malformed. What was written so far is not committed.
    """
    data = encoder.data
    outcomes: Counter[str | None] = Counter()
    written: list[shards.Shard] = []
    for rows in _batched(_pack(_documents(unit, encoder, outcomes), data), data.shard_rows):
        path = store.join(directory, f"{unit.index:06d}-{len(written):05d}.parquet")
        pad_id = encoder.tokenizer.pad_token_id
        written.append(shards.write_shard(path, rows, source_id=unit.source_id, seq_len=data.seq_len, pad_id=pad_id))
    dropped = {reason: count for reason, count in outcomes.items() if reason is not None}
    summary = shards.UnitSummary(unit.index, unit.source, outcomes.total(), dropped, tuple(written))
    shards.write_unit(directory, summary)
    return summary


class Packer:
    """Packs units in a Ray Data actor.

    An error that rayft explains leaves as a value of the result, so that the driver raises it as it is.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        job.credentials.adopt()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """{"item": [place of a unit in the job]} -> {"rows_read": [int], "error": [pickled RayftError, or empty]}."""
        (place,) = batch["item"]
        try:
            summary = self._pack(self._job.units[place])
        except RayftError as error:
            return {"rows_read": [0], "error": [pickle.dumps(error)]}
        return {"rows_read": [summary.rows_read], "error": [b""]}

    @cached_property
    def _encoder(self) -> Encoder:
        """Loaded by the first unit, once in an actor, so that its errors leave the same way."""
        return make_encoder(self._job.data, load_tokenizer(self._job.model))

    def _pack(self, unit: Unit) -> shards.UnitSummary:
        if not store.exists(unit.file):
            rule = f"the file is not there on node {socket.gethostname()}"
            raise DataError(unit.file, None, rule, "Put it on storage that every node sees at the same path")
        return pack_unit(unit, self._encoder, self._job.directory)


def _fill(cfg: SftRun, split: str, key: str, directory: str, tokenizer: Tokenizer, *, use_ray: bool) -> None:
    """Pack the units that are not committed yet, and commit the folder."""
    shards.remove_strays(directory)
    units = plan_units(split, getattr(cfg.data, split), cfg.data.unit_mb)
    there = shards.read_units(directory, range(len(units)))
    missing = tuple(unit for unit in units if unit.index not in there)
    job = Job(directory, cfg.model, cfg.data, missing, credentials(), cfg.run.start_s)
    if missing:
        finished = _pack_through_ray(job) if use_ray else _pack_here(job, make_encoder(cfg.data, tokenizer))
        try:
            with closing(finished):
                _report(split, finished, len(units) - len(missing), len(units))
        finally:
            shards.remove_strays(directory)  # of actors that another one's error stopped
    summaries = _summaries(directory, units)
    manifest = shards.Manifest(
        version=shards.DATA_VERSION,
        key=key,
        split=split,
        seq_len=cfg.data.seq_len,
        tokenizer=fingerprint(tokenizer),
        chat_template=template_text(tokenizer),
        data=cfg.data.model_dump(mode="json", exclude=shards.NOT_IN_KEY - {split}),
        totals=_totals(summaries),
        dropped=_dropped(summaries),
        shards=tuple(shard for summary in summaries for shard in summary.shards),
    )
    rows, rows_read = manifest.totals["rows"], manifest.totals["rows_read"]
    if rows == 0:
        rule = f"none of the {rows_read} rows can be used; dropped are {_in_words(manifest.dropped)}"
        raise DataError(f"data.{split}", None, rule, "Correct the rows, the datasets' columns and roles, or data.seq_len")
    shards.write_manifest(directory, manifest)
    tokens = manifest.totals["tokens"]
    log.info(
        "packed %s: %d rows of %d tokens, %.1f%% full, from %d rows; dropped: %s; in %s",
        split, rows, manifest.seq_len, 100 * tokens / (rows * manifest.seq_len), rows_read, _in_words(manifest.dropped), directory,
    )  # fmt: skip


def _pack_here(job: Job, encoder: Encoder) -> Generator[int, None, None]:
    """Pack the job's units one by one; yields the input rows of each."""
    for unit in job.units:
        yield pack_unit(unit, encoder, job.directory).rows_read


def pool_shape(cpus: float, wanted: int | None, units: int) -> tuple[int, float]:
    """(number of actors, CPUs reserved by each) for a cluster with so many CPUs, the configured actors and units to pack.

    One CPU stays unreserved: a Ray Data pool that holds all of them can starve the tasks beside it and hang.
    """
    actors = min(wanted or max(1, int(cpus) - 1), units)
    return actors, math.floor(min(1.0, max(cpus - 1, 0.5) / actors) * 1000) / 1000


def _pack_through_ray(job: Job) -> Generator[int, None, None]:
    """Pack the job's units in Ray Data actors; yields the input rows of each unit when it is done, in any order.

    Raises:
        ResourceError: the cluster has no room for one of them within the job's wait. They start as places come free.
    """
    import ray.data

    actors, cpus = pool_shape(ray.cluster_resources().get("CPU", 1.0), job.data.actors, len(job.units))
    actor = [{"CPU": cpus}]
    wait_for_room(actor, job.start_s, "packing")
    results = ray.data.from_items(list(range(len(job.units)))).map_batches(
        Packer,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
    )
    results.context.enable_progress_bars = False
    # A unit that cannot be split, such as a large compressed file, shows no progress for as long as it takes.
    results.context.execution_no_progress_timeout_s = -1
    with closing(iter(results.iter_rows())) as rows, silence_told("packing", actor) as finished:
        for row in rows:
            finished()
            if row["error"]:
                raise pickle.loads(row["error"])
            yield int(row["rows_read"])


def _summaries(directory: str, units: Sequence[Unit]) -> list[shards.UnitSummary]:
    """The summaries of units that some processes have packed, in the order of the plan."""
    there = shards.read_units(directory, range(len(units)))
    for unit in units:
        if unit.index not in there:
            rule = f"the shards of {store.name_of(unit.file)} were packed, but are not in this folder as the driver sees it"
            raise ConfigError("data.cache_dir", directory, rule, "Set it to a folder on storage that every node sees, or to s3://")
    return [there[unit.index] for unit in units]


def _documents(unit: Unit, encoder: Encoder, outcomes: Counter[str | None]) -> Iterator[Document]:
    """The unit's documents in order. Counts its rows by the reason why they were dropped, None when they were not."""
    dataset = getattr(encoder.data, unit.split)[unit.source]
    for rows in _batched(unit.rows(), ENCODE_ROWS):
        places = [row_place(unit.file, place) for place, _ in rows]
        for encoded in encoder.encode_many([row for _, row in rows], dataset, places):
            outcomes[encoded.dropped] += 1
            yield from encoded.documents


def _pack(documents: Iterable[Document], data: Data) -> Iterator[list[Document]]:
    """Rows of documents, packed in windows of `data.pack_window` documents."""
    for window in _batched(documents, data.pack_window if data.pack else 1):
        for row in pack([len(document.tokens) for document in window], data.seq_len):
            yield [window[index] for index in row]


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def _report(split: str, finished: Iterable[int], done: int, total: int) -> None:
    """Log how far packing is while units finish."""
    log.info("packing %s: %d of %d units are there", split, done, total)
    rows, started = 0, time.monotonic()
    logged = started
    for rows_read in finished:
        rows, done, now = rows + rows_read, done + 1, time.monotonic()
        if done == total or now - logged >= LOG_EVERY_S:
            log.info("packing %s: %d of %d units, %d rows, %.0f rows/s", split, done, total, rows, rows / (now - started))
            logged = now


def _totals(summaries: Iterable[shards.UnitSummary]) -> dict[str, int]:
    """Sums over all units; of max_documents the largest."""
    written = [shard for summary in summaries for shard in summary.shards]
    summed = ("rows", "documents", "tokens", "trained_tokens")
    totals = {name: sum(getattr(shard, name) for shard in written) for name in summed}
    largest = max((shard.max_documents for shard in written), default=0)
    return totals | {"max_documents": largest, "rows_read": sum(summary.rows_read for summary in summaries)}


def _dropped(summaries: Iterable[shards.UnitSummary]) -> dict[str, dict[str, int]]:
    """Dataset -> reason -> rows."""
    counts: dict[str, Counter[str]] = {}
    for summary in summaries:
        counts.setdefault(summary.source, Counter()).update(summary.dropped)
    return {source: dict(reasons) for source, reasons in counts.items()}


def _in_words(dropped: Mapping[str, Mapping[str, int]]) -> str:
    listed = [f"{count} of {source}: {reason}" for source, reasons in dropped.items() for reason, count in reasons.items()]
    return "; ".join(listed) or "none"
