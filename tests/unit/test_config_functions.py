"""User functions by file and by module, on the driver and on a worker that does not see the files."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import rayft
from rayft.config.functions import UserFunction, load_function, resolve
from rayft.errors import ConfigError

HOOK = "import neighbour_of_hook\n\ndef fire(event):\n    return event + neighbour_of_hook.SUFFIX\n\nlimit = 3\n"


@pytest.fixture(autouse=True)
def _imports_are_undone() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the command starts, with a hook file in a folder of its own and a package."""
    for name, text in {
        "hooks/my hook.py": HOOK,
        "hooks/neighbour_of_hook.py": "SUFFIX = '!'\n",
        "userpkg/__init__.py": "",
        "userpkg/inner/__init__.py": "def top(x):\n    return -x\n",
        "userpkg/inner/rewards.py": "from userpkg.inner import top\n\ndef score(x):\n    return top(x) * 2\n",
        "userpkg/alone.py": "def score(x):\n    return x * 3\n",
        "broken.py": "raise RuntimeError('no licence')\n",
        "half.py": "import a_package_nobody_has\n",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sentence(spec: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_function(resolve(spec))
    return str(caught.value)


def test_a_file_carries_its_source_hash_and_folder(project: Path) -> None:
    function = resolve("./hooks/my hook.py:fire")
    assert function.file == str(project / "hooks" / "my hook.py")
    assert function.folder == str(project / "hooks")
    assert function.source == HOOK
    assert function.sha256 == hashlib.sha256(HOOK.encode()).hexdigest()
    assert load_function(pickle.loads(pickle.dumps(function)))("step") == "step!"


def test_resolving_a_file_does_not_run_it(project: Path) -> None:
    assert resolve("./broken.py:fire").attribute == "fire"


def test_what_was_hashed_is_what_runs(project: Path) -> None:
    function = resolve("hooks/my hook.py:fire")
    Path(function.file).write_text("def fire(event):\n    return 'another'\n")
    assert load_function(function)("step") == "step!"
    assert load_function(resolve("hooks/my hook.py:fire"))("step") == "another"


def test_a_file_runs_once_and_shadows_no_module(project: Path) -> None:
    (project / "random.py").write_text("def fire(event):\n    return event\n")
    function = resolve("./random.py:fire")
    assert load_function(function) is load_function(function)
    assert "rayft_user_" in load_function(function).__module__


@pytest.mark.parametrize(("spec", "result"), [("userpkg.inner:top", -5), ("userpkg.inner.rewards:score", -10), ("userpkg.alone:score", 15)])
def test_a_module_is_found_in_the_current_folder(project: Path, spec: str, result: int) -> None:
    function = resolve(spec)
    assert function.folder == str(project)
    assert load_function(function)(5) == result


def test_an_installed_module_needs_no_folder() -> None:
    assert resolve("textwrap:dedent").folder is None
    assert resolve("yaml.nodes:ScalarNode").folder is None
    assert load_function(resolve("textwrap:dedent"))("  a") == "a"


WORKER = """
import pickle, sys
from rayft.config.functions import load_function
print(load_function(pickle.loads(bytes.fromhex(sys.argv[1])))(5))
"""


def on_a_worker(function: UserFunction, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Loads and calls the function in a fresh process that starts in another folder."""
    command = [sys.executable, "-c", WORKER, pickle.dumps(function).hex()]
    environ = {**os.environ, "PYTHONPATH": str(Path(rayft.__file__).parents[1])}
    return subprocess.run(command, cwd=cwd, env=environ, text=True, capture_output=True, check=False)


@pytest.mark.parametrize("spec", ["./userpkg/alone.py:score", "userpkg.alone:score"])
@pytest.mark.parametrize("visible", [True, False])
def test_a_worker_loads_it_where_the_path_is_absent_too(
    project: Path, tmp_path_factory: pytest.TempPathFactory, spec: str, visible: bool
) -> None:
    function = resolve(spec)
    if not visible:
        project.rename(project.with_name(f"{project.name}-away"))
    done = on_a_worker(function, tmp_path_factory.mktemp("elsewhere"))
    assert (done.stdout, done.stderr) == ("15\n", "")


def test_a_module_that_differs_on_the_worker_is_refused(project: Path) -> None:
    function = replace(resolve("userpkg.alone:score"), sha256="0" * 64)
    with pytest.raises(ConfigError, match=r"alone\.py differs from the source that this command started with"):
        load_function(function)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "./none.py:fire",
            "user function = './none.py:fire': there is no file {cwd}/none.py. Give its path from the folder where the command starts.",
        ),
        (
            "hooks:",
            "user function = 'hooks:': must read module:function or ./file.py:function. Name one function, such as ./hooks.py:on_step.",
        ),
        ("hooks.py", "must read module:function"),
        ("a-b:fire", "must read module:function"),
        ("a:b.c", "must read module:function"),
        ("./userpkg/alone.py:fire", "{cwd}/userpkg/alone.py does not define fire. Give the name of a function that is defined there."),
        ("userpkg.alone:fire", "{cwd}/userpkg/alone.py does not define fire."),
        ("./hooks/my hook.py:limit", "is of type int, which cannot be called. Name a function."),
        ("nowhere_at_all:fire", "there is no module nowhere_at_all here or among the installed ones. Name a file as ./file.py:function."),
        ("userpkg.nothing:fire", "there is no module userpkg.nothing here"),
        ("nowhere_at_all.deep:fire", "importing nowhere_at_all.deep raised ModuleNotFoundError: No module named 'nowhere_at_all'."),
        ("sys:exit", "the module sys has no Python source. Wrap the function in a .py file of your own."),
        ("./broken.py:fire", "importing {cwd}/broken.py raised RuntimeError: no licence. Make it import on its own first."),
        ("broken:fire", "importing broken raised RuntimeError: no licence."),
        ("half:fire", "importing half raised ModuleNotFoundError: No module named 'a_package_nobody_has'."),
        ("./half.py:fire", "raised ModuleNotFoundError: No module named 'a_package_nobody_has'."),
    ],
)
def test_refusals_are_sentences(project: Path, spec: str, message: str) -> None:
    assert message.replace("{cwd}", str(project)) in sentence(spec)


def test_a_file_that_failed_can_be_tried_again(project: Path) -> None:
    assert "RuntimeError" in sentence("./broken.py:fire")
    assert "RuntimeError" in sentence("./broken.py:fire")
