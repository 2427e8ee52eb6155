"""What is done to a store that has images: removing, collecting, looking for damage."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sandboxd.errors import ImageError
from sandboxd.images.records import ImageRecord
from sandboxd.images.store import Store, ids_tag
from sandboxd.images.unpacking import open_unpacker
from sandboxd.plan import IdMap


@dataclass(frozen=True, slots=True)
class Collected:
    """Layers that went, and those no image has that are in use; names of their directories."""

    gone: tuple[str, ...]
    used: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verified:
    """One layer of an image, and what is wrong with it; "" is nothing."""

    image: str
    layer: str
    problem: str


def wanted(store: Store, names: Sequence[str]) -> list[ImageRecord]:
    """The images of these names; without names all."""
    if not names:
        return store.images()
    found = [store.find(name) for name in names]
    for name, record in zip(names, found, strict=True):
        if record is None:
            raise ImageError(f"no image {name!r} in {store.place}", hint="`sandboxd image ls`")
    return [record for record in found if record is not None]


def remove(store: Store, names: Sequence[str], ids: IdMap) -> Collected:
    """Forget these images, and remove the layers that no other has."""
    records = wanted(store, names) if names else []
    with open_unpacker(ids) as unpacker, store.removing(unpacker):
        for record in records:
            store.forget(record)
        gone, used = store.collect(unpacker)
    return Collected(tuple(gone), tuple(used))


def verify(store: Store, names: Sequence[str], ids: IdMap) -> list[Verified]:
    """Every layer of these images held against the digest its tree had when it was unpacked."""
    tag = ids_tag(ids)
    seen: dict[str, str] = {}
    found = []
    with open_unpacker(ids) as unpacker:
        for record in wanted(store, names):
            for diff_id in record.layers:
                if diff_id not in seen:
                    seen[diff_id] = _problem(store, diff_id, tag, unpacker.digest)
                found.append(Verified(record.name, diff_id, seen[diff_id]))
    return found


def _problem(store: Store, diff_id: str, tag: str, digest: Callable[[int], str]) -> str:
    layer = store.layer(diff_id, tag)
    if layer is None:
        return "it is missing"
    folder, record = layer
    if record.ids != tag:
        return "it was unpacked for other ids, so not all of it can be read"
    opened = os.open(folder / "root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return "" if digest(opened) == record.tree else "it is not what was unpacked"
    finally:
        os.close(opened)
