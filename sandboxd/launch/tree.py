"""Makes the entries of a layer below one directory, as overlayfs wants to find them there.

Nothing leaves the directory: the folder of an entry is opened by openat2(2), beneath it and
through no link, and what is made in it has a name of one part. What is there already is replaced,
never written to.

Whiteouts (OCI image specification, layer.md) hide what a lower layer has. For overlayfs that is a
character device 0:0, which needs no privilege since Linux 5.8; a directory that hides all below it
has an attribute. Kernel overlayfs (userxattr) and fuse-overlayfs read both. Not chosen: attributes
on empty files, which only Linux 6.7 knows, and .wh. files, which only fuse-overlayfs knows.
"""

from __future__ import annotations

import errno
import os
import stat

from sandboxd.images.tar import (
    CHUNK,
    DEVICE,
    DIRECTORY,
    FIFO,
    FILE,
    HARDLINK,
    SYMLINK,
    TarError,
    shown,
)
from sandboxd.linux.paths import open_beneath

TYPE_CHECKING = False  # as typing's, which is not imported for it
if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandboxd.images.tar import Entry

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."
# What the kernel reads with the mount option userxattr, and what fuse-overlayfs does.
OPAQUE_ATTRIBUTES = ("user.overlay.opaque", "user.fuseoverlayfs.opaque")
# Attributes that would steer an overlay, or another program that unpacks images.
NOT_OURS = (
    b"user.overlay.",
    b"user.fuseoverlayfs.",
    b"user.containers.",
    b"user.rootlesscontainers",
)

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_HOLE = bytes(CHUNK)
_LAST_TIME = 1 << 33  # seconds; no file system here keeps later ones
_SET_ID = stat.S_ISUID | stat.S_ISGID
MOST_NAMES = 1 << 28
"""Bytes of all names of a layer: some are remembered until its end."""
_LOW_IDS = 60000
"""Above are nobody and what systems make up for themselves."""


class Report:
    """What was made and what was left out, counted."""

    __slots__ = (
        *("bytes", "devices", "entries", "highest_id", "owners", "setid", "whiteouts", "xattrs"),
    )

    def __init__(self) -> None:
        self.entries = self.bytes = self.whiteouts = self.highest_id = 0
        self.devices = self.setid = self.xattrs = self.owners = 0

    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


class Tree:
    """A directory being filled. `ids` is how many ids from 0 on exist here; 1: all are ours.

    `most` is how many things there may be, those directories included that no entry is about.
    """

    def __init__(self, root: int, ids: int, most: int) -> None:
        self.report = Report()
        self._root = root
        self._ids = ids
        self._most = most
        self._names = 0
        self._path = b""
        self._folder = open_beneath(root, b"", _FOLDER)
        self._times: dict[bytes, int] = {}
        self._whiteouts: dict[tuple[bytes, bytes], None] = {}
        self._opaque: dict[bytes, None] = {}

    def close(self) -> None:
        os.close(self._folder)

    def add(self, entry: Entry, content: Iterable[tuple[int, bytes]]) -> None:
        """Make one entry; TarError if it cannot be meant, OSError if it cannot be made."""
        self._count(entry.name, entry.target)
        folder, _, name = entry.name.rpartition(b"/")
        if name.startswith(WHITEOUT):
            self._hide(folder, name)
        elif entry.kind == DEVICE:
            self.report.devices += 1
        elif entry.kind == DIRECTORY:
            self._directory(entry)
        else:
            self._enter(folder)
            if entry.kind == HARDLINK:
                self._hardlink(name, entry)
                return
            self._free(name)
            if entry.kind == FILE:
                self._file(name, entry, content)
            else:
                self._special(name, entry)

    def _count(self, *names: bytes) -> None:
        self.report.entries += 1
        if self.report.entries > self._most:
            raise TarError(f"more than {self._most} entries")
        self._names += sum(map(len, names))
        if self._names > MOST_NAMES:
            raise TarError(f"more than {MOST_NAMES} bytes of names")

    # -- where

    def _enter(self, path: bytes) -> None:
        """Make `path` the current folder, and what lacks on the way."""
        if path == self._path:
            return
        try:
            folder = open_beneath(self._root, path, _FOLDER)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise _not_a_folder(path, error) from error
            folder = self._make_folders(path)
        os.close(self._folder)
        self._folder, self._path = folder, path

    def _make_folders(self, path: bytes) -> int:
        self._count()
        above, _, name = path.rpartition(b"/")
        try:
            folder = open_beneath(self._root, above, _FOLDER)
        except FileNotFoundError:
            folder = self._make_folders(above)
        except OSError as error:
            raise _not_a_folder(above, error) from error
        try:
            os.mkdir(name, 0o755, dir_fd=folder)
            return open_beneath(folder, name, _FOLDER)
        except OSError as error:
            raise _not_a_folder(path, error) from error
        finally:
            os.close(folder)

    def _free(self, name: bytes) -> None:
        """The last of several entries with one name counts; a directory does not go away for it."""
        try:
            os.unlink(name, dir_fd=self._folder)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            where = shown(self._path + b"/" + name)
            raise TarError(f"{where}: it would take the place of a directory") from None

    # -- what

    def _directory(self, entry: Entry) -> None:
        try:
            self._enter(entry.name)
        except TarError:
            folder, _, name = entry.name.rpartition(b"/")
            self._enter(folder)  # else it is not the last part that is in the way
            self._free(name)
            self._enter(entry.name)
        self._dress(self._folder, entry)
        self._times[entry.name] = entry.mtime

    def _file(self, name: bytes, entry: Entry, content: Iterable[tuple[int, bytes]]) -> None:
        made = os.open(name, _NEW, 0o600, dir_fd=self._folder)
        try:
            for at, data in content:
                _write(made, data, at)
            if entry.size and os.fstat(made).st_size != entry.size:
                os.ftruncate(made, entry.size)  # it ends with a hole
            self._dress(made, entry)
            os.utime(made, ns=_times(entry.mtime))
        finally:
            os.close(made)
        self.report.bytes += entry.size

    def _hardlink(self, name: bytes, entry: Entry) -> None:
        """Only to what this layer has: its folder is looked up as every other."""
        if entry.target == entry.name:
            raise TarError(f"{shown(entry.name)}: a link to itself")
        above, _, last = entry.target.rpartition(b"/")
        where = f"{shown(entry.name)}: a link to {shown(entry.target)}"
        try:
            folder = open_beneath(self._root, above, _FOLDER)
        except OSError as error:
            raise TarError(f"{where}, which is not in this layer") from error
        try:
            if stat.S_ISDIR(os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode):
                raise TarError(f"{where}, a directory")
            self._free(name)
            os.link(last, name, src_dir_fd=folder, dst_dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            raise TarError(f"{where}, which is not in this layer") from None
        finally:
            os.close(folder)

    def _special(self, name: bytes, entry: Entry) -> None:
        if entry.kind == SYMLINK:
            os.symlink(entry.target, name, dir_fd=self._folder)
        elif entry.kind == FIFO:
            os.mkfifo(name, 0o600, dir_fd=self._folder)
        ids = self._owner(entry)
        if ids is not None:
            os.chown(name, *ids, dir_fd=self._folder, follow_symlinks=False)
        if entry.kind == FIFO:  # made a moment ago, and nobody else is here
            os.chmod(name, self._mode(entry), dir_fd=self._folder)
        self.report.xattrs += len(entry.xattrs)  # the kernel allows none (xattr(7))
        os.utime(name, ns=_times(entry.mtime), dir_fd=self._folder, follow_symlinks=False)

    # -- attributes

    def _dress(self, made: int, entry: Entry) -> None:
        ids = self._owner(entry)
        if ids is not None:
            os.fchown(made, *ids)
        os.fchmod(made, self._mode(entry))
        for key, value in entry.xattrs.items():
            if not key.startswith(b"user.") or key.startswith(NOT_OURS) or b"\0" in key:
                self.report.xattrs += 1
                continue
            try:
                os.setxattr(made, key, value)
            except OSError:  # too long, or the file system has none
                self.report.xattrs += 1

    def _mode(self, entry: Entry) -> int:
        if entry.mode & _SET_ID and entry.kind == FILE:
            self.report.setid += 1
        return entry.mode & ~_SET_ID

    def _owner(self, entry: Entry) -> tuple[int, int] | None:
        """Ids of this user namespace; what does not exist here belongs to root."""
        if self._ids == 1:
            self.report.owners += (entry.uid, entry.gid) != (0, 0)
            return None
        ids = [one if one < self._ids else 0 for one in (entry.uid, entry.gid)]
        self.report.owners += ids != [entry.uid, entry.gid]
        low = [one for one in ids if one < _LOW_IDS]
        self.report.highest_id = max(self.report.highest_id, *low, 0)
        return ids[0], ids[1]

    # -- what hides

    def _hide(self, folder: bytes, name: bytes) -> None:
        if name == OPAQUE:
            self._opaque[folder] = None
        elif not name.startswith(_AUFS):  # its own book-keeping, of no meaning to others
            hidden = name[len(WHITEOUT) :]
            if hidden in (b"", b".", b".."):
                raise TarError(f"{shown(folder + b'/' + name)}: a whiteout of nothing")
            self._whiteouts[folder, hidden] = None

    def finish(self) -> None:
        """Whiteouts, which are about lower layers only; and the times of directories, last."""
        for folder, name in self._whiteouts:
            self._whiteout(folder, name)
        for folder in self._opaque:
            self._enter(folder)
            self.report.whiteouts += 1
            for attribute in OPAQUE_ATTRIBUTES:
                os.setxattr(self._folder, attribute, b"y")
        for path in reversed(self._times):
            try:
                self._enter(path)
            except TarError:  # something else has taken its place
                continue
            os.utime(self._folder, ns=_times(self._times[path]))

    def _whiteout(self, folder: bytes, name: bytes) -> None:
        if folder in self._opaque:
            return
        self._enter(folder)
        try:
            there = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            self.report.whiteouts += 1
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=self._folder)
            return
        if stat.S_ISDIR(there.st_mode):  # anything else hides what is below anyway
            self._opaque[folder + b"/" + name if folder else name] = None


def _not_a_folder(path: bytes, error: OSError) -> Exception:
    if error.errno == errno.ELOOP:
        return TarError(f"{shown(path)}: the way there leads through a symbolic link")
    if error.errno in (errno.ENOTDIR, errno.EXDEV):
        return TarError(f"{shown(path)}: the way there is no directory")
    return error


def _write(to: int, data: bytes, at: int) -> None:
    """Runs of zeros become holes: a bomb of them fills no disk."""
    if data == _HOLE[: len(data)]:
        os.ftruncate(to, at + len(data))
        return
    view = memoryview(data)
    while view:
        done = os.pwrite(to, view, at)
        view, at = view[done:], at + done


def _times(mtime: int) -> tuple[int, int]:
    time = min(mtime, _LAST_TIME) * 10**9
    return time, time
