"""What jobs changed in their roots, kept after them: each as a layer, a list and a record.

    NAME/layer.tar       the changes as a layer (OCI image specification, layer.md)
    NAME/changes         "A path", "C path" or "D path", each with a NUL behind it
    NAME/kept.json       written last; before, the directory is called .new-*

All of it belongs to the caller, whatever ids the job had. What an interrupted run left is called
.new-*, and its lock (flock(2)) is free.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sandboxd.errors import HostError, ImageError, JobError
from sandboxd.images.importing import Imported, import_layer
from sandboxd.images.records import ImageRecord, decode, encode
from sandboxd.images.store import Store, own_place
from sandboxd.images.unpacking import Limits
from sandboxd.plan import IdMap
from sandboxd.stores.folders import own_place as place_of

SCHEMA = "sandboxd.kept/1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_NEW = ".new-"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE = 1 << 16


class KeptRecord(msgspec.Struct, frozen=True, kw_only=True):
    """kept.json."""

    schema: str = SCHEMA
    name: str
    job: str
    status: str
    policy: str
    source: str
    """What the root was: "host", a directory, or "" for an image."""
    image: str = ""
    image_id: str = ""
    kept: float = 0.0
    """Seconds since the epoch."""
    bytes: int = 0
    """Of the layer."""
    complete: bool = True
    counts: dict[str, int] = {}
    """added, changed, deleted; and what a layer cannot have, by its kind."""


@dataclass(frozen=True, slots=True)
class Change:
    """One path that is not as it was: kind "A" (added), "C" (changed) or "D" (deleted)."""

    kind: str
    path: str


def place() -> Path:
    """Where they are: $SANDBOXD_KEPT, or as all stores (stores/folders.py)."""
    return place_of("kept")


@dataclass(frozen=True, slots=True)
class KeptRoot:
    """The changes of one run."""

    folder: Path
    record: KeptRecord

    def changes(self) -> Iterator[Change]:
        """In the order of their paths, directory by directory."""
        rest = b""
        with (self.folder / "changes").open("rb") as file:
            while data := file.read(_PIECE):
                *whole, rest = (rest + data).split(b"\0")
                for one in whole:
                    yield Change(one[:1].decode(), "/" + os.fsdecode(one[2:]))

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def kept_roots() -> list[KeptRoot]:
    """All of them, by name; what cannot be read is left out."""
    found = []
    try:
        files = sorted(place().glob("[!.]*/kept.json"))
    except PermissionError:
        files = []
    for file in files:
        with suppress(ImageError, OSError):
            found.append(KeptRoot(file.parent, _record(file)))
    return found


def find_kept(name: str) -> KeptRoot:
    """By its name, or by the first 7 or more letters of it if no other begins so."""
    every = kept_roots()
    alike = [one for one in every if len(name) >= 7 and one.record.name.startswith(name)]
    exact = [one for one in every if one.record.name == name]
    if len(found := exact or alike) == 1:
        return found[0]
    there = ", ".join(one.record.name for one in every[:20])
    raise ImageError(f"no kept root {name!r}", hint=f"there are: {there}" if there else
                     "there is none: `sandboxd run --keep` keeps what a job changes")  # fmt: skip


def _record(file: Path) -> KeptRecord:
    return decode(file.read_bytes(), KeptRecord, str(file))


class New:
    """One being made: descriptors to write to, and `keep` to give it its name."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.layer = os.open(folder / "layer.tar", flags, 0o600)
        self.changes = os.open(folder / "changes", flags, 0o600)

    def keep(self, record: KeptRecord) -> KeptRoot:
        size = os.fstat(self.layer).st_size
        record = msgspec.structs.replace(record, bytes=size)
        (self._folder / "kept.json").write_bytes(encode(record))
        target = self._folder.with_name(self._name)
        try:
            self._folder.rename(target)
        except OSError as error:
            raise _taken(self._name) from error
        return KeptRoot(target, record)

    def close(self) -> None:
        os.close(self.layer)
        os.close(self.changes)


def check_free(name: str) -> None:
    """JobError if this can be no name of a kept root, or is one already."""
    if not NAME.fullmatch(name):
        raise JobError(f"keep_root: {name!r} cannot be a name",
                       hint="letters, digits, and _.- after the first")  # fmt: skip
    if os.path.lexists(place() / name):
        raise _taken(name)


def check_place() -> None:
    """HostError if nothing can be kept there, which is better known before a run than after it."""
    where = place()
    try:
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(where, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unusable(where, error) from error


def no_room() -> HostError:
    return _unusable(place(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _unusable(where: Path, error: OSError) -> HostError:
    return HostError("kept", f"{where}: {error.strerror}",
                     hint="SANDBOXD_KEPT=DIR names another place")  # fmt: skip


def _taken(name: str) -> JobError:
    return JobError(f"keep_root: there is a kept root {name!r} already",
                    hint=f"another name, or `sandboxd kept rm {name}`")  # fmt: skip


@contextmanager
def new(name: str) -> Iterator[New]:
    """A place for what a run changed; what did not get its name is gone at the end."""
    where = place()
    folder = where / f"{_NEW}{os.urandom(6).hex()}"
    try:
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(mode=0o700)
        lock = os.open(folder, _FOLDER)
    except OSError as error:
        raise _unusable(where, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sweep(where)
        made = New(folder, name)
        try:
            yield made
        finally:
            made.close()
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(where: Path) -> None:
    """What runs left that were killed."""
    for folder in where.glob(f"{_NEW}*"):
        with suppress(OSError):
            lock = os.open(folder, _FOLDER)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def commit(kept: KeptRoot, name: str, ids: IdMap, limits: Limits) -> Imported:
    """An image of the caller's: that of the run, and above it a layer of what the run changed."""
    record = kept.record
    if not record.image_id:
        what = "the host's /usr" if record.source == "host" else record.source
        raise ImageError(f"{record.name}: its root was {what}, and no image",
                         hint="`sandboxd image import` makes one to run in")  # fmt: skip
    if not record.complete:
        raise ImageError(f"{record.name}: more was changed than a layer may have")
    store = Store(own_place())
    base = next((one for one in store.images() if one.id == record.image_id), None)
    if base is None:
        raise ImageError(f"{record.name}: its image {record.image!r} is not in {store.place}",
                         hint="import or pull it there") from None  # fmt: skip
    with (kept.folder / "layer.tar").open("rb") as layer:
        return import_layer(store, layer, _above(base, name), ids, limits)


def _above(base: ImageRecord, name: str) -> ImageRecord:
    return msgspec.structs.replace(base, name=name, source=f"commit above {base.name}", created="")
