"""Where answers with an environment are played: what of the run describes it, found on the driver, and loaded where engines are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rayft.config.functions import UserFunction, load_function, resolve
from rayft.config.schema import Environment as Section
from rayft.config.schema import GrpoRun
from rayft.errors import ConfigError
from rayft.models.tokenizer import load_tokenizer
from rayft.rollout.dialogue import Dialogue
from rayft.rollout.env import Environment, MakeEnvironment

READY = {"tools": "rayft.rollout.environments.tools:Tools", "openenv": "rayft.rollout.environments.openenv:OpenEnv"}
"""Where an environment is that is named without a colon."""
READY_TOOLS = "rayft.rollout.environments."
"""Where tools come with rayft. The module of one that not every machine can run has a function `check`, which refuses."""


@dataclass(frozen=True)
class Scene:
    """An environment as the run names it, with the code that a worker needs; picklable.

    Attributes:
        section: of the run.
        function: makes environments.
        tools: functions that it is given.
    """

    section: Section
    function: UserFunction
    tools: tuple[UserFunction, ...]


def scene_of(cfg: GrpoRun) -> Scene | None:
    """The run's environment, found but not loaded; None without one.

    Raises:
        ConfigError: a function does not exist.
    """
    named = cfg.environment.function
    if named is None:
        return None
    return Scene(cfg.environment, resolve(READY.get(named, named)), tuple(map(resolve, cfg.environment.tools)))


def maker_of(scene: Scene) -> tuple[MakeEnvironment, list[dict[str, Any]] | None]:
    """What makes environments, after it has made one, and the schemas of the tools that environments have.

    Raises:
        ConfigError: a function cannot be loaded, what it makes is no environment, or a tool cannot run on this machine.
    """
    arguments: dict[str, Any] = dict(scene.section.arguments)
    if scene.tools:
        arguments["tools"] = [load_function(tool) for tool in scene.tools]
        for module in {tool.module for tool in scene.tools if tool.module.startswith(READY_TOOLS)}:
            if (check := getattr(sys.modules[module], "check", None)) is not None:
                check()
    make: Callable[..., Environment] = partial(load_function(scene.function), **arguments)
    try:
        made = make()
    except Exception as problem:  # the user's code may raise anything
        rule = f"called with environment.arguments, raised {type(problem).__name__}: {problem}"
        raise ConfigError("environment.function", scene.section.function, rule, "Correct the arguments, or the function") from problem
    if not callable(getattr(made, "reset", None)) or not callable(getattr(made, "step", None)):
        rule = f"makes a {type(made).__name__}, which lacks reset or step"
        raise ConfigError("environment.function", scene.section.function, rule, "See rayft/rollout/env.py for what an environment has")
    return make, getattr(made, "tools", None)


@dataclass(frozen=True)
class Stage:
    """What a rollout with an environment needs.

    Attributes:
        make: makes the environment of one answer.
        dialogue: of the run's tokenizer.
        deadline_s: for each call of an environment.
        max_turns: most turns of the policy in an answer.
    """

    make: MakeEnvironment
    dialogue: Dialogue
    deadline_s: float = 60.0
    max_turns: int = 16


def stage_of(cfg: GrpoRun, scene: Scene) -> Stage:
    """The stage, with the run's tokenizer loaded.

    Raises:
        ConfigError: see `maker_of`.
        DataError: the tokenizer cannot be read.
    """
    make, _ = maker_of(scene)
    return Stage(make, Dialogue(load_tokenizer(cfg.model), scene.section.function), scene.section.deadline_s, scene.section.max_turns)
