"""Limits of a policy -> the kernel's: resource limits of a process, files and CPUs of a cgroup."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sandboxd import plan
from sandboxd.compile.decisions import decisions
from sandboxd.errors import HostError
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
        ("NPROC", _processes(limits.processes, host), "limits.processes"),
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


def _processes(most: int | None, host: Host) -> int | None:
    """init counts too. Where there is pids.max it must refuse first: it counts how often."""
    if most is None:
        return None
    return most + 1 + (host.cgroup is not None and "pids" in host.cgroup.controllers)


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
    if host.seccomp and not policy.syscalls.oci:
        asked = [one for one in decisions(policy.syscalls, host.arch) if one.name in INOTIFY]
        if not any(one.otherwise == "allow" or one.rules for one in asked):
            return own
    return (*own, *SHARES)


def cgroup_files(policy: Policy, host: Host) -> dict[str, str]:
    """What is written into the leaf of a run, for the controllers this host gives us."""
    controllers = host.cgroup.controllers if host.cgroup else frozenset()
    files: dict[str, str] = {}
    if "memory" in controllers:
        files |= _memory(policy)
    if "pids" in controllers and policy.limits.processes is not None:
        files["pids.max"] = str(policy.limits.processes + 1)
    if "cpu" in controllers:
        if policy.limits.cpus is not None:
            files["cpu.max"] = f"{max(1000, round(policy.limits.cpus * PERIOD))} {PERIOD}"
        if policy.resources.cpu_weight is not None:
            files["cpu.weight"] = str(policy.resources.cpu_weight)
    if "hugetlb" in controllers:  # what memory.max does not count
        files |= {f"hugetlb.{size}.max": "0" for size in host.huge_pages}
    if "io" in controllers:
        for one in policy.resources.io:
            words = {"rbps": one.read, "wbps": one.write, "riops": one.reads, "wiops": one.writes}
            asked = [f"{word}={number}" for word, number in words.items() if number is not None]
            lines = files.get("io.max", "")
            files["io.max"] = f"{lines}{' '.join([one.device, *asked])}\n"
    return files


def _memory(policy: Policy) -> dict[str, str]:
    limits, resources = policy.limits, policy.resources
    files: dict[str, str] = {}
    if limits.memory is not None:
        files["memory.max"] = str(limits.memory)
        # Else a run would go on above its limit, as slowly as the disk is.
        files["memory.swap.max"] = str(resources.swap)
        if resources.oom == "run":
            files["memory.oom.group"] = "1"
    if resources.memory_high is not None:
        files["memory.high"] = str(resources.memory_high)
    return files


def cpu_sets(policy: Policy, host: Host) -> tuple[str, ...]:
    """Where a run may be: nothing for anywhere, one set for all runs, or one for each to itself."""
    wanted = policy.resources
    pins = wanted.cpuset is not None or wanted.cores is not None or not wanted.siblings
    if not pins or not host.cgroup or "cpuset" not in host.cgroup.controllers:
        return ()
    allowed = None if wanted.cpuset is None else frozenset(parse_cpus(wanted.cpuset))
    every = [cpu for core in host.cores for cpu in core]
    cores = [tuple(cpu for cpu in core if allowed is None or cpu in allowed) for core in host.cores]
    cores = [core if wanted.siblings else core[:1] for core in cores if core]
    if not cores:
        raise HostError("cpus", f"{policy.origin('resources.cpuset')}: none of these CPUs is ours",
                        hint=f"ours are {listed(every)}")  # fmt: skip
    if wanted.cores is None:
        return (listed(cpu for core in cores for cpu in core),)
    if wanted.cores > len(cores):
        raise HostError("cpus", f"{policy.origin('resources.cores')}: {wanted.cores} cores for a "
                        f"run, and {len(cores)} there are", hint="ask for fewer")  # fmt: skip
    groups = range(0, len(cores) - wanted.cores + 1, wanted.cores)
    return tuple(
        listed(cpu for core in cores[at : at + wanted.cores] for cpu in core) for at in groups
    )


def cpus_at_once(policy: Policy, host: Host, sets: tuple[str, ...]) -> float:
    """How many CPU seconds a run can use in a second, at most."""
    most = float(min((len(parse_cpus(one)) for one in sets), default=host.cpus))
    return most if policy.limits.cpus is None else min(most, policy.limits.cpus)


def parse_cpus(text: str) -> list[int]:
    """The CPUs of a list as the kernel writes it: "0-3,8"."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), min(int(last or first), HIGHEST_CPU) + 1))
    return sorted(found)


HIGHEST_CPU = 65536


def listed(cpus: Iterable[int]) -> str:
    return ",".join(map(str, sorted(cpus)))
