"""What somebody calls an image, looked into: files by their names, in a directory or an archive.

Nothing is unpacked for it: of an archive only the headers are read, and where each file begins. An
archive that has to be decompressed, or comes through a pipe, is written to a nameless file first.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from sandboxd.errors import ImageError
from sandboxd.images import tar
from sandboxd.images.streams import PIECE, compression, plain
from sandboxd.images.unpacking import Limits
from sandboxd.linux.paths import open_beneath

# What lies at the top of an archive of images: an OCI layout, or what docker save writes.
_OF_IMAGES = re.compile(
    rb"oci-layout|index\.json|manifest\.json|repositories|blobs|[0-9a-f]{64}(?:\.json|\.tar)?"
)
_MOST_FILES = 1 << 16
_MOST_LINKS = 8

Read = Callable[[int], bytes]


class Files(Protocol):
    """Files by name. ImageError for what is not there."""

    def has(self, name: str) -> bool: ...
    def reader(self, name: str) -> AbstractContextManager[Read]: ...


@dataclass(frozen=True, slots=True)
class Folder:
    """A directory; no link in it is followed."""

    opened: int

    def has(self, name: str) -> bool:
        try:
            os.close(open_beneath(self.opened, os.fsencode(name), os.O_PATH))
        except OSError:
            return False
        return True

    @contextmanager
    def reader(self, name: str) -> Iterator[Read]:
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
            opened = open_beneath(self.opened, os.fsencode(name), flags)
        except OSError as error:
            raise ImageError(f"{name}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise ImageError(f"{name}: no regular file")
            yield lambda count: os.read(opened, count)
        finally:
            os.close(opened)


@dataclass(frozen=True, slots=True)
class Archive:
    """A tar archive that can be read anywhere."""

    file: BinaryIO
    where: dict[bytes, tuple[int, int]]
    """Name -> offset and length."""
    links: dict[bytes, bytes]

    def has(self, name: str) -> bool:
        return self._place(name) is not None

    def _place(self, name: str) -> tuple[int, int] | None:
        path = os.fsencode(name)
        for _ in range(_MOST_LINKS):  # docker save once wrote a layer once, and links to it
            if path not in self.links:
                break
            path = posixpath.normpath(posixpath.join(posixpath.dirname(path), self.links[path]))
        return self.where.get(path)

    @contextmanager
    def reader(self, name: str) -> Iterator[Read]:
        place = self._place(name)
        if place is None:
            raise ImageError(f"{name}: not in the archive")
        at, left = place

        def read(count: int) -> bytes:
            nonlocal at, left
            self.file.seek(at)
            data = self.file.read(min(count, left))
            at, left = at + len(data), left - len(data)
            return data

        yield read


@dataclass(frozen=True, slots=True)
class Layer:
    """A tar archive that is no archive of images: one layer, as it is."""

    file: BinaryIO

    def read(self, count: int) -> bytes:
        return self.file.read(count)


@contextmanager
def opened(source: str | BinaryIO, scratch: Path, limits: Limits) -> Iterator[Files | Layer]:
    """A directory's or an archive's files, or the one layer that it is."""
    if isinstance(source, str) and os.path.isdir(source):
        folder = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield Folder(folder)
        finally:
            os.close(folder)
        return
    try:
        given: BinaryIO = (
            open(source, "rb", buffering=0)  # noqa: SIM115  closed below, as what was given is
            if isinstance(source, str)
            else source
        )
    except OSError as error:
        raise ImageError(f"{source}: {error.strerror}") from error
    name = source if isinstance(source, str) else "stdin"
    with given, _seekable(given, scratch, limits) as file:
        yield _look(file, name)


@contextmanager
def _seekable(given: BinaryIO, scratch: Path, limits: Limits) -> Iterator[BinaryIO]:
    start = given.read(8) if given.seekable() else b""
    if given.seekable():
        given.seek(0)
        if compression(start) is None:
            yield given
            return
    with tempfile.TemporaryFile(dir=scratch) as file:
        left = limits.bytes + (1 << 30)
        for piece in plain(lambda _: given.read(PIECE)):
            left -= len(piece)
            if left < 0:
                raise ImageError(f"more than {limits.bytes} bytes when unpacked")
            file.write(piece)
        file.seek(0)
        yield file


def _look(file: BinaryIO, name: str) -> Files | Layer:
    """Only what an archive of images consists of makes one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)

    def skip(count: int) -> int:
        at = file.tell()
        return file.seek(min(at + count, size)) - at

    archive = Archive(file, {}, {})
    try:
        for entry in tar.Reader(file.read, skip):
            top = entry.name.partition(b"/")[0]
            if top and not _OF_IMAGES.fullmatch(top):
                break
            if len(archive.where) >= _MOST_FILES:
                raise ImageError(f"an archive of more than {_MOST_FILES} files")
            if entry.kind == tar.FILE:
                archive.where[entry.name] = entry.offset, entry.stored
            elif entry.kind in (tar.SYMLINK, tar.HARDLINK):
                inside = entry.target if entry.kind == tar.SYMLINK else b"/" + entry.target
                archive.links[entry.name] = inside.lstrip(b"/") if inside[:1] == b"/" else inside
        else:
            if archive.has("index.json") or archive.has("manifest.json"):
                return archive
    except tar.TarError as error:
        raise ImageError(f"{name}: {error}") from error
    file.seek(0)
    return Layer(file)
