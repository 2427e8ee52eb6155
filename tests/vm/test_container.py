"""sandboxd in a container of an OCI runtime, with /sys/fs/cgroup writable and not.

As Kubernetes or Docker have it with a private cgroup namespace: no root, no capability, no new
privileges, a PID namespace whose init is the supervisor. User namespaces are allowed and /proc is
not masked, without which no sandbox is made (docs/howto/cgroup-delegation.md).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAME = "sandboxd-test"
CGROUP = Path("/sys/fs/cgroup", NAME)
UID = 1000
CRUN = ("crun", "--cgroup-manager=cgroupfs")

# One run that wants more memory than it may have, and one that wants more processes.
PROGRAM = """\
import json, sys, trio
from sandboxd.job import Job
from sandboxd.policy import Limits
from sandboxd.cgroup import subtree
from sandboxd.supervise.runner import open_runner
before = str(subtree.mounted()[1])
eater = "x = bytearray(200 << 20); import time; time.sleep(1)"
forks = "import os, signal\\nfor n in range(40):\\n    os.fork() or signal.pause()"
def job(code):
    limits = Limits(memory=64 << 20, processes=8, wall_time=60)
    return Job(argv=[sys.executable, "-S", "-c", code], limits=limits)
async def main():
    async with open_runner(slots=1) as runner:
        eaten, forked = await runner.run(job(eater)), await runner.run(job(forks))
        print(json.dumps({
            "status": [eaten.status, forked.status],
            "enforcement": eaten.enforcement,
            "degraded": {each.what: each.why for each in eaten.degraded},
            "sources": [eaten.usage.memory_peak_source, eaten.usage.processes_peak_source],
            "path": runner.host.cgroup and runner.host.cgroup.path,
            "before": before, "after": str(subtree.mounted()[1]),
        }))
trio.run(main)
"""

pytestmark = [
    pytest.mark.root_ok,
    pytest.mark.time_limit(150),
    pytest.mark.needs("disposable", "open-checkout", "userns"),
    pytest.mark.skipif(shutil.which("crun") is None, reason="crun is not installed"),
]


def mount(to: str, source: str, *options: str, kind: str = "bind") -> dict[str, Any]:
    return {"destination": to, "type": kind, "source": source, "options": list(options)}


def configuration(cgroups: str) -> dict[str, Any]:
    """config.json of an OCI bundle (runtime-spec); `cgroups` is "rw" or "ro"."""
    ours = (path for path in sys.path if os.path.isdir(path) and not path.startswith("/usr/"))
    safe = ("nosuid", "nodev", "noexec")
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {
            "user": {"uid": UID, "gid": UID},
            "cwd": "/tmp",
            "args": [sys.executable, "-P", "-c", PROGRAM],
            "env": [f"PATH={os.environ['PATH']}", f"PYTHONPATH={os.pathsep.join(sys.path)}",
                    "HOME=/tmp", "LANG=C.UTF-8"],
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "mounts": [
            mount("/proc", "proc", kind="proc"),
            mount("/dev", "tmpfs", "nosuid", "mode=755", kind="tmpfs"),
            mount("/dev/shm", "shm", "nosuid", "nodev", "mode=1777", kind="tmpfs"),
            mount("/sys", "sysfs", "ro", *safe, kind="sysfs"),
            mount("/sys/fs/cgroup", "cgroup", cgroups, *safe, kind="cgroup"),
            mount("/tmp", "tmpfs", "nosuid", "nodev", "mode=1777", kind="tmpfs"),
            mount("/var/tmp", "tmpfs", "nosuid", "nodev", "mode=1777", kind="tmpfs"),
            *(mount(path, path, "rbind", "ro") for path in ("/usr", "/etc", *ours)),
        ],
        "linux": {
            "cgroupsPath": f"/{NAME}",
            "namespaces": [{"type": kind} for kind in
                           ("pid", "ipc", "uts", "mount", "network", "cgroup")],
        },
    }  # fmt: skip


@contextmanager
def created(bundle: Path, cgroups: str) -> Iterator[subprocess.Popen[str]]:
    """A container that is made and not started; what it prints comes out of the process here."""
    root = bundle / "rootfs"
    root.mkdir()
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), root / name)
    (bundle / "config.json").write_text(json.dumps(configuration(cgroups)))
    argv = [*CRUN, "create", "--bundle", str(bundle), NAME]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as making:
        try:
            yield making
        finally:
            subprocess.run([*CRUN, "delete", "--force", NAME], check=False)


def contained(bundle: Path, cgroups: str) -> dict[str, Any]:
    """What the program prints there."""
    with created(bundle, cgroups) as making:
        assert making.stdout is not None
        assert making.wait() == 0, making.stdout.read()
        if cgroups == "rw":  # as the specification wants it of a runtime ("Cgroup ownership")
            names = Path("/sys/kernel/cgroup/delegate").read_text().split()
            for path in (CGROUP, *(CGROUP / name for name in names)):
                if path.exists():
                    os.chown(path, UID, UID)
        subprocess.run([*CRUN, "start", NAME], check=True)
        said = making.stdout.read()
    assert not CGROUP.exists()
    assert said.startswith("{"), said
    found: dict[str, Any] = json.loads(said)
    return found


def test_cgroups_that_are_writable(tmp_path: Path) -> None:
    """Its own cgroup is found, left for a leaf of it, and limits memory and processes."""
    found = contained(tmp_path, "rw")
    assert found["before"] == found["path"] == "/sys/fs/cgroup"
    assert found["after"] == "/sys/fs/cgroup/sandboxd.supervisor"
    assert found["status"] == ["memory_limit", "process_limit"], found
    assert found["enforcement"]["memory"] == found["enforcement"]["processes"] == "cgroup2"
    assert not {"memory", "processes"} & found["degraded"].keys()
    assert found["sources"] == ["cgroup2 memory.peak", "cgroup2 pids.peak"]


def test_cgroups_that_are_read_only(tmp_path: Path) -> None:
    """What is not the kernel's is said, and why; memory is watched, and processes are counted."""
    found = contained(tmp_path, "ro")
    assert found["path"] is None
    assert found["after"] == found["before"] == "/sys/fs/cgroup"
    assert found["enforcement"]["memory"] == "sampled"
    assert found["enforcement"]["processes"] == "RLIMIT_NPROC"
    why = "/sys/fs/cgroup: cgroups are mounted read-only here (Read-only file system)"
    assert found["degraded"]["memory"].startswith(why), found
    assert found["degraded"]["cpu_time"].startswith(why)
    assert found["status"] == ["memory_limit", "nonzero_exit"]
    assert found["sources"] != ["cgroup2 memory.peak", "cgroup2 pids.peak"]
