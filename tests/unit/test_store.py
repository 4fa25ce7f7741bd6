"""Files by location: paths and objects answer alike, and a full disk is said in one sentence."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rayft.data import store
from rayft.errors import ResourceError, room_for


@pytest.fixture(params=["path", "object"])
def top(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "path" else f"memory://{tmp_path.name}"


def test_paths_and_objects_answer_alike(top: str, tmp_path: Path) -> None:
    file = store.join(top, "a", "b.bin")
    assert not store.exists(file) and store.sizes(store.join(top, "a")) == {}
    store.make_folder(store.join(top, "a", "c"))
    store.write(file, b"one")
    store.write(file, b"other")
    store.write(store.join(top, "a", "c", "d.json"), b"{}")
    assert store.exists(file) and store.read(file) == b"other" and store.size(file) == 5
    assert store.sizes(store.join(top, "a")) == {"b.bin": 5, "c/d.json": 2}
    assert store.sizes(store.join(top, "a"), "*") == {"b.bin": 5}
    assert store.sizes(store.join(top, "a"), "*/*.json") == {"c/d.json": 2}
    with store.open_read(file) as stream:
        stream.seek(-3, os.SEEK_END)
        assert stream.read() == b"her" and stream.read() == b""
    assert store.create(store.join(top, "a", "e"), b"x") and not store.create(store.join(top, "a", "e"), b"y")
    assert store.read(store.join(top, "a", "e")) == b"x"
    with pytest.raises(FileNotFoundError):
        store.read(store.join(top, "missing"))
    with pytest.raises(KeyError), store.committed_file(store.join(top, "half")) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert not store.exists(store.join(top, "half"))
    store.delete(file)
    store.delete(file)
    store.delete_tree(store.join(top, "a"), mark="e")
    assert store.sizes(store.join(top, "a")) == {}
    store.delete_tree(store.join(top, "a"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path, code: int) -> None:
    said = r"/x: cannot be written: the (disk is full|quota is used up)\. Make room there"
    with pytest.raises(ResourceError, match=said), store.committed_file(tmp_path / "x"):
        try:
            raise OSError(code, "no")
        except OSError as problem:
            raise RuntimeError("a library's own") from problem
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="other"), room_for("x"):
        raise OSError(errno.EIO, "other")
