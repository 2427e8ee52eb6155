"""What sandboxd itself could not do; a workload's own failure is a Result, never one of these."""

from __future__ import annotations

import os


class SandboxError(Exception):
    """Base of everything sandboxd raises on purpose. `hint` says what to do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message


class PolicyError(SandboxError):
    """A policy, or a job held against it, is wrong. `where` names file and dotted key."""

    def __init__(self, where: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.where = where


class PolicyErrors(PolicyError):
    """The errors of one policy file, in the file's order: no more than MOST, and how many more."""

    MOST = 100

    def __init__(self, errors: tuple[PolicyError, ...]) -> None:
        if more := max(0, len(errors) - self.MOST):
            errors = (
                *errors[: self.MOST],
                PolicyError("", f"and {more} more error{'s' * (more > 1)}"),
            )
        super().__init__("", "\n".join(str(error) for error in errors))
        self.where = errors[0].where if errors else ""
        self.errors = errors


class JobError(SandboxError):
    """A job that cannot be carried out as asked: a NUL in argv, a file that is not there."""


class ImageError(SandboxError):
    """An image that is not there, or that cannot be taken: damaged, too large, or meant to harm."""


class HostError(SandboxError):
    """This machine lacks something that is needed. `missing` names it, `hint` is the fix."""

    def __init__(self, missing: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.missing = missing


class LaunchError(SandboxError):
    """Setting up a sandbox failed. `stage` is the kind of step, `step` its number in the plan."""

    def __init__(self, stage: str, step: int, errno: int, what: str, *, hint: str = "") -> None:
        reason = f": {os.strerror(errno)}" if errno else ""
        super().__init__(f"{stage}: step {step} {what}{reason}", hint=hint)
        self.stage = stage
        self.step = step
        self.errno = errno


class Busy(SandboxError):
    """A daemon has no room: its queue is full, a quota is used up, or it goes down."""


class InternalError(SandboxError):
    """A bug in sandboxd: please report it."""


class WorkloadFailed(SandboxError):
    """`run(..., check=True)` and the status was not ok. `result` is the whole Result."""

    def __init__(self, message: str, result: object) -> None:
        super().__init__(message)
        self.result = result
