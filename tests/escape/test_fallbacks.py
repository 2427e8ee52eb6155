"""The same sandbox where the host offers less: what still holds, and what the result says."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.escape.attack import (
    POLICIES,
    Host,
    Job,
    Policy,
    SandboxError,
    achieved,
    find,
    in_turn,
    open_runner,
    probe,
    python,
)

LESS: dict[str, Callable[[Host], Host]] = {
    "executor": lambda host: msgspec.structs.replace(host, memfd_exec=False),
    "single id": lambda host: msgspec.structs.replace(host, subuid=None, subgid=None),
    "no Landlock": lambda host: msgspec.structs.replace(host, landlock=0),
    "first Landlock": lambda host: msgspec.structs.replace(host, landlock=min(1, host.landlock)),
    "no cgroup": lambda host: msgspec.structs.replace(host, cgroup=None, cgroup_why_not="test"),
    "no overlay": lambda host: msgspec.structs.replace(host, overlay=False, fuse_overlayfs=None),
    "nothing": lambda host: msgspec.structs.replace(
        host, memfd_exec=False, subuid=None, subgid=None, landlock=0, cgroup=None, overlay=False,
        fuse_overlayfs=None, cgroup_why_not="test",
    ),
}  # fmt: skip

POSTURE = """
lines = dict(line.split(":", 1) for line in reads("/proc/self/status").splitlines())
found["capabilities"] = {lines[name].strip() for name in lines if name.startswith("Cap")}
found["capabilities"] = sorted(found["capabilities"])
found["modes"] = [lines[name].strip() for name in ("NoNewPrivs", "Seccomp", "TracerPid")]
found["descriptors"] = [fd for fd in range(1024) if tried(os.fstat, fd) == "ok"]
found["environ"] = sorted(os.environ)
found["pids"] = sorted(name for name in os.listdir("/proc") if name.isdigit())
found["session"] = os.getsid(0) == os.getpgid(0) == os.getpid()
found["top"] = sorted(set(os.listdir("/")) & {"sys", "work", "opt", "srv", "boot"})
refused = {
    "environ of init": reads("/proc/1/environ"),
    "memory of init": reads("/proc/1/mem"),
    "maps of init": reads("/proc/1/maps"),
    "program of init": reads("/proc/1/exe"),
    "root of init": tried(os.listdir, "/proc/1/root"),
    "descriptors of init": tried(os.readlink, "/proc/1/fd/3"),
    "ptrace": tried(call, "ptrace", 0x4206, 1, 0, 0),
    "userns": tried(call, "unshare", 0x10000000),
    "mount": tried(call, "mount", b"x", b"/tmp", b"tmpfs", 0, None),
    "umount": tried(call, "umount2", b"/proc", 2),
    "keys": tried(call, "keyctl", 0, -3, 0),
    "bpf": tried(call, "bpf", 0, bytes(120), 120),
    "setuid": tried(os.setuid, 0),
    "setgroups": tried(os.setgroups, [0]),
    "host": tried(os.kill, HOST, 0),
    "sysctl": writes("/proc/sys/kernel/core_pattern"),
    "root": writes("/new-in-root", b"x", os.O_WRONLY | os.O_CREAT) if READ_ONLY else "EROFS",
    "usr": writes("/usr/bin/env"),
    "passwd": writes("/etc/passwd") if READ_ONLY else "EROFS",
    "shadow": reads("/etc/shadow"),
}
found["refused"] = refused
tried(os.kill, 1, 9)
tried(os.kill, 1, 19)
"""
ANSWERS = {"EPERM", "EACCES", "EROFS", "ENOENT", "ESRCH", "EINVAL", "ENOSYS"}


def posture(policy: Policy) -> str:
    known = f"HOST, READ_ONLY = {os.getpid()}, {not policy.root.writable}\n"
    return known + POSTURE


def check(found: dict[str, Any]) -> None:
    assert found["capabilities"] == ["0000000000000000"]
    assert found["modes"] == ["1", "2", "0"]
    assert found["descriptors"] == [0, 1, 2]
    assert found["pids"] == ["1", "2"]
    assert found["session"]
    assert found["top"] == []
    wrong = {name: answer for name, answer in found["refused"].items() if answer not in ANSWERS}
    assert not wrong
    assert not [name for name in found["environ"] if "SANDBOXD" in name or "PYTHON" in name]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("less", LESS)
async def test_posture_with_less(less: str, policy: str) -> None:
    """Every layer that does not depend on what is missing is there all the same.

    gVisor's sandboxposture_test is of this kind. What is missing is named in the result.
    """
    whole = find(policy)
    async with open_runner(host=LESS[less](probe())) as runner:
        result = await runner.run(Job(argv=python(posture(whole)), policy=whole))
        check(achieved(result))
        named = {one.what for one in result.degraded}
    expected = {
        "single id": {"user_namespace"},
        "no Landlock": {"landlock"},
        "first Landlock": {"landlock"},
        "no cgroup": {"memory"},
        "nothing": {"user_namespace", "landlock", "memory"},
    }
    assert expected.get(less, set()) <= named


@pytest.mark.parametrize("less", ["executor", "single id", "nothing"])
async def test_files_between_jobs_with_less(less: str) -> None:
    """One uid for all jobs, and an interpreter as init: still nothing passes from job to job."""
    host = LESS[less](probe())
    leaving = """
for place in ("/tmp", "/box", "/dev/shm"):
    open(place + "/left", "w").write("left")
tried(call, "shmget", 4711, 4096, 0o1666)
"""
    looking = """
for place in ("/tmp", "/box", "/dev/shm"):
    found[place] = os.listdir(place)
found["shm"] = tried(call, "shmget", 4711, 4096, 0)
"""
    _, found = await in_turn("base", leaving, looking, host=host)
    assert found == {"/tmp": [], "/box": [], "/dev/shm": [], "shm": "ENOENT"}


REQUIRED: dict[str, dict[str, Any]] = {
    "no Landlock": {"landlock": 6},
    "single id": {"user_namespace": "subuid"},
    "no cgroup": {"memory": "enforced", "cpu_time": "enforced"},
    "no seccomp": {"syscalls": "enforced"},
}


@pytest.mark.parametrize("less", REQUIRED)
async def test_required_layers(less: str) -> None:
    """A layer that the policy requires and the host lacks is an error before anything starts."""
    host = probe()
    lacking = LESS[less](host) if less in LESS else msgspec.structs.replace(host, seccomp=False)
    base = find("base")
    require = msgspec.structs.replace(base.require, **REQUIRED[less])
    async with open_runner(host=lacking) as runner:
        with pytest.raises(SandboxError):
            await runner.run(Job(argv=("/bin/true",), policy=find(base, require=require)))


@pytest.mark.needs("subuid")
async def test_groups_of_the_caller() -> None:
    """A namespace with a single id cannot leave the caller's groups: user_namespaces(7), setgroups.

    So what they may read, jobs may, and the result says so. With subordinate ids they are gone.
    """
    counting = "found['groups'] = len(os.getgroups())"
    host = msgspec.structs.replace(probe(), other_groups=True)
    for one, count, said in (
        (host, 0, False),
        (LESS["single id"](host), len(os.getgroups()), True),
        (LESS["single id"](msgspec.structs.replace(host, other_groups=False)), None, False),
    ):
        async with open_runner(host=one) as runner:
            result = await runner.run(Job(argv=python(counting), policy="base"))
        assert count is None or achieved(result)["groups"] == count
        assert ("groups" in {found.what for found in result.degraded}) == said
