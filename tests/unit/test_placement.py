"""What a run asks of the cluster, and the sentence when the cluster lacks it."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayft.actors import placement
from rayft.actors.placement import check_cluster, derive_steps, need_of, resolve_device, worker_resources
from rayft.config.schema import Parallel
from rayft.errors import ResourceError

ONE_NODE = {"CPU": 16.0, "GPU": 4.0, "memory": 1e11}


@pytest.mark.parametrize(
    ("wanted", "resources", "device"),
    [("auto", ONE_NODE, "cuda"), ("auto", {"CPU": 4.0}, "cpu"), ("cpu", ONE_NODE, "cpu"), ("cuda", {"CPU": 4.0}, "cuda")],
)
def test_auto_takes_gpus_where_there_are_any(wanted: Any, resources: dict[str, float], device: str) -> None:
    assert resolve_device(Parallel(device=wanted), resources) == device


@pytest.mark.parametrize(
    ("fields", "device", "each", "total"),
    [
        ({"workers": 3}, "cpu", {"CPU": 1.0}, (3, 0, 4)),
        ({"workers": 3}, "cuda", {"CPU": 0.0, "GPU": 1.0}, (3, 3, 1)),
        ({"workers": 2, "cpus_per_worker": 4}, "cuda", {"CPU": 4.0, "GPU": 1.0}, (2, 2, 9)),
        ({"workers": 2, "cpus_per_worker": 2}, "cpu", {"CPU": 2.0}, (2, 0, 5)),
    ],
)
def test_workers_leave_a_cpu_to_data(fields: dict[str, int], device: str, each: dict[str, float], total: tuple[int, int, int]) -> None:
    parallel = Parallel(**fields)
    need = need_of(parallel, device)
    assert worker_resources(parallel, device) == each
    assert (need.workers, need.gpus, need.cpus) == total


def test_a_run_that_just_fits_is_placed() -> None:
    check_cluster(need_of(Parallel(workers=4), "cuda"), {"CPU": 1.0, "GPU": 4.0})
    check_cluster(need_of(Parallel(workers=3), "cpu"), {"CPU": 4.0})


@pytest.mark.parametrize(
    ("fields", "device", "resources", "sentence"),
    [
        ({"workers": 8}, "cuda", ONE_NODE, r"parallel.workers = 8: needs 8 GPUs, the cluster has 4. Set parallel.workers = 4, .*"),
        ({"workers": 1}, "cuda", {"CPU": 4.0}, r"parallel.workers = 1: needs 1 GPU, the cluster has 0. Set parallel.device = cpu, .*"),
        ({"workers": 4}, "cpu", {"CPU": 4.0}, r"parallel.workers = 4: needs 5 CPUs, 1 of them for Ray Data, the cluster has 4. .*"),
        ({"workers": 4, "cpus_per_worker": 4}, "cuda", ONE_NODE, r"parallel.workers = 4: needs 17 CPUs, .* has 16. .*cpus_per_worker.*"),
    ],
)
def test_a_shortfall_is_a_sentence(fields: dict[str, int], device: str, resources: dict[str, float], sentence: str) -> None:
    with pytest.raises(ResourceError, match=sentence) as caught:
        check_cluster(need_of(Parallel(**fields), device), resources)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("rows", "per_step", "epochs", "max_steps", "steps"),
    [
        (100, 10, 1.0, None, 10),
        (101, 10, 1.0, None, 11),
        (100, 10, 1.1, None, 11),
        (1000, 10, 0.1, None, 10),
        (3, 8, 1.0, None, 1),
        (100, 10, 3.0, 7, 7),
    ],
)
def test_steps(rows: int, per_step: int, epochs: float, max_steps: int | None, steps: int) -> None:
    assert derive_steps(rows, per_step, epochs, max_steps) == steps


@given(st.integers(1, 10**9), st.integers(1, 4096), st.integers(1, 500))
def test_steps_hold_all_rows_and_not_one_step_more(rows: int, per_step: int, hundredths: int) -> None:
    steps = derive_steps(rows, per_step, hundredths / 100, None)
    assert 100 * steps * per_step >= hundredths * rows > 100 * (steps - 1) * per_step


@pytest.mark.parametrize(("address", "cores", "cpus"), [("10.0.0.1:6379", 2, None), (None, 2, 4), (None, 32, 32)])
def test_ray_is_joined_bare_and_started_with_enough_cpus(
    address: str | None, cores: int, cpus: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    placement.start_ray()
    if cpus is None:
        assert calls == [{}]
    else:
        assert calls[0]["address"] == "local"
        assert calls[0]["num_cpus"] == cpus
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    placement.start_ray()
    assert len(calls) == 1


def test_a_plan_without_a_cluster_sees_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert placement.resources_in_reach()["CPU"] == 4.0
