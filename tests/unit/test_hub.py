"""The Hugging Face hub without network: datasets and models are fetched once, and a push sends exactly the export and its card."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from rayft.config.load import load
from rayft.config.paths import absolute
from rayft.config.schema import Model, SftRun
from rayft.data import hub as rows
from rayft.data import store
from rayft.data.sources import read_rows, resolve_files
from rayft.errors import ConfigError, DataError, InfrastructureError
from rayft.models import hub

GSM8K = ["data.train.gsm8k.path=openai/gsm8k", "data.train.gsm8k.subset=main", "data.train.gsm8k.split=train[:10%]"]


def run_of(tmp_path: Path, *overrides: str) -> SftRun:
    cfg = load([], ["method=sft", "run.name=r", f"run.dir={tmp_path}", "model.path=org/base", *overrides])
    assert isinstance(cfg, SftRun)
    return absolute(cfg)


def test_a_dataset_is_fetched_once_and_read_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_list([{"question": f"q{i}", "answer": str(i)} for i in range(25)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(rows, "ROWS", 10)
    cfg = run_of(tmp_path, *GSM8K, "data.train.gsm8k.revision=v1")
    source = cfg.data.train["gsm8k"]
    assert source.path == "openai/gsm8k" and not rows.is_there(cfg, source)
    found: list[SftRun] = []
    threads = [threading.Thread(target=lambda: found.append(rows.with_hub_files(cfg, "train"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [("openai/gsm8k", "main", "train[:10%]", "v1")] and len(found) == 3
    assert rows.is_there(cfg, source)
    files = resolve_files("gsm8k", found[0].data.train["gsm8k"])
    assert [Path(file).name for file in files] == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert [row["question"] for file in files for _, row in read_rows(file)] == [f"q{i}" for i in range(25)]
    other = run_of(tmp_path, *GSM8K, "data.train.gsm8k.revision=v2")
    assert not rows.is_there(other, other.data.train["gsm8k"])


@pytest.mark.parametrize(
    ("problem", "expected", "said"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist"), DataError, "not a dataset of the hub"),
        (ValueError("Unknown split 'tset'"), DataError, "Unknown split 'tset'"),
        (ConnectionError("Couldn't reach the Hub"), InfrastructureError, "cannot be reached"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_said_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception, expected: type[Exception], said: str
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(expected, match=rf"data\.train\.gsm8k\.path = 'openai/gsm8k': .*{said}"):
        rows.with_hub_files(run_of(tmp_path, *GSM8K), "train")


def test_paths_urls_and_ids_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "folder").mkdir(parents=True)
    paths = ["owner/folder", "owner/name", "owner/rows.jsonl", "a/b/c", "s3://bucket/x/", "file:///x/y.txt", "rows.txt"]
    cfg = run_of(tmp_path, *(f"data.train.d{number}.path={path}" for number, path in enumerate(paths)), "data.cache_dir=s3://bucket/cache/")
    here = str(tmp_path)
    assert [source.path for source in cfg.data.train.values()] == [
        f"{here}/owner/folder", "owner/name", f"{here}/owner/rows.jsonl", f"{here}/a/b/c", "s3://bucket/x", "/x/y.txt", f"{here}/rows.txt",
    ]  # fmt: skip
    assert cfg.data.cache_dir == "s3://bucket/cache" and cfg.model.path == "org/base"
    with pytest.raises(ConfigError, match=r"data\.train\.a\.subset = 'main': is for datasets of the Hugging Face hub, and x\.jsonl is"):
        run_of(tmp_path, "data.train.a.path=x.jsonl", "data.train.a.subset=main")


def test_a_model_is_fetched_once_in_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub.tempfile, "gettempdir", lambda: str(tmp_path))
    hub._on_this_node.cache_clear()
    for revision in ("v1", "v1", None):
        assert hub.model_folder(Model(path="test-org/once", revision=revision)) == str(tmp_path)
    assert asked == [("test-org/once", "v1"), ("test-org/once", None)]
    assert hub.model_folder(Model(path=str(tmp_path))) == str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(LocalEntryNotFoundError("not in the cache")))
    with pytest.raises(ConfigError, match=r"model\.path = 'test-org/never@v9': .* \(not in the cache\)"):
        hub.model_folder(Model(path="test-org/never", revision="v9"))


def failing(problem: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise problem

    return fail


def test_a_folder_on_a_store_must_be_a_finished_export(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/export"
    store.write(f"{url}/config.json", b"{}")
    store.write(f"{url}/model.safetensors", b"weights")
    plain = Path(hub.fetched_folder(url, tmp_path))
    assert (plain / "model.safetensors").read_bytes() == b"weights"
    sums = {name: (store.size(plain / name), store.file_hash(plain / name)) for name in ("config.json", "model.safetensors")}
    store.write(f"{url}/export.json", json.dumps({"step": 3, "files": sums}).encode())
    assert (Path(hub.fetched_folder(url, tmp_path)) / "model.safetensors").read_bytes() == b"weights"
    (tmp_path / "second").mkdir()
    store.write(f"{url}/model.safetensors", b"weightz")
    with pytest.raises(DataError, match=r"model\.safetensors: its content is not what was written"):
        hub.fetched_folder(url, tmp_path / "second")
    assert list((tmp_path / "second").iterdir()) == []
    with pytest.raises(DataError, match=r"holds no config\.json, and no export that was finished"):
        hub.fetched_folder("memory://nothing", tmp_path)


def test_the_card_has_the_front_matter_that_the_hub_reads() -> None:
    card = hub.model_card(
        "my-run", base="org/base", datasets=["openai/gsm8k"], tags=["rayft", "lora"], adapter=True, figures={"steps": "20", "loss": "1.5"}
    )
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["rayft", "lora"],
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "datasets": ["openai/gsm8k"],
    }
    assert "# my-run" in text and "A LoRA adapter for org/base" in text and "| loss | 1.5 |" in text
    local = hub.model_card("x", base="/models/base", datasets=[], tags=[], adapter=False, figures={})
    assert "base_model" not in local and "/models" not in local


def test_a_push_is_one_commit_of_the_files_and_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> str:
            assert exist_ok
            sent["repo"] = (repo, private)
            return f"https://hub/{repo}"

        def create_commit(self, repo: str, operations: list[Any], commit_message: str) -> None:
            sent["files"] = {one.path_in_repo: one.path_or_fileobj for one in operations}

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"HF_TOKEN: pushing needs a token"):
        hub.push_folder(tmp_path, ["config.json"], "card", "me/x", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.push_folder(tmp_path, ["config.json"], "card", "me/x", True) == "https://hub/me/x"
    assert sent == {"repo": ("me/x", True), "files": {"config.json": str(tmp_path / "config.json"), "README.md": b"card"}}


def test_a_push_that_fails_is_said_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    import httpx

    request = httpx.Request("POST", "https://hub")
    refused = HfHubHTTPError("403 Forbidden", response=httpx.Response(403, request=request))
    for problem, expected, said in (
        (refused, ConfigError, "the hub refuses (403"),
        (httpx.ConnectError("no route", request=request), InfrastructureError, "the hub cannot be reached (no route"),
    ):
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", failing(problem))
        with pytest.raises(expected) as caught:
            hub.push_folder(tmp_path, [], "card", "me/x", False)
        assert said in str(caught.value) and "secret" not in str(caught.value)
