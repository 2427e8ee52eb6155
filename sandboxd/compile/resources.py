"""Limits of a policy -> the kernel's: resource limits of a process, files of a cgroup."""

from __future__ import annotations

import math

from sandboxd import plan
from sandboxd.compile.decisions import decisions
from sandboxd.host import Host
from sandboxd.policy import Policy

OWN = "every sandbox: quotas that jobs of one user would share"
PERIOD = 100_000
"""Microseconds of a cpu.max period (Documentation/admin-guide/cgroup-v2.rst)."""

INOTIFY = frozenset({"inotify_init", "inotify_init1"})
SHARES = (("max_inotify_instances", 16), ("max_inotify_watches", 16384))
"""Of 128 and of 8192 up to 1048576 that all of a user have (fs/notify/inotify/inotify_user.c)."""


def rlimits(policy: Policy, host: Host) -> tuple[plan.Step, ...]:
    """setrlimit(2) for every process of the job. Applied last, inside its user namespace."""
    limits = policy.limits
    wanted: list[tuple[str, int | None, str]] = [
        # A second more than the whole tree may use: the backstop of the supervisor's timer.
        ("CPU", _ceil(limits.cpu_time), "limits.cpu_time"),
        ("FSIZE", limits.file_size, "limits.file_size"),
        ("NOFILE", limits.open_files, "limits.open_files"),
        ("STACK", limits.stack, "limits.stack"),
        ("AS", limits.address_space, "limits.address_space"),
        # init counts too
        ("NPROC", None if limits.processes is None else limits.processes + 1, "limits.processes"),
    ]
    steps = [
        plan.SetLimit(resource=name, soft=value, hard=value, why=policy.origin(key))
        for name, value, key in (
            (name, _at_most(value, host.hard_limits.get(name)), key) for name, value, key in wanted
        )
        if value is not None or name == "STACK"
    ]
    # 0 would still feed a core_pattern that is a pipe; 1 byte is too small for any (core(5)).
    own = {"CORE": 1, "SIGPENDING": 256, "MSGQUEUE": 65536, "NICE": 0, "RTPRIO": 0}
    steps += [
        plan.SetLimit(resource=name, soft=_at_most(value, host.hard_limits.get(name)),
                      hard=_at_most(value, host.hard_limits.get(name)), why=OWN)
        for name, value in own.items()
    ]  # fmt: skip
    return tuple(steps)


def _ceil(seconds: float | None) -> int | None:
    return None if seconds is None else math.ceil(seconds) + 1


def _at_most(value: int | None, hard: int | None) -> int | None:
    """No more than our own hard limit, which nobody here may raise."""
    if hard is None:
        return value
    return hard if value is None else min(value, hard)


def quotas(policy: Policy, host: Host) -> tuple[tuple[str, int], ...]:
    """What goes into /proc/sys/user of a job's user namespace (namespaces(7), inotify(7)).

    inotify is counted for the user of each namespace up to the first, where all jobs are the
    caller, whatever their uid inside. So each gets a share, where its filter lets it have any.
    """
    own = (("max_user_namespaces", 0),)
    if host.seccomp:
        asked = [one for one in decisions(policy.syscalls, host.arch) if one.name in INOTIFY]
        if not any(one.otherwise == "allow" or one.rules for one in asked):
            return own
    return (*own, *SHARES)


def cgroup_files(policy: Policy, host: Host) -> dict[str, str]:
    """What is written into the leaf of a run, for the controllers this host gives us."""
    limits = policy.limits
    controllers = host.cgroup.controllers if host.cgroup else frozenset()
    files: dict[str, str] = {}
    if "memory" in controllers and limits.memory is not None:
        files["memory.max"] = str(limits.memory)
        files["memory.swap.max"] = "0"
        files["memory.oom.group"] = "1"
    if "pids" in controllers and limits.processes is not None:
        files["pids.max"] = str(limits.processes + 1)
    if "cpu" in controllers and limits.cpus is not None:
        files["cpu.max"] = f"{max(1000, round(limits.cpus * PERIOD))} {PERIOD}"
    return files
