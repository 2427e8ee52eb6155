"""What is done with collected files: kept in memory, written to a directory, or only summed up.

The porter hands over a small file as bytes and a large one as a descriptor. Nothing larger than
CHUNK is held here on its way, holes are not read, and all that blocks is done in a thread, which
stops at the next CHUNK when the run is cancelled.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Protocol

import trio

from sandboxd.errors import JobError
from sandboxd.job import Job
from sandboxd.linux import packets
from sandboxd.linux.packets import FILE, Entry
from sandboxd.linux.paths import open_beneath
from sandboxd.result import Artifact

CHUNK = 1 << 20
_ZEROS = bytes(CHUNK)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_STAGE = ".sandboxd-"
"""How the directory is called in which files lie until all are there."""


class Sink(Protocol):
    """Where collected files go."""

    blocks: bool
    """Whether to take even a small one may take a while."""

    def take(self, entry: Entry, source: int | None) -> Artifact: ...


class Memory:
    """Into the result."""

    blocks = False

    def take(self, entry: Entry, source: int | None) -> Artifact:
        data = entry.content
        if source is not None:
            data = read(source, size_of(entry), 0)
        return _artifact(entry, len(data), hashlib.sha256(data).hexdigest(), data)


class Sum:
    """Nowhere: who asks for them reads them afterwards."""

    blocks = False

    def take(self, entry: Entry, source: int | None) -> Artifact:
        if source is None:
            digest = hashlib.sha256(entry.content)
            return _artifact(entry, len(entry.content), digest.hexdigest())
        digest = hashlib.sha256()
        for _, data, _ in _pieces(source, size_of(entry)):
            digest.update(data)
        return _artifact(entry, size_of(entry), digest.hexdigest())


class Folder:
    """Below a directory of the caller's, where other things may be and change.

    All files are written to a directory of our own in it first. When the last one is there, each is
    renamed to its place: complete, or not at all. No link is followed on the way to that place
    (openat2(2)), and only a file is replaced. Until then nothing is to be seen of them, and what
    fails or is cancelled takes them with it.
    """

    blocks = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._top = self._stage = -1
        self._name = ""
        self._files: list[str] = []

    def open(self) -> None:
        self._name = _STAGE + os.urandom(8).hex()
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._top = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            os.mkdir(self._name, 0o700, dir_fd=self._top)
            self._stage = os.open(self._name, _FOLDER, dir_fd=self._top)
        except OSError as error:
            raise self._error(None, error) from error

    def take(self, entry: Entry, source: int | None) -> Artifact:
        path = os.fsdecode(entry.name)
        _check_name(path, self._path)
        name = str(len(self._files))
        self._files.append(path)
        try:
            made = os.open(name, _NEW, entry.mode & 0o777, dir_fd=self._stage)  # and our umask
            try:
                size, digest = _write(made, entry, source)
            finally:
                os.close(made)
        except OSError as error:
            raise self._error(path, error) from error
        return _artifact(entry, size, digest)

    def publish(self) -> None:
        """Everything to its place; JobError before anything is, if something is in the way."""
        for above, numbers in self._by_folder():
            self._check(above, numbers)
        for above, numbers in self._by_folder():
            path = self._files[numbers[0]]
            try:
                folder = self._enter(os.fsencode(above))
                try:
                    for number in numbers:
                        path = self._files[number]
                        name = path.rpartition("/")[2]
                        os.rename(str(number), name, src_dir_fd=self._stage, dst_dir_fd=folder)
                finally:
                    os.close(folder)
            except OSError as error:
                raise self._error(path, error) from error

    def _by_folder(self) -> Iterator[tuple[str, list[int]]]:
        """Directories, and the numbers of the files that belong into each: they come together."""
        every = range(len(self._files))
        for above, numbers in groupby(every, lambda one: self._files[one].rpartition("/")[0]):
            yield above, list(numbers)

    def close(self) -> None:
        """What has not got to its place goes; also after open() failed."""
        if self._stage >= 0:
            for number in range(len(self._files)):
                with suppress(OSError):
                    os.unlink(str(number), dir_fd=self._stage)
            os.close(self._stage)
        if self._top >= 0:
            with suppress(OSError):
                os.rmdir(self._name, dir_fd=self._top)
            os.close(self._top)
        self._top = self._stage = -1

    def _check(self, above: str, numbers: list[int]) -> None:
        """Whether a file, or nothing, is where each of them belongs."""
        path = self._files[numbers[0]]
        try:
            folder = open_beneath(self._top, os.fsencode(above), os.O_PATH | os.O_DIRECTORY)
            try:
                for number in numbers:
                    path = self._files[number]
                    _check_free(folder, path.rpartition("/")[2])
            finally:
                os.close(folder)
        except FileNotFoundError:  # no such directory yet
            return
        except OSError as error:
            raise self._error(path, error) from error

    def _enter(self, path: bytes) -> int:
        """The directory, and what lacks on the way."""
        try:
            return open_beneath(self._top, path, _FOLDER)
        except FileNotFoundError:
            above, _, name = path.rpartition(b"/")
            folder = self._enter(above)
            try:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=folder)
                return open_beneath(folder, name, _FOLDER)
            finally:
                os.close(folder)

    def _error(self, path: str | None, error: OSError) -> JobError:
        where = self._path if path is None else f"{self._path}/{path}"
        hint = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return JobError(f"collect_to: {where}: {error.strerror}", hint=hint)


def _check_free(folder: int, name: str) -> None:
    try:
        there = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(there):
        raise FileExistsError(errno.EEXIST, "there is something else of that name")


def _check_name(path: str, top: Path) -> None:
    """The porter gives no others; but here one would be written to."""
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise JobError(f"collect_to: {top}: {path!r} is no name of a file")


def size_of(entry: Entry) -> int:
    (size,) = packets.SIZE.unpack(entry.content)
    return int(size)


def _artifact(entry: Entry, size: int, digest: str, data: bytes = b"") -> Artifact:
    path = os.fsdecode(entry.name)
    return Artifact(path=path, bytes=size, sha256=digest, mode=entry.mode, data=data)


def _write(made: int, entry: Entry, source: int | None) -> tuple[int, str]:
    """Size and sha256 of what was written; holes stay holes."""
    digest = hashlib.sha256()
    if source is None:
        digest.update(entry.content)
        _write_all(made, entry.content, 0)
        return len(entry.content), digest.hexdigest()
    size = size_of(entry)
    for at, data, is_hole in _pieces(source, size):
        digest.update(data)
        if not is_hole:
            _write_all(made, data, at)
    os.ftruncate(made, size)
    return size, digest.hexdigest()


def _write_all(to: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(to, view, at)
        view, at = view[done:], at + done


def read(source: int, count: int, at: int) -> bytes:
    """So many bytes of a file, fewer only at its end: above 2 GB the kernel stops early."""
    data = os.pread(source, count, at)
    while len(data) < count and (more := os.pread(source, count - len(data), at + len(data))):
        data += more
    return data


def _pieces(source: int, size: int) -> Iterator[tuple[int, bytes | memoryview, bool]]:
    """Offset, data and whether that is a hole: all of a file, no more than it had when found."""
    for start, end, is_hole in _runs(source, size):
        at = start
        while at < end:
            trio.from_thread.check_cancelled()
            count = min(CHUNK, end - at)
            data = memoryview(_ZEROS)[:count] if is_hole else os.pread(source, count, at)
            if not data:
                raise OSError(errno.EIO, "it became shorter while it was read")
            yield at, data, is_hole
            at += len(data)


def _runs(source: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """Where data and holes begin and end: SEEK_DATA and SEEK_HOLE of lseek(2)."""
    at = 0
    while at < size:
        try:
            data = min(os.lseek(source, at, os.SEEK_DATA), size)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data from here to the end
                raise
            data = size
        if data > at:
            yield at, data, True
        if data < size:
            at = min(os.lseek(source, data, os.SEEK_HOLE), size)
            yield data, at, False
        else:
            at = size


# -- where a job wants them --------------------------------------------------------------------


@asynccontextmanager
async def open_sink(job: Job) -> AsyncIterator[Sink]:
    """The job's sink. What is in it counts when the block is left without an error."""
    if not isinstance(job.collect_to, Path):
        yield Memory() if job.collect_to == "memory" else Sum()
        return
    folder = Folder(job.collect_to)
    try:
        await trio.to_thread.run_sync(folder.open)
        yield folder
        await trio.to_thread.run_sync(folder.publish)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(folder.close)


def check_place(job: Job) -> None:
    """JobError now for what would be one after the run: no directory, or one that is closed."""
    path = job.collect_to
    if not isinstance(path, Path) or not job.collect:
        return
    there = next((one for one in (path, *path.absolute().parents) if os.path.lexists(one)), path)
    if not there.is_dir():
        reason = errno.ENOTDIR
    elif not os.access(there, os.W_OK | os.X_OK):
        reason = errno.EACCES
    else:
        return
    raise JobError(f"collect_to: {there}: {os.strerror(reason)}")


def save(artifacts: Iterable[Artifact], path: Path) -> None:
    """Files that came with a result, to where a run would have written them."""
    folder = Folder(path)
    try:
        folder.open()
        for artifact in artifacts:
            folder.take(Entry(FILE, os.fsencode(artifact.path), artifact.mode, artifact.data), None)
        folder.publish()
    finally:
        folder.close()
