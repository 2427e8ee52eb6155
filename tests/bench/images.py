"""Images: a job in one beside a job in the host root; taking one in beside umoci."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio

from sandboxd import find_policy, open_runner
from sandboxd.policy import Root
from tests.bench.contestants import POLICY, Sandboxd, policy_for
from tests.bench.measures import Bench, Measure, Row, Table, latency_of
from tests.bench.programs import PLACE, STATIC
from tests.images import making

SIZE = 80 << 20
"""Bytes of files in the image that is taken in."""
LAYERS = 5
"""Of the image that jobs run in."""
SANDBOXD = (sys.executable, "-P", "-m", "sandboxd")
OURS, THEIRS = "sandboxd image import", "umoci unpack"


async def roots(bench: Bench) -> list[Row]:
    """A program in the host's root, in an image, and in a private writable copy of each."""
    if not bench.programs:
        return []
    plain = policy_for(bench.folder)
    image = find_policy(POLICY)
    limits = plain.limits
    async with image_of(bench, small(bench)) as name, open_runner(host=bench.host) as runner:
        policies = {
            "host root": plain,
            "image root": msgspec.structs.replace(
                image, limits=limits, root=root(image.root, name)
            ),
            "host root, writable": msgspec.structs.replace(
                plain, root=msgspec.structs.replace(plain.root, writable=True)
            ),
            "image root, writable": msgspec.structs.replace(
                image, limits=limits, root=root(image.root, name, writable=True)
            ),
        }
        if not (bench.host.overlay or bench.host.fuse_overlayfs):
            policies = {"host root": plain}
        ways = [Sandboxd(who, runner, policy, 0) for who, policy in policies.items()]
        return await latency_of(bench, ways, bench.path(STATIC), "by root")


def root(base: Root, name: str, *, writable: bool = False) -> Root:
    return msgspec.structs.replace(base, image=name, writable=writable)


@asynccontextmanager
async def image_of(bench: Bench, layout: Path) -> AsyncIterator[str]:
    """The name of an image that is taken in and forgotten."""
    before = os.environ.get("SANDBOXD_IMAGES")
    os.environ["SANDBOXD_IMAGES"] = str(bench.folder.parent / "store")
    try:
        await command([*SANDBOXD, "image", "import", str(layout), "--name", "bench"])
        yield "bench"
    finally:
        with trio.CancelScope(shield=True):
            await command([*SANDBOXD, "image", "rm", "bench"])
        del os.environ["SANDBOXD_IMAGES"]
        if before is not None:
            os.environ["SANDBOXD_IMAGES"] = before


def small(bench: Bench) -> Path:
    """An OCI layout with the static program, and layers on top that have nothing to do with it."""
    program = (bench.folder / STATIC).read_bytes()
    name = f"{PLACE}/{STATIC}"[1:].encode()
    layers = [making.file(name, program, mode=making.octal(0o755, 8)) + making.END]
    layers += [making.file(b"layer%d" % at) + making.END for at in range(1, LAYERS)]
    return making.oci_layout(bench.folder.parent / "small", layers)


async def importing(bench: Bench) -> list[Row]:
    """An image of SIZE, gzipped, from an OCI layout: to the last byte, by a command each."""
    folder = bench.folder.parent / "import"
    folder.mkdir()
    layout = making.oci_layout(folder / "layout", [large(folder / "large.tar")], name="latest")
    table = Table(f"taking in an image of {SIZE >> 20} MB", "s")
    store, bundle = folder / "store", folder / "bundle"
    ways = {OURS: [*SANDBOXD, "image", "import", str(layout), "--name", "bench"]}
    if shutil.which("umoci"):
        ways[THEIRS] = ["umoci", "unpack", "--rootless", f"--image={layout}:latest", str(bundle)]
    environment = os.environ | {"SANDBOXD_IMAGES": str(store)}
    for number in range(1 + max(1, bench.rounds // 10)):
        for who, argv in sorted(ways.items(), reverse=bool(number % 2)):
            os.sync()  # nobody pays for what another has left to be written
            began = trio.current_time()
            await command(argv, environment)
            if number:  # the first one brings files into memory
                table.add(who, trio.current_time() - began)
            await command([*SANDBOXD, "image", "rm", "bench"], environment, check=who == OURS)
            shutil.rmtree(bundle, ignore_errors=True)
    return table.all()


async def command(
    argv: list[str], environment: dict[str, str] | None = None, *, check: bool = True
) -> None:
    await trio.run_process(
        argv, env=environment, capture_stdout=True, capture_stderr=True, check=check
    )


def large(archive: Path) -> bytes:
    """A tar archive with SIZE bytes of this machine's own libraries: as mixed as an image is."""
    left = SIZE
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as out:
        for file in files():
            size = file.stat().st_size
            if size <= left:
                out.add(file, str(file)[1:], recursive=False)
                left -= size
            if left < SIZE // 100:
                break
    data = archive.read_bytes()
    archive.unlink()
    return data


def files() -> Iterator[Path]:
    """Regular files of the system, the same ones in the same order each time."""
    for top in ("/usr/lib/python3", "/usr/lib/python3.11", "/usr/share", "/usr/lib"):
        for place, folders, names in os.walk(top):
            folders.sort()
            for name in sorted(names):
                file = Path(place, name)
                if not file.is_symlink() and file.is_file() and os.access(file, os.R_OK):
                    yield file


MEASURES: dict[str, Measure] = {"roots": roots, "import": importing}
