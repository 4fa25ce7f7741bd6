"""The named events of a trainer, told to the run's callbacks on every rank."""

from __future__ import annotations

from typing import Any

from rayft.config.functions import load_function
from rayft.errors import TrainingError
from rayft.types import Launch, R, Session


class Events:
    """Calls the run's callbacks.

    Args:
        launch: the run.
        session: of this rank.
    """

    def __init__(self, launch: Launch[R], session: Session) -> None:
        self._session = session
        self._callbacks = [(function, load_function(function)) for function in launch.callbacks]

    def __call__(self, name: str, step: int, **state: Any) -> None:
        """Tell every callback.

        Raises:
            TrainingError: one raised, which stops the run.
        """
        for function, callback in self._callbacks:
            try:
                callback(name, {"step": step, "rank": self._session.rank, "run_dir": self._session.run_dir, **state})
            except Exception as problem:  # the user's code may raise anything
                rule = f"raised {type(problem).__name__} at {name} of step {step}: {problem}"
                remedy = "Mend it or take it out, then run the same command again to resume"
                raise TrainingError("run.callbacks", function.spec, rule, remedy) from problem
