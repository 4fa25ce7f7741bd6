"""What a wheel holds and needs: every package is in it, and every library that is imported is declared."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from unittest import mock

from rules.source_tree import ROOT, imports, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTION_OF = {
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "math_verify": "math-verify",
    "reasoning_gym": "reasoning-gym",
    "mlflow": "mlflow-skinny",
}
"""Import name -> distribution, where they differ."""
NOT_IMPORTED = {
    "s3fs": "fsspec loads it for s3://",
    "tensorboard": "torch.utils.tensorboard loads it",
    "trl": "for users' own formats and drivers",
}
"""Dependencies that no line imports, with the reason why they are there all the same."""
OWN = {"rayft", "rayft_kernels", "bench", "hub"}
WITH_TORCH = {"triton"}
"""Libraries that come with torch where they are of use."""


def declared(*groups: list[str]) -> set[str]:
    """Names of the distributions in lists of requirements."""
    return {re.split(r"[\[<>=;\s]", requirement, maxsplit=1)[0].lower() for group in groups for requirement in group}


def test_libraries_are_declared_if_and_only_if_they_are_imported() -> None:
    imported = {module.split(".")[0] for source in sources() for _, module in imports(source)}
    needed = {DISTRIBUTION_OF.get(name, name) for name in imported - set(sys.stdlib_module_names) - OWN - WITH_TORCH}
    always = declared(PROJECT["dependencies"])
    extras = declared(*(PROJECT["optional-dependencies"][name] for name in ("rollout", "optim8bit", "rewards", "trackers")))
    assert needed - extras == always - NOT_IMPORTED.keys()
    assert extras <= needed | NOT_IMPORTED.keys()


def test_every_folder_with_code_is_a_package_of_the_wheel() -> None:
    with mock.patch("setuptools.setup") as setup, mock.patch("os.getcwd", return_value=str(ROOT)):
        runpy.run_path(str(ROOT / "setup.py"))
    packages = set(setup.call_args.kwargs["packages"])
    folders = {source.path.rsplit("/", 1)[0] for source in sources("rayft", "recipes", "kernels/rayft_kernels")}
    expected = {folder.removeprefix("kernels/").replace("/", ".").replace("recipes", "rayft.recipes") for folder in folders}
    assert packages == expected


def test_the_exact_torch_stays_open() -> None:
    """A pinned torch would replace the one that a user has, with its driver's CUDA."""
    torch = [requirement for requirement in PROJECT["dependencies"] if requirement.startswith("torch")]
    assert torch == ["torch>=2.11"]
