"""Environment variables: the opt-out, what workers get, and whether there is a cluster to join."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from rayft.config.environment import OPTED_OUT, credentials, in_ray_job, opt_out, prepare_process, worker_environment
from rayft.errors import ConfigError


@pytest.mark.parametrize("name", ["DO_NOT_TRACK", "RAYFT_DO_NOT_TRACK"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", True),
        ("true", True),
        (" TRUE\n", True),
        ("True", True),
        ("0", False),
        ("", False),
        ("yes", False),
        ("11", False),
        ("false", False),
    ],
)
def test_opt_out(name: str, value: str, expected: bool) -> None:
    assert opt_out({name: value}) is expected
    assert (worker_environment({name: value}).items() >= OPTED_OUT.items()) is expected


def test_one_of_the_two_is_enough() -> None:
    assert opt_out({"DO_NOT_TRACK": "0", "RAYFT_DO_NOT_TRACK": "1"})
    assert not opt_out({})


def test_workers_get_the_cache_folders_made_absolute_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"HF_HOME": "cache", "HF_HUB_CACHE": "/hub", "HF_HUB_OFFLINE": "1", "HF_TOKEN": "secret", "HOME": "/h", "PATH": "/bin"}
    assert worker_environment(environ) == {
        "HF_HOME": f"{tmp_path}/cache",
        "HF_HUB_CACHE": "/hub",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    assert worker_environment({"HF_HOME": ""}) == {"TOKENIZERS_PARALLELISM": "false"}


def test_preparing_a_process_keeps_what_the_user_set() -> None:
    environ = {"DO_NOT_TRACK": "true", "RAY_DEDUP_LOGS": "1", "RAY_USAGE_STATS_ENABLED": "1", "TOKENIZERS_PARALLELISM": "true"}
    prepare_process(environ)
    assert environ == {
        **OPTED_OUT,
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_DEDUP_LOGS": "1",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


def test_the_libraries_read_the_opt_out() -> None:
    """Ray and the Hugging Face hub themselves say that they are switched off; ray also that its print patch is."""
    probe = """
import os
from rayft.config.environment import prepare_process
prepare_process(os.environ)
from ray._common.usage import usage_lib
from ray.train.v2._internal import constants
from ray._private import ray_constants
from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY
assert not usage_lib.usage_stats_enabled() and HF_HUB_DISABLE_TELEMETRY
assert os.environ[constants.ENABLE_PRINT_PATCH_ENV_VAR] == "0"
assert not ray_constants.RAY_DEDUP_LOGS and not ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
"""
    environ = {name: value for name, value in os.environ.items() if name not in OPTED_OUT and not name.startswith("RAY_")}
    subprocess.run([sys.executable, "-c", probe], env={**environ, "RAYFT_DO_NOT_TRACK": "True"}, check=True, timeout=120)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"RAY_ADDRESS": ""}, False),
        ({"RAY_ADDRESS": "local"}, False),
        ({"RAY_ADDRESS": "auto"}, True),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, True),
        ({"RAY_ADDRESS": "ray://head:10001"}, True),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, True),
        ({"RAY_JOB_ID": "01000000"}, True),
        ({"RAY_JOB_ID": "", "RAY_DEDUP_LOGS": "1"}, False),
    ],
)
def test_a_cluster_is_joined_when_the_environment_names_one(environ: dict[str, str], expected: bool) -> None:
    assert in_ray_job(environ) is expected


def test_the_address_of_the_job_server_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS = 'http://head:8265': is the address of Ray's job server"):
        in_ray_job({"RAY_ADDRESS": "http://head:8265"})


def test_secrets_travel_as_arguments_and_show_in_no_text() -> None:
    environ = {"AWS_SECRET_ACCESS_KEY": "hidden", "AWS_ENDPOINT_URL": "http://store", "HF_TOKEN": "hidden too", "PATH": "/bin"}
    assert worker_environment(environ)["AWS_ENDPOINT_URL"] == "http://store"
    assert not {"hidden", "hidden too"} & set(worker_environment(environ).values())
    found = credentials(environ=environ)
    assert "hidden" not in repr(found) and pickle.loads(pickle.dumps(found)) == found
    there = {"HF_TOKEN": "the node's own"}
    found.adopt(there)
    assert there == {"AWS_SECRET_ACCESS_KEY": "hidden", "HF_TOKEN": "the node's own"}


def test_named_variables_are_forwarded_over_those_of_the_worker_and_shown_nowhere() -> None:
    secrets = credentials({"WANDB_API_KEY": "secret", "HF_TOKEN": "token", "OTHER": "x"}, ["WANDB_API_KEY"])
    worker = {"WANDB_API_KEY": "old", "HF_TOKEN": "own"}
    secrets.adopt(worker)
    assert worker == {"WANDB_API_KEY": "secret", "HF_TOKEN": "own"}
    assert "secret" not in repr(secrets) and "token" not in repr(secrets)
    with pytest.raises(ConfigError, match="is not set where the command runs"):
        credentials({}, ["MISSING"])
