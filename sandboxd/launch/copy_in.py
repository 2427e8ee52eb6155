"""Makes files in the working directory of a sandbox whose program has not started yet.

Nobody else writes there at this time, but nothing depends on it: every component of a name is
opened by itself and without following links (so the walk cannot leave the directory), and nothing
that exists is written to: a file is made anew, in place of one that has its name.
"""

from __future__ import annotations

import errno
import os

from sandboxd.linux.packets import (
    DIRECTORY,
    HARDLINK,
    LINK,
    NOW,
    RANGE,
    REFUSED,
    SOURCE,
    Entry,
)

TYPE_CHECKING = False  # as typing's, which is not imported for it
if TYPE_CHECKING:
    from collections.abc import Iterable

DISK = b"limits.disk"
INODES = b"limits.inodes"

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER_MODE = 0o755
_CHUNK = 1 << 20
_MOST = 1 << 30
_ALL = 1 << 62


class Destination:
    """The working directory, whom things in it belong to, and the folder made or found last."""

    def __init__(self, box: int, uid: int, gid: int) -> None:
        self._box = box
        self._uid = uid
        self._gid = gid
        self._path = b""
        self._folder = os.open(b".", _FOLDER, dir_fd=box)

    def close(self) -> None:
        os.close(self._folder)

    def copy_in(self, entries: Iterable[Entry], sources: list[int]) -> Entry | None:
        """What stood in the way of the first that could not be made; None if all are there."""
        remaining = iter(sources)
        for entry in entries:
            source = next(remaining) if entry.kind == SOURCE else None
            try:
                self._make(entry, source)
            except OSError as error:
                return Entry(REFUSED, entry.name, error.errno or errno.EIO, self._limit(error))
        return None

    def _limit(self, error: OSError) -> bytes:
        """Which limit it was, if it was one: a tmpfs says ENOSPC for both of its own."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return b""
        there = os.fstatvfs(self._folder)
        return INODES if there.f_bavail and not there.f_ffree else DISK

    def _make(self, entry: Entry, source: int | None) -> None:
        if entry.kind == DIRECTORY:
            self._enter(entry.name)
            os.fchmod(self._folder, entry.mode)
            if entry.time != NOW:
                os.utime(self._folder, ns=(entry.time, entry.time))
            return
        path, _, name = entry.name.rpartition(b"/")
        self._enter(path)
        if entry.kind == LINK:
            self._link(name, entry)
        elif entry.kind == HARDLINK:
            self._hardlink(name, entry.content)
        else:
            self._file(name, entry, source)

    def _enter(self, path: bytes) -> None:
        """Make `path` the current folder, and what lacks on the way."""
        if path == self._path:
            return
        below = path.startswith(self._path + b"/") if self._path else True
        rest = path[len(self._path) :].lstrip(b"/") if below else path
        here = os.open(b".", _FOLDER, dir_fd=self._folder if below else self._box)
        try:
            for part in filter(None, rest.split(b"/")):
                above, here = here, self._subfolder(here, part)
                os.close(above)
        except BaseException:
            os.close(here)
            raise
        os.close(self._folder)
        self._folder, self._path = here, path

    def _subfolder(self, above: int, name: bytes) -> int:
        try:
            return os.open(name, _FOLDER, dir_fd=above)
        except FileNotFoundError:
            os.mkdir(name, 0o700, dir_fd=above)
        made = os.open(name, _FOLDER, dir_fd=above)
        try:
            os.fchown(made, self._uid, self._gid)
            os.fchmod(made, _FOLDER_MODE)
        except BaseException:
            os.close(made)
            raise
        return made

    def _link(self, name: bytes, entry: Entry) -> None:
        try:
            os.symlink(entry.content, name, dir_fd=self._folder)
        except FileExistsError:
            os.unlink(name, dir_fd=self._folder)
            os.symlink(entry.content, name, dir_fd=self._folder)
        os.chown(name, self._uid, self._gid, dir_fd=self._folder, follow_symlinks=False)
        if entry.time != NOW:
            times = entry.time, entry.time
            os.utime(name, ns=times, dir_fd=self._folder, follow_symlinks=False)

    def _hardlink(self, name: bytes, target: bytes) -> None:
        """The target's folder is looked up as every other; its last part is not followed."""
        *above, last = target.split(b"/")
        folder = os.dup(self._box)
        try:
            for part in above:
                below = os.open(part, _FOLDER, dir_fd=folder)
                os.close(folder)
                folder = below
            try:
                self._name(folder, last, name)
            except FileExistsError:
                os.unlink(name, dir_fd=self._folder)
                self._name(folder, last, name)
        finally:
            os.close(folder)

    def _name(self, folder: int, there: bytes, here: bytes) -> None:
        os.link(there, here, src_dir_fd=folder, dst_dir_fd=self._folder, follow_symlinks=False)

    def _file(self, name: bytes, entry: Entry, source: int | None) -> None:
        try:
            made = os.open(name, _NEW, 0o600, dir_fd=self._folder)
        except FileExistsError:
            os.unlink(name, dir_fd=self._folder)
            made = os.open(name, _NEW, 0o600, dir_fd=self._folder)
        try:
            if source is None:
                _write(made, entry.content)
            else:
                _copy(source, made, entry.content)
            os.fchown(made, self._uid, self._gid)
            os.fchmod(made, entry.mode)
            if entry.time != NOW:
                os.utime(made, ns=(entry.time, entry.time))
        finally:
            os.close(made)


def _write(to: int, content: bytes) -> None:
    done = os.write(to, content) if content else 0
    while done < len(content):
        done += os.write(to, content[done:])


def _copy(source: int, to: int, part: bytes) -> None:
    """All of `source` from its beginning, or a RANGE of it; holes stay holes."""
    if part:
        start, length = RANGE.unpack(part)
        if _send(source, to, start, length) < length:
            raise OSError(errno.EIO, "it became shorter while it was read")
        return
    there = os.fstat(source)
    if there.st_blocks * 512 >= there.st_size:  # and where there is no size, as in /proc
        _send(source, to, 0, _ALL)
        return
    at = 0
    try:
        while at < there.st_size:
            at = os.lseek(source, at, os.SEEK_DATA)
            end = os.lseek(source, at, os.SEEK_HOLE)
            os.lseek(to, at, os.SEEK_SET)
            _send(source, to, at, end - at)
            at = end
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data from here to the end (lseek(2))
            raise
    os.ftruncate(to, there.st_size)


def _send(source: int, to: int, start: int, length: int) -> int:
    """So many bytes at most, wherever others who have `source` have read up to."""
    done = 0
    try:
        while count := os.sendfile(to, source, start + done, min(_MOST, length - done)):
            done += count
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without splice, e.g. some FUSE and procfs
            raise
        while content := os.pread(source, min(_CHUNK, length - done), start + done):
            _write(to, content)
            done += len(content)
    return done
