"""The files of a problem package: ordinary ones, and none that a link leads out of it for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from sandboxd.judge import metadata
from sandboxd.judge.metadata import ProblemError

NAME = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,254}")
"""What has another name is as if it were not there: the format says so."""


def relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def inside(path: Path, root: Path) -> Path:
    """The path, if it is an ordinary file of the package (links inside the package are)."""
    name = relative(path, root)
    if not path.is_file():
        there = os.path.lexists(path)
        raise ProblemError(name, "not an ordinary file" if there else "there is no such file")
    if not path.resolve().is_relative_to(root.resolve()):
        raise ProblemError(name, "a link that leads out of the package")
    return path


def read(path: Path, root: Path) -> bytes:
    """A file that is to be parsed: of a larger one no more than shows that it is too large."""
    with inside(path, root).open("rb") as file:
        return file.read(metadata.LARGEST + 1)


def tree(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """The files below a directory by their relative names."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and all(map(NAME.fullmatch, path.relative_to(folder).parts)):
            yield relative(path, folder), inside(path, root)
