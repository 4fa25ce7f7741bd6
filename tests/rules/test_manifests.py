"""Cluster files and shipped configurations: they parse, agree with each other, and start runs that the schema accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayft.config.load import load
from rules.source_tree import ROOT

MANIFESTS = sorted((ROOT / "cluster").rglob("*.yaml"))
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}
"""The CRD takes any text here; KubeRay then refuses what is not one of these."""
Manifest = dict[str, Any]


def parse(file: Path) -> Manifest:
    """The only document of a file."""
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def entrypoint_problem(entrypoint: str) -> str | None:
    """Why an entrypoint would not start; None when its command, configuration and overrides are fine."""
    command, *rest = shlex.split(entrypoint)
    if (command, rest[0]) != ("rayft", "train"):
        return f"begins with {command} {rest[0]}"
    if not (ROOT / rest[1]).is_file():
        return f"{rest[1]} does not exist"
    load([ROOT / rest[1]], rest[2:])
    return None


def rayjob_problems(manifest: Manifest) -> list[str]:
    """What is wrong with a RayJob beyond what its CRD can tell."""
    spec = manifest["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    problems = [] if spec["submissionMode"] in SUBMISSION_MODES else [f"submissionMode {spec['submissionMode']}"]
    problems += [f"{c['name']}: limits differ from requests" for c in containers if c["resources"]["limits"] != c["resources"]["requests"]]
    problems += [f"{c['name']}: another image" for c in containers if c["image"] != containers[0]["image"]]
    if "run.name=" not in spec["entrypoint"]:
        problems.append("without a fixed run.name a retry would not resume")
    stop = next(float(env["value"]) for env in containers[0]["env"] if env["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
    if any(group["template"]["spec"]["terminationGracePeriodSeconds"] < stop for group in groups):
        problems.append("pods are killed before Ray's own wait is over")
    return problems


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_manifest_starts_a_run(file: Path) -> None:
    manifest = parse(file)
    if "entrypoint" in (job := manifest.get("spec", manifest)):
        assert entrypoint_problem(job["entrypoint"]) is None
    if manifest.get("kind") == "RayJob":
        assert rayjob_problems(manifest) == []


def test_versions_agree() -> None:
    ours = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    rays = re.findall(r"^ARG BASE=rayproject/ray:([\d.]+)-", (ROOT / "cluster/image/Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(ours) == len(rays) == 1
    for file in MANIFESTS:
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r'rayVersion: "(.+)"', text)) <= set(rays)
        assert set(re.findall(r"rayft:([\d.]+)", text)) <= set(ours)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_shipped_configuration_is_a_run(file: Path) -> None:
    cfg = load([file], [])
    assert (ROOT / "recipes" / f"{cfg.method}.py").is_file()


def test_configuration_of_the_readme_is_a_run(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.+?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my.yaml").write_text(block, encoding="utf-8")
    load([tmp_path / "my.yaml"], ["run.name=my-lora", "adapter.type=lora", "export.merge=true"])


def test_shipped_configurations_have_names_of_their_own() -> None:
    names = [load([file], []).run.name for file in CONFIGS]
    assert len(set(names)) == len(names) > 0, "two configurations would resume each other's run"


def test_the_rules_can_fail() -> None:
    assert entrypoint_problem("python train.py") == "begins with python train.py"
    assert entrypoint_problem("rayft train missing.yaml") == "missing.yaml does not exist"
    good = parse(ROOT / "cluster/kuberay/rayjob-sft.yaml")
    good["spec"]["submissionMode"] = "K8sJob"
    good["spec"]["entrypoint"] = "rayft train recipes/configs/qwen3/0.6b_sft.yaml"
    head = good["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    head["terminationGracePeriodSeconds"] = 30
    head["containers"][0]["resources"]["limits"]["memory"] = "8Gi"
    assert [problem.split()[0] for problem in rayjob_problems(good)] == ["submissionMode", "ray-head:", "without", "pods"]
