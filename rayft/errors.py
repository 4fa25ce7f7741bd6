"""One error tree. Every error a user can meet is a sentence: field, value, rule, remedy. The class decides the exit code."""

from __future__ import annotations


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
