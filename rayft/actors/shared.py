"""Whether every node sees the run's directory, asked before anything is built."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayft.errors import ResourceError

ANSWER_S = 60.0
"""How long the nodes may take to answer, together."""


def check_shared(run_dir: Path, device_type: str) -> None:
    """Refuse a run directory that a node which may get work does not see. Does nothing on a cluster of one node.

    Args:
        run_dir: the run's directory, by path; a URL needs no check.
        device_type: "cuda" asks nodes with GPUs or CPUs, for workers and for packing; "cpu" those with CPUs.

    Raises:
        ResourceError: naming the nodes.
    """
    import ray

    resources = ("GPU", "CPU") if device_type == "cuda" else ("CPU",)
    nodes = [node for node in ray.nodes() if node["Alive"] and any(node["Resources"].get(name, 0) > 0 for name in resources)]
    if len(nodes) < 2:
        return
    token = run_dir / f".seen-{uuid.uuid4().hex}"
    token.write_text(token.name)
    try:
        refuse_blind(run_dir, _answers(token, nodes))
    finally:
        token.unlink()


def refuse_blind(run_dir: Path, answers: Iterable[tuple[str, bool | None]]) -> None:
    """Refuse when a node did not see the token.

    Args:
        answers: (name of a node, whether it saw the token; None when it did not answer).
    """
    known = list(answers)
    blind = [node for node, seen in known if seen is False]
    silent = [node for node, seen in known if seen is None]
    if blind:
        rule = f"is not there on {', '.join(blind)}"
        remedy = "Use a folder on storage that every node mounts at the same path, or s3://"
        raise ResourceError("run directory", str(run_dir), rule, remedy)
    if silent:
        rule = f"cannot be checked: {', '.join(silent)} gave no answer in {ANSWER_S:.0f} s"
        raise ResourceError("run directory", str(run_dir), rule, "Look whether that node is overloaded, or use s3://")


def _answers(token: Path, nodes: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool | None]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=1)(_sees)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    names = [f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes]
    tasks = [look.options(scheduling_strategy=place).remote(str(token)) for place in places]
    done, _ = ray.wait(tasks, num_returns=len(tasks), timeout=ANSWER_S)
    return [(name, _answer(task) if task in done else None) for name, task in zip(names, tasks, strict=True)]


def _answer(task: Any) -> bool | None:
    """What a task that has ended says; None when its node died."""
    import ray

    try:
        return bool(ray.get(task))
    except ray.exceptions.RayError:
        return None


def _sees(token: str) -> bool:
    return os.path.exists(token)
