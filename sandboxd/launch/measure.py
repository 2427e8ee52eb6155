"""How much a directory holds that a live job writes to: bytes on disk, and entries.

No link is followed. The way down is kept as descriptors, so nothing that is moved meanwhile leads
the walk astray; what lies deeper than DEEPEST, or is more than was asked for, is not looked at, and
that is said.
"""

from __future__ import annotations

import os
import stat

DEEPEST = 256
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOCK = 512  # the unit of st_blocks (stat(2))


class Measure:
    """`whole` is false if there is more than was counted."""

    __slots__ = ("bytes", "entries", "whole")

    def __init__(self) -> None:
        self.bytes = self.entries = 0
        self.whole = True


def measure(root: int, most: int) -> Measure:
    """Look at no more than `most` entries below the directory `root`."""
    found = Measure()
    linked: set[tuple[int, int]] = set()
    start = os.open(".", _FOLDER, dir_fd=root)
    device = os.fstat(start).st_dev
    levels = [(start, os.listdir(start))]
    try:
        while levels:
            folder, names = levels[-1]
            if not names:
                levels.pop()
                os.close(folder)
                continue
            if found.entries >= most:
                found.whole = False
                return found
            below = _count(folder, names.pop(), found, linked, device)
            if below >= 0 and len(levels) >= DEEPEST:
                os.close(below)
                found.whole = False
            elif below >= 0:
                levels.append((below, []))
                levels[-1][1].extend(os.listdir(below))
        return found
    finally:
        for folder, _ in levels:
            os.close(folder)


def _count(
    folder: int, name: str, found: Measure, linked: set[tuple[int, int]], device: int
) -> int:
    """Add one entry; a descriptor if it is a directory to look into, else -1."""
    try:
        seen = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if seen.st_dev != device:
            return -1
        found.entries += 1
        if stat.S_ISDIR(seen.st_mode):
            found.bytes += seen.st_blocks * _BLOCK
            return os.open(name, _FOLDER, dir_fd=folder)
    except OSError:  # it went meanwhile
        return -1
    identity = (seen.st_dev, seen.st_ino)
    if seen.st_nlink > 1:
        if identity in linked:
            found.entries -= 1  # one inode
            return -1
        linked.add(identity)
    found.bytes += seen.st_blocks * _BLOCK
    return -1
