"""Namespaces of the job's own: the way to capabilities, and with them to most kernel bugs."""

from __future__ import annotations

import os

import pytest

from tests import needs
from tests.escape.attack import (
    Change,
    Compiled,
    Job,
    achieved,
    any_uid,
    attack,
    attack_c,
    every_policy,
    finished,
    live,
    open_runner,
    plan,
    probe,
    python,
    with_steps,
    without,
)

KINDS = {"CLONE_NEW" + name.upper(): flag for name, flag in plan.NAMESPACES.items()}
UNSHARING = f"""
for name, flag in {KINDS!r}.items():
    found["unshare " + name] = tried(call, "unshare", flag)
"""
# The child that a success makes goes at once; clone knows no NEWTIME, that bit is a signal there.
CLONING = f"""
def cloned(nr, *args):
    if call(nr, *args) == 0:
        os._exit(0)

flags = {[flag for flag in KINDS.values() if flag != plan.NAMESPACES["time"]]!r}
for flag in flags:
    for upper in (0, 1 << 32, 0xffffffff << 32):
        found[f"clone {{flag | upper:#x}}"] = tried(cloned, "clone", flag | upper | 17, 0, 0, 0, 0)
"""


def unlimited(compiled: Compiled) -> Compiled:
    """Neither the filter nor the limit of namespaces (where it is a step of the tenant's)."""
    kinds = (plan.WriteFile, plan.Filter)
    return with_steps(compiled, lambda step: None if isinstance(step, kinds) else step)


@every_policy
async def test_unshare(policy: str) -> None:
    """unshare(2): CVE-2022-0185, CVE-2023-0386, CVE-2024-1086 all begin with CLONE_NEWUSER.

    Countermeasures: seccomp; max_user_namespaces 0 in the job's user namespace; no capability
    for the other kinds.
    """
    found = await attack(policy, UNSHARING)
    assert set(found.values()) == {"EPERM"}, found


@every_policy
async def test_clone(policy: str) -> None:
    """clone(2) with CLONE_NEW*, also behind high bits; clone3(2), whose flags lie in memory.

    Countermeasures: the same; clone3 does not exist (ENOSYS), and libc falls back.
    """
    found = await attack(policy, CLONING)
    assert set(found.values()) == {"EPERM"}, found
    third = """
for flag in (0, 0x10000000):
    arguments = (ctypes.c_uint64 * 11)(flag, 0, 0, 0, 17)
    found[hex(flag)] = tried(lambda: call("clone3", arguments, 88) or os._exit(0))
"""
    assert set((await attack(policy, third)).values()) == {"ENOSYS"}


@pytest.mark.parametrize(
    ("policy", "weaken", "answer"),
    [
        ("base", without(plan.Filter), "ENOSPC"),
        ("shell", without(plan.Filter), "ENOSPC"),
        ("judge-native", without(plan.Filter), "ENOSPC"),
        ("judge-native", unlimited, "ok"),
    ],
)
async def test_user_namespace_without_filter(policy: str, weaken: Change, answer: str) -> None:
    """The limit of namespaces holds by itself: ENOSPC. Without it, too, there is no other layer."""
    body = "found['made'] = tried(call, 'unshare', 0x10000000)"
    assert await attack(policy, body, weaken=weaken) == {"made": answer}


@any_uid
async def test_raising_the_limit_of_namespaces(policy: str) -> None:
    """/proc/sys/user belongs to the root of the user namespace: namespaces(7).

    Countermeasures: nobody is that root; /proc/sys is read-only, or not there.
    """
    found = await attack(
        policy,
        """
for name in ("max_user_namespaces", "max_net_namespaces", "max_inotify_instances"):
    found[name] = writes("/proc/sys/user/" + name, b"100")
""",
    )
    assert set(found.values()) <= {"EACCES", "EROFS", "ENOENT", "EPERM"}, found


@every_policy
async def test_entering_namespaces(policy: str) -> None:
    """setns(2) to what /proc/PID/ns and a pidfd stand for; parents by ioctl: ioctl_nsfs(2).

    Countermeasures: seccomp; /proc/1/ns needs ptrace access; no parent is within reach.
    """
    found = await attack(
        policy,
        """
pidfd = call("pidfd_open", 1, 0)
found["setns 1"] = tried(call, "setns", pidfd, 0x10000000 | 0x20000)
for name in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
    found["open " + name] = tried(os.open, "/proc/1/ns/" + name, os.O_RDONLY)
    own = os.open("/proc/self/ns/" + name, os.O_RDONLY)
    found["setns " + name] = tried(call, "setns", own, 0)
for name, request in (("user", 0xb702), ("user", 0xb701), ("pid", 0xb702), ("mnt", 0x8010b70b),
                      ("mnt", 0x8010b70c)):  # NS_GET_PARENT, _USERNS, NS_MNT_GET_NEXT, _PREV
    own = os.open("/proc/self/ns/" + name, os.O_RDONLY)
    found[f"ioctl {name} {request:#x}"] = tried(fcntl.ioctl, own, request, bytearray(16))
""",
    )
    assert set(found.values()) <= {"EPERM", "EACCES", "ENOTTY"}, found


NAMES = """
found = {kind: os.readlink("/proc/self/ns/" + kind) for kind in os.listdir("/proc/self/ns")}
"""


@pytest.mark.parametrize("policy", ["base", "judge-native", "shell"])
async def test_namespaces_of_a_job_are_its_own(policy: str) -> None:
    """Nothing is shared with the host or with a job that runs at the same time: namespaces(7).

    (But for the user namespace of jobs whose uid is their own in it; and where there are no cgroups
    of ours to tell apart, jobs share the one cgroup namespace that hides the caller's.)
    """
    shared = {("user", "judge-native")}
    if needs.missing("cgroup"):
        shared.add(("cgroup", policy))
    async with open_runner(slots=2) as runner:
        async with live(runner, policy, NAMES + "ready()") as other:
            one = achieved(await runner.run(Job(argv=python(NAMES), policy=policy)))
            two = await finished(other)
    for kind in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
        assert one[kind] != os.readlink(f"/proc/self/ns/{kind}")
        assert one[kind] != two[kind] or (kind, policy) in shared


CAPABLE = r"""
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <unistd.h>
int main(void) {
    int made = unshare(CLONE_NEWUSER | CLONE_NEWNS);
    int mounted = mount("none", "/tmp", "tmpfs", 0, 0);
    printf("{\"made\": %d, \"mounted\": %d}\n", made, mounted);
}
"""


@pytest.mark.needs("gcc")
async def test_capabilities_from_a_namespace() -> None:
    """What a nested namespace is for: root in it, and mounts. Both need two layers gone."""
    held = achieved(await attack_c("judge-native", CAPABLE))
    assert held == {"made": -1, "mounted": -1}
    open_ = achieved(await attack_c("judge-native", CAPABLE, weaken=unlimited))
    assert open_ == {"made": 0, "mounted": -1 if probe().landlock else 0}
