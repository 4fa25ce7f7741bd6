"""What may be deleted of a run and of its packed shards, and the deletion."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rayft.checkpoint import resume
from rayft.data import shards, store

SHARDS = re.compile(r"(train|eval)-[0-9a-f]{16}")


@dataclass(frozen=True)
class Surplus:
    """A folder that may go.

    Attributes:
        location: path or URL.
        why: in words.
        bytes: of all its files.
        mark: the file that makes the folder count, deleted first; None when it does not count.
    """

    location: str
    why: str
    bytes: int
    mark: str | None


def surplus_checkpoints(home: str, keep: int) -> list[Surplus]:
    """Checkpoint directories of a run that were never finished, and the oldest ones beyond `keep` but the best.

    Only right while nobody trains.
    """
    half = [Surplus(folder, "unfinished checkpoint", _bytes(folder), None) for folder in resume.unfinished(home)]
    why = f"checkpoint beyond the newest {keep}"
    old = [Surplus(one.directory, why, _bytes(one.directory), resume.COMMITTED) for one in resume.surplus(home, keep)]
    return half + old


def surplus_shards(cache: str, run_dir: str) -> list[Surplus]:
    """Folders of packed shards that no run uses: none that has a directory noted in them reads them, and no checkpoint names their key.

    A folder that somebody is packing has a lock beside it and is left out.

    Args:
        cache: folder of the packed shards.
        run_dir: folder of the runs, whose checkpoints are asked.
    """
    sizes = store.sizes(cache)
    folders = sorted({name.partition("/")[0] for name in sizes if SHARDS.fullmatch(name.partition("/")[0])})
    unused = [folder for folder in folders if f"{folder}.lock" not in sizes and not _has_user(store.join(cache, folder))]
    named = _keys_of_checkpoints(run_dir) if unused else set()
    return [
        Surplus(
            store.join(cache, folder),
            "packed shards that no run uses",
            sum(count for name, count in sizes.items() if name.startswith(f"{folder}/")),
            shards.MANIFEST,
        )
        for folder in unused
        if folder.partition("-")[2] not in named
    ]


def delete(found: Surplus) -> None:
    """Delete a folder; what makes it count goes first."""
    store.delete_tree(found.location, mark=found.mark)


def _bytes(folder: str) -> int:
    return sum(store.sizes(folder).values())


def _has_user(folder: str) -> bool:
    return any(store.exists(store.join(home, "config.yaml")) for home in shards.users(folder))


def _keys_of_checkpoints(run_dir: str) -> set[str]:
    """Beginnings of the keys of the training rows that checkpoints were made from."""
    homes = {name.partition("/")[0] for name in store.sizes(run_dir, "*/config.yaml")}
    records = [one.progress for name in homes for one in resume.committed(store.join(run_dir, name))]
    return {str(record["training rows"])[:16] for record in records if "training rows" in record}
