"""Waiting for room: what is said and when, how it ends, and what an autoscaling cluster changes."""

from __future__ import annotations

import importlib
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from rayft.actors import run, trainer_group
from rayft.actors.engines import holds
from rayft.config.load import load
from rayft.config.schema import AnyRun
from rayft.data import waiting
from rayft.errors import ResourceError
from rayft.types import Launch

ray = pytest.importorskip("ray")

SMALL = ["method=sft", "run.name=first", "model.path=tiny", "data.train.zoo.path=zoo.jsonl", "parallel.workers=2", "parallel.device=cpu"]


class Group:
    """A placement group that has a place from the n-th look on; looks take two seconds of a clock of their own."""

    def __init__(self, looks: int) -> None:
        self.looks, self.now, self.removed = looks, 100.0, 0

    def wait(self, seconds: int) -> bool:
        self.now, self.looks = self.now + seconds, self.looks - 1
        return self.looks <= 0

    def remove(self, group: Any) -> None:
        self.removed += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a cluster of so many CPUs, one of them free, whose placement group is the one that is returned."""
    groups = importlib.import_module("ray.util.placement_group")  # ray.util has a function of that name

    def make(looks: int, cpus: float = 4.0) -> Group:
        group = Group(looks)
        monkeypatch.setattr(groups, "placement_group", lambda bundles, name: group)
        monkeypatch.setattr(groups, "remove_placement_group", group.remove)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
        monkeypatch.setattr(waiting.time, "monotonic", lambda: group.now)
        return group

    return make


def launch(*overrides: str) -> Launch[Any]:
    cfg: AnyRun = load([], [*SMALL, *overrides])
    return Launch(
        cfg=cfg, run_dir=Path("nowhere"), train_shards="", eval_shards=None, identity={}, total_steps=1, device_type="cpu", local=False
    )


@pytest.mark.parametrize(
    ("bundles", "totals", "free", "words"),
    [
        ([{"CPU": 1.0}] * 3, {"CPU": 4.0}, {"CPU": 1.0}, "3 CPUs (1 of 4 is free)"),
        ([{"GPU": 1.0, "CPU": 2.0}], {"CPU": 8.0}, {"CPU": 2.5}, "1 GPU (0 of 0 are free) and 2 CPUs (2.5 of 8 are free)"),
        ([{"GPU": 0.49}] * 2, {"GPU": 2.0}, {}, "0.98 GPUs (0 of 2 are free)"),
    ],
)
def test_a_shortage_in_words(bundles: Any, totals: dict[str, float], free: dict[str, float], words: str) -> None:
    assert waiting.shortage(bundles, totals, free) == words


def test_lines_come_soon_and_then_every_minute(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    group = cluster(looks=70)  # 140 s
    with caplog.at_level(logging.WARNING, "rayft"):
        assert waiting.wait_for_room([{"CPU": 1.0}] * 2, 600.0, "training")
    assert caplog.messages == ["training waits for 2 CPUs (1 of 4 is free)"] * 3 and group.removed == 1


def test_the_wait_ends_with_what_is_needed_and_free(cluster: Any) -> None:
    group = cluster(looks=1000)
    sentence = r"run.start_s = 30.0: was not enough for packing to find room, which needs 2 CPUs \(1 of 4 is free\)\. Look who"
    with pytest.raises(ResourceError, match=sentence) as caught:
        waiting.wait_for_room([{"CPU": 1.0, "GPU": 0.0}] * 2, 30.0, "packing")
    assert group.now - 100.0 == 32.0 and group.removed == 1 and caught.value.exit_code == 4


def test_a_stop_ends_the_wait(cluster: Any) -> None:
    group = cluster(looks=1000)
    assert not waiting.wait_for_room([{"CPU": 1.0}], 600.0, "training", lambda: group.now > 105.0)
    assert group.removed == 1


def test_silence_is_told_until_something_happens(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in {"cluster_resources": {"CPU": 4.0}, "available_resources": {}}.items():
        monkeypatch.setattr(ray, name, lambda value=value: value)
    monkeypatch.setattr(waiting, "POLL_S", 0.01)
    monkeypatch.setattr(waiting, "LINE_S", 0.6)
    with waiting.silence_told("packing", [{"CPU": 1.0}]) as finished:
        for _ in range(8):
            time.sleep(0.1)
            finished()
        assert caplog.messages == []
        end = time.monotonic() + 5
        while not caplog.messages:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert caplog.messages[0] == "packing: nothing was finished for a minute; a process of it takes 1 CPU (0 of 4 are free)"


def test_a_cluster_that_stayed_too_small_is_told_from_a_busy_one(cluster: Any) -> None:
    cluster(looks=1000, cpus=2.0)
    with pytest.raises(ResourceError, match=r"parallel.workers = 2: needs 3 CPUs, .* has 2\. .*parallel.autoscaling = true"):
        trainer_group._has_room(launch())
    cluster(looks=1000, cpus=2.0)
    with pytest.raises(ResourceError, match=r"run.start_s = 600.0: .* needs 2 CPUs \(1 of 2 is free\)"):
        trainer_group._has_room(launch("parallel.autoscaling=true"))
    cluster(looks=1000)
    with pytest.raises(ResourceError, match=r"run.start_s = 9.0: .* needs 2 CPUs \(1 of 4 is free\)"):
        trainer_group._has_room(launch("run.start_s=9"))


def test_a_growing_cluster_may_begin_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.placement, "start_ray", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    with pytest.raises(ResourceError, match=r"needs 2 GPUs, the cluster has 0"):
        run._place(launch("parallel.device=cuda").cfg)
    assert run._place(launch("parallel.device=cuda", "parallel.autoscaling=true").cfg) == "cuda"


def test_ray_train_tries_nothing_again_by_itself() -> None:
    config = vars(trainer_group._failure_config())
    limits = {name: limit for name, limit in config.items() if name.startswith("max_") or name.endswith("_limit")}
    assert len(limits) >= 2 and set(limits.values()) == {0}


def test_a_question_for_room_is_not_the_trainer() -> None:
    entry = {"state": "CREATED", "bundles": {0: {"CPU": 1.0}}, "name": ""}
    assert holds({"a": entry}, set(), [{"CPU": 1.0}])
    assert not holds({"a": entry | {"name": waiting.ROOM}}, set(), [{"CPU": 1.0}])
