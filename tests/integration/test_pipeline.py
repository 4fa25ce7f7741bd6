"""Packing as a whole: the same bytes in this process, through Ray Data and after a kill; errors that explain themselves."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from rayft.config.schema import SftRun
from rayft.data import pipeline
from rayft.data.formats import make_encoder
from rayft.data.pipeline import pack_unit, pool_shape, prepare
from rayft.data.reader import Reader
from rayft.data.shards import read_manifest
from rayft.data.units import Unit, plan_units
from rayft.data.zoo import write_rows, zoo_rows
from rayft.errors import ConfigError, DataError
from rayft.models.tiny import write_tiny_model
from rayft.models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rows = zoo_rows("train", 1500)
    write_tiny_model(folder / "model", (message["content"] for row in rows[:200] for message in row["messages"]))
    write_rows(folder / "chats" / "1.jsonl", rows[:900])
    write_rows(folder / "chats" / "2.jsonl", rows[900:])
    write_rows(folder / "eval.jsonl", zoo_rows("eval", 40))
    (folder / "notes.txt").write_text("".join(f"Note {i}: the {'very ' * (i % 50)}old tiger sleeps.\n" for i in range(400)))
    return folder


def run(corpus: Path, cache: Path, **data: Any) -> SftRun:
    datasets = {
        "chats": {"path": str(corpus / "chats")},
        "notes": {"path": str(corpus / "notes.txt"), "format": "text", "limit": 300},
    }
    section = {
        "train": datasets,
        "eval": {"held_out": {"path": str(corpus / "eval.jsonl")}},
        "seq_len": SEQ_LEN,
        "shard_rows": 16,
        "pack_window": 128,
        "unit_mb": 0.02,
        "cache_dir": str(cache),
    }
    model = {"path": str(corpus / "model")}
    return SftRun.model_validate({"method": "sft", "run": {"name": "r", "deadline_s": 60}, "model": model, "data": section | data})


def packed(cfg: SftRun, split: Literal["train", "eval"], *, use_ray: bool) -> Path:
    return Path(prepare(cfg, split, use_ray=use_ray))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(run(corpus, tmp_path_factory.mktemp("undisturbed")), "train", use_ray=False)


def test_the_shards_hold_every_document_of_the_datasets(corpus: Path, undisturbed: Path) -> None:
    cfg = run(corpus, undisturbed.parent)
    encoder = make_encoder(cfg.data, load_tokenizer(cfg.model))
    expected = []
    for source_id, (name, dataset) in enumerate(cfg.data.train.items()):
        rows = [row for unit in plan_units("train", {name: dataset}, 1.0) for _, row in unit.rows()]
        for encoded in encoder.encode_many(rows, dataset, [name] * len(rows)):
            expected += [(source_id, document.tokens.tobytes(), document.loss_weights.tobytes()) for document in encoded.documents]
    reader = Reader(undisturbed, seed=0, shuffle=False, window=1)
    found = []
    for position in range(reader.num_rows):
        row = reader.row(position)
        ends = np.minimum(np.cumsum(row.lengths), row.num_tokens)
        for start, end, source_id in zip([0, *ends], ends, row.source_ids, strict=False):
            found.append((int(source_id), row.tokens[start:end].tobytes(), row.loss_weights[start:end].tobytes()))
    assert sorted(found) == sorted(expected)


def test_the_manifest_adds_up(undisturbed: Path) -> None:
    manifest = read_manifest(undisturbed)
    totals, dropped = manifest.totals, manifest.dropped
    assert totals["rows_read"] == 1500 + 300
    assert totals["documents"] >= 1800 - sum(dropped["chats"].values())
    assert totals["rows"] == sum(shard.rows for shard in manifest.shards)
    assert 0 < totals["trained_tokens"] < totals["tokens"] <= totals["rows"] * SEQ_LEN
    assert totals["tokens"] > 0.8 * totals["rows"] * SEQ_LEN
    assert dropped["chats"]["longer than data.seq_len"] > 0
    assert [shard.name for shard in manifest.shards] == sorted(shard.name for shard in manifest.shards)
    assert manifest.chat_template and "<|im_start|>" in manifest.chat_template


def test_ray_data_writes_the_same_bytes(corpus: Path, undisturbed: Path, tmp_path: Path, ray_cluster: None) -> None:
    folder = packed(run(corpus, tmp_path), "train", use_ray=True)
    assert contents(folder) == contents(undisturbed)
    assert folder.name == undisturbed.name


@pytest.mark.parametrize(
    ("cpus", "wanted", "units", "shape"),
    [
        (4.0, None, 10, (3, 1.0)),
        (4.0, None, 2, (2, 1.0)),
        (4.0, 6, 10, (6, 0.5)),
        (4.0, 7, 10, (7, 0.428)),
        (1.0, None, 10, (1, 0.5)),
        (64.0, 8, 100, (8, 1.0)),
    ],
)
def test_the_pool_leaves_a_cpu_free(cpus: float, wanted: int | None, units: int, shape: tuple[int, float]) -> None:
    assert pool_shape(cpus, wanted, units) == shape


def test_a_killed_run_goes_on_where_it_was(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(run(corpus, tmp_path / "cache").model_dump_json())
    program = (
        "import sys; from pathlib import Path; from rayft.config.schema import SftRun; from rayft.data.pipeline import prepare\n"
        "prepare(SftRun.model_validate_json(Path(sys.argv[1]).read_text()), 'train', use_ray=False)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run.json")]
    with subprocess.Popen(command, cwd=ROOT) as process:
        folder = tmp_path / "cache" / undisturbed.name
        while not (folder / "000000.json").exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    committed = {path.stem for path in folder.glob("??????.json")}
    assert committed < {path.stem for path in undisturbed.glob("??????.json")}
    (folder / ".000009-00000.parquet.0123.tmp").write_text("half a shard")
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir() if path.name[:6] in committed}
    assert len(before) > 1

    subprocess.run(command, cwd=ROOT, check=True)
    assert contents(folder) == contents(undisturbed)
    assert {name: ((folder / name).stat().st_mtime_ns, (folder / name).stat().st_ino) for name in before} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_complete_folder_is_used_as_it_is(corpus: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "plan_units", None)
    assert packed(run(corpus, undisturbed.parent, shuffle=False, actors=2), "train", use_ray=False) == undisturbed


def test_a_lost_shard_is_named(corpus: Path, tmp_path: Path) -> None:
    folder = packed(run(corpus, tmp_path), "eval", use_ray=False)
    (folder / "000000-00000.parquet").unlink()
    with pytest.raises(DataError, match=rf"000000-00000\.parquet: the file is missing\. Delete {folder} and run again"):
        packed(run(corpus, tmp_path), "eval", use_ray=False)


def test_two_drivers_pack_the_same_rows_once(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders: list[Path] = []
    with caplog.at_level(logging.INFO, "rayft"):
        threads = [threading.Thread(target=lambda: folders.append(packed(run(corpus, tmp_path), "train", use_ray=False))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(folders) == 2 and folders[0] == folders[1]
    messages = [record.getMessage() for record in caplog.records]
    assert len([text for text in messages if text.startswith("packed train")]) == 1
    assert len([text for text in messages if text.startswith("waiting for")]) == 1


def broken(corpus: Path, folder: Path) -> Path:
    """Chats of which one in the middle has a role that the format does not know."""
    rows: list[Any] = zoo_rows("train", 600)
    rows[400]["messages"][0]["role"] = 7
    write_rows(folder / "broken.jsonl", rows)
    return folder / "broken.jsonl"


def refuse(cfg: SftRun, *, use_ray: bool) -> tuple[str, Path]:
    with pytest.raises(DataError) as caught:
        prepare(cfg, "train", use_ray=use_ray)
    assert type(caught.value) is DataError
    (folder,) = Path(str(cfg.data.cache_dir)).iterdir()
    return str(caught.value), folder


def test_an_error_keeps_what_was_finished_and_nothing_else(corpus: Path, tmp_path: Path, ray_cluster: None) -> None:
    file = broken(corpus, tmp_path)
    sentences = []
    for use_ray in (False, True):
        cfg = run(corpus, tmp_path / f"ray-{use_ray}", train={"chats": {"path": str(file)}})
        sentence, folder = refuse(cfg, use_ray=use_ray)
        sentences.append(sentence)
        names = sorted(contents(folder))
        committed = {name[:6] for name in names if name.endswith(".json")}
        assert committed and "manifest.json" not in names
        assert use_ray or not [name for name in names if name.endswith(".tmp")]  # actors take a moment to stop
        for index in committed:
            listed = json.loads((folder / f"{index}.json").read_text())["shards"]
            assert all((folder / shard["name"]).stat().st_size == shard["bytes"] for shard in listed)
    assert sentences[0] == sentences[1]
    assert f"{file}, byte " in sentences[0]


def test_workers_without_the_file_say_so(corpus: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gone.jsonl"
    write_rows(file, zoo_rows("train", 5))

    def plan_and_lose(*arguments: Any) -> tuple[Unit, ...]:
        units = plan_units(*arguments)
        file.unlink()
        return units

    monkeypatch.setattr(pipeline, "plan_units", plan_and_lose)
    cfg = run(corpus, tmp_path / "cache", train={"gone": {"path": str(file)}})
    with pytest.raises(DataError, match="the file is not there on node"):
        prepare(cfg, "train", use_ray=True)
    assert list(Path(str(cfg.data.cache_dir)).iterdir()) == []


def test_a_folder_that_the_driver_does_not_see_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(pipeline, "pack_unit", lambda unit, encoder, directory: pack_unit(unit, encoder, elsewhere))
    with pytest.raises(ConfigError, match=r"data\.cache_dir = .*Set it to a folder on storage that every node sees"):
        packed(run(corpus, tmp_path / "cache"), "eval", use_ray=False)


def test_no_usable_row_is_an_error_with_the_reasons(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.eval: none of the 40 rows can be used; dropped are 40 of held_out: longer than"):
        packed(run(corpus, tmp_path, seq_len=4), "eval", use_ray=False)


def test_one_document_a_row_without_packing(corpus: Path, tmp_path: Path) -> None:
    totals = read_manifest(packed(run(corpus, tmp_path, pack=False), "eval", use_ray=False)).totals
    assert totals["rows"] == totals["documents"] > 0
    assert totals["max_documents"] == 1


def test_memory_does_not_grow_with_the_file(corpus: Path, tmp_path: Path) -> None:
    peaks = []
    for copies in (4, 4, 24):  # the first one fills caches
        file = tmp_path / f"{copies}.txt"
        file.write_text((corpus / "notes.txt").read_text() * copies)
        cfg = run(corpus, tmp_path, train={"notes": {"path": str(file), "format": "text"}}, shard_rows=64)
        (unit,) = plan_units("train", cfg.data.train, 1000)
        encoder = make_encoder(cfg.data, load_tokenizer(cfg.model))
        tracemalloc.start()
        pack_unit(unit, encoder, tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1], peaks
