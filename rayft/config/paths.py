"""Relative paths mean the folder where the command starts; workers start elsewhere, so the driver makes them absolute."""

from __future__ import annotations

from pathlib import Path

from rayft.config.schema import Dataset, SftRun


def absolute(cfg: SftRun) -> SftRun:
    """The same run with every local path absolute; ids of cached models and inline templates stay as they are."""
    model = cfg.model.model_copy(
        update={
            "path": _existing(cfg.model.path),
            "tokenizer": _existing(cfg.model.tokenizer) if cfg.model.tokenizer else None,
            "chat_template": _existing(cfg.model.chat_template) if _is_file_name(cfg.model.chat_template) else cfg.model.chat_template,
        }
    )
    data = cfg.data.model_copy(
        update={
            "train": _sources(cfg.data.train),
            "eval": _sources(cfg.data.eval),
            "cache_dir": _plain(cfg.data.cache_dir) if cfg.data.cache_dir else None,
        }
    )
    return cfg.model_copy(update={"model": model, "data": data, "run": cfg.run.model_copy(update={"dir": _plain(cfg.run.dir)})})


def _sources(sources: dict[str, Dataset]) -> dict[str, Dataset]:
    return {name: source.model_copy(update={"path": _plain(source.path)}) for name, source in sources.items()}


def _plain(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _existing(path: str | None) -> str | None:
    """Absolute when there is such a file or folder; else it is the name of something else."""
    return _plain(path) if path and Path(path).expanduser().exists() else path


def _is_file_name(template: str | None) -> bool:
    return bool(template) and len(str(template)) < 1024 and "{" not in str(template)
