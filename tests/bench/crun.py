"""crun at the same isolation, and a way to it where cgroups v1 and v2 are both mounted.

There crun refuses to run without root: it looks at what /sys/fs/cgroup is. So it gets a mount
namespace in which cgroup v2 lies there, and nsenter takes each crun to it; what that detour costs
is measured beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from sandboxd.cgroup import subtree
from tests.bench.contestants import Command, Contestant
from tests.bench.programs import PLACE


@dataclass(frozen=True)
class Bundle:
    """An OCI bundle with one configuration a program."""

    crun: str
    folder: Path
    programs: Path
    uid: int
    gid: int
    way: tuple[str, ...] = ()
    """The words in front of crun's own."""

    def argv(self, program: str) -> list[str]:
        config = self.folder / f"{Path(program).name}-{self.uid}.json"
        if not config.exists():
            config.write_text(json.dumps(config_of(program, self.programs, self.uid, self.gid)))
        name = f"sandboxd-bench-{os.getpid()}-{os.urandom(8).hex()}"
        words = ["--cgroup-manager=disabled", f"--root={self.folder}/state", "run"]
        words += [f"--bundle={self.folder}", f"--config={config}", name]
        return [*self.way, self.crun, *words]


@asynccontextmanager
async def open_crun(programs: Path, folder: Path) -> AsyncIterator[list[Contestant]]:
    """Nobody if it is not installed; whether it runs is for the caller to try."""
    crun = shutil.which("crun")
    if crun is None:
        yield []
        return
    root = folder / "rootfs"
    for name in ("usr", "tmp", "proc", "dev", "box", PLACE[1:]):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    top, _ = subtree.mounted()
    if top is None or top == Path("/sys/fs/cgroup"):
        bundle = Bundle(crun, folder, programs, os.getuid(), os.getgid())
        yield [Command("crun", bundle.argv)]
        return
    async with open_detour(top) as way:
        bundle = Bundle(crun, folder, programs, 0, 0, way)

        def detour(program: str) -> list[str]:
            return [*way, program.replace(PLACE, str(programs), 1)]

        yield [Command("crun by nsenter", bundle.argv), Command("none by nsenter", detour)]


@asynccontextmanager
async def open_detour(top: Path) -> AsyncIterator[tuple[str, ...]]:
    """The words that take a command to where cgroup v2 is at its usual place."""
    script = f"mount --bind {top} /sys/fs/cgroup && echo ready && exec cat"
    process = await trio.lowlevel.open_process(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        await process.stdout.receive_some()
        yield (
            *("nsenter", "--user", "--mount", "--preserve-credentials"),
            f"--target={process.pid}", "--",
        )  # fmt: skip
    finally:
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()
            await process.stdout.aclose()
            await process.wait()


def config_of(program: str, folder: Path, uid: int, gid: int) -> dict[str, object]:
    """What bwrap's options say, in the words of the OCI runtime specification."""
    safe = ["nosuid", "nodev"]
    private = [
        {"destination": target, "type": "tmpfs", "source": "tmpfs", "options": [*safe, "mode=1777"]}
        for target in ("/tmp", "/box")
    ]
    binds = [
        {"destination": target, "type": "none", "source": source, "options": ["bind", "ro", *safe]}
        for target, source in (("/usr", "/usr"), (PLACE, str(folder)))
    ]
    kinds = ("user", "pid", "mount", "ipc", "uts", "network", "cgroup")
    none: list[str] = []
    return {
        "ociVersion": "1.0.0",
        "hostname": "sandbox",
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [program],
            "env": ["PATH=/usr/bin"],
            "cwd": "/box",
            "noNewPrivileges": True,
            "capabilities": dict.fromkeys(
                ("bounding", "effective", "inheritable", "permitted", "ambient"), none
            ),
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            *private,
            *binds,
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in kinds],
            "uidMappings": [{"containerID": 0, "hostID": uid, "size": 1}],
            "gidMappings": [{"containerID": 0, "hostID": gid, "size": 1}],
        },
    }
