"""What the JSON of an image says, of an OCI layout or of docker save: which layers, and how to run.

Whatever bytes come in, these functions return values or raise ImageError.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from sandboxd.errors import ImageError
from sandboxd.image import Config
from sandboxd.images.archive import Files
from sandboxd.images.records import decode

MOST_JSON = 4 << 20
"""Bytes of a manifest or a configuration; registries refuse larger ones, too."""
MOST_LAYERS = 128
"""overlayfs takes more, but no maker of images does."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DEEPEST = 3
INDEXES = frozenset({
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
})  # fmt: skip
MANIFESTS = frozenset({
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
})  # fmt: skip
_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


class Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""


class Descriptor(msgspec.Struct, frozen=True):
    """One blob: its digest and what it is (OCI image specification, descriptor.md)."""

    digest: str
    media_type: str = msgspec.field(name="mediaType", default="")
    size: int = -1
    platform: Platform | None = None
    annotations: dict[str, str] | None = None


class Index(msgspec.Struct, frozen=True):
    manifests: tuple[Descriptor, ...]


class Manifest(msgspec.Struct, frozen=True):
    config: Descriptor
    layers: tuple[Descriptor, ...]


class _Run(msgspec.Struct, frozen=True):
    env: tuple[str, ...] | None = msgspec.field(name="Env", default=None)
    entrypoint: tuple[str, ...] | str | None = msgspec.field(name="Entrypoint", default=None)
    cmd: tuple[str, ...] | str | None = msgspec.field(name="Cmd", default=None)
    cwd: str | None = msgspec.field(name="WorkingDir", default=None)
    user: str | None = msgspec.field(name="User", default=None)


class _Layers(msgspec.Struct, frozen=True):
    diff_ids: tuple[str, ...] = ()


class ImageConfig(msgspec.Struct, frozen=True):
    """config.md of the OCI image specification, as far as it is used."""

    architecture: str = ""
    os: str = ""
    created: str | None = None
    config: _Run | None = None
    rootfs: _Layers = _Layers()


class _Saved(msgspec.Struct, frozen=True):
    """An entry of docker save's manifest.json."""

    config: str = msgspec.field(name="Config")
    layers: tuple[str, ...] = msgspec.field(name="Layers")
    tags: tuple[str, ...] | None = msgspec.field(name="RepoTags", default=None)


@dataclass(frozen=True, slots=True)
class Blob:
    """A layer where it lies: its name there, its digest as it lies there, and when unpacked."""

    where: str
    digest: str | None
    diff_id: str


@dataclass(frozen=True, slots=True)
class Found:
    """An image in a source."""

    id: str
    names: tuple[str, ...]
    config: ImageConfig
    layers: tuple[Blob, ...]
    """The lowest first."""


def find(files: Files) -> list[Found]:
    """Every image of this machine's kind in the source."""
    if files.has("manifest.json"):
        data = _whole(files, "manifest.json", None)
        saved = _decode(data, tuple[_Saved, ...], "manifest.json")
        return [_saved(files, one) for one in saved]
    if not files.has("index.json"):
        raise ImageError("neither an OCI layout (index.json) nor what docker save writes "
                         "(manifest.json)")  # fmt: skip
    index = decode(_whole(files, "index.json", None), Index, "index.json")
    return [*_of_index(files, index, 0)]


def _decode(data: bytes, kind: type[tuple[_Saved, ...]], where: str) -> tuple[_Saved, ...]:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise ImageError(f"{where}: {error}") from error


def _saved(files: Files, saved: _Saved) -> Found:
    data = _whole(files, saved.config, None)
    config, diff_ids = read_config(data, len(saved.layers))
    names = zip(saved.layers, diff_ids, strict=True)
    layers = tuple(Blob(where, None, diff_id) for where, diff_id in names)
    return Found(_sha256(data), saved.tags or (), config, layers)


def _of_index(files: Files, index: Index, depth: int) -> Iterator[Found]:
    for one in choose(index):
        data = _whole(files, blob(one.digest), one.digest)
        if one.media_type in INDEXES:
            if depth >= _DEEPEST:
                raise ImageError("indexes within indexes within indexes")
            yield from _of_index(files, decode(data, Index, one.digest), depth + 1)
            continue
        manifest = decode(data, Manifest, one.digest)
        config_data = _whole(files, blob(manifest.config.digest), manifest.config.digest)
        names = [(one.annotations or {}).get(key, "") for key in _NAMES]
        yield of_manifest(manifest, config_data, tuple(name for name in names if name)[:1])


def of_manifest(manifest: Manifest, config_data: bytes, names: tuple[str, ...]) -> Found:
    """The image of a manifest whose configuration is this."""
    config, diff_ids = read_config(config_data, len(manifest.layers))
    pairs = zip(manifest.layers, diff_ids, strict=True)
    layers = tuple(Blob(blob(one.digest), one.digest, diff_id) for one, diff_id in pairs)
    return Found(_sha256(config_data), names, config, layers)


def choose(index: Index) -> list[Descriptor]:
    """Those for this machine; what says nothing about machines is for all."""
    wanted = _MACHINES.get(os.uname().machine, os.uname().machine)
    known = [one for one in index.manifests if one.media_type in INDEXES | MANIFESTS | {""}]
    fit = [
        one for one in known
        if one.platform is None or (one.platform.architecture, one.platform.os) == (wanted, "linux")
    ]  # fmt: skip
    if not fit:
        kinds = {f"{one.platform.os}/{one.platform.architecture}" for one in known if one.platform}
        raise ImageError(f"no image for linux/{wanted}",
                         hint=f"there is {', '.join(sorted(kinds)[:8]) or 'none'}")  # fmt: skip
    return fit


def blob(digest: str) -> str:
    """Where an OCI layout has it."""
    if not _DIGEST.fullmatch(digest):
        raise ImageError(f"{digest[:100]!r} is no digest that is known: sha256: and 64 digits")
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def read_config(data: bytes, layers: int) -> tuple[ImageConfig, tuple[str, ...]]:
    """The configuration, and as many diff_ids as there are layers."""
    config = decode(data, ImageConfig, "the image's configuration")
    diff_ids = config.rootfs.diff_ids
    if len(diff_ids) != layers or not 0 < layers <= MOST_LAYERS:
        raise ImageError(f"{layers} layers and {len(diff_ids)} diff_ids in the configuration")
    for one in diff_ids:
        blob(one)
    if config.os not in ("", "linux"):
        raise ImageError(f"an image for {config.os}", hint="sandboxd runs those for Linux")
    return config, diff_ids


def how_to_run(config: ImageConfig) -> Config:
    """What is honoured of a configuration; what cannot be meant is an ImageError."""
    run = config.config or _Run()
    env = [one.partition("=") for one in run.env or ()]
    texts = [*(run.env or ()), run.cwd or "", run.user or ""]
    if any("\0" in one for one in (*texts, *_words(run.entrypoint), *_words(run.cmd))):
        raise ImageError("the image's configuration contains a NUL")
    return Config(
        env=tuple((name, value) for name, equals, value in env if name and equals),
        cwd="/" + run.cwd.lstrip("/") if run.cwd else None,
        entrypoint=_words(run.entrypoint),
        cmd=_words(run.cmd),
        user=run.user or "",
    )


def _words(words: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return ("/bin/sh", "-c", words) if isinstance(words, str) else words or ()


def _whole(files: Files, name: str, digest: str | None) -> bytes:
    """All of a small file, held against its digest."""
    with files.reader(name) as read:
        data = b""
        while piece := read(MOST_JSON + 1 - len(data)):
            data += piece
            if len(data) > MOST_JSON:
                raise ImageError(f"{name}: more than {MOST_JSON} bytes")
    check_digest(data, digest, name)
    return data


def check_digest(data: bytes, digest: str | None, what: str) -> None:
    """ImageError unless this is what the digest is of."""
    if digest is not None and _sha256(data) != digest:
        raise ImageError(f"{what}: its digest is {_sha256(data)}, and should be {digest}")


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
