"""Files to rows: which files a dataset names, ranges that can be read apart, and the rows of a range, streamed.

A file is an absolute path, or the URL of an object on a store.

| extension | rows | place of a row | range |
|---|---|---|---|
| .jsonl, .ndjson | one JSON object a line | byte offset | bytes |
| .txt | one `text` a line | byte offset | bytes |
| .parquet | its rows | row number | row groups |
| .csv, .tsv | lines after the header, every value a string | row number | the file |
| .json | an array of objects, or an object whose only array of objects it is | row number | the file |

Each may also end in .gz, .bz2, .xz or .zst; then its only range is the file, and byte offsets are those of the unpacked text.
Text is UTF-8, with or without byte order mark. Lines end with "\\n" or "\\r\\n"; blank ones are no rows. Only .json is held in memory.
"""

from __future__ import annotations

import bz2
import csv
import fnmatch
import glob
import gzip
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from rayft.data import store
from rayft.data.store import Location
from rayft.errors import DataError

if TYPE_CHECKING:
    from rayft.config.schema import Dataset

Row: TypeAlias = dict[str, Any]
Range: TypeAlias = tuple[int, int | None]

BOM = b"\xef\xbb\xbf"
LINES = (".jsonl", ".ndjson", ".txt")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
EXTENSIONS = (".json", *LINES, ".parquet", *DELIMITERS)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
PARQUET_ROWS = 256
"""Rows of a Parquet file that are held as Python objects at once."""


def resolve_files(name: str, dataset: Dataset, split: str = "train") -> tuple[str, ...]:
    """The files of a dataset, absolute, sorted by name.

    A folder stands for every supported file below it, hidden ones left out; a glob for what it matches, where `**` is
    any folder (on a store `*` is too). Links keep their own names.

    Args:
        name: name of the dataset.
        dataset: names a file, folder or glob, by path or URL.
        split: train or eval, for messages.

    Raises:
        DataError: nothing is found, a file is empty, or a named or matched file is of an unsupported kind.
    """
    field = f"data.{split}.{name}.path"
    found = _objects(dataset.path) if store.is_url(dataset.path) else _files(Path(dataset.path).expanduser())
    if not found:
        raise DataError(field, dataset.path, "no data file is found there", "Name an existing file, a folder or a glob")
    for file, size in found.items():
        if _kind(file)[0] not in EXTENSIONS:
            rule = f"{store.name_of(file)} is not one of {', '.join(EXTENSIONS)}, plain or with {', '.join(COMPRESSIONS)}"
            raise DataError(field, dataset.path, rule, "Convert the file, or narrow the glob")
        if size == 0:
            raise DataError(field, dataset.path, f"{file} is empty", "Remove the file, or write it again")
    return tuple(sorted(found))


def _files(path: Path) -> dict[str, int]:
    """Absolute path -> bytes of the files that a path names."""
    if path.is_file():
        found = [path]
    elif path.is_dir():
        below = (file for file in path.rglob("*") if not any(part.startswith(".") for part in file.relative_to(path).parts))
        found = [file for file in below if file.is_file() and _kind(file)[0] in EXTENSIONS]
    else:
        found = [Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)]
    return {file.absolute().as_posix(): file.stat().st_size for file in found}


def _objects(url: str) -> dict[str, int]:
    """URL -> bytes of the objects that a URL names."""
    if not glob.has_magic(url):
        if store.exists(url):
            return {url: store.size(url)}
        return {store.join(url, name): size for name, size in _visible(url).items() if _kind(name)[0] in EXTENSIONS}
    parts = url.split("/")
    plain = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    folder, pattern = "/".join(parts[:plain]), "/".join(parts[plain:]).replace("**/", "*")
    return {store.join(folder, name): size for name, size in _visible(folder).items() if fnmatch.fnmatchcase(name, pattern)}


def _visible(folder: str) -> dict[str, int]:
    """Name below a folder on a store -> bytes, hidden files and folders left out."""
    return {name: size for name, size in store.sizes(folder).items() if not any(part.startswith(".") for part in name.split("/"))}


def split_ranges(file: Location, target_bytes: int) -> list[Range]:
    """Ranges of a file that hold every row once and in order; nothing but the file and `target_bytes` decides them.

    Args:
        file: a file of `resolve_files`.
        target_bytes: size that a range aims at, 1 or more: bytes of lines, compressed bytes of Parquet row groups.

    Raises:
        DataError: the Parquet file cannot be read.
    """
    extension, compression = _kind(file)
    if compression or extension not in (*LINES, ".parquet"):
        return [(0, None)]
    starts = _row_group_starts(file, target_bytes) if extension == ".parquet" else [*range(0, store.size(file), target_bytes)]
    return list(zip(starts, [*starts[1:], None], strict=True))


def read_rows(file: Location, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Row]]:
    """(place, row) for the rows of a range, streamed. A line belongs to the range that its first byte lies in.

    Args:
        file: a file of `resolve_files`.
        start, stop: a range of `split_ranges`; the whole file by default.

    Raises:
        DataError: the file is damaged, or a row is not what the extension promises; it names the file and the line.
    """
    extension, compression = _kind(file)
    if (start, stop) != (0, None) and (compression or extension not in (*LINES, ".parquet")):
        raise ValueError(f"{file} has no ranges")
    with _damage_explained(file):
        if extension == ".parquet":
            yield from _parquet_rows(file, compression, start, stop)
            return
        with _open(file, compression) as stream:
            if extension == ".json":
                yield from _json_rows(stream, file)
            elif extension in DELIMITERS:
                yield from _csv_rows(stream, file, DELIMITERS[extension])
            else:
                to_row = _text_row if extension == ".txt" else _json_row
                for offset, line in _lines(stream, start, stop):
                    if line.removeprefix(BOM if offset == 0 else b"").strip():
                        yield offset, to_row(_decoded(line, offset, file), offset, file)


def row_place(file: Location, place: int) -> str:
    """A row's place in words, from the number that `read_rows` gave."""
    return f"{file}, byte {place}" if _kind(file)[0] in LINES else f"{file}, row {place + 1}"


def _kind(file: Location) -> tuple[str, str]:
    """(extension, compression), in lower case; compression is "" without."""
    suffixes = [suffix.lower() for suffix in Path(store.name_of(file)).suffixes] or [""]
    compression = suffixes.pop() if suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def _open(file: Location, compression: str) -> IO[bytes]:
    """The file's bytes, unpacked."""
    packed = store.open_read(file)
    if not compression:
        return packed
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(packed, compression="zstd"))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    stream: IO[bytes] = openers[compression](packed, "rb")
    return stream


@contextmanager
def _damage_explained(file: Location) -> Iterator[None]:
    """Turn what decompressors and pyarrow raise on a damaged file into a sentence."""
    from pyarrow import ArrowException

    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError, ArrowException, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno is not None:
            raise  # the operating system's, not the file's
        raise DataError(str(file), None, f"the file is damaged ({problem})", "Fetch or write it again") from problem


def _lines(stream: IO[bytes], start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end) of the lines whose first byte lies in [start, stop). Only "\\n" ends a line."""
    offset = start
    if start:
        stream.seek(start - 1)
        offset += len(stream.readline()) - 1  # the rest of a line that began before start, if any
    while stop is None or offset < stop:
        line = stream.readline()
        if not line:
            return
        yield offset, line
        offset += len(line)


def _decoded(raw: bytes, offset: int, file: Location) -> str:
    """The text of bytes at an offset, without byte order mark."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as problem:
        bad = offset + problem.start
        rule = f"the byte 0x{raw[problem.start]:02x} there is not UTF-8 ({problem.reason})"
        raise DataError(f"{file}, byte {bad}", None, rule, "Convert the file to UTF-8") from problem
    return text.removeprefix("\ufeff") if offset == 0 else text


def _text_row(line: str, offset: int, file: Location) -> Row:
    return {"text": line.removesuffix("\n").removesuffix("\r")}


def _json_row(line: str, offset: int, file: Location) -> Row:
    try:
        row = json.loads(line)
    except ValueError as problem:
        raise DataError(_line_place(file, offset), None, f"the line is not JSON ({problem})", "Correct the line") from problem
    if not isinstance(row, dict):
        rule = f"every line must be a JSON object, but this one is {_shown(line)}"
        raise DataError(_line_place(file, offset), None, rule, "Correct the line")
    return row


def _line_place(file: Location, offset: int) -> str:
    """A line's number, counted only when there is an error to report, and its offset."""
    with _open(file, _kind(file)[1]) as stream:
        number = sum(1 for _ in _lines(stream, 0, offset)) + 1
    return f"{file}, line {number} (byte {offset})"


def _json_rows(stream: IO[bytes], file: Location) -> Iterator[tuple[int, Row]]:
    text = _decoded(stream.read(), 0, file)
    try:
        value = json.loads(text)
    except ValueError as problem:
        remedy = "Correct the file; if it has one object a line, name it .jsonl"
        raise DataError(str(file), None, f"the file is not one JSON value ({problem})", remedy) from problem
    if isinstance(value, dict):
        arrays = [item for item in value.values() if isinstance(item, list) and item and all(isinstance(row, dict) for row in item)]
        value = arrays[0] if len(arrays) == 1 else None
    if not isinstance(value, list):
        rule = "the file must hold an array of objects, or an object with one such array"
        raise DataError(str(file), None, rule, "Write the rows as one array, or one a line as .jsonl")
    for index, row in enumerate(value):
        if not isinstance(row, dict):
            rule = f"every row must be a JSON object, but this one is {_shown(json.dumps(row))}"
            raise DataError(f"{file}, row {index + 1}", None, rule, "Correct the row")
        yield index, row


def _csv_rows(stream: IO[bytes], file: Location, delimiter: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**31 - 1)  # of the process; the default of 128 KiB is too small for documents
    reader = csv.reader((_decoded(line, offset, file) for offset, line in _lines(stream, 0, None)), delimiter=delimiter, strict=True)
    records = _csv_records(reader, file)
    header = next(records, [])
    if len(set(header)) < len(header):
        raise DataError(f"{file}, line 1", ", ".join(header), "a column name occurs twice", "Rename one of the columns")
    for index, record in enumerate(records):
        if len(record) != len(header):
            rule = f"the row has {len(record)} fields, the header {len(header)}"
            raise DataError(f"{file}, line {reader.line_num}", None, rule, "Correct the row, or quote its fields")
        yield index, dict(zip(header, record, strict=True))


def _csv_records(reader: Any, file: Location) -> Iterator[list[str]]:
    """Records that are not blank."""
    try:
        yield from filter(None, reader)
    except csv.Error as problem:
        raise DataError(f"{file}, line {reader.line_num}", None, f"the line is not CSV ({problem})", "Correct the line") from problem


@contextmanager
def _seekable(file: Location, compression: str) -> Iterator[Location | IO[bytes]]:
    """The file itself, or its unpacked bytes in a temporary file: Parquet is read from its end."""
    if not compression:
        if store.is_url(file):
            with store.open_read(file) as stream:
                yield stream
        else:
            yield file
        return
    with tempfile.TemporaryFile() as unpacked, _open(file, compression) as stream:
        shutil.copyfileobj(stream, unpacked)
        yield unpacked


def _parquet_rows(file: Location, compression: str, start: int, stop: int | None) -> Iterator[tuple[int, Row]]:
    from pyarrow.parquet import ParquetFile

    with _seekable(file, compression) as source, ParquetFile(source) as parquet:
        groups = range(parquet.num_row_groups)[start:stop]
        number = sum(parquet.metadata.row_group(group).num_rows for group in range(groups.start))
        for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=list(groups)):
            for row in batch.to_pylist():
                yield number, row
                number += 1


def _row_group_starts(file: Location, target_bytes: int) -> list[int]:
    """First row groups of ranges that reach the target with their last row group."""
    from pyarrow.parquet import ParquetFile

    with _damage_explained(file), _seekable(file, "") as source, ParquetFile(source) as parquet:
        metadata = parquet.metadata
    starts, size = [0], 0
    for index in range(metadata.num_row_groups):
        if size >= target_bytes:
            starts, size = [*starts, index], 0
        group = metadata.row_group(index)
        size += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
    return starts


def _shown(text: str) -> str:
    """The beginning of a text, for messages."""
    text = text.strip()
    return text if len(text) <= 40 else f"{text[:37]}..."
