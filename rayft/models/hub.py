"""Model files: the local folder of what a run names, and the way back to the Hugging Face hub.

An id of the hub or a folder on an object store is copied to this node once, by one process at a time, before it is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayft.data import store
from rayft.data.lock import exclusive
from rayft.errors import ConfigError, DataError, InfrastructureError

if TYPE_CHECKING:
    from rayft.config.schema import Model

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
EXPORT = "export.json"
"""File of an export that is written last: its step and, on an object store, the size and hash of every other file."""
DOWNLOAD_S = 3600.0
"""How long a process waits for another one of its node that fetches the same model."""
CLIENTS = {"huggingface_hub", "httpx", "requests", "urllib3"}


def model_folder(model: Model) -> str:
    """The local folder of the model's files.

    Raises:
        ConfigError: there is no such folder, and no such model on the hub or in its local cache.
        DataError: a folder on an object store is not complete.
        InfrastructureError: the hub or store failed.
    """
    return model.path if Path(model.path).is_dir() else _on_this_node(model.path, model.revision)


@functools.cache
def _on_this_node(path: str, revision: str | None) -> str:
    cache = Path(tempfile.gettempdir()) / f"rayft-{os.getuid()}"
    cache.mkdir(exist_ok=True)
    name = hashlib.sha256(json.dumps([path, revision]).encode()).hexdigest()[:16]
    with exclusive(cache / f"{name}.lock", DOWNLOAD_S):
        return fetched_folder(path, cache) if store.is_url(path) else _snapshot(path, revision)


def _snapshot(name: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS))
    except (OSError, HFValidationError) as problem:
        reason = str(problem).strip().split("\n")[0]
        rule = f"must be a Hugging Face model folder, or an id of the hub ({reason})"
        remedy = "Give the path of a folder that holds config.json, or an id and revision that the hub or the local cache has"
        if isinstance(problem, ConnectionError) and not isinstance(problem, LocalEntryNotFoundError):
            raise InfrastructureError("model.path", name, f"the hub cannot be reached ({reason})", remedy) from problem
        raise ConfigError("model.path", name if revision is None else f"{name}@{revision}", rule, remedy) from problem


def fetched_folder(url: str, cache: Path) -> str:
    """A verified local copy of a model folder on an object store.

    Args:
        url: the folder; an export that rayft wrote is held to its record, any other folder to the sizes that the store lists.
        cache: local folder to put it into.

    Raises:
        DataError: there is no model, or a file is not what was written.
    """
    sizes = store.sizes(url)
    expected: dict[str, tuple[int, str] | None] = dict.fromkeys(sizes)
    if EXPORT in sizes:
        record = store.read(store.join(url, EXPORT))
        expected = {name: (size, digest) for name, (size, digest) in json.loads(record)["files"].items()}
        state = record.decode()
    else:
        state = json.dumps([sizes, store.many(store.version, (store.join(url, name) for name in sizes))])
    if "config.json" not in expected and "adapter_config.json" not in expected:
        rule = "holds no config.json, and no export that was finished"
        raise DataError("model.path", url, rule, "Name the folder of a model or of a finished export")
    folder = cache / hashlib.sha256(f"{url}\n{state}".encode()).hexdigest()[:24]
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as part:
            for name, size_and_hash in expected.items():
                file = Path(part) / "model" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                store.fetch(store.join(url, name), file, size_and_hash)
            (Path(part) / "model").rename(folder)
    return str(folder)


def model_card(name: str, *, base: str, datasets: Sequence[str], tags: Sequence[str], adapter: bool, figures: Mapping[str, str]) -> str:
    """README.md of a model repository: front matter that the hub reads, and how the model came about.

    Args:
        name: of the run.
        base: the model that was trained; named in the front matter when it is an id of the hub.
        datasets: ids of the hub among the training sources.
        tags: words to find it by.
        adapter: the repository holds an adapter and not a whole model.
        figures: what to tell of the training, by name.
    """
    facts: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation", "tags": list(tags)}
    if base.count("/") == 1 and not base.startswith("/") and not store.is_url(base):
        facts |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    if datasets:
        facts["datasets"] = list(datasets)
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in facts.items())  # JSON values are YAML
    rows = "\n".join(f"| {key} | {value} |" for key, value in figures.items())
    what = "A LoRA adapter for" if adapter else "A fine-tuned version of"
    return f"---\n{front}\n---\n\n# {name}\n\n{what} {Path(base).name if base.startswith('/') else base}, trained with rayft.\n\n" + (
        f"| training | |\n|---|---|\n{rows}\n"
    )


def push_folder(folder: Path, files: Sequence[str], card: str, repo: str, private: bool) -> str:
    """Put files and card into a repository of the hub, in one commit; makes the repository when there is none. Its address.

    Raises:
        ConfigError: there is no token, or it may not write there.
        InfrastructureError: the hub cannot be reached or failed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise ConfigError("HF_TOKEN", None, "pushing needs a token of the Hugging Face hub", "Set HF_TOKEN, or run hf auth login")
    added = [CommitOperationAdd(name, str(folder / name)) for name in files] + [CommitOperationAdd("README.md", card.encode())]
    try:
        address = HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().create_commit(repo, added, commit_message="Trained with rayft")
    except Exception as problem:
        if not isinstance(problem, OSError) and type(problem).__module__.partition(".")[0] not in CLIENTS:
            raise
        reason = str(problem).strip().split("\n")[0]
        status = getattr(getattr(problem, "response", None), "status_code", None)
        if status in (400, 401, 403, 404) or isinstance(problem, ValueError):
            rule = f"the hub refuses ({reason})"
            raise ConfigError("--repo", repo, rule, "Give OWNER/NAME and a token that may write there") from problem
        rule = f"the hub cannot be reached ({reason})"
        raise InfrastructureError("--repo", repo, rule, "Run the command again where there is network") from problem
    return str(address)
