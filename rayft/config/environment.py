"""Environment variables: the one place that reads them, and the ones that every process of a run gets."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, field

from rayft.errors import ConfigError

OPTED_OUT = {
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray does not read DO_NOT_TRACK
    "VLLM_NO_USAGE_STATS": "1",  # vLLM takes "1" only, so DO_NOT_TRACK=true would not reach it
}
FORWARDED = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_CA_BUNDLE",
)
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
"""What processes get as an argument: Ray writes the variables of a runtime environment into its logs."""
FOLDERS = ("HF_HOME", "HF_HUB_CACHE")


def opt_out(environ: Mapping[str, str] = os.environ) -> bool:
    """True when the user asks not to be tracked: DO_NOT_TRACK or RAYFT_DO_NOT_TRACK is 1 or true, in any case, spaces aside.

    rayft itself reports nothing to anyone; the answer is passed on to the libraries that do.
    """
    return any(environ.get(name, "").strip().lower() in ("1", "true") for name in ("DO_NOT_TRACK", "RAYFT_DO_NOT_TRACK"))


def worker_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for every process of the run, for the `env_vars` of a Ray runtime environment. Holds no secrets.

    Folders are made absolute, because Ray starts workers in a folder of their own.
    """
    chosen = {name: environ[name] for name in FORWARDED if environ.get(name)}
    chosen |= {name: os.path.abspath(os.path.expanduser(chosen[name])) for name in FOLDERS if name in chosen}
    return chosen | {"TOKENIZERS_PARALLELISM": "false"} | (OPTED_OUT if opt_out(environ) else {})


@dataclass(frozen=True)
class Credentials:
    """Secrets on their way to another process; they are in no text that shows this object."""

    values: Mapping[str, str] = field(repr=False)
    forwarded: Mapping[str, str] = field(repr=False, default_factory=dict)

    def adopt(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Set those that this process does not have from its own machine, and all that env.forward names."""
        for name, value in self.values.items():
            environ.setdefault(name, value)
        environ.update(self.forwarded)


def credentials(environ: Mapping[str, str] = os.environ, forward: Collection[str] = ()) -> Credentials:
    """The secrets of this process that stores and the hub need, and the variables that env.forward names.

    Raises:
        ConfigError: one of these is not set.
    """
    for name in forward:
        if name not in environ:
            raise ConfigError("env.forward", name, "is not set where the command runs", "Set it, or take it out of the list")
    kept = {name: environ[name] for name in CREDENTIALS if environ.get(name)}
    return Credentials(kept, {name: environ[name] for name in forward})


def prepare_process(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets up this process; to be called before ray is imported, which reads its variables once, on import."""
    environ.update(worker_environment(environ))
    environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # with the patch a worker's print shows twice on the driver
    environ.setdefault("RAY_DEDUP_LOGS", "0")  # lines that differ only in their numbers are held back as repetitions
    environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under `uv run`, every worker would resolve the environment again


def in_ray_job(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment names a cluster to join, so that Ray must be started bare, without resources or runtime_env.

    RAY_ADDRESS is set for the entrypoint of `ray job submit`, in KubeRay pods and by users; RAY_JOB_CONFIG_JSON_ENV_VAR for
    an entrypoint; RAY_JOB_ID in Ray's own workers, such as a Tune trial.

    Raises:
        ConfigError: RAY_ADDRESS is the address of the job server, which only takes submissions.
    """
    address = environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        rule = "is the address of Ray's job server, which a driver cannot join"
        raise ConfigError("RAY_ADDRESS", address, rule, "Submit with `ray job submit -- rayft train ...`, pass --local, or unset it")
    submitted = any(environ.get(name) for name in ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_ID"))
    return submitted or address not in ("", "local")
