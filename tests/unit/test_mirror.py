"""The files of a run on a store: what changes is copied, what was there is fetched, and a commit waits for the log."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rayft.actors import mirror
from rayft.actors.mirror import carried, followed, mirrored
from rayft.data import store
from rayft.errors import DataError


def test_files_go_to_the_store_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "EVERY_S", 0.02)
    remote = f"memory://{tmp_path.name}/run"
    store.write(f"{remote}/config.yaml", b"the driver's")
    store.write(f"{remote}/metrics.jsonl", b"1\n")
    store.write(f"{remote}/checkpoints/step-1/x", b"large")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with mirrored(first, remote, pull=True) as flush:
        assert [file.name for file in first.iterdir()] == ["metrics.jsonl"]
        with (first / "metrics.jsonl").open("ab") as log:
            log.write(b"2\n")
        flush()
        assert store.read(f"{remote}/metrics.jsonl") == b"1\n2\n"
        (first / "trace").mkdir()
        (first / "trace" / "a.json").write_text("{}")
        (first / "metrics.jsonl.new").write_text("half")
        end = time.monotonic() + 5
        while not store.exists(f"{remote}/trace/a.json"):
            assert time.monotonic() < end
            time.sleep(0.01)
        (first / "last").write_text("x")
    assert store.read(f"{remote}/last") == b"x" and not store.exists(f"{remote}/metrics.jsonl.new")
    assert store.read(f"{remote}/config.yaml") == b"the driver's"
    with followed(f"{remote}/metrics.jsonl", second / "metrics.jsonl"):
        store.write(f"{remote}/metrics.jsonl", b"1\n2\n3\n")
    assert (second / "metrics.jsonl").read_bytes() == b"1\n2\n3\n"
    with mirrored(second, None, pull=True) as flush:
        flush()


def test_a_file_of_the_driver_goes_on_where_it_was_whatever_ends_it(tmp_path: Path) -> None:
    file, url = tmp_path / "journal.jsonl", f"memory://{tmp_path.name}/run/journal.jsonl"
    with carried(file, url):
        file.write_bytes(b"1\n")
    file.unlink()
    with pytest.raises(KeyError), carried(file, url):
        assert file.read_bytes() == b"1\n"
        file.write_bytes(b"1\n2\n")
        raise KeyError
    assert store.read(url) == b"1\n2\n"


def test_an_error_of_the_block_is_not_hidden_by_one_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise DataError("s3://x", None, "refused", "Look")

    (tmp_path / "metrics.jsonl").write_text("1")
    monkeypatch.setattr(store, "upload", refuse)
    with pytest.raises(KeyError), mirrored(tmp_path, f"memory://{tmp_path.name}/run", pull=False):
        raise KeyError
    with pytest.raises(DataError), mirrored(tmp_path, f"memory://{tmp_path.name}/run", pull=False):
        pass
