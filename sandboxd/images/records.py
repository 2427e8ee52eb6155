"""What the store writes down about images and layers: JSON of our own, read back with suspicion."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from sandboxd.errors import ImageError
from sandboxd.image import Config

IMAGE_SCHEMA = "sandboxd.image/1"
LAYER_SCHEMA = "sandboxd.layer/1"

Kind = TypeVar("Kind", bound=msgspec.Struct)


class LayerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """layer.json: one layer as it was unpacked for one map of ids."""

    schema: str = LAYER_SCHEMA
    diff_id: str
    """sha256 of the tar archive, as the image's configuration names it."""
    tree: str
    """sha256 over the tree on disk; `image verify` compares."""
    ids: str
    """The map of ids that its owners are in."""
    entries: int
    bytes: int
    """Of all files, holes included."""
    whiteouts: int = 0
    devices: int = 0
    """Device nodes that were left out."""
    setid: int = 0
    """Files that lost their set-user-id or set-group-id bit."""
    xattrs: int = 0
    """Attributes that were left out."""
    owners: int = 0
    """Entries whose owner has no id here, so that they belong to root, or to the caller."""
    highest_id: int = 0


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """NAME.json: an image, and of which layers it is made."""

    schema: str = IMAGE_SCHEMA
    name: str
    id: str
    layers: tuple[str, ...]
    """diff_ids, the lowest first."""
    config: Config = Config()
    architecture: str = ""
    created: str = ""
    source: str = ""
    """Where it came from."""
    imported: float = 0.0
    """Seconds since the epoch."""


def decode(data: bytes, kind: type[Kind], where: str) -> Kind:
    """A record; ImageError naming `where` if it is none."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise ImageError(f"{where}: {error}") from error


def encode(record: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"
