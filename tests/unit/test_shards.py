"""Shards: layout, padding, bytes, the key, and what happens when files are broken or half-written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayft.config.schema import SftRun
from rayft.data import shards
from rayft.data.formats import Document
from rayft.data.shards import Manifest, Shard, UnitSummary, read_shard, shard_key, write_shard
from rayft.errors import DataError


def document(tokens: list[int], weights: list[float]) -> Document:
    return Document(np.array(tokens, np.int32), np.array(weights, np.float32))


ROWS = [
    [document([5, 6, 7], [1, 0, 0.5]), document([8, 9], [0, 1])],
    [document([10, 11, 12, 13], [1, 1, 1, 1])],
    [document([14], [1])],
]


def write(directory: Path, name: str = "000000-00000.parquet") -> Shard:
    directory.mkdir(exist_ok=True)
    return write_shard(directory / name, ROWS, source_id=3, seq_len=6, pad_id=99)


def manifest(*written: Shard, version: int = shards.DATA_VERSION) -> Manifest:
    return Manifest(version, "key", "train", 6, "print", "{{ x }}", {"seq_len": 6}, {"rows": 3}, {"a": {"too long": 2}}, written)


def test_a_shard_holds_its_documents_padded_at_weight_zero(tmp_path: Path) -> None:
    columns = read_shard(tmp_path, write(tmp_path), 6)
    assert columns.tokens.tolist() == [[5, 6, 7, 8, 9, 99], [10, 11, 12, 13, 99, 99], [14, 99, 99, 99, 99, 99]]
    assert columns.loss_weights.tolist() == [[0, 0, 0.5, 0, 1, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert columns.offsets.tolist() == [0, 2, 3, 4]
    assert columns.lengths.tolist() == [3, 3, 6, 6]
    assert columns.source_ids.tolist() == [3, 3, 3, 3]
    assert columns.num_tokens.tolist() == [5, 4, 1]


def test_a_shard_counts_what_it_holds(tmp_path: Path) -> None:
    shard = write(tmp_path)
    assert (shard.rows, shard.documents, shard.tokens, shard.trained_tokens, shard.max_documents) == (3, 4, 10, 5, 2)
    content = (tmp_path / shard.name).read_bytes()
    assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_foreign_readers_see_plain_list_columns(tmp_path: Path) -> None:
    write(tmp_path)
    layout = pq.read_schema(tmp_path / "000000-00000.parquet")
    assert [str(column) for column in layout.types] == [
        "fixed_size_list<element: int32 not null>[6]",
        "fixed_size_list<element: float not null>[6]",
        "list<element: int32 not null>",
        "list<element: int32 not null>",
        "int32",
    ]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a") == write(tmp_path / "b")


def test_a_failed_write_leaves_neither_the_file_nor_a_temporary_one(tmp_path: Path) -> None:
    too_long = [[document([1] * 7, [1.0] * 7)]]
    with pytest.raises(ValueError):
        write_shard(tmp_path / "x.parquet", too_long, source_id=0, seq_len=6, pad_id=0)
    with pytest.raises(KeyboardInterrupt), shards.committed_file(tmp_path / "y") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_strays_of_a_killed_writer_are_removed_and_nothing_else(tmp_path: Path) -> None:
    shard = write(tmp_path)
    (tmp_path / f".{shard.name}.0123.tmp").write_text("half")
    shards.remove_strays(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [shard.name]


def test_a_unit_is_committed_by_its_sidecar_only_while_its_shards_are_whole(tmp_path: Path) -> None:
    shard = write(tmp_path)
    assert shards.read_units(tmp_path, [0]) == {}
    summary = UnitSummary(0, "a", 7, {"too long": 2}, (shard,))
    shards.write_unit(tmp_path, summary)
    assert shards.read_units(tmp_path, [0]) == {0: summary}
    os.truncate(tmp_path / shard.name, shard.bytes - 1)
    assert shards.read_units(tmp_path, [0]) == {}


def test_the_manifest_survives_the_disk(tmp_path: Path) -> None:
    shards.write_manifest(tmp_path, manifest(write(tmp_path)))
    assert shards.read_manifest(tmp_path) == manifest(write(tmp_path))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "the file is missing"),
        (lambda path: os.truncate(path, 100), "it has 100 bytes instead of"),
        (flip, "its content is not what was written"),
    ],
)
def test_a_damaged_shard_is_named_with_the_remedy(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    shard = write(tmp_path)
    damage(tmp_path / shard.name)
    with pytest.raises(DataError) as caught:
        read_shard(tmp_path, shard, 6)
    assert said in str(caught.value)
    assert str(tmp_path / shard.name) in str(caught.value)
    assert f"Delete {tmp_path} and run again" in str(caught.value)


def test_verify_finds_what_is_missing_or_short_without_reading(tmp_path: Path) -> None:
    whole, short = write(tmp_path), write(tmp_path, "000001-00000.parquet")
    shards.verify(tmp_path, [whole, short])
    os.truncate(tmp_path / short.name, 10)
    with pytest.raises(DataError, match=r"000001-00000\.parquet: it has 10 bytes"):
        shards.verify(tmp_path, [whole, short])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "the shards are not complete"),
        ("{", "it cannot be read"),
        ("{}", "it cannot be read"),
        (json.dumps(manifest(version=0).__dict__), "it has data version 0"),
    ],
)
def test_a_folder_without_a_usable_manifest_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / shards.MANIFEST).write_text(content)
    with pytest.raises(DataError, match=said):
        shards.read_manifest(tmp_path)


def run(path: Path, *, text: str = "text", order: tuple[str, ...] = ("a", "b"), **data: Any) -> SftRun:
    datasets = {name: {"path": str(path / f"{name}.jsonl"), "format": "text", "text": text} for name in order}
    return SftRun.model_validate(
        {"method": "sft", "run": {"name": "r"}, "model": {"path": "m"}, "data": {"train": datasets, "eval": {}, **data}}
    )


def write_files(directory: Path) -> Path:
    directory.mkdir()
    for name in ("a", "b"):
        (directory / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    return directory


def test_the_key_changes_with_all_that_changes_content(tmp_path: Path) -> None:
    corpus = write_files(tmp_path / "corpus")
    keys = [
        shard_key(cfg, "train", fingerprint)
        for cfg, fingerprint in [
            (run(corpus), "print"),
            (run(corpus), "other"),
            (run(corpus, seq_len=1024), "print"),
            (run(corpus, pack=False), "print"),
            (run(corpus, too_long="truncate"), "print"),
            (run(corpus, train_on_inputs=True), "print"),
            (run(corpus, roles_to_train=["user"]), "print"),
            (run(corpus, shard_rows=8), "print"),
            (run(corpus, pack_window=8), "print"),
            (run(corpus, unit_mb=8), "print"),
            (run(corpus, text="body"), "print"),
            (run(corpus, order=("b", "a")), "print"),
            (run(corpus, order=("a",)), "print"),
        ]
    ]
    (corpus / "b.jsonl").write_text('{"text": "c"}\n')
    keys.append(shard_key(run(corpus), "train", "print"))
    assert len(set(keys)) == len(keys)


def test_the_key_ignores_what_changes_no_byte(tmp_path: Path) -> None:
    corpus = write_files(tmp_path / "corpus")
    moved = write_files(tmp_path / "moved")
    key = shard_key(run(corpus), "train", "print")
    os.utime(corpus / "a.jsonl", (1, 1))
    for cfg in (run(corpus), run(moved), run(corpus, shuffle=False, window=2, actors=3, cache_dir="elsewhere")):
        assert shard_key(cfg, "train", "print") == key


def test_a_large_file_is_known_by_size_date_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "WHOLE_FILE", 20)
    monkeypatch.setattr(shards, "ENDS", 10)
    corpus = write_files(tmp_path / "corpus")
    file = corpus / "a.jsonl"
    keys = set()
    for content, date in [("x" * 40, 1), ("x" * 40, 2), ("x" * 41, 1), ("y" + "x" * 39, 1), ("x" * 39 + "y", 1)]:
        file.write_text(content)
        os.utime(file, (date, date))
        keys.add(shard_key(run(corpus), "train", "print"))
    assert len(keys) == 5
    file.write_text("x" * 20 + "y" + "x" * 19)
    os.utime(file, (1, 1))
    assert shard_key(run(corpus), "train", "print") in keys
