"""Datasets of the Hugging Face hub as files: each is read once, through the `datasets` library, and kept beside the packed shards."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rayft.data import store
from rayft.data.lock import exclusive
from rayft.errors import DataError, InfrastructureError

if TYPE_CHECKING:
    from rayft.config.schema import AnyRun, Dataset
    from rayft.types import R

log = logging.getLogger("rayft")

ROWS = 50_000
"""Rows in a file."""
COPY = ".complete"
"""The file that is written last; a folder without it does not count."""
OFFLINE = re.compile(r"offline|connection|connect|timed? ?out|resolve|couldn't reach", re.IGNORECASE)


def cache_dir(cfg: AnyRun) -> str:
    """Folder of the run's packed shards and of the datasets copied from the hub."""
    return cfg.data.cache_dir if cfg.data.cache_dir is not None else store.join(cfg.run.dir, ".shards")


def is_there(cfg: AnyRun, dataset: Dataset) -> bool:
    """Whether a dataset's files can be read without asking the hub."""
    return not is_hub_id(dataset.path) or store.exists(store.join(_folder(cfg, dataset), COPY))


def is_hub_id(path: str) -> bool:
    """Whether a source is named by the id of a dataset on the hub: the driver has made every path absolute."""
    return not store.is_url(path) and not Path(path).is_absolute()


def with_hub_files(cfg: R, split: str) -> R:
    """The same run with every hub dataset of a split as a folder of files, fetched when it is not there yet.

    Raises:
        DataError: the hub has no such dataset, subset, split or revision.
        InfrastructureError: the hub cannot be reached, or another process kept the lock for longer than `run.deadline_s`.
    """
    sources: dict[str, Dataset] = getattr(cfg.data, split)
    found = {name: _copied(cfg, f"data.{split}.{name}", one) if is_hub_id(one.path) else one for name, one in sources.items()}
    return cast("R", cfg.model_copy(update={"data": cfg.data.model_copy(update={split: found})}))


def _copied(cfg: AnyRun, field: str, dataset: Dataset) -> Dataset:
    folder = _folder(cfg, dataset)
    if not store.exists(store.join(folder, COPY)):
        store.make_folder(folder)
        with exclusive(f"{folder}.lock", cfg.run.deadline_s):
            if not store.exists(store.join(folder, COPY)):
                _copy(_load(field, dataset), folder)
    return dataset.model_copy(update={"path": folder})


def _folder(cfg: AnyRun, dataset: Dataset) -> str:
    names = [dataset.path, dataset.subset, dataset.split, dataset.revision]
    key = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    return store.join(cache_dir(cfg), f"hub-{dataset.path.replace('/', '--')}-{key}")


def _load(field: str, dataset: Dataset) -> Any:
    import datasets

    try:
        return datasets.load_dataset(dataset.path, dataset.subset, split=dataset.split, revision=dataset.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as problem:
        cause = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else ''}"
        if isinstance(problem, ConnectionError) or OFFLINE.search(str(problem)):
            rule = f"the Hugging Face hub cannot be reached, and the dataset is not in the local cache ({cause})"
            raise InfrastructureError(f"{field}.path", dataset.path, rule, "Run it where there is network, or name a file") from problem
        rule = f"no such file, and not a dataset of the hub that can be read ({cause})"
        raise DataError(f"{field}.path", dataset.path, rule, "Correct the path, or subset, split and revision") from problem


def _copy(rows: Any, folder: str) -> None:
    """Write the rows as Parquet files of ROWS rows, then the record that makes them count."""
    log.info("copying %d rows of the hub to %s", len(rows), folder)
    for number, start in enumerate(range(0, len(rows), ROWS)):
        with store.committed_file(store.join(folder, f"{number:05d}.parquet")) as temporary:
            rows.select(range(start, min(start + ROWS, len(rows)))).to_parquet(str(temporary))
    store.write(store.join(folder, COPY), json.dumps({"rows": len(rows)}).encode())
