"""Files by location: a path, or the URL of an object on a store that fsspec reaches (s3://bucket/key, gs://, memory://).

A path is served by the operating system alone, as ever. An object store knows no rename, so what belongs together becomes visible by
the object that is written last. Every request to a store is tried again until RETRY_S have passed when its failure may pass, and every
object that is read or written is held to its size: a short one counts as a failure.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import io
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

from rayft.errors import DataError, InfrastructureError, RayftError, ResourceError, room_for

log = logging.getLogger("rayft")

Location: TypeAlias = str | os.PathLike[str]
T = TypeVar("T")

RETRY_S = 120.0
"""How long a request that fails for a reason that may pass is tried again."""
REQUEST_S = 30.0
"""How long a store may stay silent within one try."""
REQUEST_TRIES = 3
"""Tries of the store's own client within one of ours, so that one lost part does not repeat a large upload."""
PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
CHUNK = 16 << 20
"""Bytes of one request for a part of an object."""
PARALLEL = 8
"""Requests at once when there are many of them."""

LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "urllib3", "gcsfs", "google", "azure", "adlfs", "requests", "ssl"}
"""Where the errors of stores' clients come from that are no OSError."""
FINAL = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidRegionError", "ProfileNotFound"}
"""Those of them that another try does not mend."""
FINAL_CODES = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENAMETOOLONG, errno.EMSGSIZE}


def is_url(location: Location) -> bool:
    """Whether a location is an object's URL and not a path."""
    return "://" in os.fspath(location)


def join(location: Location, *names: str) -> str:
    """A location below another one."""
    return "/".join((os.fspath(location).rstrip("/"), *names))


def name_of(location: Location) -> str:
    """The last part of a location."""
    return os.fspath(location).rstrip("/").rpartition("/")[2]


def exists(location: Location) -> bool:
    """Whether there is a file or an object of this name (of a path, a folder counts too)."""
    return (_object_size(location) is not None) if is_url(location) else os.path.exists(location)


def size(location: Location) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    found = _object_size(location) if is_url(location) else os.stat(location).st_size
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "no such object", os.fspath(location))
    return found


def version(location: Location) -> str:
    """A text that changes when an object's content does; the store tells it without reading the object."""
    return str(_patiently("read", location, lambda fs, key: fs.ukey(key)))


def read(location: Location, expected: tuple[int, str] | None = None) -> bytes:
    """The content of a file.

    Args:
        expected: its size and sha256.

    Raises:
        FileNotFoundError: there is none.
        DataError: it is not what is expected.
    """
    total = _held_to(location, expected)
    if is_url(location):
        content = b"".join(read_range(location, start, min(start + CHUNK, total)) for start in range(0, total, CHUNK))
    else:
        content = Path(location).read_bytes()
    if expected and hashlib.sha256(content).hexdigest() != expected[1]:
        raise _not_as_written(location, "its content")
    return content


def fetch(location: Location, file: Path, expected: tuple[int, str] | None = None) -> None:
    """Copy an object to a new local file, which appears when it is complete.

    Args:
        expected: its size and sha256.

    Raises:
        FileNotFoundError: there is no such object.
        DataError: it is not what is expected.
    """
    total = _held_to(location, expected)
    with committed_file(file) as temporary:
        with temporary.open("wb") as stream, ThreadPoolExecutor(PARALLEL, "rayft-fetch") as pool:
            starts = range(0, total, CHUNK)
            for first in range(0, len(starts), PARALLEL):  # so that no more than PARALLEL chunks are in memory
                some = starts[first : first + PARALLEL]
                for part in pool.map(lambda start: read_range(location, start, min(start + CHUNK, total)), some):
                    stream.write(part)
        if expected and file_hash(temporary) != expected[1]:
            raise _not_as_written(location, "its content")


def read_range(location: Location, start: int, stop: int) -> bytes:
    """Bytes start to stop - 1 of an object, all of them."""
    return _patiently("read", location, lambda fs, key: _part(fs, key, start, stop))


def file_hash(file: Location) -> str:
    """Hex sha256 of a local file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_read(location: Location) -> BinaryIO:
    """A file for reading from any place in it."""
    if not is_url(location):
        return open(location, "rb")
    return io.BufferedReader(_ObjectFile(os.fspath(location), size(location)), 4 << 20)


def write(location: Location, content: bytes) -> None:
    """Write a whole file, which appears in one piece and takes the place of an older one."""
    if is_url(location):
        _patiently("written", location, lambda fs, key: fs.pipe_file(key, content))
        _check_size(location, len(content))
        return
    with committed_file(location) as temporary:
        temporary.write_bytes(content)


def create(location: Location, content: bytes) -> bool:
    """Write a small file unless there is one; False when there is. Of several that do so at once, one succeeds.

    On a store it is a put with If-None-Match (S3 and what speaks its language, Google); a store that ignores the condition lets two
    succeed, of which the last one's content stays.
    """
    if not is_url(location):
        try:
            with open(location, "xb") as stream:
                stream.write(content)
        except FileExistsError:
            return False
        return True
    try:
        _patiently("written", location, lambda fs, key: fs.pipe_file(key, content, mode="create"))
    except FileExistsError:
        # An answer that was lost on its way makes the second try meet the first one's object.
        return _content_or_none(location) == content
    return True


def upload(file: Location, location: str) -> None:
    """Copy a local file to an object."""
    _patiently("written", location, lambda fs, key: fs.put_file(os.fspath(file), key))
    _check_size(location, os.path.getsize(file))


@contextmanager
def committed_file(location: Location) -> Iterator[Path]:
    """A local path to write to; what is there when the block ends well becomes `location`, and vanishes when it does not."""
    if is_url(location):
        with tempfile.TemporaryDirectory(prefix="rayft-") as folder, room_for(folder):
            temporary = Path(folder) / name_of(location)
            yield temporary
            upload(temporary, os.fspath(location))
        return
    path = Path(location)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with room_for(path):
            yield temporary
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(location: Location) -> None:
    """Make a folder with those above it; a store needs none.

    Raises:
        ResourceError: it cannot be made: a file is in the way, or the place is not writable.
    """
    if is_url(location):
        return
    try:
        Path(location).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise not_writable(location, f"the folder cannot be made ({problem.strerror})") from problem


def not_writable(location: Location, rule: str) -> ResourceError:
    """What to say of a folder that nothing can be written into."""
    return ResourceError(os.fspath(location), None, rule, "Make it writable, or name another folder (run.dir, data.cache_dir, --out)")


def sizes(location: Location, pattern: str = "**/*") -> dict[str, int]:
    """Name below `location` -> bytes, of all files whose name matches; sorted by name, empty when there is no such folder.

    Args:
        pattern: as in pathlib; in one that has a slash, `*` stands for slashes too on a store.
    """
    if not is_url(location):
        top = Path(location)
        files = (file for file in top.glob(pattern) if file.is_file())
        return {file.relative_to(top).as_posix(): file.stat().st_size for file in sorted(files)}
    found = _patiently("listed", location, lambda fs, key: _below(fs, key, "/" in pattern))
    names = dict(sorted(found.items()))
    return {name: count for name, count in names.items() if pattern == "**/*" or fnmatch.fnmatchcase(name, pattern)}


def delete(location: Location) -> None:
    """Delete a file, if there is one."""
    if not is_url(location):
        Path(location).unlink(missing_ok=True)
        return
    try:
        _patiently("deleted", location, lambda fs, key: fs.rm_file(key))
    except FileNotFoundError:
        return


def delete_tree(location: Location, mark: str | None = None) -> None:
    """Delete a folder with all that is in it, if there is one.

    Args:
        mark: the file in it that makes the others count; it goes first, so that half of them never count.
    """
    if mark is not None:
        delete(join(location, mark))
    if not is_url(location):
        import shutil

        shutil.rmtree(location, ignore_errors=not os.path.exists(location))
        return
    many(delete, (join(location, name) for name in sizes(location)))


def many(function: Callable[[str], T], locations: Iterable[str]) -> list[T]:
    """The results of a function of several locations, PARALLEL at once."""
    with ThreadPoolExecutor(PARALLEL, "rayft-store") as pool:
        return list(pool.map(function, locations))


class _ObjectFile(io.RawIOBase):
    """An object of known size as a file; every read asks the store for that range."""

    def __init__(self, location: str, total: int) -> None:
        self._location, self._total, self._at = location, total, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._total}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readall(self) -> bytes:
        start, self._at = self._at, max(self._at, self._total)
        return b"".join(read_range(self._location, at, min(at + CHUNK, self._total)) for at in range(start, self._total, CHUNK))

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._total)
        if stop <= self._at:
            return 0
        part = read_range(self._location, self._at, stop)
        buffer[: len(part)] = part
        self._at = stop
        return len(part)


def filesystem(location: Location) -> Any:
    """The fsspec file system of a URL, which takes endpoint and credentials from the environment.

    Raises:
        DataError: fsspec does not know the scheme, or its package is not installed.
    """
    import fsspec

    scheme = os.fspath(location).partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in ("s3", "s3a"):
        retries = {"mode": "standard", "total_max_attempts": REQUEST_TRIES}
        options["config_kwargs"] = {"connect_timeout": REQUEST_S, "read_timeout": REQUEST_S, "retries": retries}
    try:
        return fsspec.filesystem(scheme, **options)
    except (ValueError, ImportError) as problem:
        rule = f"{scheme}:// cannot be reached from here ({problem})"
        raise DataError("location", os.fspath(location), rule, "Use a path, s3://, or install the package that serves it") from problem


def _patiently(done: str, location: Location, request: Callable[[Any, str], T]) -> T:
    """Run `request(file system, key)` until it works, its failure is final, or RETRY_S have passed.

    Raises:
        FileNotFoundError, FileExistsError: as the store says.
        DataError: the store refuses, whoever asks again.
        InfrastructureError: the store still failed after RETRY_S.
    """
    fs, key, started, pause = filesystem(location), key_of(location), time.monotonic(), PAUSE_S
    while True:
        try:
            return request(fs, key)
        except Exception as problem:
            if isinstance(problem, FileNotFoundError | FileExistsError | RayftError) or not _of_the_store(problem):
                raise
            cause = f"{type(problem).__name__}: {str(problem).strip() or 'no answer'}"
            if _is_final(problem):
                rule = f"cannot be {done}: the store refuses ({cause})"
                remedy = "Check the address, the permissions and the AWS_* variables of this environment"
                raise DataError(os.fspath(location), None, rule, remedy) from problem
            if time.monotonic() + pause - started > RETRY_S:
                rule = f"cannot be {done}: the store failed for {time.monotonic() - started:.0f} s ({cause})"
                raise InfrastructureError(os.fspath(location), None, rule, "Run the same command again once it answers") from problem
            log.info("%s: not %s yet (%s), trying again in %.1f s", os.fspath(location), done, cause, pause)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _of_the_store(problem: Exception) -> bool:
    return isinstance(problem, OSError | EOFError) or type(problem).__module__.partition(".")[0] in LIBRARIES


def _is_final(problem: Exception) -> bool:
    if type(problem).__name__ in FINAL or isinstance(problem, PermissionError):
        return True
    return isinstance(problem, OSError) and problem.errno in FINAL_CODES


def key_of(location: Location) -> str:
    """What the file system calls a location: without its scheme."""
    return os.fspath(location).partition("://")[2]


def _object_size(location: Location) -> int | None:
    """Bytes of an object, None when there is none."""
    try:
        found = _patiently("read", location, lambda fs, key: fs.info(key))
    except FileNotFoundError:
        return None
    return int(found["size"]) if found["type"] == "file" else None


def _check_size(location: Location, written: int) -> None:
    """Hold what was just written to its size; nothing but a broken store or another writer gets it wrong."""
    found = _object_size(location)
    if found != written:
        rule = f"has {found} bytes right after {written} were written"
        raise InfrastructureError(os.fspath(location), None, rule, "Check that nothing else writes there, and run the same command again")


def _below(fs: Any, key: str, deep: bool) -> dict[str, int]:
    prefix = f"{str(fs._strip_protocol(key)).rstrip('/')}/"
    return {name.removeprefix(prefix): count for name, count in _listing(fs, prefix, deep).items()}


def _listing(fs: Any, prefix: str, deep: bool) -> dict[str, int]:
    """Key -> bytes of what is below a prefix. fsspec's own walk takes a folder whose listing failed for an empty one, so it is not used."""
    try:
        whole = deep and hasattr(fs, "call_s3")  # one listing without delimiter; it raises
        entries = list(fs.find(prefix, detail=True).values()) if whole else fs.ls(prefix, detail=True)
    except FileNotFoundError:
        return {}
    found = {entry["name"]: int(entry["size"]) for entry in entries if entry["type"] == "file" and entry["name"].startswith(prefix)}
    for entry in entries if deep else ():
        if entry["type"] == "directory" and entry["name"].startswith(prefix):
            found |= _listing(fs, entry["name"].rstrip("/") + "/", deep)
    return found


def _part(fs: Any, key: str, start: int, stop: int) -> bytes:
    content = bytes(fs.cat_file(key, start=start, end=stop))
    if len(content) != stop - start:
        raise EOFError(f"{len(content)} bytes came instead of {stop - start}")
    return content


def _content_or_none(location: Location) -> bytes | None:
    try:
        return read(location)
    except FileNotFoundError:
        return None


def _held_to(location: Location, expected: tuple[int, str] | None) -> int:
    """Bytes of a file, which must be as many as expected."""
    total = size(location)
    if expected and total != expected[0]:
        raise _not_as_written(location, f"with {total} bytes instead of {expected[0]} it")
    return total


def _not_as_written(location: Location, what: str) -> DataError:
    return DataError(os.fspath(location), None, f"{what} is not what was written", "Delete it with what belongs to it and run again")
