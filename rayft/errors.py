"""One error tree. Every error a user can meet is a sentence: field, value, rule, remedy. The class decides the exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class RayftError(Exception):
    """A refusal or failure that rayft explains.

    Args:
        field: what is at fault: a dotted configuration key, a file, or a process.
        value: the offending value, as the user wrote it; None when there is none.
        rule: what must hold.
        remedy: what to do about it.
    """

    exit_code = 1
    kind = "error"

    def __init__(self, field: str, value: object, rule: str, remedy: str) -> None:
        self.field, self.value, self.rule, self.remedy = field, value, rule, remedy
        super().__init__(self.sentence())

    def sentence(self) -> str:
        """The error as one readable line."""
        shown = "" if self.value is None else f" = {self.value!r}"
        return f"{self.field}{shown}: {self.rule}. {self.remedy}."

    def __reduce__(self) -> tuple[type[RayftError], tuple[str, object, str, str]]:
        return type(self), (self.field, self.value, self.rule, self.remedy)


class ConfigError(RayftError):
    """The run as written cannot be: unknown key, wrong type, impossible combination. Retrying does not help."""

    exit_code = 2
    kind = "configuration"


class DataError(RayftError):
    """Rows, shards or templates are missing, malformed or changed. Retrying does not help."""

    exit_code = 3
    kind = "data"


class ResourceError(RayftError):
    """The cluster, the disk or the device has too little of something. Retrying helps once it has more."""

    exit_code = 4
    kind = "resources"


class TrainingError(RayftError):
    """Training went wrong numerically or did not finish what was asked."""

    exit_code = 5
    kind = "training"


class InfrastructureError(RayftError):
    """A process, node or store failed beyond the retry budget. Running the same command again resumes."""

    exit_code = 6
    kind = "infrastructure"


class Stopped(RayftError):
    """The run ended early because it was asked to, with a checkpoint. Running the same command again resumes."""

    exit_code = 143  # what a shell shows of a process that SIGTERM ended
    kind = "stopped"


NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}


@contextmanager
def room_for(place: object) -> Iterator[None]:
    """Say in a sentence that the disk or the quota ended while something was written at `place`.

    Raises:
        ResourceError: an error of the block is, or comes from, one of those.
    """
    try:
        yield
    except Exception as problem:
        if isinstance(problem, RayftError) or (flaw := no_room(problem)) is None:
            raise
        raise ResourceError(str(place), None, f"cannot be written: {flaw}", "Make room there and run the same command again") from problem


def no_room(problem: BaseException | None) -> str | None:
    """What ended, in words, when the error or one that it comes from is of a full disk or quota; else None."""
    if problem is None:
        return None
    if isinstance(problem, OSError) and problem.errno in NO_ROOM:
        return NO_ROOM[problem.errno]
    ranks = getattr(problem, "failures", {})  # of torch's CheckpointException: rank -> (error, traceback)
    causes = [failure[0] for failure in ranks.values()] if isinstance(ranks, dict) else []
    return next((flaw for cause in [*causes, problem.__cause__ or problem.__context__] if (flaw := no_room(cause))), None)
