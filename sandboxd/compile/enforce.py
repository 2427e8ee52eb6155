"""What is in force on this host under a policy, word for word as the result will say it.

The only place that claims enforcement; every claim is derived from the plan's steps and the host's
facts, and a policy's [require] is held against it.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from sandboxd import plan
from sandboxd.compile import carrying, rootfs
from sandboxd.errors import HostError
from sandboxd.host import Host
from sandboxd.plan import IdMap, SetupPlan
from sandboxd.policy import Attached, Policy, Syscalls

NONE = "none"
NOT_LIMITED = "not limited"
NOT_ASKED = "not asked"
WATCHED = "watched directory"
ON_REQUEST = {"memory_high": "memory", "cpu_weight": "cpu", "pinning": "cpuset", "io": "io"}
"""What [resources] may ask for -> the controller without which there is none of it."""


CAPS = {
    "network_connections": "nftables",
    "network_bytes": "net_bytes",
    "network_rate": "net_rate",
}
"""What [network] may ask for -> what this host must have."""


class Found(msgspec.Struct, frozen=True):
    enforcement: dict[str, str]
    degraded: tuple[tuple[str, str], ...]


def judge(policy: Policy, host: Host, ids: IdMap, setup: SetupPlan) -> Found:
    """The guarantees of a run under this policy here."""
    limits = policy.limits
    controllers = host.cgroup.controllers if host.cgroup else frozenset()
    per_process = [] if limits.address_space is None else ["RLIMIT_AS per process"]
    sampled = [] if host.hides_processes else ["sampled"]
    in_memory = policy.root.upper == "tmpfs"
    filtered = any(isinstance(step, plan.Filter) for step in setup.steps)
    says = {
        "user_namespace": "single" if ids.writer == "self" else "subuid",
        "uid": "own" if setup.own_uid else "shared",
        "root": _root(policy, host),
        "network": _network(policy, host),
        "cpu_time": _pick(limits.cpu_time, host.cgroup is not None, "cgroup2 cpu.stat",
                          " and ".join([*sampled, "RLIMIT_CPU per process"])),
        "wall_time": _pick(limits.wall_time, True, "supervisor", NONE),
        "memory": _pick(limits.memory, "memory" in controllers, "cgroup2",
                        " and ".join([*sampled, *per_process]) or NONE),
        # RLIMIT_NPROC counts per (user namespace, uid), and a run has one of the two to itself.
        "processes": _pick(limits.processes, "pids" in controllers, "cgroup2", "RLIMIT_NPROC"),
        "cpus": _pick(limits.cpus, "cpu" in controllers, "cgroup2", NONE),
        "output": _pick(limits.output, True, "supervisor", NONE),
        "disk": _pick(limits.disk, in_memory, "tmpfs size", WATCHED),
        "inodes": _pick(limits.inodes, in_memory, "tmpfs inodes", WATCHED),
        "syscalls": _syscalls(policy.syscalls) if filtered else NONE,
        "landlock": f"abi {host.landlock}" if setup.landlock else NONE,
        "kill": "cgroup2 and pid namespace" if host.cgroup else "pid namespace",
    }  # fmt: skip
    for what in ON_REQUEST:
        there = "cgroup2" if ON_REQUEST[what] in controllers else NONE
        says[what] = there if _asks(policy, what) else NOT_ASKED
    says |= _caps(policy, host)
    return Found(says, tuple(_degraded(policy, host, says)))


def _syscalls(syscalls: Syscalls) -> str:
    """What the filter is made of."""
    if syscalls.oci:
        return "profile"
    on_top = isinstance(syscalls, Attached) and syscalls.on_top
    return "allowlist and profile" if on_top else "allowlist"


def _pick(limit: object, exact: bool, best: str, fallback: str) -> str:
    if limit is None:
        return NOT_LIMITED
    return best if exact else fallback


def _network(policy: Policy, host: Host) -> str:
    found = []
    if host.place is not None:
        found.append("group: one namespace" if host.place.shared else "group: bridge, nftables")
    if policy.network.mode == "user":
        found.append(f"user: {carrying.program(policy, host)[0]}, nftables")
    return "; ".join(found) or NONE


def _caps(policy: Policy, host: Host) -> dict[str, str]:
    """The caps of [network]."""
    network = policy.network
    rows = {
        "network_connections": (network.connections, True, "nftables"),
        "network_bytes": (network.bytes, host.net_bytes, "nftables"),
        "network_rate": (network.rate, host.net_rate, "nftables and tbf"),
    }
    return {
        what: NOT_ASKED if cap is None or network.mode == "none" else how if there else NONE
        for what, (cap, there, how) in rows.items()
    }


def _asks(policy: Policy, what: str) -> bool:
    wanted = policy.resources
    asked = {
        "memory_high": wanted.memory_high is not None,
        "cpu_weight": wanted.cpu_weight is not None,
        "pinning": bool(wanted.cpuset or wanted.cores or not wanted.siblings),
        "io": bool(wanted.io),
    }
    return asked[what]


def _root(policy: Policy, host: Host) -> str:
    how = rootfs.driver(policy, host)
    if how == "shared" and policy.root.image:
        how = "kernel"
    return {"shared": "host:read-only", "kernel": "overlay:kernel", "fuse": "overlay:fuse",
            "tmpfs": "tmpfs and binds"}[how]  # fmt: skip


def _degraded(policy: Policy, host: Host, says: dict[str, str]) -> list[tuple[str, str]]:
    notes = host.fault_notes
    in_memory = policy.root.upper == "tmpfs"
    found: list[tuple[str, str]] = []
    if says["user_namespace"] == "single":
        found.append(
            ("user_namespace", notes.get("subuid", "no subordinate ids: jobs share a uid"))
        )
        if host.other_groups:  # user_namespaces(7): who maps a single gid must deny setgroups
            found.append(("groups", "a single id: jobs stay in all groups that the caller is in"))
    found += _without_controllers(policy, host, says)
    found += _uncapped(host, says)
    if says["syscalls"] == NONE:
        why = notes.get("seccomp", f"{policy.origin('syscalls')} allows everything")
        found.append(("syscalls", why))
    if host.landlock < 6:
        why = notes.get("landlock", f"ABI {host.landlock}: signals and abstract sockets unscoped")
        found.append(("landlock", why))
    if WATCHED in (says["disk"], says["inodes"]):
        found.append(
            ("disk", "a directory has no limit of the kernel's: it is looked at some 50 times a "
             "second, and in between a run can write what the disk takes")
        )  # fmt: skip
    if says["root"] == "overlay:fuse" and says["memory"] == "cgroup2" and in_memory:
        found.append(("memory", "files written through fuse-overlayfs are not in it; limits.disk "
                      "holds them"))  # fmt: skip
    if not rootfs.is_shared(policy, host) and says["root"] == "tmpfs and binds":
        found.append(("root", notes.get("overlay", "no overlay works here: lower files read-only")))
    found += [
        (name, f"no more than {size} bytes: looked at every quarter of a second, not the kernel's")
        for name, size in host.quotas.items()
    ]
    if policy.root.image and host.image is not None:
        found += [("image", note) for note in host.image.notes]
    return found


def _uncapped(host: Host, says: dict[str, str]) -> list[tuple[str, str]]:
    why = {what: host.fault_notes.get(fact, "not there") for what, fact in CAPS.items()}
    return [(what, f"{why[what]}; {NONE}") for what in CAPS if says[what] == NONE]


def _without_controllers(
    policy: Policy, host: Host, says: dict[str, str]
) -> Iterator[tuple[str, str]]:
    notes = host.fault_notes
    no_cgroup = host.cgroup_why_not or "no delegated cgroup v2"
    hidden = notes.get("processes", "/proc hides processes")
    if host.cgroup is None:
        yield "cpu_time", f"{no_cgroup}: a lower bound, what escapes wait4 is not counted"
        if host.hides_processes and policy.limits.idle_time is not None:
            yield "idle_time", f"{hidden}; {NONE}"
    for what, controller in (("memory", "memory"), ("cpus", "cpu")):
        if says[what] not in ("cgroup2", NOT_LIMITED):
            why = notes.get(f"cgroup.{controller}", no_cgroup)
            if what == "memory" and host.hides_processes:
                why = f"{why}; {hidden}"
            yield what, f"{why}; {says[what]}"
    for what, controller in ON_REQUEST.items():
        if says[what] == NONE:
            yield what, f"{notes.get(f'cgroup.{controller}', no_cgroup)}; none"
    if policy.limits.memory is not None and (spare := _huge_pages(host)):
        yield "huge pages", f"{spare} of this machine's are outside of limits.memory"


def _huge_pages(host: Host) -> int:
    """How many a run could take, which no limit of memory counts."""
    held = host.cgroup is not None and "hugetlb" in host.cgroup.controllers
    return 0 if held else sum(host.huge_pages.values())


def check_required(policy: Policy, host: Host, found: Found) -> None:
    """Refuse what the policy's [require] demands and this host does not give."""
    require, says = policy.require, found.enforcement
    reasons = dict(found.degraded)
    exact = {
        "memory": says["memory"] == "cgroup2",
        "cpu_time": says["cpu_time"] == "cgroup2 cpu.stat",
        "processes": says["processes"] in ("cgroup2", "RLIMIT_NPROC"),
        "cpus": says["cpus"] == "cgroup2",
        "syscalls": says["syscalls"] != NONE,
        "network": not (lacking := _uncapped(host, says)),
    }
    reasons["network"] = "; ".join(f"{what}: {why}" for what, why in lacking)
    for name, holds in exact.items():
        if getattr(require, name) == "enforced" and not holds:
            where = policy.origin(f"require.{name}")
            why = reasons.get(name) or says[name]
            hint = "run `sandboxd doctor`, or relax the policy"
            if why == NOT_LIMITED:
                hint = f"set limits.{name}, or relax the policy"
            raise HostError(name, f"{where}: required to be enforced, but {why}", hint=hint)
    if require.user_namespace == "subuid" and says["user_namespace"] != "subuid":
        raise HostError("subuid", f"{policy.origin('require.user_namespace')}: no subordinate ids",
                        hint=reasons.get("user_namespace", "run `sandboxd doctor`"))  # fmt: skip
    if host.landlock < require.landlock:
        raise HostError("landlock", f"{policy.origin('require.landlock')}: this kernel has ABI "
                        f"{host.landlock}", hint="a newer kernel, or lsm=landlock")  # fmt: skip
