"""Packed rows on disk: their schema, their key, and the order of writes that makes a half-written folder harmless.

A folder, by path or URL, holds the shards of one split. Every file appears in one piece, in this order: a unit's shards, the
unit's sidecar (its commit mark), and, when all units are there, `manifest.json`. Bytes depend on the data, the settings in the key and
the version of pyarrow only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayft.data import store
from rayft.data.sources import resolve_files
from rayft.data.store import Location, committed_file
from rayft.errors import DataError

if TYPE_CHECKING:
    from rayft.config.schema import SftRun
    from rayft.data.formats import Document

DATA_VERSION = 1
"""Version of what is written: raise it when the same input gives other shards."""

MANIFEST = "manifest.json"
WHOLE_FILE = 64_000_000
"""Files up to this many bytes are identified by all their content, larger ones by their ends and their date."""
ENDS = 1_000_000

NOT_IN_KEY = {"train", "eval", "shuffle", "window", "actors", "cache_dir"}
"""Fields of the data section that change no byte of a shard; the datasets enter the key on their own."""


@dataclass(frozen=True)
class Shard:
    """One parquet file of packed rows.

    Attributes:
        name: file name.
        rows, documents: what it holds.
        tokens: tokens of the documents, padding not counted.
        trained_tokens: tokens that are predicted with a non-zero weight.
        max_documents: most documents in one of its rows.
        bytes, sha256: size and hash of the file.
    """

    name: str
    rows: int
    documents: int
    tokens: int
    trained_tokens: int
    max_documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class UnitSummary:
    """What became of a unit; its sidecar.

    Attributes:
        index: the unit's place in the plan.
        source: name of the dataset.
        rows_read: rows of the input.
        dropped: reason -> input rows left out for it.
        shards: the shards written, in order.
    """

    index: int
    source: str
    rows_read: int
    dropped: dict[str, int]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What a complete folder holds.

    Attributes:
        version: DATA_VERSION of the writer.
        key: the folder's key, see `shard_key`.
        split: "train" or "eval".
        seq_len: tokens in a row.
        tokenizer: fingerprint of the tokenizer.
        chat_template: text of the template that rendered the chats, None when the tokenizer has none.
        data: of the data section of the run that wrote it, what decides the content; with the split's datasets.
        totals: rows, documents, tokens, trained_tokens, max_documents over all shards, and rows_read of the input.
        dropped: dataset -> reason -> input rows left out for it.
        shards: in the order of the plan; the id of a row is its place in their concatenation.
    """

    version: int
    key: str
    split: str
    seq_len: int
    tokenizer: str
    chat_template: str | None
    data: Mapping[str, Any]
    totals: Mapping[str, int]
    dropped: Mapping[str, Mapping[str, int]]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Columns:
    """A shard in memory.

    Attributes:
        tokens: int32 [rows, seq_len].
        loss_weights: float32 [rows, seq_len], the weight of predicting each token.
        lengths: int32 [documents of all rows]; those of a row sum to seq_len.
        source_ids: int32 [documents of all rows].
        offsets: int32 [rows + 1], where a row's documents lie in the two above.
        num_tokens: int32 [rows], tokens before the padding.
    """

    tokens: NDArray[np.int32]
    loss_weights: NDArray[np.float32]
    lengths: NDArray[np.int32]
    source_ids: NDArray[np.int32]
    offsets: NDArray[np.int32]
    num_tokens: NDArray[np.int32]


def schema(seq_len: int) -> pa.Schema:
    """Arrow schema v1 of a shard; nothing in it can be null."""

    def column(name: str, value: pa.DataType, size: int = -1) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("element", value, nullable=False), size), nullable=False)

    return pa.schema(
        [
            column("tokens", pa.int32(), seq_len),
            column("loss_weights", pa.float32(), seq_len),
            column("lengths", pa.int32()),
            column("source_ids", pa.int32()),
            pa.field("num_tokens", pa.int32(), nullable=False),
        ]
    )


def shard_key(cfg: SftRun, split: Literal["train", "eval"], fingerprint: str) -> str:
    """Hex sha256 over everything that changes the shards of a split: settings, files and tokenizer.

    A dataset's path is left out: its files count by name, order and content, so that a moved corpus keeps its shards.

    Raises:
        DataError: no file matches a dataset.
    """
    datasets: dict[str, Any] = getattr(cfg.data, split)
    parts = {
        "version": DATA_VERSION,
        "data": cfg.data.model_dump(mode="json", exclude=NOT_IN_KEY),
        "datasets": [
            [name, dataset.model_dump(mode="json", exclude={"path"}), [identity(file) for file in resolve_files(name, dataset, split)]]
            for name, dataset in datasets.items()
        ],
        "tokenizer": fingerprint,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def identity(file: str) -> list[str | int]:
    """What tells a version of a file from another, without reading all of a large one; of an object, what the store says of it."""
    if store.is_url(file):
        return [store.name_of(file), store.size(file), store.version(file)]
    stat = os.stat(file)
    with open(file, "rb") as stream:
        if stat.st_size <= WHOLE_FILE:
            return [store.name_of(file), stat.st_size, hashlib.file_digest(stream, "sha256").hexdigest()]
        digest = hashlib.sha256(stream.read(ENDS))
        stream.seek(-ENDS, os.SEEK_END)
        digest.update(stream.read(ENDS))
    return [store.name_of(file), stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


def remove_strays(directory: Location) -> None:
    """Delete the temporary files that a killed writer left; on a store it leaves none."""
    if not store.is_url(directory):
        for temporary in Path(directory).glob(".*.tmp"):
            temporary.unlink(missing_ok=True)


def remove_fruitless(directory: Location) -> None:
    """Delete an unfinished folder in which no committed unit has rows: corrected input has other shards, in another folder."""
    units = (json.loads(store.read(store.join(directory, name))) for name in store.sizes(directory, "[0-9]*.json"))
    if not any(unit["shards"] for unit in units):
        with suppress(OSError):  # an actor that is being stopped may still write there
            store.delete_tree(directory)


def write_shard(path: Location, rows: Sequence[Sequence[Document]], *, source_id: int, seq_len: int, pad_id: int) -> Shard:
    """Write rows of documents as a shard.

    A short row is filled with `pad_id` at weight 0, and the filling belongs to its last document, so that a row of one
    document stays one. The first token of a document is predicted by nothing: its weight is written as 0.
    """
    tokens = np.full((len(rows), seq_len), pad_id, np.int32)
    loss_weights = np.zeros((len(rows), seq_len), np.float32)
    lengths: list[list[int]] = []
    num_tokens: list[int] = []
    for row, documents in enumerate(rows):
        end = 0
        for document in documents:
            start, end = end, end + len(document.tokens)
            tokens[row, start:end] = document.tokens
            loss_weights[row, start + 1 : end] = document.loss_weights[1:]
        lengths.append([len(document.tokens) for document in documents])
        lengths[-1][-1] += seq_len - end
        num_tokens.append(end)
    layout = schema(seq_len)
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), type=layout.field("tokens").type),
        pa.FixedSizeListArray.from_arrays(pa.array(loss_weights.reshape(-1)), type=layout.field("loss_weights").type),
        pa.array(lengths, layout.field("lengths").type),
        pa.array([[source_id] * len(documents) for documents in rows], layout.field("source_ids").type),
        pa.array(num_tokens, layout.field("num_tokens").type),
    ]
    with committed_file(path) as temporary:
        pq.write_table(pa.table(columns, schema=layout), temporary, compression="zstd", compression_level=3, version="2.6")
        digest, size = store.file_hash(temporary), temporary.stat().st_size
    counts, trained = [len(documents) for documents in rows], int(np.count_nonzero(loss_weights))
    return Shard(store.name_of(path), len(rows), sum(counts), sum(num_tokens), trained, max(counts), size, digest)


def read_shard(directory: Location, shard: Shard, seq_len: int) -> Columns:
    """Read and decode a shard, after checking that it is the one that was written.

    Raises:
        DataError: the file is missing or its content is not what the manifest says.
    """
    try:
        content = store.read(store.join(directory, shard.name))
    except FileNotFoundError:
        raise _broken(directory, shard.name, "the file is missing") from None
    flaw = _flaw(len(content), shard)
    if flaw is not None or hashlib.sha256(content).hexdigest() != shard.sha256:
        raise _broken(directory, shard.name, flaw or "its content is not what was written")
    table = pq.read_table(pa.BufferReader(content), schema=schema(seq_len), use_threads=False).combine_chunks()
    column = {name: table.column(name).chunk(0) for name in table.column_names}
    return Columns(
        tokens=column["tokens"].values.to_numpy().reshape(shard.rows, seq_len),
        loss_weights=column["loss_weights"].values.to_numpy().reshape(shard.rows, seq_len),
        lengths=column["lengths"].values.to_numpy(),
        source_ids=column["source_ids"].values.to_numpy(),
        offsets=column["lengths"].offsets.to_numpy(),
        num_tokens=column["num_tokens"].to_numpy(),
    )


def is_complete(directory: Location) -> bool:
    """Whether the folder has been committed."""
    return store.exists(store.join(directory, MANIFEST))


def verify(directory: Location, shards: Iterable[Shard]) -> None:
    """Check that every shard is there in its full size; content is checked by `read_shard`, when it is read anyway.

    Raises:
        DataError: naming the first shard that is not.
    """
    sizes = store.sizes(directory, "*.parquet")
    for shard in shards:
        flaw = _flaw(sizes.get(shard.name), shard)
        if flaw is not None:
            raise _broken(directory, shard.name, flaw)


def write_unit(directory: Location, summary: UnitSummary) -> None:
    """Commit a unit: write its sidecar. Its shards must be in place."""
    store.write(store.join(directory, _sidecar(summary.index)), json.dumps(asdict(summary), indent=1).encode())


def read_units(directory: Location, indices: Sequence[int]) -> dict[int, UnitSummary]:
    """Index -> summary of those units that are committed and whose shards are there in full size."""
    sizes = store.sizes(directory, "*")
    there = [index for index in indices if _sidecar(index) in sizes]
    texts = store.many(store.read, [store.join(directory, _sidecar(index)) for index in there])
    found = {index: _summary(json.loads(text)) for index, text in zip(there, texts, strict=True)}
    return {index: unit for index, unit in found.items() if not any(_flaw(sizes.get(shard.name), shard) for shard in unit.shards)}


def _summary(fields: Mapping[str, Any]) -> UnitSummary:
    return UnitSummary(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})


def write_manifest(directory: Location, manifest: Manifest) -> None:
    """Commit the folder. Every unit must be committed."""
    store.write(store.join(directory, MANIFEST), json.dumps(asdict(manifest), indent=1).encode())


def read_manifest(directory: Location) -> Manifest:
    """The manifest of a complete folder.

    Raises:
        DataError: it is missing, unreadable, or of another version.
    """
    if not is_complete(directory):
        raise DataError(store.join(directory, MANIFEST), None, "the shards are not complete", "Run the command again to finish them")
    try:
        fields = json.loads(store.read(store.join(directory, MANIFEST)))
        manifest = Manifest(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})
    except (ValueError, TypeError, KeyError) as error:
        raise _broken(directory, MANIFEST, f"it cannot be read ({error})") from error
    if manifest.version != DATA_VERSION:
        raise _broken(directory, MANIFEST, f"it has data version {manifest.version}, this is {DATA_VERSION}")
    return manifest


def _sidecar(index: int) -> str:
    return f"{index:06d}.json"


def _flaw(size: int | None, shard: Shard) -> str | None:
    if size is None:
        return "the file is missing"
    return None if size == shard.bytes else f"it has {size} bytes instead of {shard.bytes}"


def _broken(directory: Location, name: str, flaw: str) -> DataError:
    return DataError(store.join(directory, name), None, flaw, f"Delete {os.fspath(directory)} and run again")


USERS = "users"
"""Folder of a shard folder that names the runs which read it, for `rayft clean`."""


def note_user(directory: Location, run_home: str) -> None:
    """Leave a note that a run reads these shards."""
    name = hashlib.sha256(run_home.encode()).hexdigest()[:16]
    note = store.join(directory, USERS, f"{name}.json")
    if not store.exists(note):
        store.make_folder(store.join(directory, USERS))
        store.write(note, json.dumps({"run": run_home}).encode())


def users(directory: Location) -> list[str]:
    """The runs that have read these shards, by their directories."""
    notes = [store.join(directory, USERS, name) for name in store.sizes(store.join(directory, USERS), "*.json")]
    return sorted(json.loads(text)["run"] for text in store.many(store.read, notes))
