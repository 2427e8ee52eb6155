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


def empty(root: int) -> None:
    """Remove everything in the directory `root`, which stays."""
    here = open_beneath(root, b"", os.O_RDONLY | os.O_DIRECTORY)
    way: list[tuple[bytes, tuple[int, int]]] = []
    try:
        while True:
            below = _remove_but_one(here)
            if below:
                way.append((below, _identity(here)))
                above, here = here, _enter(here, below)
                os.close(above)
                continue
            if not way:
                return
            name, identity = way.pop()
            below_it, here = here, os.open("..", _FOLDER, dir_fd=here)
            os.close(below_it)
            if _identity(here) != identity:
                raise Moved("a directory was moved while it was removed")
            os.rmdir(name, dir_fd=here)
    finally:
        os.close(here)


def _remove_but_one(folder: int) -> bytes:
    """All that can go at once; the name of a directory that has something in it, b"" for none."""
    first = b""
    for name in map(os.fsencode, os.listdir(folder)):
        if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=folder)
            continue
        try:
            os.rmdir(name, dir_fd=folder)
        except OSError:
            first = first or name
    return first


def _enter(above: int, name: bytes) -> int:
    os.chmod(name, 0o700, dir_fd=above)  # a mode of 0 is nothing to who has CAP_DAC_OVERRIDE
    return os.open(name, _FOLDER, dir_fd=above)


def _identity(folder: int) -> tuple[int, int]:
    found = os.fstat(folder)
    return found.st_dev, found.st_ino
