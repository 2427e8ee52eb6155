"""From a source to the store: layers unpacked, digests checked, and only then a name for it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from sandboxd.errors import ImageError
from sandboxd.images import archive, manifests
from sandboxd.images.archive import Files, Layer, Read
from sandboxd.images.manifests import Found
from sandboxd.images.records import ImageRecord, LayerRecord
from sandboxd.images.store import Store, check_name, ids_tag
from sandboxd.images.streams import PIECE, plain
from sandboxd.images.unpacking import Limits, Unpacker, open_unpacker
from sandboxd.plan import IdMap

_HIGHEST_ID = 65535


@dataclass(frozen=True, slots=True)
class Imported:
    """An image that is there now, and how its layers came to be."""

    record: ImageRecord
    layers: tuple[LayerRecord, ...]
    new: int
    """How many of them were not there before."""


def import_image(
    store: Store, source: str | BinaryIO, name: str | None, ids: IdMap, limits: Limits
) -> list[Imported]:
    """Every image of a source: a directory, a file or a stream. ImageError if it cannot be taken.

    Without a name each gets the one it brings; a plain archive that of its file.
    """
    with open_unpacker(ids) as unpacker, store.importing(unpacker):
        return take(Taking(store, unpacker, ids, limits), source, name)


def import_layer(
    store: Store, stream: BinaryIO, base: ImageRecord, ids: IdMap, limits: Limits
) -> Imported:
    """An image with the layers of `base`, whose name it has, and above them that of a stream."""
    check_name(base.name)
    if len(base.layers) >= manifests.MOST_LAYERS:
        raise ImageError(f"{base.source}: it has {len(base.layers)} layers already")
    with open_unpacker(ids) as unpacker, store.importing(unpacker):
        return Taking(store, unpacker, ids, limits).above(base, stream.read)


def take(taking: Taking, source: str | BinaryIO, name: str | None) -> list[Imported]:
    """The same as part of something that is an import already."""
    if name is not None:
        check_name(name)
    said = source if isinstance(source, str) else "-"
    with archive.opened(source, taking.store.place, taking.limits) as found:
        if isinstance(found, Layer):
            return [taking.layer(found, check_name(name or _stem(said)), said)]
        images = manifests.find(found)
        named = [(image, _names(image, name, len(images))) for image in images]
        return [taking.image(image, names, said, _readers(found, image)) for image, names in named]


def _stem(source: str) -> str:
    if source == "-":
        raise ImageError("a name is needed for what comes from stdin", hint="--name NAME")
    return os.path.basename(source.rstrip("/")).partition(".tar")[0].partition(".t")[0]


def _names(image: Found, name: str | None, images: int) -> tuple[str, ...]:
    if name is not None:
        if images > 1:
            raise ImageError(f"there are {images} images in it, and one name",
                             hint="leave --name out: each brings its own")  # fmt: skip
        return (name,)
    if not image.names:
        raise ImageError("the image brings no name", hint="--name NAME")
    return tuple(check_name(one) for one in image.names)


Readers = Iterator[Callable[[], AbstractContextManager[Read]]]


def _readers(files: Files, image: Found) -> Readers:
    for one in image.layers:
        yield lambda where=one.where: files.reader(where)  # type: ignore[misc]


class Taking:
    """An import in progress."""

    def __init__(self, store: Store, unpacker: Unpacker, ids: IdMap, limits: Limits) -> None:
        self.store = store
        self._unpacker = unpacker
        self._ids = ids
        self._tag = ids_tag(ids)
        self.limits = limits
        self._new = 0

    def image(
        self, image: Found, names: tuple[str, ...], source: str, readers: Readers
    ) -> Imported:
        """Those layers that are not there yet, then the record; `readers` give layers in order."""
        self._new = 0
        layers = []
        for blob, reader in zip(image.layers, readers, strict=True):
            layer = self._there(blob.diff_id)
            if layer is None:
                with reader() as read:
                    layer = self._unpack(read, blob.digest, blob.diff_id)
            layers.append(layer)
        how = manifests.how_to_run(image.config)
        record = ImageRecord(
            name=names[0], id=image.id, layers=tuple(one.diff_id for one in layers), config=how,
            architecture=image.config.architecture, created=image.config.created or "",
            source=source, imported=time.time(),
        )  # fmt: skip
        record = self._with_ids(record)
        for name in names:
            self.store.keep_image(msgspec.structs.replace(record, name=name))
        return Imported(record, tuple(layers), self._new)

    def layer(self, found: Layer, name: str, source: str) -> Imported:
        """A plain archive: an image of one layer, with nothing to say about how to run it."""
        self._new = 0
        layer = self._unpack(found.read, None, None)
        record = ImageRecord(
            name=name, id=layer.diff_id, layers=(layer.diff_id,), source=source,
            imported=time.time(),
        )  # fmt: skip
        self.store.keep_image(record)
        return Imported(record, (layer,), self._new)

    def above(self, base: ImageRecord, read: Read) -> Imported:
        """One layer more than `base` has, which may be there already."""
        self._new = 0
        layers = [self._there(one) for one in base.layers]
        if None in layers:
            raise ImageError(f"{base.source}: a layer is missing, or was unpacked for other ids",
                             hint="import or pull it again")  # fmt: skip
        layer = self._unpack(read, None, None)
        diff_ids = (*base.layers, layer.diff_id)
        record = msgspec.structs.replace(
            base, layers=diff_ids, imported=time.time(),
            id="sha256:" + hashlib.sha256("\n".join((base.id, *diff_ids)).encode()).hexdigest(),
        )  # fmt: skip
        self.store.keep_image(record)
        return Imported(record, (*(one for one in layers if one is not None), layer), self._new)

    def _there(self, diff_id: str) -> LayerRecord | None:
        found = self.store.layer(diff_id, self._tag)
        return found[1] if found is not None and found[1].ids == self._tag else None

    def _unpack(self, read: Read, digest: str | None, diff_id: str | None) -> LayerRecord:
        """A layer into a place of its own, where it is held against what it should be."""
        outer, inner = hashlib.sha256(), hashlib.sha256()

        def compressed(count: int) -> bytes:
            data = read(count)
            outer.update(data)
            return data

        def pieces() -> Iterator[bytes]:
            for piece in plain(compressed):
                inner.update(piece)
                yield piece
            while compressed(PIECE):  # what may stand behind is in the digest
                pass

        uids, gids = self._ids.uids, self._ids.gids
        owner = (uids[0][1], gids[0][1]) if self._ids.writer == "direct" else None
        with self.store.new_layer(self._unpacker, owner) as folder:
            root = os.open(folder / "root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                report = self._unpacker.unpack(pieces(), root, self.limits)
            finally:
                os.close(root)
            found = f"sha256:{inner.hexdigest()}"
            _compare("layer", f"sha256:{outer.hexdigest()}", digest)
            _compare("layer, when decompressed,", found, diff_id)
            if diff_id is None and not report["ended"]:
                raise ImageError("truncated: the archive has no end")
            counts = {key: report[key] for key in LayerRecord.__struct_fields__ if key in report}
            record = LayerRecord(diff_id=found, tree=report["digest"], ids=self._tag, **counts)
            self.store.keep_layer(folder, record)
        self._new += 1
        return record

    # -- who the program is to be

    def _with_ids(self, record: ImageRecord) -> ImageRecord:
        """With the ids of its user, by the image's own files where it is a name."""
        if not record.config.user:
            return record
        user, _, group = record.config.user.partition(":")
        row = self._row(record, "etc/passwd", user)
        uid = _number([user], 0) if user.isdecimal() else _number(row, 2)
        if group:
            found = self._row(record, "etc/group", group)
            gid = _number([group], 0) if group.isdecimal() else _number(found, 2)
        else:
            gid = _number(row, 3) if row else 0  # as docker has it for a number without a line
        if uid is None or gid is None or max(uid, gid) > _HIGHEST_ID:
            return record
        config = msgspec.structs.replace(record.config, uid=uid, gid=gid)
        return msgspec.structs.replace(record, config=config)

    def _row(self, record: ImageRecord, path: str, key: str) -> list[str]:
        """The line of passwd(5) or group(5) that has this name, or this number."""
        text = self.store.read(record, path) or ""
        rows = [line.split(":") for line in text.splitlines()]
        return next((row for row in rows if key in (row[0], *row[2:3])), [])


def _compare(what: str, found: str, wanted: str | None) -> None:
    if wanted is not None and found != wanted:
        raise ImageError(f"a {what} has the digest {found}, and should have {wanted}",
                         hint="damaged, or not what it says: fetch it again")  # fmt: skip


def _number(row: list[str], place: int) -> int | None:
    text = row[place] if len(row) > place else ""
    return int(text) if text.isdecimal() and len(text) < 10 else None
