"""The files of a sharded checkpoint on an object store, as torch's checkpoint writer and reader ask for them.

A file is written to a temporary one here and uploaded whole, with a record of its size and sha256 beside it; reading fetches it whole and
compares. So every request can be repeated, and nothing shorter or other than what was written is ever loaded.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystemBase

from rayft.data import store
from rayft.data.store import Location
from rayft.errors import DataError, room_for

RECORD = ".sum"
"""Ending of the record of an object: its size and sha256."""


class Objects(FileSystemBase):
    """Files below a URL, in the terms of torch.distributed.checkpoint.

    Args:
        expected: name -> (size, sha256) of the files to read.
    """

    def __init__(self, expected: Mapping[str, tuple[int, str]] | None = None) -> None:
        self._expected = expected or {}

    @contextmanager
    def create_stream(self, path: Location, mode: str) -> Generator[Any, None, None]:
        """A local stream: of a new file that is uploaded at the end, or of a whole, verified copy of an object."""
        with tempfile.TemporaryDirectory(prefix="rayft-checkpoint-") as folder, room_for(folder):
            file = Path(folder) / store.name_of(path)
            if "r" in mode:
                store.fetch(path, file, self._expected_of(path))
            with file.open(mode) as stream:
                yield cast(IO[bytes], stream)
            if "w" in mode:
                store.upload(file, os.fspath(path))
                store.write(f"{os.fspath(path)}{RECORD}", json.dumps([file.stat().st_size, store.file_hash(file)]).encode())

    def _expected_of(self, path: Location) -> tuple[int, str]:
        if store.name_of(path) not in self._expected:
            rule = "the checkpoint's record does not list it"
            raise DataError(os.fspath(path), None, rule, "Delete that checkpoint to resume from an older one")
        return self._expected[store.name_of(path)]

    def concat_path(self, path: Location, suffix: str) -> str:
        """The URL of a file below another."""
        return store.join(path, suffix)

    def rename(self, path: Location, new_path: Location) -> None:
        """Write a file anew under another name, and delete it under its own."""
        for ending in ("", RECORD):
            store.write(f"{os.fspath(new_path)}{ending}", store.read(f"{os.fspath(path)}{ending}"))
            store.delete(f"{os.fspath(path)}{ending}")

    def init_path(self, path: Location) -> str:
        """The URL as it is."""
        return os.fspath(path)

    def mkdir(self, path: Location) -> None:
        """A store has no folders."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Location) -> bool:
        """Whether a checkpoint can be there."""
        return store.is_url(checkpoint_id)

    def exists(self, path: Location) -> bool:
        """Whether there is an object of this name."""
        return store.exists(path)

    def rm_file(self, path: Location) -> None:
        """Delete an object."""
        store.delete(path)


def writer(url: str) -> FileSystemWriter:
    """A writer of a checkpoint below a URL."""
    made = FileSystemWriter(tempfile.gettempdir())
    made.fs, made.path = cast(Any, Objects()), url
    return made


def reader(url: str, files: Mapping[str, tuple[int, str]]) -> FileSystemReader:
    """A reader of a checkpoint below a URL.

    Args:
        files: name -> (size, sha256), from the checkpoint's record.
    """
    made = FileSystemReader(tempfile.gettempdir())
    made.fs, made.path = cast(Any, Objects(files)), url
    return made


def written(url: str) -> dict[str, tuple[int, str]]:
    """Name -> (size, sha256) of the objects that were written below a URL, held to the sizes that the store lists.

    Raises:
        DataError: one lacks its record, or has another size.
    """
    sizes = store.sizes(url)
    names = [name for name in sizes if not name.endswith(RECORD)]
    if lacking := [name for name in names if f"{name}{RECORD}" not in sizes]:
        raise DataError(store.join(url, lacking[0]), None, "has no record of its size", "Run the same command again")
    records = store.many(store.read, (store.join(url, f"{name}{RECORD}") for name in names))
    found = {name: (int(size), str(digest)) for name, (size, digest) in zip(names, map(json.loads, records), strict=True)}
    if short := [name for name in names if sizes[name] != found[name][0]]:
        raise DataError(store.join(url, short[0]), None, f"has not {found[short[0]][0]} bytes as written", "Run the same command again")
    return found
