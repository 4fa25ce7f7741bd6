"""The command line: what it imports, what it calls, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rayft
from rayft.cli import main
from rayft.config.load import load
from rayft.errors import ConfigError, DataError, InfrastructureError, RayftError, ResourceError, TrainingError

HEAVY = {"torch", "ray", "vllm", "transformers", "peft", "datasets", "pandas", "pydantic", "pyarrow", "numpy", "yaml"}
COMMANDS = ["train", "preprocess", "evaluate", "generate", "export", "validate", "plan", "config-schema", "check"]
RUN = "method: sft\nrun: {name: first}\nmodel: {path: tiny}\ndata: {train: {gsm8k: {path: gsm8k.jsonl}}}\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    return "run.yaml"


@pytest.fixture(autouse=True)
def _environment_and_imports_are_undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before, path = dict(os.environ), list(sys.path)
    yield
    os.environ.clear()
    os.environ.update(before)
    sys.path[:] = path


class Calls:
    """Stands in for a module of functions: records each call, and raises what it was told to."""

    def __init__(self, raises: BaseException | None = None) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.raises = raises

    def function(self, name: str) -> Any:
        def call(*args: Any) -> None:
            self.made.append((name, *args))
            if self.raises is not None:
                raise self.raises

        return call

    def install(self, monkeypatch: pytest.MonkeyPatch, module: str, *names: str) -> Calls:
        fake = types.ModuleType(module)
        vars(fake).update({name: self.function(name) for name in names})
        monkeypatch.setitem(sys.modules, module, fake)
        return self


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls().install(monkeypatch, "rayft.commands", "preprocess", "evaluate", "generate", "export", "plan", "check")


def rayft_process(*args: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(Path(rayft.__file__).parents[1])}
    command = [sys.executable, *args]
    return subprocess.run(command, env=environ, text=True, stdout=stdout, stderr=subprocess.PIPE, timeout=60, check=False)


@pytest.mark.parametrize("argument", ["--help", "--version", "train --help"])
def test_help_imports_nothing_heavy(argument: str) -> None:
    start = time.perf_counter()
    done = rayft_process("-X", "importtime", "-m", "rayft", *argument.split())
    print(f"rayft {argument}: {time.perf_counter() - start:.2f} s with the interpreter's start")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0
    assert "argparse" in imported
    assert imported & HEAVY == set()


def test_help_lists_every_command_and_each_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--help"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert f"example:\n  rayft {' '.join(arguments)}" in text
        assert all(len(line) <= 140 for line in text.splitlines())
        if not arguments:
            assert all(f"    {name}" in text for name in COMMANDS)


def test_commands_get_the_run_and_their_options(config: str, commands: Calls) -> None:
    cfg = load([Path(config)], ["optim.lr=1e-3"])
    for arguments in (
        "preprocess run.yaml optim.lr=1e-3",
        "preprocess run.yaml --local optim.lr=1e-3",
        "evaluate --local run.yaml optim.lr=1e-3 --model out",
        "generate run.yaml optim.lr=1e-3 --prompt hello",
        "generate run.yaml --prompt hello --max-tokens 5 --temperature 0.5 --model out optim.lr=1e-3",
        "export run.yaml optim.lr=1e-3",
        "export run.yaml optim.lr=1e-3 --step 7 --out here --merge",
        "export run.yaml optim.lr=1e-3 --best",
        "plan run.yaml optim.lr=1e-3",
        "check a/model",
        "check a/model --adapter-targets all-linear --seq-len 64",
    ):
        assert main(arguments.split()) == 0, arguments
    assert commands.made == [
        ("preprocess", cfg, False),
        ("preprocess", cfg, True),
        ("evaluate", cfg, "out", True),
        ("generate", cfg, "hello", None, 128, 0.0),
        ("generate", cfg, "hello", "out", 5, 0.5),
        ("export", cfg, None, None, False, False),
        ("export", cfg, 7, "here", True, False),
        ("export", cfg, None, None, False, True),
        ("plan", cfg),
        ("check", "a/model", None, 2048),
        ("check", "a/model", "all-linear", 64),
    ]


@pytest.mark.parametrize("local", [[], ["--local"]])
def test_train_calls_the_recipe_of_the_method(config: str, monkeypatch: pytest.MonkeyPatch, local: list[str]) -> None:
    calls = Calls().install(monkeypatch, "rayft.recipes.sft", "main")
    assert main(["train", config, *local]) == 0
    assert calls.made == [("main", load([Path(config)], []), bool(local))]


def test_train_takes_a_users_own_driver(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("def main(cfg, local):\n    print(cfg.run.name, local)\n")
    assert main(["train", config, "--recipe", "mine.py", "run.name=other"]) == 0
    assert capsys.readouterr().out == "other False\n"
    assert main(["train", config, "--recipe", "none.py"]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_the_process_is_prepared_before_a_command_runs(config: str, commands: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    main(["plan", config])
    assert (os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["VLLM_NO_USAGE_STATS"]) == ("0", "1")


def test_files_and_overrides_are_told_apart(config: str, tmp_path: Path, commands: Calls) -> None:
    (tmp_path / "a=b").mkdir()
    (tmp_path / "a=b" / "more.yaml").write_text("optim: {lr: 1}\n")
    assert main(["plan", config, "./a=b/more.yaml", "run.dir=x=y/z.yaml", "model.chat_template='{{ a }}\n\n'"]) == 0
    ((_, cfg),) = commands.made
    assert (cfg.optim.lr, cfg.run.dir, cfg.model.chat_template) == (1.0, "x=y/z.yaml", "{{ a }}\n")


def test_validate_prints_one_line_and_imports_user_functions(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hooks.py").write_text("def on_step(event, state):\n    pass\n")
    assert main(["validate", config, "run.callbacks=[./hooks.py:on_step]"]) == 0
    assert capsys.readouterr().out == "first: a valid sft run of tiny on gsm8k\n"
    assert main(["validate", config, "run.callbacks=[./hooks.py:on_end]"]) == 2
    assert "hooks.py does not define on_end" in capsys.readouterr().err


def test_config_schema_prints_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config-schema", "--field", "optim.lr"]) == 0
    assert capsys.readouterr().out == "# Highest learning rate. (a finite number > 0)\nlr: 1.0e-05\n"
    assert main(["config-schema", "--field", "optim.lr", "--format", "json"]) == 0
    assert capsys.readouterr().out.startswith("{")


@pytest.mark.parametrize("error", [ConfigError, DataError, ResourceError, TrainingError, InfrastructureError])
def test_an_error_is_a_sentence_and_an_exit_code(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[RayftError]
) -> None:
    Calls(error("field", 3, "must be even", "Add one")).install(monkeypatch, "rayft.commands", "plan")
    assert main(["plan", config]) == error.exit_code
    assert capsys.readouterr() == ("", f"error ({error.kind}): field = 3: must be even. Add one.\n")
    assert main(["plan", config, "--debug"]) == error.exit_code
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith(f"error ({error.kind}): field = 3: must be even. Add one.\n")


def test_an_interrupt_is_130_and_an_unexplained_error_propagates(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Calls(KeyboardInterrupt()).install(monkeypatch, "rayft.commands", "plan")
    assert main(["plan", config]) == 130
    Calls(ZeroDivisionError()).install(monkeypatch, "rayft.commands", "plan")
    with pytest.raises(ZeroDivisionError):
        main(["plan", config])


def test_a_broken_socket_is_not_taken_for_a_reader_that_left(config: str) -> None:
    program = "import sys, types\nfrom rayft.cli import main\nsys.modules['rayft.commands'] = m = types.ModuleType('m')\n"
    program += "def plan(cfg):\n    raise BrokenPipeError('a peer left')\nm.plan = plan\nmain(['plan', 'run.yaml'])"
    assert "BrokenPipeError: a peer left" in rayft_process("-c", program).stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """As in `rayft config-schema | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = rayft_process("-m", "rayft", "config-schema", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    "arguments", [["plan", "run.yaml", "--loca"], ["check", "a", "b"], ["trian", "run.yaml"], ["generate", "run.yaml"], []]
)
def test_unknown_arguments_are_refused(config: str, commands: Calls, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: rayft" in capsys.readouterr().err
    assert commands.made == []
