"""Named places that outlive a run: volumes, made by hand, and caches, made when first used.

    NAME/data/...        what runs see
    NAME/volume.json     its size and when it was made (VolumeRecord)
    NAME/lock            of a cache: shared by its readers, exclusive for its one writer (flock(2))
    lock                 shared by who makes one, exclusive for who sweeps

Each user has his own. Who has one in use holds a shared lock on its directory (folders.py), and it
is removed only by who gets the exclusive one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from sandboxd.errors import HostError, JobError
from sandboxd.stores import folders

SCHEMA = "sandboxd.volume/1"
CACHE_SIZE = 4 << 30
"""Bytes that a cache may grow to, where its mount says no other size."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_BLOCK = 512


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """volume.json."""

    schema: str = SCHEMA
    kind: str
    name: str
    size: int | None
    """Bytes that it may grow to; None: no limit but the disk."""
    made: float


class Used(msgspec.Struct, frozen=True):
    """What lies in one: bytes on the disk, and files, directories and links."""

    bytes: int
    entries: int


class Shelf(msgspec.Struct, frozen=True):
    """All volumes, or all caches, of a user."""

    kind: str
    place: Path

    @classmethod
    def own(cls, kind: str) -> Shelf:
        """Of the caller: $SANDBOXD_VOLUMES or $SANDBOXD_CACHES, or folders.py's place for them."""
        return cls(kind, folders.own_place(f"{kind}s"))

    # -- reading

    def every(self) -> list[VolumeRecord]:
        found = []
        with suppress(OSError):
            for folder in sorted(self.place.iterdir()):
                record = self.find(folder.name)
                if record is not None:
                    found.append(record)
        return found

    def find(self, name: str) -> VolumeRecord | None:
        if not _NAME.fullmatch(name):
            return None
        try:
            data = (self.place / name / "volume.json").read_bytes()
            return msgspec.json.decode(data, type=VolumeRecord)
        except (OSError, msgspec.DecodeError):
            return None

    def get(self, name: str) -> VolumeRecord:
        """JobError if there is none of this name."""
        record = self.find(name)
        if record is None:
            known = ", ".join(one.name for one in self.every()[:20]) or "there is none"
            raise JobError(f"no {self.kind} {name!r}", hint=f"`sandboxd volume ls`: {known}")
        return record

    def data(self, name: str) -> Path:
        return self.place / name / "data"

    def lock_file(self, name: str) -> Path:
        return self.place / name / folders.LOCK

    def hold(self, name: str) -> int | None:
        """A descriptor while which it is not removed; None if it is not there."""
        return folders.hold(self.place / name)

    # -- changing

    def create(self, name: str, size: int | None, owner: tuple[int, int] | None = None) -> bool:
        """False if there is one already. `owner` is whose it is, where that is not the caller."""
        if not _NAME.fullmatch(name) or name == folders.LOCK:
            raise JobError(f"{name!r} cannot be the name of a {self.kind}",
                           hint="up to 64 letters, digits, and _.-")  # fmt: skip
        with self._locked() as lock:
            if folders.try_lock(lock, fcntl.LOCK_EX):  # nobody else is making one
                for dead in self.place.glob(f"{folders.NEW}*"):
                    folders.erase(dead)
            fcntl.flock(lock, fcntl.LOCK_SH)
            folder = self.place / f"{folders.NEW}{os.getpid()}-{os.urandom(6).hex()}"
            try:
                folders.make(folder, self._mode)
                folders.make(folder / "data")
                if owner is not None:
                    os.chown(folder / "data", *owner)
                folders.write(folder / folders.LOCK, b"")
                record = VolumeRecord(kind=self.kind, name=name, size=size, made=time.time())
                folders.write(folder / "volume.json", msgspec.json.encode(record))
                folder.rename(self.place / name)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return False
                where = f"{self.place}: {error.strerror}"
                raise HostError(f"{self.kind}s", where) from error
            finally:
                if folder.exists():
                    folders.erase(folder)
        return True

    def remove(self, name: str) -> bool:
        """False if it is in use. HostError if files in it are not ours to remove."""
        self.get(name)
        if not folders.remove(self.place / name):
            return False
        left = [*self.place.glob(f"{folders.NEW}{name}.*")]
        if left:
            raise HostError(f"{self.kind}s", f"{left[0]}: not all of it could be removed",
                            hint="files in it belong to others")  # fmt: skip
        return True

    # -- within

    @property
    def _mode(self) -> int:
        return 0o711 if os.geteuid() == 0 else 0o700

    @contextmanager
    def _locked(self) -> Iterator[int]:
        kind = f"{self.kind}s"
        with folders.locked(self.place, kind, (self.place,), self._mode) as lock:
            yield lock


def used(top: Path) -> Used:
    """What lies below a directory, as far as it can be read; a file of several names is one."""
    total = entries = 0
    seen: set[tuple[int, int]] = set()
    for above, names, files in os.walk(top):
        for name in (*names, *files):
            with suppress(OSError):
                found = os.lstat(os.path.join(above, name))
                entries += 1
                if found.st_nlink > 1 and name not in names:
                    identity = found.st_dev, found.st_ino
                    if identity in seen:
                        continue
                    seen.add(identity)
                total += found.st_blocks * _BLOCK
    return Used(total, entries)
