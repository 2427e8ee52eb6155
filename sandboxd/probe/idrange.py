"""Which host ids sandboxes may use: subordinate ones of an ordinary user, free ones for root."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sandboxd.host import IdRange

SMALLEST = 4096
"""Jobs begin at 1000 inside, so a shorter range is not worth the trouble."""

# What systemd sets apart for containers (UIDS-GIDS in systemd's documentation); nspawn -U takes
# its ranges from there, too.
_SET_APART = range(524288, 1878982657, 65536)
_COUNT = 65536
_SMALL_COUNT = 16384
_BELOW = range(65536 - 2 * _SMALL_COUNT, 0, -4096)


def subordinate(kind: str, user: int, folder: Path = Path("/etc")) -> IdRange | str:
    """The first range of `user` in /etc/subuid or /etc/subgid (`kind`), or why there is none.

    subuid(5): lines of name or number, first id, count. Both files go by user.
    """
    try:
        name = pwd.getpwuid(user).pw_name
    except KeyError:
        name = str(user)
    path = folder / kind
    ranges = [found for owner, found in entries(path) if owner in (name, str(user))]
    for found in ranges:
        if found.count >= SMALLEST:
            return found
    if ranges:
        most = max(found.count for found in ranges)
        return f"{path} gives {name} {most} ids; {SMALLEST} are needed"
    return f"{path} has no line for {name}"


def entries(path: Path) -> Iterator[tuple[str, IdRange]]:
    for line in _lines(path):
        owner, _, rest = line.partition(":")
        start, _, count = rest.partition(":")
        if owner and _is_number(start) and _is_number(count):
            yield owner.strip(), IdRange(start=int(start), count=int(count))


def _is_number(word: str) -> bool:
    return word.strip().isdecimal() and len(word) < 20


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if not line.startswith("#")]


def free(folder: Path = Path("/etc"), proc: Path = Path("/proc/self")) -> IdRange | None:
    """Ids that root may map and nobody has, the same for uids and gids; None if there are none.

    As systemd-nspawn -U does: a range of 65536 at a multiple of 65536, of which neither /etc/sub*id
    nor /etc/passwd, nor whoever answers getpwuid(3), knows an id. Where only a few ids are mapped
    at all (root of a container), a shorter one below them.
    """
    mapped = _common(_extents(proc / "uid_map"), _extents(proc / "gid_map"))
    taken = [*_taken(folder)]
    for found in _candidates(mapped):
        if not _collides(found.start, found.count, taken):
            return found
    return None


def _candidates(mapped: Sequence[tuple[int, int]]) -> Iterator[IdRange]:
    for starts, count in ((_SET_APART, _COUNT), (_BELOW, _SMALL_COUNT)):
        for low, high in mapped:
            for start in starts:
                if low <= start and start + count <= high:
                    yield IdRange(start=start, count=count)
                elif start > high and starts.step > 0:
                    break


def _extents(path: Path) -> list[tuple[int, int]]:
    """The ids that exist in this user namespace: [from, to)."""
    rows = [[int(word) for word in line.split()] for line in _lines(path) if line]
    return [(row[0], row[0] + row[2]) for row in rows]


def _common(
    left: Iterable[tuple[int, int]], right: Iterable[tuple[int, int]]
) -> list[tuple[int, int]]:
    right = list(right)
    pairs = [(max(a, c), min(b, d)) for a, b in left for c, d in right]
    return [(low, high) for low, high in pairs if low < high]


def _taken(folder: Path) -> Iterator[tuple[int, int]]:
    for kind in ("subuid", "subgid"):
        for _, found in entries(folder / kind):
            yield found.start, found.start + found.count
    for kind in ("passwd", "group"):
        for line in _lines(folder / kind):
            words = line.split(":")
            if len(words) > 2 and _is_number(words[2]):
                yield int(words[2]), int(words[2]) + 1


def _collides(start: int, count: int, taken: Iterable[tuple[int, int]]) -> bool:
    if any(low < start + count and high > start for low, high in taken):
        return True
    try:
        pwd.getpwuid(start)
    except KeyError:
        pass
    else:
        return True
    try:
        grp.getgrgid(start)
    except KeyError:
        return False
    return True


def of_caller(folder: Path = Path("/etc")) -> tuple[IdRange, IdRange] | str:
    """(uids, gids) for this process, or why there are none."""
    if os.geteuid() == 0:
        found = free(folder)
        return (found, found) if found else "no range of ids is mapped here and free"
    uids = subordinate("subuid", os.getuid(), folder)
    if isinstance(uids, str):
        return uids
    gids = subordinate("subgid", os.getuid(), folder)
    return gids if isinstance(gids, str) else (uids, gids)
