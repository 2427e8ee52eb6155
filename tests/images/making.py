"""Archives to be imported: built byte by byte, as no well-meaning program would write them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandboxd.compile.idmap import tenant_ids
from sandboxd.images.importing import Imported, import_image
from sandboxd.images.store import Store
from sandboxd.images.unpacking import Limits, open_unpacker
from sandboxd.plan import IdMap
from tests.supervise.variants import as_found, without

END = bytes(1024)
SMALL = Limits(bytes=64 << 20, entries=2000)


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def binary(value: int, width: int) -> bytes:
    """GNU's base-256."""
    return ((1 << (8 * width - 1)) | (value & ((1 << (8 * width - 1)) - 1))).to_bytes(width, "big")


def header(name: bytes, kind: bytes = b"0", **fields: bytes) -> bytes:
    """A ustar header; `fields` are raw bytes instead of what would stand there."""
    said = {
        "mode": octal(0o644, 8), "uid": octal(0, 8), "gid": octal(0, 8), "size": octal(0, 12),
        "mtime": octal(0, 12), "link": b"", "magic": b"ustar\x0000", "prefix": b"",
        "device": octal(0, 8) * 2,
    } | fields  # fmt: skip
    block = name[:100].ljust(100, b"\0") + said["mode"] + said["uid"] + said["gid"]
    block += said["size"] + said["mtime"] + b" " * 8 + kind + said["link"][:100].ljust(100, b"\0")
    block += said["magic"] + bytes(64) + said["device"] + said["prefix"].ljust(167, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def file(name: bytes, data: bytes = b"data\n", **fields: bytes) -> bytes:
    return header(name, size=octal(len(data), 12), **fields) + padded(data)


def folder(name: bytes, mode: int = 0o755) -> bytes:
    return header(name, b"5", mode=octal(mode, 8))


def link(name: bytes, to: bytes) -> bytes:
    return header(name, b"2", link=to)


def hard(name: bytes, to: bytes) -> bytes:
    return header(name, b"1", link=to)


def pax(records: list[tuple[bytes, bytes]], kind: bytes = b"x") -> bytes:
    data = b""
    for key, value in records:
        body = b" " + key + b"=" + value + b"\n"
        length = len(body) + 1
        while len(b"%d" % length) + len(body) != length:
            length += 1
        data += b"%d" % length + body
    return header(b"PaxHeaders/x", kind, size=octal(len(data), 12)) + padded(data)


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _of_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    return entry


def tarball(top: Path) -> bytes:
    """A directory as a tar archive, as an honest program writes it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.add(top, ".", filter=_of_root)
    return data.getvalue()


def oci_layout(
    top: Path, layers: list[bytes], config: dict[str, object] | None = None, name: str = "made"
) -> Path:
    """An OCI layout with these layers (plain archives), gzipped."""
    blobs = top / "blobs/sha256"
    blobs.mkdir(parents=True)
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]

    def put(data: bytes, kind: str) -> dict[str, object]:
        (blobs / sha256(data).partition(":")[2]).write_bytes(data)
        return {"mediaType": kind, "digest": sha256(data), "size": len(data)}

    described = {
        "architecture": machine, "os": "linux", "config": config or {},
        "rootfs": {"type": "layers", "diff_ids": [sha256(one) for one in layers]},
    }  # fmt: skip
    kind = "application/vnd.oci.image"
    packed = [put(gzip.compress(one), f"{kind}.layer.v1.tar+gzip") for one in layers]
    manifest = {
        "schemaVersion": 2, "layers": packed,
        "config": put(json.dumps(described).encode(), f"{kind}.config.v1+json"),
    }  # fmt: skip
    found = put(json.dumps(manifest).encode(), f"{kind}.manifest.v1+json")
    found["annotations"] = {"org.opencontainers.image.ref.name": name}
    (top / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [found]}))
    (top / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return top


def docker_archive(layers: list[bytes], name: str, config: dict[str, object]) -> bytes:
    """What docker save writes."""
    described = json.dumps({
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine], "os": "linux",
        "config": config, "rootfs": {"type": "layers", "diff_ids": [sha256(one) for one in layers]},
    }).encode()  # fmt: skip
    ids = [sha256(one).partition(":")[2] for one in layers]
    where = [f"{one}/layer.tar" for one in ids]
    manifest = json.dumps([{"Config": f"{ids[0]}.json", "RepoTags": [name], "Layers": where}])
    files = [file(where[at].encode(), layers[at]) for at in range(len(layers))]
    return b"".join(
        [*files, file(f"{ids[0]}.json".encode(), described),
         file(b"manifest.json", manifest.encode()), END]
    )  # fmt: skip


# -- stores ----------------------------------------------------------------------------------


def ids(single: bool = False) -> IdMap:
    return tenant_ids(without("subuid") if single else as_found())


@contextmanager
def store(place: Path) -> Iterator[Store]:
    """A store that is gone at the end: what is in it may belong to ids that pytest has not."""
    found = Store(place)
    try:
        yield found
    finally:
        if place.exists():
            with open_unpacker(ids()) as unpacker, found.removing(unpacker):
                for image in found.images():
                    found.forget(image)
                _, used = found.collect(unpacker)
                assert not used


def take(place: Store, data: bytes, limits: Limits = SMALL, name: str = "made") -> Imported:
    """Import bytes as they would come through a pipe."""
    (imported,) = import_image(place, io.BytesIO(data), name, ids(), limits)
    return imported


# -- images that run ---------------------------------------------------------------------------

PROGRAMS = ("sh", "cat", "ls", "stat", "id", "env", "touch", "rm", "mkdir", "mv", "ln", "true")


def system(top: Path, programs: tuple[str, ...] = PROGRAMS) -> Path:
    """A small root: these programs of the host with the libraries they are linked with."""
    for name in ("usr/bin", "etc", "home/app", "srv"):
        (top / name).mkdir(parents=True)
    (top / "bin").symlink_to("usr/bin")
    (top / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
    for name in programs:
        found = shutil.which(name)
        assert found is not None
        shutil.copy(found, top / "usr/bin" / name)
        listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=False).stdout
        for library in re.findall(r"(/\S+) \(0x", listed):
            place = top / library.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                shutil.copy(library, place)
    return top
