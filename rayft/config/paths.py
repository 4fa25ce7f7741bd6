"""Relative paths mean the folder where the command starts; workers start elsewhere, so the driver makes them absolute.

URLs of object stores (s3://bucket/key), ids of the Hugging Face hub and names of runs (run:NAME) stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from rayft.config.schema import Dataset, GrpoRun, Reward
from rayft.errors import ConfigError
from rayft.types import R

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE = re.compile(r".*\.(jsonl?|ndjson|parquet|csv|tsv|txt|gz|bz2|xz|zst)", re.IGNORECASE)
RUN = "run:"
"""Prefix of a model.path that names another run of the same run.dir."""


def absolute(cfg: R) -> R:
    """The same run with every local path absolute; ids of models and datasets, URLs and inline templates stay as they are.

    What a judge is asked takes the place of the file that it is in: other machines have no such file, and a run holds what was used.

    Raises:
        ConfigError: a source that is no id of the hub has fields that only the hub knows.
    """
    model = cfg.model.model_copy(
        update={
            "path": _existing(cfg.model.path),
            "tokenizer": _existing(cfg.model.tokenizer) if cfg.model.tokenizer else None,
            "chat_template": _template(cfg.model.chat_template),
        }
    )
    data = cfg.data.model_copy(
        update={
            "train": _sources("train", cfg.data.train),
            "eval": _sources("eval", cfg.data.eval),
            "cache_dir": plain(cfg.data.cache_dir) if cfg.data.cache_dir else None,
        }
    )
    trackers = cfg.trackers.model_copy(update={"dir": plain(cfg.trackers.dir)}) if cfg.trackers.dir else cfg.trackers
    run = cfg.run.model_copy(update={"dir": plain(cfg.run.dir)})
    judged = {"reward": _judged(cfg.reward)} if isinstance(cfg, GrpoRun) else {}
    return cast("R", cfg.model_copy(update={"model": model, "data": data, "trackers": trackers, "run": run, **judged}))


def plain(path: str) -> str:
    """A path as an absolute one; a URL as it is, without a slash at its end."""
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    return path.rstrip("/") if "://" in path else str(Path(path).expanduser().absolute())


def _sources(split: str, sources: dict[str, Dataset]) -> dict[str, Dataset]:
    return {name: _source(f"data.{split}.{name}", source) for name, source in sources.items()}


def _source(field: str, source: Dataset) -> Dataset:
    """An id has the form owner/name; a file or folder of that name goes before it."""
    if HUB_ID.fullmatch(source.path) and not FILE.fullmatch(source.path) and not Path(source.path).exists():
        return source
    for name in ("subset", "split", "revision"):
        if getattr(source, name) != Dataset.model_fields[name].default:
            rule = f"is for datasets of the Hugging Face hub, and {source.path} is a file, a folder or a URL"
            raise ConfigError(f"{field}.{name}", getattr(source, name), rule, "Remove it, or give an id such as openai/gsm8k as the path")
    return source.model_copy(update={"path": plain(source.path)})


def _existing(path: str) -> str:
    """Absolute when there is such a file or folder; else it is the name of something else."""
    return plain(path) if path.startswith("file://") or ("://" not in path and Path(path).expanduser().exists()) else path


def _template(template: str | None) -> str | None:
    """Text of a template stays as it is; the name of a file becomes absolute."""
    return _existing(template) if template and len(template) < 1024 and "{" not in template else template


def _judged(reward: Reward) -> Reward:
    functions = dict(reward.functions)
    for name, function in reward.functions.items():
        if (judge := function.judge) is None or not is_template_file(judge.prompt):
            continue
        if (file := Path(judge.prompt).expanduser()).is_file():
            read = judge.model_copy(update={"prompt": file.read_text(encoding="utf-8")})
            functions[name] = function.model_copy(update={"judge": read})
    return reward.model_copy(update={"functions": functions})


def is_template_file(text: str) -> bool:
    """Whether it names a file of a Jinja template rather than is one."""
    return text.endswith(".jinja") and "{" not in text
