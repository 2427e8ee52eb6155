"""The input files of a job as packets for the porter: read, opened, and directories walked."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Generator, Iterator
from pathlib import Path

import trio

from sandboxd.errors import HostError, JobError
from sandboxd.job import Copied, File, Names, Tar, check_inside
from sandboxd.linux import packets
from sandboxd.linux.descriptors import told
from sandboxd.linux.packets import NOW, Entry, Packet
from sandboxd.supervise.archives import Item, Room, unpacked

_PERMISSIONS = 0o777
_LONGEST = 4096  # PATH_MAX; no name that a program could use is longer
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_SMALL = 4096
"""Bytes of a file that is read here; what is larger the kernel copies, in half the time."""
_EARLIEST, _LATEST = -(1 << 62), 1 << 62  # ns; what a file system may say beyond is a mistake


def shown(name: bytes) -> str:
    return f"files[{os.fsdecode(name)!r}]"


class Sources:
    """Fills packets one after the other, and owns what the last one carries."""

    def __init__(self, files: Names[Copied], room: Room, attached: Collection[bytes] = ()) -> None:
        """`attached`: names where something is by reference, into which nothing is put."""
        self._items = items(files, room)
        self._attached = attached
        self._over: Item | None = None
        self._slow = any(_is_slow(value) for value in files.values())
        self.waits = any(
            isinstance(value, Tar) and isinstance(value.source, int) for value in files.values()
        )
        """Whether somebody else may keep us waiting, for any time."""
        self._threads = trio.CapacityLimiter(1) if self.waits else None  # not one of trio's 40
        self.packet = Packet(b"")
        self._owned: list[int] = []

    def close(self) -> None:
        packets.close(self._owned)
        self._owned = []
        if self._over is not None and self._over[1] is not None:
            os.close(self._over[1])
        self._over = None
        self._items.close()

    async def wait_next(self, head: bytes, box: int) -> bool:
        """Makes `packet` the next one, in a thread if files have to be read; False at the end."""
        packets.close(self._owned)
        self._owned = []
        if self._slow:
            await trio.to_thread.run_sync(self._fill, head, box, limiter=self._threads)
        else:
            self._fill(head, box)
        return not self.packet.empty

    def _fill(self, head: bytes, box: int) -> None:
        self.packet = Packet(head, [box])
        while (item := self._over or next(self._items, None)) is not None:
            entry, descriptor = self._over = item
            if self._attached:
                _check_free(entry.name, self._attached)
            if not self.packet.has_room(entry, descriptor):
                return
            self.packet.add(entry, descriptor)
            if descriptor is not None:
                self._owned.append(descriptor)
            self._over = None


def _check_free(name: bytes, attached: Collection[bytes]) -> None:
    parts = name.split(b"/")
    for count in range(1, len(parts) + 1):
        if (place := b"/".join(parts[:count])) in attached:
            raise JobError(f"{shown(name)}: {os.fsdecode(place)!r} is in its way",
                           hint="nothing can be put into what is attached")  # fmt: skip


def _is_slow(value: Copied) -> bool:
    data = value.data if isinstance(value, File) else value
    return isinstance(data, Path | Tar) or len(data) > packets.INLINE


def items(files: Names[Copied], room: Room) -> Generator[Item, None, None]:
    """What has to be made, in this order; the caller closes the descriptors it gets.

    Directories come last, and what is inside of one before it: they may be read-only.
    """
    folders: list[Entry] = []
    for key, value in files.items():
        name = _normal(os.fsencode(key))
        if isinstance(value, Tar):
            for entry, descriptor in unpacked(name, value, room, folders):
                yield _short_enough(entry), descriptor
            continue
        file = value if isinstance(value, File) else File(data=value)
        if not isinstance(file.data, Path):
            yield _inline(name, file.data, file.mode)
            continue
        try:
            yield from _from_host(name, file.data, file.mode if value is file else None, folders)
        except OSError as error:
            raise _unreadable(name, file.data, error) from error
    for entry in reversed(folders):
        yield entry, None


def _normal(name: bytes) -> bytes:
    check_inside(name)
    normal = b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))
    _check_length(normal)
    return normal


def _check_length(name: bytes) -> None:
    if len(name) > _LONGEST:
        raise JobError(f"{shown(name[:64])}...: the name has more than {_LONGEST} bytes")


def _short_enough(entry: Entry) -> Entry:
    _check_length(entry.name)
    return entry


def _file(name: bytes, kind: int, mode: int, content: bytes = b"", time: int = NOW) -> Entry:
    if not name:
        raise JobError(f"{shown(name)}: only a directory can be the working directory")
    return Entry(kind, name, mode & _PERMISSIONS, content, time)


def _time(found: os.stat_result) -> int:
    """What make(1) goes by."""
    return min(max(found.st_mtime_ns, _EARLIEST), _LATEST)


def _inline(name: bytes, data: bytes, mode: int) -> Item:
    if len(data) <= packets.INLINE:
        return _file(name, packets.FILE, mode, data), None
    entry = _file(name, packets.SOURCE, mode)
    memory = packets.memory_file("sandboxd-input")
    try:
        done = 0
        view = memoryview(data)
        while done < len(data):
            done += os.write(memory, view[done:])
    except BaseException:
        os.close(memory)
        raise
    return entry, memory


def _unreadable(name: bytes, path: Path, error: OSError) -> JobError | HostError:
    what = f"{shown(name)}: {path}"
    found = told(error, what)
    return found if isinstance(found, HostError) else JobError(f"{what}: {error.strerror}")


def _from_host(name: bytes, path: Path, mode: int | None, folders: list[Entry]) -> Iterator[Item]:
    """A file or directory as the caller named it: perhaps by a link."""
    kind = os.stat(path).st_mode
    if not stat.S_ISDIR(kind):
        yield _open(name, path, kind, mode)
        return
    top = os.open(path, _READ | os.O_DIRECTORY)
    try:
        yield from _walk(name, top, path, folders)
    finally:
        os.close(top)


def _open(
    name: bytes, path: Path, kind: int, mode: int | None = None, folder: int | None = None
) -> Item:
    """A regular file; a small one is read now. In a `folder`, it is the last part of `path`."""
    if not stat.S_ISREG(kind):
        raise JobError(f"{shown(name)}: {path} is no regular file or directory")
    if folder is None:
        descriptor = os.open(path, _READ)
    else:
        descriptor = os.open(path.name, _READ | os.O_NOFOLLOW, dir_fd=folder)
    keep = False
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise JobError(f"{shown(name)}: {path} is no regular file")
        mode = found.st_mode if mode is None else mode
        content = b"" if found.st_size > _SMALL else _start_of(descriptor)
        if len(content) <= packets.INLINE and found.st_size <= _SMALL:
            return _file(name, packets.FILE, mode, content, _time(found)), None
        entry = _file(name, packets.SOURCE, mode, time=_time(found))
        keep = True
        return entry, descriptor
    finally:
        if not keep:
            os.close(descriptor)


def _start_of(descriptor: int) -> bytes:
    """The file, if it is small; else more than fits. Files of /proc give a page at a time."""
    content = b""
    while len(content) <= packets.INLINE:
        piece = os.read(descriptor, packets.INLINE + 1 - len(content))
        if not piece:
            break
        content += piece
    return content


def _walk(name: bytes, top: int, path: Path, folders: list[Entry]) -> Iterator[Item]:
    """All below a directory: no link in it is followed, also if one gets there meanwhile."""
    pending = [b""]
    while pending:
        below = pending.pop()
        inside = b"/".join(filter(None, (name, below)))
        try:
            folder = _reach(top, below)
        except OSError as error:
            raise _unreadable(inside, path / os.fsdecode(below), error) from error
        try:
            found = os.fstat(folder)
            if inside:
                mode = found.st_mode & _PERMISSIONS
                inside = _normal(inside)
                folders.append(Entry(packets.DIRECTORY, inside, mode, time=_time(found)))
            yield from _list(name, below, folder, path, pending)
        finally:
            os.close(folder)


def _list(
    name: bytes, below: bytes, folder: int, path: Path, pending: list[bytes]
) -> Iterator[Item]:
    """What is in one directory; directories in it go to `pending`."""
    with os.scandir(folder) as found:
        children = sorted(found, key=lambda child: child.name)
    for child in children:
        inner = b"/".join(filter(None, (below, os.fsencode(child.name))))
        inside = b"/".join(filter(None, (name, inner)))
        if child.is_symlink():
            target = os.fsencode(os.readlink(child.name, dir_fd=folder))
            time = _time(child.stat(follow_symlinks=False))
            yield _file(_normal(inside), packets.LINK, 0, target, time), None
        elif child.is_dir(follow_symlinks=False):
            pending.append(inner)
        else:
            kind = child.stat(follow_symlinks=False).st_mode
            where = path / os.fsdecode(inner)
            try:
                yield _open(_normal(inside), where, kind, None, folder)
            except OSError as error:
                raise _unreadable(inside, where, error) from error


def _reach(top: int, below: bytes) -> int:
    here = os.open(".", _FOLDER, dir_fd=top)
    for part in filter(None, below.split(b"/")):
        above = here
        try:
            here = os.open(part, _FOLDER, dir_fd=above)
        finally:
            os.close(above)
    return here
