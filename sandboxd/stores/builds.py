"""The store of builds: what compilers and their like left, by the digest of all that went in.

    objects/KEY/tree/...             the files, as they are bound into sandboxes
    objects/KEY/build.json           what they are (BuildRecord); before it is there, the directory
                                     has another name (folders.py)
    objects/KEY/used                 its time of change is that of the last use
    lock                             shared by who adds, exclusive for who sweeps
    keys                             a byte each for the keys being built (fcntl(2), OFD locks)

A run holds a shared lock on the objects it uses, and only who has the exclusive one removes them.

Whether the files are still what was kept is looked at when a build finds them: size, inode and time
of the last change (ctime, which no program can set) of each, against the record. Where they differ,
or were written before this boot (a crash may have lost content), every digest is made anew. What is
not as it was is removed, and built again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sandboxd import units
from sandboxd.errors import HostError, InternalError, JobError
from sandboxd.reference import Reference
from sandboxd.result import Artifact, Result
from sandboxd.stores import folders

SCHEMA = "sandboxd.build/1"
KIND = "builds"
SIZE_VARIABLE = "SANDBOXD_BUILDS_SIZE"
LARGEST = 4 << 30
"""Bytes of all builds together, where SIZE_VARIABLE names no other."""
OLDEST = 30 * 86400.0
"""Seconds after which a build that nobody used goes."""
_LINE = 4096
_CHUNK = 1 << 20
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIGITS = re.compile("[0-9a-f]{7,64}")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a build."""

    path: bytes
    size: int
    sha256: str
    mode: int
    stamp: tuple[int, ...] = ()
    """Inode, size, ctime in ns."""


class BuildRecord(msgspec.Struct, frozen=True, kw_only=True):
    """build.json."""

    schema: str = SCHEMA
    key: str
    argv: tuple[str, ...]
    """For people: what is no UTF-8 in it is shown as backslashes."""
    made: float
    """Seconds since the epoch."""
    boot: str
    files: tuple[FileRecord, ...]
    result: Result

    @property
    def size(self) -> int:
        """Bytes, each file rounded up as a file system would."""
        return sum(-(-file.size // _LINE) * _LINE for file in self.files)

    def reference(self) -> Reference:
        return Reference(key=self.key, names=tuple(os.fsdecode(one.path) for one in self.files))

    def whole_result(self) -> Result:
        """With the files that were collected; their content is in the store."""
        files = tuple(
            Artifact(path=os.fsdecode(one.path), bytes=one.size, sha256=one.sha256, mode=one.mode)
            for one in self.files
        )
        return msgspec.structs.replace(self.result, artifacts=files)


@dataclass(frozen=True, slots=True)
class Kept:
    """A build in the store."""

    record: BuildRecord
    used: float


def own_place() -> Path:
    """$SANDBOXD_BUILDS, or stores/folders.py's place for them."""
    return folders.own_place(KIND)


def largest() -> int:
    """Bytes that the store may have, by $SANDBOXD_BUILDS_SIZE. HostError if that is no size."""
    text = os.environ.get(SIZE_VARIABLE, "")
    try:
        return int(units.parse_size(text)) if text else LARGEST
    except ValueError as error:
        raise HostError(SIZE_VARIABLE, f"{SIZE_VARIABLE}: {error}",
                        hint="a size such as 512M") from None  # fmt: skip


@dataclass(frozen=True, slots=True)
class Store:
    """One store."""

    place: Path

    @property
    def objects(self) -> Path:
        return self.place / "objects"

    # -- reading

    def find(self, key: str) -> BuildRecord | None:
        """What is there under a key, if it still is what was kept; else it goes."""
        record = self.read(key)
        if record is None:
            return None
        if not self._is_as_kept(record):
            if self._problem(record):
                folders.remove(self.objects / key)
                return None
            self._restamp(record)
        with suppress(OSError):
            os.utime(self.objects / key / "used")
        return record

    def read(self, key: str) -> BuildRecord | None:
        try:
            data = (self.objects / key / "build.json").read_bytes()
            record = msgspec.json.decode(data, type=BuildRecord)
        except (OSError, msgspec.DecodeError):
            return None
        return record if record.key == key and record.schema == SCHEMA else None

    def look_up(self, digits: str) -> BuildRecord:
        """By 7 or more digits of its key. JobError if there is none, or more than one."""
        found = []
        if _DIGITS.fullmatch(digits):
            found = [one.record for one in self.every() if one.record.key.startswith(digits)]
        if len(found) != 1:
            what = "more than one build" if found else "no build"
            raise JobError(f"{what} {digits!r} in {self.place}",
                           hint="7 or more digits of a key: `sandboxd cache ls`")  # fmt: skip
        return found[0]

    def every(self) -> list[Kept]:
        """All of them, those used last first."""
        found = []
        with suppress(OSError):
            for folder in self.objects.iterdir():
                record = self.read(folder.name)
                if record is not None:
                    found.append(Kept(record, _time_of(folder / "used", record.made)))
        return sorted(found, key=lambda one: one.used, reverse=True)

    def hold(self, key: str) -> int | None:
        """A descriptor while which it is not removed; None if it is not there."""
        return folders.hold(self.objects / key)

    def identity(self, key: str) -> tuple[int, int]:
        found = os.stat(self.objects / key / "tree", follow_symlinks=False)
        return found.st_dev, found.st_ino

    def problem(self, key: str) -> str:
        """What is wrong with a build whose files are all read; "" is nothing."""
        record = self.read(key)
        return "it is not there" if record is None else self._problem(record)

    # -- adding

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Around what adds: nothing is swept away meanwhile. What dead ones left goes first."""
        with self._locked() as lock:
            if folders.try_lock(lock, fcntl.LOCK_EX):
                self._sweep()
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def try_key(self, key: str) -> int | None:
        """A descriptor while which nobody else builds this; None if somebody does."""
        with self._locked():
            keys = os.open(self.place / "keys", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # struct flock: l_type, l_whence, l_start, l_len, l_pid (fcntl(2)); one byte of 2^62.
        where = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, int(key[:15], 16), 1, 0)
        try:
            fcntl.fcntl(keys, fcntl.F_OFD_SETLK, where)
        except OSError as error:
            os.close(keys)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise HostError(KIND, f"{self.place}: {error.strerror}",
                            hint="no locks there: SANDBOXD_BUILDS=DIR") from error  # fmt: skip
        return keys

    def keep(self, key: str, argv: Iterable[str], result: Result) -> BuildRecord:
        """The files that a build left, from now on under its key. OSError if they do not fit."""
        folder = self.objects / f"{folders.NEW}{os.getpid()}-{os.urandom(6).hex()}"
        folders.make(folder, self._mode)
        try:
            tree = folder / "tree"
            folders.make(tree)
            files = tuple(_write(tree, artifact) for artifact in result.artifacts)
            record = BuildRecord(
                key=key, argv=tuple(argv), made=time.time(), boot=boot_id(), files=files,
                result=msgspec.structs.replace(result, artifacts=()),
            )  # fmt: skip
            folders.write(folder / "used", b"")
            folders.write(folder / "build.json", msgspec.json.encode(record))
            final = self.objects / key
            while True:
                try:
                    folder.rename(final)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    if (there := self.find(key)) is not None:
                        return there
                    if not folders.remove(final):
                        raise
                else:
                    return record
        finally:
            if folder.exists():
                folders.erase(folder)

    # -- removing

    def remove(self, key: str) -> bool:
        """False if it is in use."""
        return folders.remove(self.objects / key)

    def collect(self, size: int | None, age: float | None) -> tuple[list[Kept], list[Kept]]:
        """Remove what is older, and of the rest those unused for longest until they fit.

        What went, and what should have and is in use.
        """
        with self._locked() as lock:
            if folders.try_lock(lock, fcntl.LOCK_EX):
                self._sweep()
        gone: list[Kept] = []
        used: list[Kept] = []
        total, now = 0, time.time()
        for one in self.every():
            total += one.record.size
            old = age is not None and now - one.used > age
            if old or (size is not None and total > size):
                went = self.remove(one.record.key)
                (gone if went else used).append(one)
                total -= one.record.size if went else 0
        return gone, used

    # -- within

    @property
    def _mode(self) -> int:
        """Sandboxes of root's have other ids, and go through without being able to look round."""
        return 0o711 if os.geteuid() == 0 else 0o700

    @contextmanager
    def _locked(self) -> Iterator[int]:
        with folders.locked(self.place, KIND, (self.objects,), self._mode) as lock:
            yield lock

    def _sweep(self) -> None:
        for folder in self.objects.glob(f"{folders.NEW}*"):
            folders.erase(folder)

    def _is_as_kept(self, record: BuildRecord) -> bool:
        tree = self.objects / record.key / "tree"
        try:
            stamps = [_stamp(os.lstat(_inside(tree, one.path))) for one in record.files]
        except OSError:
            return False
        return record.boot == boot_id() and stamps == [one.stamp for one in record.files]

    def _problem(self, record: BuildRecord) -> str:
        tree = self.objects / record.key / "tree"
        for one in record.files:
            name = os.fsdecode(one.path)
            try:
                if _digest(_inside(tree, one.path)) != one.sha256:
                    return f"{name} is not what was kept"
            except OSError as error:
                return f"{name}: {error.strerror}"
        return ""

    def _restamp(self, record: BuildRecord) -> None:
        """They are right, and need not be read the next time."""
        folder = self.objects / record.key
        with suppress(OSError):
            stamps = [_stamp(os.lstat(_inside(folder / "tree", one.path))) for one in record.files]
            files = tuple(
                msgspec.structs.replace(one, stamp=stamp)
                for one, stamp in zip(record.files, stamps, strict=True)
            )
            new = msgspec.structs.replace(record, files=files, boot=boot_id())
            folders.replace(folder / "build.json", msgspec.json.encode(new))


def boot_id() -> str:
    """Which boot of the machine this is (random(4)); "" where /proc does not say."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _inside(tree: Path, path: bytes) -> bytes:
    return os.path.join(os.fsencode(tree), path)


def _time_of(file: Path, otherwise: float) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return otherwise


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_size, found.st_ctime_ns


def _write(tree: Path, artifact: Artifact) -> FileRecord:
    """One file, which everybody who sees it may read, and nobody may write."""
    path = os.fsencode(artifact.path)
    *above, _ = parts = path.split(b"/")
    if {b"", b".", b".."} & {*parts}:
        raise InternalError(f"a collected file is called {artifact.path!r}")
    for depth in range(1, len(above) + 1):
        folders.make(tree / os.fsdecode(b"/".join(above[:depth])))
    where = _inside(tree, path)
    made = os.open(where, _NEW_FILE, 0o600)
    try:
        view = memoryview(artifact.data)
        while view:
            view = view[os.write(made, view) :]
        mode = 0o555 if artifact.mode & 0o111 else 0o444
        os.fchmod(made, mode)
        stamp = _stamp(os.fstat(made))
    finally:
        os.close(made)
    return FileRecord(
        path=path, size=artifact.bytes, sha256=artifact.sha256, mode=mode, stamp=stamp
    )


def _digest(path: bytes) -> str:
    file = os.open(path, _READ)
    try:
        digest = hashlib.sha256()
        while data := os.read(file, _CHUNK):
            digest.update(data)
        return digest.hexdigest()
    finally:
        os.close(file)
