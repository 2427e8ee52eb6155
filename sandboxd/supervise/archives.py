"""Tar archives among the input files of a job: read by our own reader, entry by entry.

Whoever made an archive may be a stranger, so the rules are those of images: names below the place
named, no `..`, no way through a link (the porter's), every length checked before it is believed,
nothing held in memory that the sandbox has no room for. What is neither file, directory nor link is
refused, and so is an archive without its end: input is complete or an error.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from sandboxd.errors import ImageError, JobError
from sandboxd.images import streams, tar
from sandboxd.job import Tar
from sandboxd.linux import packets
from sandboxd.linux.descriptors import SCARCE, told
from sandboxd.linux.packets import Entry

Item = tuple[Entry, int | None]
"""An entry, and the descriptor of its content where it is a SOURCE."""

MOST_ENTRIES = 1 << 19
_PERMISSIONS = 0o777
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_PATIENCE = 100
"""Milliseconds between two looks whether anybody still wants what a pipe does not give."""
_HEADERS = 1 << 30
"""Bytes that headers and padding may add to what there is room for."""
_WORDS = {tar.FIFO: "a FIFO", tar.DEVICE: "a device"}


@dataclass(frozen=True, slots=True)
class Room:
    """What a sandbox has room for; None where nobody has set a limit."""

    bytes: int | None = None
    files: int | None = None

    @classmethod
    def of(cls, box: int) -> Room:
        """statvfs(3) of the working directory; a tmpfs without a limit says 0 of 0 are free."""
        there = os.fstatvfs(box)
        return cls(
            there.f_bavail * there.f_frsize if there.f_blocks else None,
            there.f_favail if there.f_files else None,
        )


class _Stream:
    """Bytes as many as asked for while there are, and not without end."""

    def __init__(self, pieces: Iterator[bytes], most: int | None) -> None:
        self._pieces = pieces
        self._left = most
        self._buffer = b""
        self._at = 0

    def read(self, count: int) -> bytes:
        if len(self._buffer) - self._at < count:
            self._fill(count)
        found = self._buffer[self._at : self._at + count]
        self._at += len(found)
        return found

    def _fill(self, count: int) -> None:
        parts = [self._buffer[self._at :]]
        have = len(parts[0])
        while have < count and (piece := next(self._pieces, b"")):
            parts.append(piece)
            have += len(piece)
            if self._left is not None:
                self._left -= len(piece)
                if self._left < 0:
                    raise tar.TarError("more bytes than the sandbox has room for")
        self._buffer, self._at = b"".join(parts), 0


class _File:
    """An archive that is a plain file: what is large is not read here, the porter copies it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._at = 0
        self._start = 0
        self._buffer = b""

    def read(self, count: int) -> bytes:
        inside = self._at - self._start
        if not 0 <= inside <= len(self._buffer) - count:
            self._start, inside = self._at, 0
            self._buffer = os.pread(self.descriptor, max(count, tar.CHUNK), self._at)
        found = self._buffer[inside : inside + count]
        self._at += len(found)
        return found

    def skip(self, count: int) -> int:
        done = min(count, self._size - self._at)
        self._at += done
        return done


@contextmanager
def _opened(archive: Tar, room: Room) -> Iterator[_Stream | _File]:
    """The archive without its compression."""
    most = None if room.bytes is None else room.bytes + _HEADERS
    if isinstance(archive.source, bytes):
        yield _Stream(streams.plain(io.BytesIO(archive.source).read), most)
        return
    if isinstance(archive.source, int):
        yield _Stream(streams.plain(_reading(archive.source)), most)
        return
    descriptor = os.open(archive.source, _READ)
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        plain = stat.S_ISREG(kind) and not streams.compression(os.pread(descriptor, 8, 0))
        yield _File(descriptor) if plain else _Stream(streams.plain(_reading(descriptor)), most)
    finally:
        os.close(descriptor)


def _reading(descriptor: int) -> Callable[[int], bytes]:
    """read() of as much as is asked for, until the end; the run may be cancelled meanwhile."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)

    def read(count: int) -> bytes:
        parts: list[bytes] = []
        while count > 0:
            trio.from_thread.check_cancelled()
            if not waiting.poll(_PATIENCE):
                continue
            try:
                data = os.read(descriptor, count)
            except BlockingIOError:
                continue
            if not data:
                break
            parts.append(data)
            count -= len(data)
        return b"".join(parts)

    return read


def unpacked(name: bytes, archive: Tar, room: Room, folders: list[Entry]) -> Iterator[Item]:
    """What has to be made below `name`; the directories, whose modes come last, in `folders`."""
    what = f"files[{os.fsdecode(name)!r}]: {_called(archive)}"
    try:
        with _opened(archive, room) as source:
            yield from _entries(name, source, room, folders)
    except tar.TarError as error:
        raise JobError(f"{what}: {error}") from error
    except ImageError as error:
        raise JobError(f"{what}: {error.args[0]}") from error
    except OSError as error:
        if error.errno in SCARCE:
            raise told(error, what) from error
        raise JobError(f"{what}: {error.strerror}") from error


def _called(archive: Tar) -> str:
    if isinstance(archive.source, int):
        return f"the archive behind descriptor {archive.source}"
    return str(archive.source) if isinstance(archive.source, Path) else "the archive"


def _entries(
    name: bytes, source: _Stream | _File, room: Room, folders: list[Entry]
) -> Iterator[Item]:
    skip = source.skip if isinstance(source, _File) else None
    reader = tar.Reader(source.read, skip)
    made: dict[bytes, Entry] = {}
    for number, entry in enumerate(reader):
        if number >= MOST_ENTRIES:
            raise tar.TarError(f"more than {MOST_ENTRIES} entries")
        inside = _below(name, entry.name)
        time = entry.mtime * 10**9 if entry.mtime < 1 << 33 else packets.NOW
        if entry.kind == tar.DIRECTORY:
            if inside:
                mode = entry.mode & _PERMISSIONS
                made[inside] = Entry(packets.DIRECTORY, inside, mode, time=time)
        elif entry.kind == tar.SYMLINK:
            yield Entry(packets.LINK, inside, 0, entry.target, time), None
        elif entry.kind == tar.HARDLINK:
            if entry.target == entry.name:
                raise tar.TarError(f"{tar.shown(entry.name)}: a link to itself")
            yield Entry(packets.HARDLINK, inside, 0, _below(name, entry.target)), None
        elif entry.kind == tar.FILE:
            yield _content(Entry(packets.FILE, inside, entry.mode & _PERMISSIONS, time=time),
                           entry, reader, (source, room))  # fmt: skip
        else:
            kind = _WORDS.get(entry.kind, "no file")
            raise tar.TarError(f"{tar.shown(entry.name)}: is {kind}, and no sandbox gets one")
    _finish(reader, source)
    folders += [made[path] for path in sorted(made)]


def _below(name: bytes, inner: bytes) -> bytes:
    return b"/".join(filter(None, (name, inner)))


def _content(
    made: Entry, entry: tar.Entry, reader: tar.Reader, where: tuple[_Stream | _File, Room]
) -> Item:
    """The entry with its content: in it, as a part of the archive, or as a file in memory."""
    source, room = where
    if room.bytes is not None and entry.stored > room.bytes:
        raise JobError(
            f"files[{os.fsdecode(made.name)!r}]: the files do not fit into the sandbox",
            hint="raise limits.disk, or give it less",
        )
    whole = entry.pieces == [(0, entry.size)] or not entry.size
    if whole and entry.size <= packets.INLINE:
        made.content = b"".join(data for _, data in reader.content(entry))
        return made, None
    made.kind = packets.SOURCE
    if whole and isinstance(source, _File):
        made.content = packets.RANGE.pack(entry.offset, entry.size)
        return made, os.dup(source.descriptor)
    memory = packets.memory_file("sandboxd-input")
    try:
        for at, data in reader.content(entry):
            trio.from_thread.check_cancelled()
            view = memoryview(data)
            while view:
                done = os.pwrite(memory, view, at)
                view, at = view[done:], at + done
        os.ftruncate(memory, entry.size)  # it may end with a hole
    except BaseException:
        os.close(memory)
        raise
    return made, memory


def _finish(reader: tar.Reader, source: _Stream | _File) -> None:
    """The end has its mark, and after it comes nothing: what writes to a pipe may finish."""
    if not reader.ended:
        raise tar.TarError("truncated: the mark of its end is missing")
    while data := source.read(tar.CHUNK):
        if data.strip(b"\0"):
            raise tar.TarError("something comes after the end of the archive")
