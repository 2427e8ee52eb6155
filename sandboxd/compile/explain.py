"""A policy, key by key: what is in force, which file says so, and what the kernel is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from sandboxd import units
from sandboxd.compile.reading import NOTHING, unit
from sandboxd.compile.seccomp import GUARDS
from sandboxd.compile.syscalls import GROUPS, RULES, members
from sandboxd.policy import Mount, Policy, Rule, Syscalls

DEFAULT = "default"
"""The origin of what no file says."""
_EXAMPLE = Policy()
NO_LIMIT = "not limited by sandboxd"
AS_FOUND = "as the kernel has it"


@dataclass(frozen=True, slots=True)
class Explained:
    """One key. `value` is written as a policy file has it."""

    key: str
    value: str
    origin: str
    meaning: str


def explain(policy: Policy) -> tuple[Explained, ...]:
    """Every key that has an effect, in the order of the reference."""
    return tuple(_rows(policy))


def _rows(policy: Policy) -> Iterator[Explained]:
    for section in msgspec.structs.fields(Policy):
        if section.name == "mounts":
            for at, mount in enumerate(policy.mounts):
                key = f"mounts[{at}]"
                yield Explained(key, toml(mount), _origin(policy, key), _mount(mount))
        elif section.name == "allow_sources":
            key, value = section.name, policy.allow_sources
            yield Explained(key, toml(value), _origin(policy, key), _allowed(value))
        elif section.name not in ("name", "description", "origins"):
            yield from _section(policy, section.name)


def _section(policy: Policy, section: str) -> Iterator[Explained]:
    struct = getattr(policy, section)
    for one in keys(struct):
        key, value = f"{section}.{one.name}", getattr(struct, one.name)
        if section == "syscalls" and isinstance(value, tuple):
            for at, entry in enumerate(value):
                where = f"{key}[{at}]"
                yield Explained(where, toml(entry), _origin(policy, where), _answer(key, entry))
        elif isinstance(value, dict):
            for name, text in value.items():
                where = f"{key}.{name}"
                meaning = "an entry of the environment given to execve(2)"
                yield Explained(where, json.dumps(text), _origin(policy, where), meaning)
        else:
            yield Explained(key, written(key, value), _origin(policy, key), _meaning(key, value))


def keys(struct: msgspec.Struct) -> list[msgspec.structs.FieldInfo]:
    """The keys of a section that count."""
    if not isinstance(struct, Syscalls):
        return list(msgspec.structs.fields(struct))
    every = msgspec.structs.fields(Syscalls)
    return [one for one in every if one.name == "oci"] if struct.oci else list(every)


def _meaning(key: str, value: object) -> str:
    if value is None and key.startswith(("limits.", "artifacts.", "network.")):
        return NO_LIMIT
    if value is None and key.startswith("resources."):
        return AS_FOUND
    meaning = MEANINGS[key]
    return meaning if isinstance(meaning, str) else meaning(value)


def _origin(policy: Policy, key: str) -> str:
    if key in policy.origins:
        return policy.origins[key]
    outer = key.partition("[")[0]
    return policy.origins.get(outer, DEFAULT)


def written(key: str, value: object) -> str:
    """A value as a policy file has it: "256M", "1.5s", true, ["null"]."""
    section, _, name = key.partition(".")
    if value is None:
        return f'"{NOTHING.get(section, "none")}"'
    kind = Mount if section == "mounts" else getattr(_EXAMPLE, section, _EXAMPLE)
    what = next((unit(one.type) for one in msgspec.structs.fields(kind) if one.name == name), "")
    if what == "bytes" and isinstance(value, int):
        return f'"{units.format_size(value)}"'
    if what == "seconds" and isinstance(value, int | float):
        return f'"{units.format_time(value)}"'
    return toml(value)


def toml(value: object) -> str:
    """A value in one line of TOML."""
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.fields(value)
        pairs = ((one.name, getattr(value, one.name), one.default) for one in fields)
        inner = ", ".join(f"{name} = {toml(got)}" for name, got, default in pairs if got != default)
        return f"{{{inner}}}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "".join(map(_escaped, json.dumps(value, ensure_ascii=False)))


def _escaped(char: str) -> str:
    """What JSON leaves as it is and TOML or a terminal would not take well."""
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else f"\\U{ord(char):08x}"


# -- what the kernel is told -----------------------------------------------------------------

_ANSWERS = {
    "syscalls.allow": "seccomp: allowed",
    "syscalls.deny": "seccomp: EPERM",
    "syscalls.enosys": "seccomp: ENOSYS, as if the kernel were older",
    "syscalls.eafnosupport": "seccomp: EAFNOSUPPORT unless a rule admits it",
    "syscalls.kill": "seccomp: the process dies of SIGSYS",
}


def _answer(key: str, entry: str | Rule) -> str:
    if isinstance(entry, Rule):
        when = "if all comparisons hold" if entry.args else "always"
        return f"seccomp: {', '.join(entry.calls)}: {entry.action} {when}"
    if key == "syscalls.rules":
        return f"seccomp, by arguments: {RULES[entry].purpose}"
    if entry in GROUPS:
        return f"{_ANSWERS[key]}, {len(members(entry))} in all: {GROUPS[entry].purpose}"
    return _ANSWERS[key]


def _allowed(sources: tuple[str, ...]) -> str:
    if "/" in sources:
        return "binds and root.source may be of anything on the host that the caller can reach"
    return "held against the real path of each source, which is then opened through no link"


def _mount(mount: Mount) -> str:
    if mount.type in ("volume", "cache"):
        locks = {"shared-ro": "MOUNT_ATTR_RDONLY, flock(2) shared with other readers",
               "copy": "an overlay above it, thrown away; flock(2) shared with other readers",
               "exclusive": "writable, flock(2) held against all others"}  # fmt: skip
        plain = "writable" if mount.writable else "MOUNT_ATTR_RDONLY"
        text = locks[mount.lock] if mount.type == "cache" else plain
        text = f"a bind of the {mount.type} {mount.name}: {text}, nosuid, nodev"
    elif mount.type == "tmpfs":
        room = "limits.disk" if mount.size is None else units.format_size(mount.size)
        text = f"an empty directory in memory, within {room}"
    else:
        how = "writable" if mount.writable else "MOUNT_ATTR_RDONLY"
        text = f"open_tree(2) and move_mount(2) of the host's {mount.source}: {how}, nosuid, nodev"
    return text if mount.exec else f"{text}, noexec"


def _choice(**texts: str) -> Callable[[Any], str]:
    return lambda value: texts[str(value).lower()]


def _source(source: str) -> str:
    if source == "host":
        return "the host's /usr, read-only, and an /etc of sandboxd's own"
    return "open_tree(2) of this directory becomes the lower layer of /"


def _id(what: str) -> Callable[[int | None], str]:
    def text(value: int | None) -> str:
        if value is None:
            return (
                f"the {what} that the run has in its tenant's user namespace, shared with no other"
            )
        return f"a last user namespace maps it to the {what} the run has outside"

    return text


def _clock(name: str) -> Callable[[int], str]:
    def text(seconds: int) -> str:
        if not seconds:
            return f"{name} as on the host"
        return f"a time namespace (time_namespaces(7)) adds {seconds} s to {name}"

    return text


def _oci(path: str) -> str:
    if not path:
        return "there is no profile: the lists and rules count"
    return f"seccomp: as this profile says, in place of lists and rules; and {GUARDS}"


def _required(what: str) -> Callable[[str], str]:
    def text(value: str) -> str:
        if value == "any":
            return f"there may be no {what}; the result then says so"
        return f"refused before it starts where there is no {what}"

    return text


def _landlock(abi: int) -> str:
    if not abi:
        return "there may be no landlock(7); the result then says so"
    return f"refused before it starts where landlock(7) is older than ABI {abi}"


MEANINGS: Mapping[str, str | Callable[[Any], str]] = MappingProxyType(
    {
        "limits.cpu_time": "cpu.stat of the run's cgroup, else sampled from /proc; and RLIMIT_CPU,"
        " a second more, for each process",
        "limits.wall_time": "a timer; then cgroup.kill, or SIGKILL for the PID namespace's init",
        "limits.idle_time": "as wall_time, counted while the tree uses almost no CPU",
        "limits.memory": "memory.max, memory.swap.max = 0 and memory.oom.group of the run's cgroup;"
        " without a cgroup sampled from /proc",
        "limits.processes": "pids.max of the run's cgroup, and RLIMIT_NPROC",
        "limits.output": "counted as it is read from the pipes; then the run is killed",
        "limits.disk": "size= of the one tmpfs that every writable place lies on",
        "limits.inodes": "nr_inodes= of the same tmpfs",
        "limits.open_files": "RLIMIT_NOFILE",
        "limits.file_size": "RLIMIT_FSIZE; without it limits.disk is",
        "limits.stack": "RLIMIT_STACK",
        "limits.address_space": "RLIMIT_AS",
        "limits.cpus": "cpu.max of the run's cgroup",
        "artifacts.files": "counted as they are found; the rest is said to be left out",
        "artifacts.bytes": "of st_size, before a file is read; what is larger than what is left of"
        " them is left out, and said to be",
        "artifacts.depth": "directories below that are not entered, and said not to be",
        "artifacts.path": "longer names are left out, and said to be",
        "artifacts.entries": "names looked at; beyond them the search ends, and says so",
        "resources.memory_high": "memory.high of the run's cgroup",
        "resources.swap": "memory.swap.max of the run's cgroup, where limits.memory is given",
        "resources.oom": _choice(
            run="memory.oom.group: the kernel kills all of the run's processes",
            process="the kernel kills one of the run's processes, and the others go on",
        ),
        "resources.cpu_weight": "cpu.weight of the run's cgroup",
        "resources.cpuset": "cpuset.cpus of the directory that holds the run's cgroup",
        "resources.cores": "a directory of its own for each set of so many cores; cpuset.cpus",
        "resources.siblings": _choice(
            true="every hyper-thread of its cores is in cpuset.cpus",
            false="one hyper-thread of each core is in cpuset.cpus",
        ),
        "resources.io": "io.max of the run's cgroup",
        "root.source": _source,
        "root.image": "its layers are overlaid: in the template, once, if no run writes to them",
        "root.config": "env: its variables over the policy's; workdir: where a program starts;"
        " user: the ids seen inside",
        "root.writable": _choice(
            true="an overlay whose upper layer is the run's own",
            false="every mount is MOUNT_ATTR_RDONLY; /box, /tmp and /dev/shm are writable",
        ),
        "root.driver": _choice(
            auto="overlayfs in the user namespace, else fuse-overlayfs, else bind mounts",
            kernel="overlayfs mounted in the user namespace (Linux 5.11), or refused",
            fuse="fuse-overlayfs outside of the sandbox, or refused",
            tmpfs="bind mounts on a tmpfs: what the host has stays read-only",
        ),
        "root.upper": _choice(
            tmpfs="all that is written lies on one tmpfs",
            directory="all that is written lies in a directory on disk, which sandboxd watches",
        ),
        "root.proc": _choice(
            pid="proc mounted with subset=pid: processes, no /proc/sys, no /proc/meminfo",
            masked="the whole of proc; /dev/null over what is dangerous, /proc/sys read-only",
            none="no proc: an empty directory",
        ),
        "root.etc": "each is bound read-only from the host's /etc if it is there",
        "root.aliases": "symbolic links in the root",
        "network.mode": _choice(
            none="a network namespace of its own in which only lo is up",
            user="the same with tap0, whose packets a program outside carries, and a filter"
            " (nftables) that belongs to the tenant",
        ),
        "network.helper": "slirp4netns, or pasta, in the host's network, as the caller",
        "network.allow": "rules of the filter; names by sandboxd's own name server, which puts"
        " their addresses into sets of the filter; all else is refused and told in the result",
        "network.resolvers": "asked by sandboxd, from the host's network; else those of the host",
        "network.publish": "bound on the host while the job runs, at 127.0.0.1 if no other address",
        "network.connections": "a set of the filter with so many places; who finds none is refused",
        "network.bytes": "a quota of the filter (nftables); beyond it connections are reset",
        "network.rate": "out: a token bucket (tc-tbf) on tap0, where packets wait; in: a limit of"
        " the filter, which drops",
        "syscalls.default": _choice(
            enosys="seccomp: every other call answers ENOSYS, as if the kernel were older",
            eperm="seccomp: every other call answers EPERM",
            kill="seccomp: every other call kills the process with SIGSYS",
        ),
        "syscalls.abi32": _choice(
            kill="seccomp: any i386 call kills the process; x32 always does",
            allow="seccomp: i386 calls are held by the same lists and rules; x32 kills",
        ),
        "syscalls.oci": _oci,
        "identity.user": _choice(
            isolated="a uid of the caller's subordinate ids (subuid(5)) that no other run has",
            caller="the uid outside is the caller's",
        ),
        "identity.uid": _id("uid"),
        "identity.gid": _id("gid"),
        "identity.name": "the name of the uid in the sandbox's /etc/passwd",
        "identity.home": "the home directory in the sandbox's /etc/passwd",
        "identity.hostname": "sethostname(2) in a UTS namespace, and /etc/hostname",
        "environment.inherit": "taken from sandboxd's own environment where it has them",
        "devices.allow": "each is bound from the host's /dev: noexec, nosuid",
        "clock.boottime": _clock("CLOCK_BOOTTIME"),
        "clock.monotonic": _clock("CLOCK_MONOTONIC"),
        "require.memory": _required("memory controller in a delegated cgroup"),
        "require.cpu_time": _required("delegated cgroup to count CPU time in"),
        "require.processes": _required("pids controller in a delegated cgroup"),
        "require.cpus": _required("cpu controller in a delegated cgroup"),
        "require.syscalls": _required("seccomp filter"),
        "require.network": _required("nftables with quotas and limits, and tc-tbf"),
        "require.user_namespace": _required("range of subordinate ids"),
        "require.landlock": _landlock,
    }
)
"""Key -> what it comes to in the kernel, of the value if need be."""
