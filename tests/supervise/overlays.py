"""Roots by an overlay for tests: what lies below, and programs that run above it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from sandboxd.job import Job
from sandboxd.policy import Identity, Limits, Mount, Policy, Root
from sandboxd.result import Result
from sandboxd.supervise.runner import open_runner
from tests.supervise import variants

DRIVERS = pytest.mark.parametrize(
    "driver",
    [
        pytest.param("kernel", marks=pytest.mark.needs("overlay")),
        pytest.param("fuse", marks=pytest.mark.needs("fuse")),
    ],
)
CALLER = Identity(user="caller", uid=1000)
PYTHON = "/usr/bin/python3"
LIMITS = Limits(wall_time=60.0, disk=64 << 20, inodes=20000)
OLD = 1_000_000_000
"""A time long gone, in seconds since the epoch."""
PRELUDE = """
import errno, fcntl, mmap, os, shutil, stat, subprocess, sys
from pathlib import Path
os.chdir("/data")
def refused(call, *args, **more):
    try:
        call(*args, **more)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"
"""


def lower(folder: Path) -> Path:
    """A directory to be a root, with something of everything in /data."""
    root = folder / "image"
    for name in ("usr", "etc", "data/deep/er/est", "data/tree/a/b"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    data = root / "data"
    for name, text in {
        "file": "lower\n", "one": "both\n", "deep/x": "x\n", "deep/er/y": "y\n",
        "deep/er/est/z": "z\n", "tree/a/b/leaf": "leaf\n", "tree/a/top": "top\n",
    }.items():  # fmt: skip
        (data / name).write_text(text)
    os.link(data / "one", data / "two")
    os.setxattr(data / "file", "user.colour", b"green")
    (data / "file").chmod(0o640)
    os.utime(data / "file", (OLD, OLD))
    (data / "link").symlink_to("file")
    with (data / "sparse").open("wb") as sparse:
        sparse.truncate(512 << 20)
        sparse.seek(256 << 20)
        sparse.write(b"in the middle")
    return root


def policy(root: Path, driver: str, limits: Limits = LIMITS, **more: object) -> Policy:
    """The directory as a writable root; `more` is for [root]."""
    chosen = Root(source=str(root), writable=True, driver=driver, proc="masked", **more)  # type: ignore[arg-type]
    base = variants.policy(limits=limits, root=chosen, identity=CALLER)
    return msgspec.structs.replace(base, mounts=(Mount(source="/usr", target="/usr"),))


async def python(program: str, chosen: Policy) -> Result:
    """Run a program above the overlay, in /data."""
    async with open_runner() as runner:
        return await runner.run(Job(argv=[PYTHON, "-Bc", PRELUDE + program], policy=chosen))
