"""Removes all that is in a directory, whatever a dead job made of it.

No link is followed, and however deep it is there are two descriptors and no recursion: on the way
back a directory is left by "..", which must lead where the walk came from.
"""

from __future__ import annotations

import os
import stat

from sandboxd.linux.paths import open_beneath

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Moved(OSError):
    """A directory is not where it was: somebody is still at work there."""


class _Level:
    """A directory on the way down; `pending` are those in it that have something in them."""

    __slots__ = ("identity", "name", "pending")

    def __init__(self, name: bytes, folder: int) -> None:
        self.name = name
        self.identity = _identity(folder)
        self.pending = _remove_what_can_go(folder)


def empty(root: int) -> None:
    """Remove everything in the directory `root`, which stays."""
    here = open_beneath(root, b"", os.O_RDONLY | os.O_DIRECTORY)
    try:
        levels = [_Level(b"", here)]
        while True:
            level = levels[-1]
            if level.pending:
                name = level.pending.pop()
                above, here = here, os.open(name, _FOLDER, dir_fd=here)
                os.close(above)
                levels.append(_Level(name, here))
                continue
            levels.pop()
            if not levels:
                return
            below, here = here, os.open("..", _FOLDER, dir_fd=here)
            os.close(below)
            if _identity(here) != levels[-1].identity:
                raise Moved("a directory was moved while it was removed")
            os.rmdir(level.name, dir_fd=here)
    finally:
        os.close(here)


def _remove_what_can_go(folder: int) -> list[bytes]:
    """All but the directories that are not empty, which are returned."""
    full = []
    for name in map(os.fsencode, os.listdir(folder)):
        if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=folder)
            continue
        try:
            os.rmdir(name, dir_fd=folder)
        except OSError:
            full.append(name)
    return full


def _identity(folder: int) -> tuple[int, int]:
    found = os.fstat(folder)
    return found.st_dev, found.st_ino
