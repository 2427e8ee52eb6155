"""Reading an OCI bundle: its config.json, and where the paths in it really lead."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandboxd.compile.bundle import FILE, bundle
from sandboxd.compile.granted import Around
from sandboxd.errors import PolicyError, PolicyErrors
from sandboxd.job import Job
from sandboxd.policy import Policy
from sandboxd.supervise.policies import find

POLICY = "bundle"
"""The policy of a bundle where none is named."""
LONGEST = 1 << 20
"""Bytes of a config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instead:
    """What an operator says that takes the place of what a bundle does."""

    argv: Sequence[bytes] = ()
    root: bool = False
    """Whether another root is named."""
    places: Collection[str] = ()
    """Where something is mounted by hand."""
    terminal: bool = True
    """Whether a terminal that the bundle wants is of use to anybody."""


def load_bundle(
    directory: str | os.PathLike[str],
    policy: str | Policy = POLICY,
    *,
    strict: bool = False,
    instead: Instead | None = None,
) -> Job:
    """The job that the bundle in this directory describes, under a policy that it can only tighten.

    `Job.policy` is the tightened policy, `Job.ignored` has what of the bundle is not done, and why;
    with `strict` that is PolicyErrors. PolicyError names file and place of what makes no sense.
    """
    instead = instead or Instead()
    folder = os.path.realpath(directory)
    around = Around(
        resolve=lambda path: _inside(folder, path), shown=instead.places,
        own_root=not instead.root, terminal=instead.terminal,
    )  # fmt: skip
    base = find(policy) if isinstance(policy, str) else policy
    job = bundle(_read(Path(folder, FILE)), base, around, instead.argv)
    if strict and job.ignored:
        raise PolicyErrors(
            tuple(PolicyError(what, f"not done: {why}") for what, why in job.ignored)
        )
    return job


def _read(file: Path) -> str:
    """No more than a config.json is, and of nothing but a file: a pipe would never end."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PolicyError(str(file), "is no regular file")
            data = stream.read(LONGEST + 1)
    except OSError as error:
        hint = "a bundle is a directory with a config.json; `crun spec` makes one"
        raise PolicyError(str(file), f"cannot be read: {error.strerror}", hint=hint) from None
    if len(data) > LONGEST:
        raise PolicyError(str(file), f"more than {LONGEST} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PolicyError(f"{file}:{line}", "not UTF-8, which JSON must be") from None


def _inside(folder: str, path: str) -> str | None:
    """Where a path leads, if it is there and below the bundle."""
    try:
        real = os.path.realpath(os.path.join(folder, path), strict=True)
    except (OSError, ValueError):
        return None
    return real if real.startswith(f"{folder.rstrip('/')}/") else None
