"""The store: layers by their digest, each unpacked once, and images by their name.

    images/NAME.json                 which layers, from where, how to run (records.ImageRecord)
    layers/DIGEST.IDS/root           the tree, its owners in the map of ids that IDS stands for
    layers/DIGEST.IDS/layer.json     written last; before, the directory is called .new-*
    lock                             shared by imports, exclusive for whoever removes

Everything appears by a rename, whole and checked, so readers take no lock on the store. A sandbox
holds a shared lock (flock(2)) on each layer it uses, and a layer is removed only by who got the
exclusive one. What an interrupted import left is called .new-*, and nobody can be at it once the
exclusive lock on the store was had.

A layer's owners are ids of the host, so a layer is there once for each map of ids it was imported
under: a second user, or the same one with other subordinate ids, sees the files of the first as
nobody's and may read what everybody may read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from sandboxd.errors import HostError, ImageError
from sandboxd.image import Image
from sandboxd.images.records import ImageRecord, LayerRecord, decode, encode
from sandboxd.images.unpacking import Unpacker
from sandboxd.linux.paths import open_beneath
from sandboxd.plan import IdMap
from sandboxd.stores.folders import NEW, locked, make, opened, system_place, write
from sandboxd.stores.folders import own_place as place_of

SYSTEM = system_place("images")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?::[0-9]+)?(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*"
                   r"(?::[A-Za-z0-9_][A-Za-z0-9._-]*)?")  # fmt: skip
_LONGEST_NAME = 160
_SHORTEST_ID = 7
_ID = re.compile(r"(?:sha256:)?([0-9a-f]{7,64})")
_MOST_TEXT = 1 << 20
_MOST_RECORD = 1 << 24


def own_place() -> Path:
    """Where the caller's images are: $SANDBOXD_IMAGES, or stores/folders.py's place for them."""
    return place_of("images")


def places() -> tuple[Path, ...]:
    """Where images are looked for: the caller's own, then the machine's."""
    own = own_place()
    return (own,) if own == SYSTEM else (own, SYSTEM)


def ids_tag(ids: IdMap) -> str:
    """Which map of ids this is, in a few letters."""
    return hashlib.sha256(repr((ids.uids, ids.gids)).encode()).hexdigest()[:8]


def check_name(name: str) -> str:
    """The name, if it can be one: as docker's, [HOST[:PORT]/]PATH[:TAG]."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME or _ID.fullmatch(name):
        raise ImageError(f"{name!r} cannot be the name of an image",
                         hint="letters, digits and ._- with / between them, perhaps :TAG; "
                         "not 7 or more hexadecimal digits alone")  # fmt: skip
    return name


@dataclass(frozen=True, slots=True)
class Store:
    """One store. Reading needs no more than the right to read."""

    place: Path

    # -- reading

    def images(self) -> list[ImageRecord]:
        """All of them, by name; what cannot be read is left out."""
        try:
            files = sorted(self._images.glob("[!.]*.json"))
        except OSError:
            return []
        found = []
        for file in files:
            with suppress(ImageError):
                found.append(self._record(file))
        return found

    def find(self, name: str) -> ImageRecord | None:
        """By its name, with :latest if need be, or by 7 or more digits of its id."""
        for one in (name, f"{name}:latest"):
            file = self._file(one)
            if len(one) <= _LONGEST_NAME and os.path.isfile(file):  # False if it is closed
                return self._record(file)
        if digits := _ID.fullmatch(name):
            wanted = f"sha256:{digits[1]}"
            found = {one.id: one for one in self.images() if one.id.startswith(wanted)}
            if len(found) == 1:
                return next(iter(found.values()))
        return None

    def layer(self, diff_id: str, tag: str) -> tuple[Path, LayerRecord] | None:
        """The layer with owners in this map of ids, else in any."""
        digits = diff_id.removeprefix("sha256:")
        others = sorted(self._layers.glob(f"{digits}.*"))
        for folder in (self._layers / f"{digits}.{tag}", *others):
            with suppress(FileNotFoundError, NotADirectoryError):
                data = (folder / "layer.json").read_bytes()
                return folder, decode(data, LayerRecord, str(folder / "layer.json"))
        return None

    def layers(self) -> list[Path]:
        """Every layer's directory."""
        with suppress(OSError):
            return sorted(one for one in self._layers.iterdir() if not one.name.startswith("."))
        return []

    def read(self, record: ImageRecord, path: str) -> str | None:
        """A small text file of an image, through no link; None if it has none that we may read."""
        for diff_id in reversed(record.layers):
            if (layer := self.layer(diff_id, "")) is not None:
                text = _small_file(layer[0] / "root", path)
                if text is not None:
                    return text
        return None

    def image(self, record: ImageRecord, tag: str) -> Image:
        """What a sandbox needs to know of an image; ImageError if one of its layers lacks."""
        found = [self.layer(one, tag) for one in record.layers]
        if None in found:
            raise ImageError(f"{record.name}: a layer is missing from {self.place}",
                             hint="import or pull it again")  # fmt: skip
        layers = [one for one in found if one is not None]
        return Image(
            name=record.name,
            id=record.id,
            layers=tuple(str(folder / "root") for folder, _ in reversed(layers)),
            config=record.config,
            highest_id=max((layer.highest_id for _, layer in layers), default=0),
            notes=tuple(_notes(record, [layer for _, layer in layers], tag)),
        )

    # -- changing

    @contextmanager
    def importing(self, unpacker: Unpacker) -> Iterator[None]:
        """Around an import: nothing is removed meanwhile. What dead ones left goes first."""
        with self._locked() as lock:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._sweep(unpacker)
            fcntl.flock(lock, fcntl.LOCK_SH)
            try:
                yield
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise HostError("images", f"{self.place}: {error.strerror}",
                                hint="make room: `sandboxd image gc`; SANDBOXD_IMAGES=DIR names "
                                "another place") from error  # fmt: skip

    @contextmanager
    def removing(self, unpacker: Unpacker) -> Iterator[None]:
        """Around what removes: nobody imports meanwhile."""
        with self._locked() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ImageError(f"{self.place}: something is being imported",
                                 hint="try again when that is done") from None  # fmt: skip
            self._sweep(unpacker)
            yield

    @contextmanager
    def new_layer(self, unpacker: Unpacker, owner: tuple[int, int] | None) -> Iterator[Path]:
        """An empty directory with an empty `root`; what is still there at the end is removed.

        `owner` is whose `root` is to be, where the unpacker is not the caller.
        """
        folder = self._layers / f"{NEW}{os.getpid()}-{os.urandom(6).hex()}"
        make(folder)
        try:
            make(folder / "root")
            if owner is not None:
                os.chown(folder / "root", *owner)
            yield folder
        finally:
            if folder.exists():
                self._remove(folder.name, unpacker)

    def keep_layer(self, folder: Path, record: LayerRecord) -> None:
        """A new layer gets its name; if another import was faster, its is as good."""
        write(folder / "layer.json", encode(record))
        name = f"{record.diff_id.removeprefix('sha256:')}.{record.ids}"
        try:
            folder.rename(self._layers / name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def keep_image(self, record: ImageRecord) -> None:
        """From now on this is what its name means."""
        file = self._file(check_name(record.name))
        new = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            write(new, encode(record))
            new.rename(file)
        finally:
            new.unlink(missing_ok=True)

    def forget(self, record: ImageRecord) -> None:
        """The name goes; layers go by collect()."""
        self._file(record.name).unlink(missing_ok=True)

    def collect(self, unpacker: Unpacker) -> tuple[list[str], list[str]]:
        """Remove the layers no image has: names of those that went, and of those in use."""
        records = [self._record(file) for file in self._images.glob("[!.]*.json")]  # or none goes
        wanted = {one.removeprefix("sha256:") for image in records for one in image.layers}
        gone, used = [], []
        for folder in self.layers():
            if folder.name.partition(".")[0] in wanted:
                continue
            with opened(folder) as descriptor:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    used.append(folder.name)
                    continue
                hidden = folder.with_name(f"{NEW}{folder.name}")
                folder.rename(hidden)  # before anybody else can take hold of it by its name
            self._remove(hidden.name, unpacker)
            gone.append(folder.name)
        return gone, used

    # -- within

    @property
    def _images(self) -> Path:
        return self.place / "images"

    @property
    def _layers(self) -> Path:
        return self.place / "layers"

    def _file(self, name: str) -> Path:
        return self._images / f"{quote(name, safe='')}.json"

    def _record(self, file: Path) -> ImageRecord:
        try:
            with file.open("rb") as stream:
                data = stream.read(_MOST_RECORD)
        except OSError as error:
            raise ImageError(f"{file}: {error.strerror}") from error
        record = decode(data, ImageRecord, str(file))
        if unquote(file.stem) != record.name:
            raise ImageError(f"{file}: it is about {record.name}")
        return record

    def _locked(self) -> AbstractContextManager[int]:
        """Others may read a store; what must not be read belongs in no image."""
        return locked(self.place, "images", (self._images, self._layers))

    def _sweep(self, unpacker: Unpacker) -> None:
        for folder in self._layers.glob(f"{NEW}*"):
            self._remove(folder.name, unpacker)
        for file in self._images.glob(".*"):
            file.unlink(missing_ok=True)

    def _remove(self, name: str, unpacker: Unpacker) -> None:
        """In two parts: what is in `root` belongs to others than what is around it."""
        folder = self._layers / name
        with suppress(FileNotFoundError), opened(folder / "root", os.O_PATH) as descriptor:
            unpacker.empty(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def _small_file(root: Path, path: str) -> str | None:
    try:
        with opened(root, os.O_PATH) as folder:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
            descriptor = open_beneath(folder, path.encode(), flags)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        return file.read(_MOST_TEXT).decode(errors="replace")


def _notes(record: ImageRecord, layers: list[LayerRecord], tag: str) -> Iterator[str]:
    if any(layer.ids != tag for layer in layers):
        yield "unpacked for other ids than ours: its files are nobody's, and read as by others"
    if owners := sum(layer.owners for layer in layers):
        yield f"{owners} of its files have owners without an id here: they are root's"
    if record.config.user and record.config.uid is None:
        yield f"its user {record.config.user!r} is none that can be had: the policy's counts"


# -- what runs have ----------------------------------------------------------------------------


def find(name: str, ids: IdMap) -> Image:
    """An image by name or id, of the caller's store or the machine's."""
    store, record = look_up(name)
    return store.image(record, ids_tag(ids))


def look_up(name: str) -> tuple[Store, ImageRecord]:
    """Where it is and what is known about it."""
    for place in places():
        store = Store(place)
        if (record := store.find(name)) is not None:
            return store, record
    known = [one.name for place in places() for one in Store(place).images()]
    there = f"there are: {', '.join(known[:20])}" if known else "there is none yet"
    raise ImageError(f"no image {name!r}", hint=f"{there}; `sandboxd image import` makes one")


@contextmanager
def using(image: Image) -> Iterator[None]:
    """Meanwhile nobody removes its layers (flock(2), shared)."""
    with ExitStack() as stack:
        for layer in image.layers:
            try:
                descriptor = stack.enter_context(opened(Path(layer).parent))
            except FileNotFoundError:
                raise ImageError(f"{image.name}: a layer was removed meanwhile",
                                 hint="import or pull it again") from None  # fmt: skip
            with suppress(BlockingIOError):  # who removes it has renamed it already
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
