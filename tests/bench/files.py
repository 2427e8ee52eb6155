"""How long 10 000 files take on their way in and out, with the run between."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
import trio

from sandboxd import Job, Tar, find_policy, open_runner
from sandboxd.host import Host
from sandboxd.job import Input
from sandboxd.policy import Policy

COUNT = 10_000
WAYS = ("bytes", "a directory", "an archive")
OUT = "collect_to a directory"
PEER = "cp -r"


def count(rounds: int) -> int:
    """How many; fewer where nobody wants the times."""
    return COUNT if rounds > 1 else COUNT // 10


def policy() -> Policy:
    """With room for them."""
    base = find_policy("base")
    limits = msgspec.structs.replace(base.limits, disk=256 << 20, inodes=4 * COUNT, memory=None)
    caps = msgspec.structs.replace(base.artifacts, files=2 * COUNT, bytes=256 << 20)
    return msgspec.structs.replace(base, limits=limits, artifacts=caps)


def inputs(folder: Path, many: int) -> Mapping[str, Mapping[str, Input]]:
    """The same files in each way: 0 to 2 KB, a hundred directories."""
    top, archive = folder / "files", folder / "files.tar"
    contents = {f"{one % 100}/{one}": b"x" * (one * 7 % 2000) for one in range(many)}
    for name, data in contents.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(data)
    with tarfile.open(archive, "w") as made:
        made.add(top, ".")
    return dict(zip(WAYS, (contents, {".": top}, {".": Tar(archive)}), strict=True))


async def times(host: Host, folder: Path, rounds: int) -> list[tuple[str, str, float]]:
    """(measure, who, ms), everybody in turn."""
    many = count(rounds)
    given = inputs(folder, many)
    copy, out = folder / "copy", folder / "out"
    found: list[tuple[str, str, float]] = []
    used = policy()
    async with open_runner(host=host, slots=1) as runner:
        await runner.run(Job(argv=["/bin/true"], policy=used, files={"a": b""}))
        for _ in range(rounds):
            for way, files in given.items():
                began = trio.current_time()
                await runner.run(Job(argv=["/bin/true"], policy=used, files=files))
                found.append((f"{many} files in", way, trio.current_time() - began))
            job = Job(argv=["/bin/true"], policy=used, files=given[WAYS[0]],
                      collect=["**"], collect_to=out)  # fmt: skip
            began = trio.current_time()
            result = await runner.run(job)
            found.append((f"{many} files in and out", OUT, trio.current_time() - began))
            if len(result.artifacts) != many:
                raise RuntimeError(f"{len(result.artifacts)} files came out")
            began = trio.current_time()
            await trio.run_process(["cp", "-r", os.fspath(folder / "files"), os.fspath(copy)])
            found.append((f"{many} files in", PEER, trio.current_time() - began))
            for made in (copy, out):
                shutil.rmtree(made)
    return [(measure, who, seconds * 1e3) for measure, who, seconds in found]
