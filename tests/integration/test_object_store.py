"""An S3 endpoint whose answers fail in every way that is tried again, or is not; rows, lock and lease on it."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayft.checkpoint import resume
from rayft.config.schema import Dataset
from rayft.data import lock as locks
from rayft.data import store
from rayft.data.lock import exclusive
from rayft.data.sources import read_rows, resolve_files, split_ranges
from rayft.errors import DataError, InfrastructureError
from s3_server import S3, Fault, reached, serve


@pytest.fixture(scope="module")
def endpoint() -> Iterator[S3]:
    with serve() as s3:
        yield s3


@pytest.fixture
def s3(endpoint: S3) -> Iterator[S3]:
    endpoint.fault = None
    with reached(endpoint):
        yield endpoint


@pytest.fixture(params=["path", "object"])
def top(request: pytest.FixtureRequest, tmp_path: Path, s3: S3) -> str:
    return str(tmp_path) if request.param == "path" else f"s3://bucket/{tmp_path.name}"


def test_what_was_written_is_held_to_its_size_and_hash(top: str, tmp_path: Path) -> None:
    file, content = store.join(top, "x"), random.Random(0).randbytes(1000)
    store.make_folder(top)
    store.write(file, content)
    (tmp_path / "copy").write_bytes(content)
    record = (1000, store.file_hash(tmp_path / "copy"))
    assert store.read(file, record) == content
    for changed, said in ((content[:-1], "999 bytes instead of 1000"), (b"x" + content[1:], "its content is not what was written")):
        store.write(file, changed)
        with pytest.raises(DataError, match=said):
            store.read(file, record)
        if store.is_url(file):
            with pytest.raises(DataError, match=said):
                store.fetch(file, tmp_path / "fetched", record)
            assert not (tmp_path / "fetched").exists()


@pytest.mark.parametrize("kind", ["500", "503", "stall", "hang-up", "cut", "short"])
def test_what_may_pass_is_tried_again(s3: S3, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "REQUEST_S", 0.15)
    url, content = f"s3://bucket/{kind}", random.Random(1).randbytes(300_000)
    if kind not in ("cut", "short"):
        s3.fault = Fault(kind, lambda method, path: method == "PUT", times=2)
        store.write(url, content)
        assert s3.fault.hits == 2
    else:
        store.write(url, content)
    s3.fault = Fault(kind, lambda method, path: method == "GET", times=2)
    assert store.read(url) == content
    assert s3.fault.hits == 2
    s3.fault = Fault(kind, lambda method, path: method == "GET")
    store.fetch(url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    s3.fault = Fault(kind, lambda method, path: method == "GET")
    with store.open_read(url) as stream:
        assert stream.read() == content
    s3.fault = Fault(kind, lambda method, path: "list-type" in path)
    assert store.sizes("s3://bucket", "*")[kind] == len(content)


def test_what_does_not_pass_ends_with_a_sentence(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("s3://bucket/there", b"x" * 100)
    s3.fault = Fault("403", times=1000)
    for action in (lambda: store.read("s3://bucket/there"), lambda: store.write("s3://bucket/y", b""), lambda: store.sizes("s3://bucket")):
        with pytest.raises(DataError, match=r"^s3://bucket.* the store refuses \(PermissionError.*AWS_"):
            action()
    monkeypatch.setattr(store, "RETRY_S", 0.3)
    s3.fault = Fault("503", times=1000)
    with pytest.raises(InfrastructureError, match=r"s3://bucket/there: cannot be read: the store failed for"):
        store.read("s3://bucket/there")
    s3.fault = Fault("short", lambda method, path: method == "GET", times=1000)
    with pytest.raises(InfrastructureError, match=r"50 bytes came instead of 100"):
        store.read("s3://bucket/there")
    s3.fault = None
    with pytest.raises(FileNotFoundError):
        store.read("s3://no-such-bucket/there")


def test_secrets_are_in_no_sentence(s3: S3, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    s3.fault = Fault("503", times=2)
    store.exists("s3://bucket/x")
    s3.fault = Fault("403", times=9)
    with pytest.raises(DataError) as caught:
        store.read("s3://bucket/x")
    assert "kept-from-logs" not in caplog.text + str(caught.value) and "trying again" in caplog.text


def test_a_lost_answer_to_a_conditional_put_is_not_taken_for_another_s(s3: S3) -> None:
    s3.fault = Fault("cut", lambda method, path: method == "PUT")
    store.write("s3://bucket/first", b"mine")
    s3.fault = Fault("hang-up", lambda method, path: method == "PUT")
    assert store.create("s3://bucket/lock", b"mine")
    assert not store.create("s3://bucket/lock", b"yours")


def test_rows_of_objects_are_those_of_the_files(s3: S3, tmp_path: Path) -> None:
    import gzip

    lines = "".join(f'{{"text": "{"x" * (i % 50)}{i}"}}\n' for i in range(600)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    for file in tmp_path.iterdir():
        store.upload(file, f"s3://bucket/corpus/deep/{file.name}")
    store.write("s3://bucket/corpus/.hidden/c.jsonl", b"{}")
    store.write("s3://bucket/corpus/README.md", b"x")
    found = resolve_files("d", Dataset(path="s3://bucket/corpus"))
    assert found == ("s3://bucket/corpus/deep/a.jsonl", "s3://bucket/corpus/deep/b.jsonl.gz")
    assert resolve_files("d", Dataset(path="s3://bucket/corpus/**/*.jsonl")) == found[:1]
    assert resolve_files("d", Dataset(path="s3://bucket/corpus/*/b*")) == found[1:]
    assert resolve_files("d", Dataset(path=found[0])) == found[:1]
    with pytest.raises(DataError, match="no data file is found"):
        resolve_files("d", Dataset(path="s3://bucket/corpus/*.txt"))
    for file in found:
        for kind in ("cut", "short"):
            s3.fault = Fault(kind, lambda method, path: method == "GET", times=1)
            rows = [row for start, stop in split_ranges(file, 8000) for _, row in read_rows(file, start, stop)]
            assert rows == [row for _, row in read_rows(tmp_path / file.rpartition("/")[2])], (file, kind)
            assert s3.fault.hits == 1


def test_the_lock_lets_one_in_at_a_time(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "POLL_S", 0.05)
    monkeypatch.setattr(locks, "STALE_S", 0.5)
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.1)
    events: list[str] = []

    def hold() -> None:
        with exclusive("s3://bucket/shards.lock", 20):
            events.append("in")
            threading.Event().wait(0.1)
            events.append("out")

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events == ["in", "out"] * 3 and not store.exists("s3://bucket/shards.lock")
    store.write("s3://bucket/shards.lock", b"elsewhere 1 x")
    hold()
    assert events == ["in", "out"] * 4


def test_the_lease_on_a_store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "LEASE_SETTLES_S", 0.1)
    monkeypatch.setattr(resume, "LEASE_BEAT_S", 0.1)
    home = "s3://bucket/runs/r"
    with resume.lease(home, "first"):
        with pytest.raises(InfrastructureError, match="in use by first"), resume.lease(home, "second"):
            pass
        threading.Event().wait(0.3)  # it is renewed meanwhile
        with pytest.raises(InfrastructureError, match="in use by first"):
            resume.refuse_held(home)
    assert not store.exists(f"{home}/lease.json")
    dead = b'{"owner": "far", "host": "elsewhere", "pid": 1, "token": "x", "heartbeat": 0}'
    store.write(f"{home}/lease.json", dead)
    with pytest.raises(InfrastructureError, match="was taken over by another driver"), resume.lease(home, "me"):
        store.write(f"{home}/lease.json", dead.replace(b'"token": "x"', b'"token": "y"'))
        threading.Event().wait(0.4)
    assert b'"y"' in store.read(f"{home}/lease.json"), "another driver's lease is left alone"
