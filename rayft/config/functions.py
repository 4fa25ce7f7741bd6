"""User functions by name: `module:function` or `./file.py:function`, found on the driver and loadable on every worker."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rayft.errors import ConfigError

SPEC = re.compile(r"(?P<file>.+\.py):(?P<function>[^\W\d]\w*)|(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<attribute>[^\W\d]\w*)")
FORM = "must read module:function or ./file.py:function"
FIELD = "user function"
FILE_MODULE = "rayft_user_"
"""How the module of a user's file is named: this, a digest and the file's name."""


@dataclass(frozen=True)
class UserFunction:
    """A function outside rayft, with all that a worker on another machine needs to load the very same code.

    Attributes:
        spec: the name as the user wrote it.
        module: name that the code has in `sys.modules`.
        file: absolute path of the source on the driver.
        is_file: named by its file rather than by its module.
        attribute: name of the function in the module.
        sha256: of the source, in hex; part of the resolved run.
        source: the text itself, for a worker that does not see the file.
        folder: absolute folder to put on `sys.path`, and to ship when the function imports its neighbours; None for a
            module that is installed, which workers must have too.
    """

    spec: str
    module: str
    file: str
    is_file: bool
    attribute: str
    sha256: str
    source: str
    folder: str | None


def resolve(spec: str) -> UserFunction:
    """Finds the source of a user function, without running it (a module's parent packages are imported).

    Relative files and top-level modules are looked for in the current folder first.

    Raises:
        ConfigError: the name is malformed, or there is no such file or module.
    """
    match = SPEC.fullmatch(spec)
    if match is None:
        raise ConfigError(FIELD, spec, FORM, "Name one function, such as ./hooks.py:on_step")
    if match["file"]:
        file = Path(match["file"]).expanduser().absolute()
        if not file.is_file():
            raise ConfigError(FIELD, spec, f"there is no file {file}", "Give its path from the folder where the command starts")
        return _describe(spec, None, file, match["function"], str(file.parent))
    file = _module_file(spec, match["module"])
    root = file.parents[match["module"].count(".") + (file.name == "__init__.py")]
    installed = root.name in ("site-packages", "dist-packages") or str(root) == sysconfig.get_path("stdlib")
    return _describe(spec, match["module"], file, match["attribute"], None if installed else str(root))


def load_function(function: UserFunction) -> Callable[..., Any]:
    """The function itself, on the driver or on a worker.

    A file runs from the carried source, so what was hashed is what runs. A module is imported where it is found, and
    must then have the source that the driver saw; where it is not found it runs from the carried source too.

    Raises:
        ConfigError: its code cannot be run, differs from the driver's, or does not define the function.
    """
    if function.folder is not None:
        _put_on_path(function.folder)
    loaded = getattr(_module(function), function.attribute, None)
    if loaded is None:
        rule = f"{function.file} does not define {function.attribute}"
        raise ConfigError(FIELD, function.spec, rule, "Give the name of a function that is defined there")
    if not callable(loaded):
        raise ConfigError(FIELD, function.spec, f"is of type {type(loaded).__name__}, which cannot be called", "Name a function")
    return loaded  # type: ignore[no-any-return]


def _describe(spec: str, module: str | None, file: Path, attribute: str, folder: str | None) -> UserFunction:
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    # A file gets a name of its own, so that ./random.py shadows nothing and two files of one name can live together.
    name = module or f"{FILE_MODULE}{digest[:12]}_{re.sub(r'[^0-9A-Za-z]', '_', file.stem)}"
    source = importlib.util.decode_source(content)
    return UserFunction(spec, name, str(file), module is None, attribute, digest, source, folder)


def _module_file(spec: str, module: str) -> Path:
    """The source file of a module, with the current folder on the path."""
    _put_on_path(str(Path.cwd()))
    try:
        found = importlib.util.find_spec(module)
    except Exception as error:  # a parent package is the user's code and may raise anything
        raise _cannot_run(spec, module, error) from error
    if found is None:
        raise ConfigError(FIELD, spec, f"there is no module {module} here or among the installed ones", "Name a file as ./file.py:function")
    if found.origin is None or not found.origin.endswith(".py"):
        raise ConfigError(FIELD, spec, f"the module {module} has no Python source", "Wrap the function in a .py file of your own")
    return Path(found.origin).absolute()


def _module(function: UserFunction) -> ModuleType:
    """The module that defines the function, run at most once per process."""
    if function.is_file:
        return sys.modules.get(function.module) or _run_source(function)
    try:
        module = importlib.import_module(function.module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{function.module}.".startswith(f"{error.name}."):
            raise _cannot_run(function.spec, function.module, error) from error
        return _run_source(function)
    except Exception as error:  # the user's code may raise anything
        raise _cannot_run(function.spec, function.module, error) from error
    if module.__file__ is not None and hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest() != function.sha256:
        rule = f"{module.__file__} differs from the source that this command started with"
        raise ConfigError(FIELD, function.spec, rule, "Install the same version on every machine, or name it as ./file.py:function")
    return module


def _run_source(function: UserFunction) -> ModuleType:
    module = ModuleType(function.module)
    module.__file__ = function.file
    sys.modules[function.module] = module
    try:
        exec(compile(function.source, function.file, "exec"), module.__dict__)
    except Exception as error:  # the user's code may raise anything
        del sys.modules[function.module]
        raise _cannot_run(function.spec, function.file, error) from error
    return module


def _put_on_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _cannot_run(spec: str, name: str, error: Exception) -> ConfigError:
    return ConfigError(FIELD, spec, f"importing {name} raised {type(error).__name__}: {error}", "Make it import on its own first")
