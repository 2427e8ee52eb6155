"""Finds files in the working directory of a sandbox that is dead, and hands them over.

What lies there was left by a hostile program: names are any bytes, and there may be links, FIFOs,
devices, directories without end. So: no link is followed, in no component; only regular files are
opened; the walk keeps two descriptors and no stack, however deep it gets; and all of it is counted.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat

from sandboxd.linux.packets import FILE, INLINE, REFUSED, SIZE, SOURCE, Entry

TYPE_CHECKING = False  # as typing's, which is not imported for it
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Match = Callable[[str], object]
    Places = list[tuple["Pattern", int]]
    Send = Callable[[Entry, int | None], None]

DEEP = "**"
REQUIRED, OPTIONAL, LITERAL = 1, 2, 4
_GLOB = frozenset("*?[")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_SHOWN = 200  # bytes of a name that is too long

_KINDS = {
    stat.S_IFDIR: "is a directory (pattern/** collects what is in it)",
    stat.S_IFLNK: "is a symbolic link",
    stat.S_IFIFO: "is a FIFO",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


class Caps:
    """How much of what a program left is looked at and handed over."""

    __slots__ = ("bytes", "depth", "entries", "files", "path")

    def __init__(self, files: int, size: int, depth: int, path: int, entries: int) -> None:
        self.files = files
        self.bytes = size
        self.depth = depth
        self.path = min(path, INLINE)
        self.entries = entries


class Pattern:
    """One pattern by components; `hit` once something was said about it.

    `meaning` is a sum of REQUIRED, OPTIONAL (by itself a pattern without wildcards is required, and
    one with them is not) and LITERAL (nothing in it is a wildcard).
    """

    __slots__ = ("hit", "literal", "matches", "name", "parts", "required")

    def __init__(self, name: bytes, meaning: int = 0) -> None:
        self.name = name
        self.parts = [part for part in os.fsdecode(name).split("/") if part not in ("", ".")]
        wild = not meaning & LITERAL
        if self.parts[-1] == DEEP and wild:
            self.parts.append("*")
        self.matches = [_match(part) if wild else part.__eq__ for part in self.parts]
        self.literal = not wild or not any(_is_glob(part) for part in self.parts)
        self.required = bool(meaning & REQUIRED) or (self.literal and not meaning & OPTIONAL)
        self.hit = False

    def is_glob(self, place: int) -> bool:
        return not self.literal and _is_glob(self.parts[place])

    def is_deep(self, place: int) -> bool:
        return not self.literal and self.parts[place] == DEEP

    def is_last(self, place: int) -> bool:
        return place == len(self.parts) - 1


def _is_glob(part: str) -> bool:
    return not _GLOB.isdisjoint(part)


def _match(part: str) -> Match:
    if part in ("*", DEEP):
        return _any
    if not _is_glob(part):
        return part.__eq__
    return re.compile(fnmatch.translate(part)).match


def _any(name: str) -> bool:
    return True


class _Full(Exception):
    """No more is looked for; says why."""


class _Level:
    """A directory on the way down: its identity, and where the walk still has to go from it."""

    __slots__ = ("identity", "path", "pending")

    def __init__(self, folder: int, path: str) -> None:
        self.identity = _identity(folder)
        self.path = path
        self.pending: list[tuple[str, Places]] = []


def _identity(folder: int) -> tuple[int, int]:
    found = os.fstat(folder)
    return found.st_dev, found.st_ino


class Walk:
    """One collection: depth first, by name in each directory, so the same tree gives the same."""

    def __init__(self, patterns: Iterable[Pattern], caps: Caps, send: Send) -> None:
        self._patterns = list(patterns)
        self._caps = caps
        self._send = send
        self._entries = caps.entries
        self._files = caps.files
        self._errors = caps.files
        self._bytes = caps.bytes

    def run(self, box: int) -> None:
        """Send one entry for each file, and for each thing that is wrong."""
        try:
            try:
                top = os.open(".", _FOLDER, dir_fd=box)
            except PermissionError as error:  # the job closed it, and we are nobody special
                self._refuse(".", _reason(error), *self._patterns)
            else:
                self._walk(top)
            for pattern in self._patterns:
                if pattern.required and not pattern.hit:
                    reason = "missing" if pattern.literal else "nothing matches"
                    self._refuse(os.fsdecode(pattern.name), reason)
        except _Full as full:
            self._send(Entry(REFUSED, b"", 0, str(full).encode()), None)

    def _walk(self, here: int) -> None:
        levels: list[_Level] = []
        try:
            levels.append(self._visit(here, "", [(pattern, 0) for pattern in self._patterns]))
            while levels:
                level = levels[-1]
                if level.pending:
                    name, places = level.pending.pop()
                    try:
                        below = _enter(here, name)
                    except OSError as error:
                        self._refuse(level.path + name, _reason(error), *_patterns(places))
                        continue
                    os.close(here)
                    here = below
                    levels.append(self._visit(here, f"{level.path}{name}/", places))
                else:
                    levels.pop()
                    if levels:
                        above, here = here, _up(here, levels[-1])
                        os.close(above)
        finally:
            os.close(here)

    def _visit(self, folder: int, path: str, places: Places) -> _Level:
        """Everything in this directory that a pattern asks for, apart from what lies deeper."""
        level = _Level(folder, path)
        places = _closure(places)
        try:
            if any(pattern.is_glob(place) for pattern, place in places):
                names = self._list(folder)
            else:
                names = sorted({pattern.parts[place] for pattern, place in places})
        except OSError as error:
            self._refuse(path.rstrip("/"), _reason(error), *_patterns(places))
            return level
        for name in names:
            self._entries -= 1
            if self._entries < 0:
                raise _Full(f"more than {self._caps.entries} entries were looked at")
            self._look(folder, name, level, places)
        level.pending.reverse()
        return level

    def _list(self, folder: int) -> list[str]:
        """The names in it, sorted: as many as may be looked at and one more."""
        names = []
        with os.scandir(folder) as found:
            for one in found:
                names.append(one.name)
                if len(names) > self._entries:
                    break
        return sorted(names)

    def _look(self, folder: int, name: str, level: _Level, places: Places) -> None:
        """Deal with one name, if a pattern ends with it or goes on below it."""
        last, deeper = _after(places, name)
        if not last and not deeper:
            return
        path = level.path + name
        concerned = [*last, *_patterns(deeper)]
        try:
            mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        except OSError as error:
            self._refuse(path, _reason(error), *concerned)
            return
        if len(os.fsencode(path)) > self._caps.path:
            self._refuse(path, f"its name is longer than {self._caps.path} bytes", *concerned)
        elif stat.S_ISDIR(mode):
            self._folder(name, level, last, deeper)
        elif last:
            self._found(folder, path, name, mode)
            for pattern in last:
                pattern.hit = True
        elif stat.S_ISLNK(mode):
            named = [pattern for pattern, place in places if pattern.parts[place] == name]
            if named:  # a link where a pattern says that there is a directory
                self._refuse(path, _KINDS[stat.S_IFLNK], *named)

    def _folder(self, name: str, level: _Level, last: list[Pattern], deeper: Places) -> None:
        path = level.path + name
        if any(pattern.literal for pattern in last):
            self._refuse(path, _KINDS[stat.S_IFDIR], *last)
        if deeper and path.count("/") + 1 > self._caps.depth:
            reason = f"lies deeper than {self._caps.depth} directories"
            self._refuse(path, reason, *_patterns(deeper))
        elif deeper:
            level.pending.append((name, deeper))

    def _found(self, folder: int, path: str, name: str, mode: int) -> None:
        if not stat.S_ISREG(mode):
            self._refuse(path, _KINDS.get(stat.S_IFMT(mode), "is no regular file"))
            return
        if self._files <= 0:
            raise _Full(f"more than {self._caps.files} files match")
        try:
            file = os.open(name, _READ, dir_fd=folder)
        except OSError as error:
            self._refuse(path, _reason(error))
            return
        try:
            self._hand_over(file, path)
        except OSError as error:
            self._refuse(path, _reason(error))
        finally:
            os.close(file)

    def _hand_over(self, file: int, path: str) -> None:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            self._refuse(path, "is no regular file")
            return
        if found.st_size > self._bytes:
            left = f"{self._bytes} of {self._caps.bytes} bytes"
            self._refuse(path, f"has {found.st_size} bytes, and {left} are left")
            return
        self._files -= 1
        self._bytes -= found.st_size
        # Without set-user-id: whoever writes the file to a disk must not hand that on.
        mode, name = found.st_mode & 0o777, os.fsencode(path)
        if found.st_size > INLINE:
            self._send(Entry(SOURCE, name, mode, SIZE.pack(found.st_size)), file)
        else:
            self._send(Entry(FILE, name, mode, os.pread(file, INLINE, 0)), None)

    def _refuse(self, path: str, reason: str, *patterns: Pattern) -> None:
        """Say what is wrong with `path`, and that is all there is to say about these patterns."""
        for pattern in patterns:
            pattern.hit = True
        if self._errors <= 0:
            raise _Full(f"more than {self._caps.files} files could not be collected")
        self._errors -= 1
        name = os.fsencode(path)
        if len(name) > self._caps.path:
            name = name[:_SHOWN] + b"..."
        self._send(Entry(REFUSED, name, 0, reason.encode("utf-8", "replace")), None)


def _closure(places: Places) -> Places:
    """With each ** also what follows it: it may stand for no directory at all."""
    found: dict[tuple[Pattern, int], None] = {}
    for pattern, first in places:
        place = first
        found[pattern, place] = None
        while pattern.is_deep(place):
            place += 1
            found[pattern, place] = None
    return list(found)


def _after(places: Places, name: str) -> tuple[list[Pattern], Places]:
    """Which patterns end with this name, and where the others are in it as a directory."""
    last: list[Pattern] = []
    deeper: Places = []
    for pattern, place in places:
        if pattern.matches[place](name):
            if pattern.is_deep(place):
                deeper.append((pattern, place))
            elif pattern.is_last(place):
                last.append(pattern)
            else:
                deeper.append((pattern, place + 1))
    return last, deeper


def _patterns(places: Places) -> list[Pattern]:
    return [pattern for pattern, _ in places]


def _enter(above: int, name: str) -> int:
    folder = os.open(name, _FOLDER, dir_fd=above)
    try:
        os.stat(".", dir_fd=folder)  # readable is not yet searchable: there must be a way back
    except BaseException:
        os.close(folder)
        raise
    return folder


def _up(here: int, level: _Level) -> int:
    """The directory above, which must be the one the walk came from."""
    above = os.open("..", _FOLDER, dir_fd=here)
    if _identity(above) != level.identity:
        os.close(above)
        raise _Full("a directory was moved while it was read")
    return above


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
