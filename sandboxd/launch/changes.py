"""What a dead job changed in its root, read from the upper layer of its overlay.

Two things come out: a layer as the OCI's image specification has it (layer.md), a tar archive with
whiteouts; and a list of what was added, changed and deleted. What lies in an upper was left by a
hostile program: no link is followed, nothing but regular files and directories is opened, and what
a layer cannot have is left out and counted: sockets, device nodes, set-user-id bits, foreign
attributes, names that would be whiteouts, and what is too deep or too large.
"""

from __future__ import annotations

import os
import stat
import tarfile

from sandboxd.images.tar import CHUNK, DEEPEST, LONGEST_PATH, MOST_PIECES
from sandboxd.launch.tree import NOT_OURS, OPAQUE, OPAQUE_ATTRIBUTES, WHITEOUT

TYPE_CHECKING = False  # as typing's, which is not imported for it
if TYPE_CHECKING:
    from typing import Any

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_MOST_ATTRIBUTES = 1 << 18
"""Bytes of the attributes of one file."""
_BLOCK = 512
_SET_ID = stat.S_ISUID | stat.S_ISGID
_ADDED, _CHANGED, _DELETED = b"A", b"C", b"D"


class Full(Exception):
    """There is more than a layer may have."""


class Below:
    """A directory as the layers below show it: its descriptors, the topmost first."""

    def __init__(self, folders: list[int]) -> None:
        self.folders = folders

    def has(self, name: bytes) -> bool:
        for folder in self.folders:
            seen = _stat(folder, name)
            if seen is not None:
                return not is_whiteout(seen)
        return False

    def names(self) -> set[bytes]:
        every = {name for folder in self.folders for name in map(os.fsencode, os.listdir(folder))}
        return {name for name in every if self.has(name)}

    def enter(self, name: bytes) -> Below:
        """The directory of this name, as far as the layers have it as one."""
        found: list[int] = []
        for folder in self.folders:
            seen = _stat(folder, name)
            if seen is None:
                continue
            if not stat.S_ISDIR(seen.st_mode):
                break
            found.append(os.open(name, _FOLDER, dir_fd=folder))
            if is_opaque(found[-1]):
                break
        return Below(found)

    def close(self) -> None:
        for folder in self.folders:
            os.close(folder)


def _stat(folder: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def is_whiteout(seen: os.stat_result) -> bool:
    """A character device 0:0 (overlayfs.rst, "whiteouts and opaque directories")."""
    return stat.S_ISCHR(seen.st_mode) and seen.st_rdev == 0


def is_opaque(folder: int) -> bool:
    there = os.listxattr(folder)
    marked = any(name in there and os.getxattr(folder, name) == b"y" for name in OPAQUE_ATTRIBUTES)
    return marked or _stat(folder, OPAQUE) is not None


class Writer:
    """The layer and the list. `left` is what may still come."""

    def __init__(self, layer: int, changes: int, left: tuple[int, int], ids: list[int]) -> None:
        self._layer = open(layer, "wb", buffering=CHUNK, closefd=False)  # noqa: SIM115
        self._changes = open(changes, "wb", buffering=CHUNK, closefd=False)  # noqa: SIM115
        self.bytes, self._entries = left
        self._ids = ids
        self._pending: list[tuple[bytes, tarfile.TarInfo]] = []
        self._linked: dict[tuple[int, int], bytes] = {}
        self.counts: dict[str, int] = {}

    def finish(self) -> None:
        self._layer.write(bytes(2 * _BLOCK))
        self._layer.flush()
        self._changes.flush()

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def change(self, kind: bytes, path: bytes) -> None:
        self.count({_ADDED: "added", _CHANGED: "changed", _DELETED: "deleted"}[kind])
        self._changes.write(kind + b" " + path + b"\0")

    # -- directories that are only there for what is in them

    def suspend(self, path: bytes, folder: int) -> int:
        """A directory that counts once something in it does; a mark to leave it by."""
        self._pending.append((path, self._info(path, os.fstat(folder), folder)))
        return len(self._pending)

    def leave(self, mark: int) -> None:
        del self._pending[mark - 1 :]

    def _flush(self) -> None:
        for path, info in self._pending:
            self._write(info)
            self.change(_CHANGED, path)
        self._pending.clear()

    # -- entries

    def folder(self, kind: bytes, path: bytes, folder: int) -> None:
        self._flush()
        self._write(self._info(path, os.fstat(folder), folder))
        self.change(kind, path)

    def hidden(self, path: bytes) -> None:
        """What a lower layer has is not there any more."""
        self._flush()
        above, _, name = path.rpartition(b"/")
        self.mark(above, WHITEOUT + name)
        self.change(_DELETED, path)

    def mark(self, above: bytes, name: bytes) -> None:
        self._flush()
        self._write(tarfile.TarInfo(os.fsdecode(above + b"/" + name if above else name)))

    def other(self, kind: bytes, path: bytes, seen: os.stat_result, above: int) -> None:
        """Anything but a directory; what a layer cannot have is counted."""
        what = _unwanted(seen) or ("large" if seen.st_size > self.bytes else "")
        if what:
            self.count(what)
            return
        self._flush()
        name = path.rpartition(b"/")[2]
        identity = (seen.st_dev, seen.st_ino)
        if seen.st_nlink > 1 and identity in self._linked:
            info = self._info(path, seen, -1)
            info.type, info.linkname = tarfile.LNKTYPE, os.fsdecode(self._linked[identity])
            self._write(info)
        elif stat.S_ISREG(seen.st_mode):
            self._linked[identity] = path
            self._file(path, os.open(name, _FILE, dir_fd=above))
        else:
            self._linked[identity] = path
            info = self._info(path, seen, -1)
            info.type = tarfile.FIFOTYPE
            if stat.S_ISLNK(seen.st_mode):
                info.type = tarfile.SYMTYPE
                info.linkname = os.fsdecode(os.readlink(name, dir_fd=above))
            self._write(info)
        self.change(kind, path)

    def _file(self, path: bytes, opened: int) -> None:
        try:
            seen = os.fstat(opened)
            self.bytes -= seen.st_size
            info = self._info(path, seen, opened)
            pieces = _pieces(opened, seen.st_size)
            head = b""
            info.size = sum(length for _, length in pieces)
            if info.size < seen.st_size:
                numbers = [len(pieces), *(number for piece in pieces for number in piece)]
                head = b"".join(b"%d\n" % number for number in numbers)
                head += bytes(-len(head) % _BLOCK)
                info.pax_headers = {
                    **info.pax_headers, "GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                    "GNU.sparse.name": info.name, "GNU.sparse.realsize": str(seen.st_size),
                }  # fmt: skip
                info.size += len(head)
            self._write(info)
            self._layer.write(head)
            for start, length in pieces:
                self._copy(opened, start, length)
            self._layer.write(bytes(-info.size % _BLOCK))
        finally:
            os.close(opened)

    def _copy(self, opened: int, start: int, length: int) -> None:
        end = start + length
        while start < end:
            data = os.pread(opened, min(CHUNK, end - start), start)
            if not data:
                raise OSError("a file became shorter while it was read")
            self._layer.write(data)
            start += len(data)

    def _write(self, info: tarfile.TarInfo) -> None:
        self._entries -= 1
        if self._entries < 0:
            raise Full
        self._layer.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _info(self, path: bytes, seen: os.stat_result, opened: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo(os.fsdecode(path))
        is_folder = stat.S_ISDIR(seen.st_mode)
        info.type = tarfile.DIRTYPE if is_folder else tarfile.REGTYPE
        info.mode = stat.S_IMODE(seen.st_mode)
        if info.mode & _SET_ID and not is_folder:
            self.count("setid")
            info.mode &= ~_SET_ID
        info.uid, info.gid = self._owner(seen)
        info.mtime = max(0, int(seen.st_mtime))
        if opened >= 0:
            info.pax_headers = self._attributes(opened)
        return info

    def _owner(self, seen: os.stat_result) -> tuple[int, int]:
        """The run's own uid, which nobody has afterwards, as it was seen inside."""
        if not self._ids:
            return seen.st_uid, seen.st_gid
        own, uid, gid = self._ids
        inside = uid if seen.st_uid == own else seen.st_uid
        return inside, gid if seen.st_gid == own else seen.st_gid

    def _attributes(self, opened: int) -> dict[str, str]:
        found: dict[str, str] = {}
        size = 0
        for name in os.listxattr(opened):
            key = os.fsencode(name)
            if key.startswith(NOT_OURS):
                continue
            value = os.getxattr(opened, name) if key.startswith(b"user.") else b""
            size += len(key) + len(value)
            if not key.startswith(b"user.") or b"=" in key or size > _MOST_ATTRIBUTES:
                self.count("xattrs")
                continue
            found[f"SCHILY.xattr.{name}"] = os.fsdecode(value)
        return found


def _unwanted(seen: os.stat_result) -> str:
    if stat.S_ISSOCK(seen.st_mode):
        return "sockets"
    return "devices" if stat.S_ISCHR(seen.st_mode) or stat.S_ISBLK(seen.st_mode) else ""


def _pieces(opened: int, size: int) -> list[tuple[int, int]]:
    """Where a file has data (lseek(2), SEEK_DATA); what is too much in pieces is one at the end."""
    found: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            start = os.lseek(opened, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            break
        at = min(os.lseek(opened, start, os.SEEK_HOLE), size)
        if len(found) >= MOST_PIECES - 1:
            at = size
        found.append((start, at - start))
    return found


class Walk:
    """Goes through an upper layer, beside the layers below it.

    `ours` is what sandboxd itself made there: path -> what is in the file, None for all else.
    """

    def __init__(self, writer: Writer, ours: dict[bytes, bytes | None], *, marks: bool) -> None:
        self._writer = writer
        self._ours = ours
        self._marks = marks
        """Files called .wh.NAME are whiteouts of fuse-overlayfs, and not the job's."""

    def visit(self, path: bytes, folder: int, below: Below, *, cut: bool) -> None:
        """Everything in one directory. `cut`: nothing of what is below it is seen any more."""
        there: set[bytes] = set()
        for name in sorted(map(os.fsencode, os.listdir(folder))):
            seen = os.stat(name, dir_fd=folder, follow_symlinks=False)
            inner = path + b"/" + name if path else name
            if name.startswith(WHITEOUT):
                hidden = name[len(WHITEOUT) :]
                if not self._marks:
                    self._writer.count("names")
                elif name != OPAQUE and below.has(hidden) and not cut:
                    self._writer.hidden(path + b"/" + hidden if path else hidden)
            elif is_whiteout(seen):
                if below.has(name) and not cut:
                    self._writer.hidden(inner)
            elif len(inner) >= LONGEST_PATH or inner.count(b"/") >= DEEPEST:
                self._writer.count("deep")
            else:
                there.add(name)
                self._entry(inner, seen, folder, below, cut=cut)
        for name in sorted(below.names() - there) if cut else ():
            self._writer.change(_DELETED, path + b"/" + name if path else name)

    def _entry(
        self, path: bytes, seen: os.stat_result, above: int, below: Below, *, cut: bool
    ) -> None:
        name = path.rpartition(b"/")[2]
        kind = _CHANGED if below.has(name) else _ADDED
        if stat.S_ISDIR(seen.st_mode):
            folder = os.open(name, _FOLDER, dir_fd=above)
            lower = below.enter(name)
            try:
                self._folder(kind, path, folder, lower, cut=cut)
            finally:
                os.close(folder)
                lower.close()
        elif not self._is_ours(path, seen, above):
            self._writer.other(kind, path, seen, above)

    def _folder(self, kind: bytes, path: bytes, folder: int, below: Below, *, cut: bool) -> None:
        if path in self._ours:
            mark = self._writer.suspend(path, folder)
            self.visit(path, folder, below, cut=cut)
            self._writer.leave(mark)
            return
        self._writer.folder(kind, path, folder)
        opaque = is_opaque(folder) and bool(below.folders) and not cut
        if opaque:
            self._writer.mark(path, OPAQUE)
        self.visit(path, folder, below, cut=cut or opaque)

    def _is_ours(self, path: bytes, seen: os.stat_result, above: int) -> bool:
        """As it was made: a link, or a file with what was written into it."""
        if path not in self._ours:
            return False
        content = self._ours[path]
        if content is None or not stat.S_ISREG(seen.st_mode):
            return content is None and not stat.S_ISREG(seen.st_mode)
        opened = os.open(path.rpartition(b"/")[2], _FILE, dir_fd=above)
        try:
            return os.pread(opened, len(content) + 1, 0) == content
        finally:
            os.close(opened)


def pack(request: dict[str, Any], area: int, layer: int, changes: int) -> dict[str, Any]:
    """Write the layer and the list of changes; what there was, counted."""
    writer = Writer(layer, changes, (request["bytes"], request["entries"]), request["ids"])
    ours = {
        os.fsencode(path): None if content is None else content.encode()
        for path, content in request["ours"].items()
    }
    walk = Walk(writer, ours, marks=request["marks"])
    complete = True
    try:
        for tree in request["trees"]:
            _tree(walk, tree, area)
    except Full:
        complete = False
    writer.finish()
    return {"counts": writer.counts, "complete": complete}


def _tree(walk: Walk, tree: dict[str, Any], area: int) -> None:
    try:
        folder = os.open(tree["path"], _FOLDER, dir_fd=area)
    except FileNotFoundError:
        return
    below = Below([])
    try:
        for path in tree["lowers"]:
            below.folders.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        walk.visit(os.fsencode(tree["prefix"]), folder, below, cut=False)
    finally:
        os.close(folder)
        below.close()
