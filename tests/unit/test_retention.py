"""What `rayft clean` deletes: only what nothing needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayft.checkpoint import resume, retention
from rayft.data import shards, store
from rayft.errors import InfrastructureError


@pytest.fixture(params=["path", "store"])
def top(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "path" else f"memory://{tmp_path.name}"


def put(location: str, content: bytes = b"x" * 10) -> None:
    store.make_folder(location.rpartition("/")[0])
    store.write(location, content)


def test_old_and_unfinished_checkpoints_go_and_the_newest_stay(top: str) -> None:
    home = store.join(top, "run")
    for step in (5, 10, 15):
        directory = store.join(resume.checkpoints_dir(home), f"step-{step:08d}-a1")
        put(store.join(directory, "__0_0.distcp"))
        put(store.join(directory, resume.COMMITTED), json.dumps({"step": step, "attempt": 1}).encode())
    put(store.join(resume.checkpoints_dir(home), "step-00000020-a2", "__0_0.distcp"))
    found = retention.surplus_checkpoints(home, 2)
    assert [(store.name_of(one.location), one.why.split()[0]) for one in found] == [
        ("step-00000020-a2", "unfinished"),
        ("step-00000005-a1", "checkpoint"),
    ]
    assert found[0].bytes == 10
    for one in found:
        retention.delete(one)
    assert [one.step for one in resume.committed(home)] == [10, 15] and resume.unfinished(home) == []
    assert retention.surplus_checkpoints(home, 2) == []


def test_shards_go_when_no_run_uses_them(top: str) -> None:
    cache = store.join(top, ".shards")
    names = ["train-" + letter * 16 for letter in "abcde"]
    for name in names:
        put(store.join(cache, name, "000000-00000.parquet"))
        put(store.join(cache, name, shards.MANIFEST), b"{}")
    put(store.join(cache, "hub-x", "y.parquet"))
    shards.note_user(store.join(cache, names[0]), store.join(top, "gone"))
    shards.note_user(store.join(cache, names[1]), store.join(top, "alive"))
    put(store.join(top, "alive", "config.yaml"))
    put(store.join(cache, f"{names[2]}.lock"), b"host 1 x")
    checkpoint = store.join(resume.checkpoints_dir(store.join(top, "alive")), "step-00000001-a1", resume.COMMITTED)
    put(checkpoint, json.dumps({"step": 1, "attempt": 1, "training rows": "d" * 64}).encode())
    found = retention.surplus_shards(cache, top)
    assert [store.name_of(one.location) for one in found] == [names[0], names[4]], "noted by a run that is gone, and by none"
    for one in found:
        retention.delete(one)
    assert sorted({name.partition("/")[0] for name in store.sizes(cache)}) == ["hub-x", *names[1:3], f"{names[2]}.lock", names[3]]


def test_a_run_that_is_held_is_refused(tmp_path: Path) -> None:
    with resume.lease(tmp_path, "trainer"), pytest.raises(InfrastructureError, match="in use by trainer"):
        resume.refuse_held(tmp_path)
    resume.refuse_held(tmp_path)
