"""Finds out what this machine offers: the facts of `Host`, by doing where doing is possible.

Everything that needs other processes is tried by launch/prober.py, and what it found is kept in
$XDG_CACHE_HOME/sandboxd/host.json for as long as everything it depends on looks the same.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

import msgspec

from sandboxd.cgroup.ladder import Climb, climbed
from sandboxd.compile.idmap import tenant_ids
from sandboxd.errors import HostError
from sandboxd.host import Host, IdRange
from sandboxd.linux import landlock
from sandboxd.probe import hostcache, idrange
from sandboxd.probe.attempts import Outcome, Tools, attempt
from sandboxd.script.numbers import ARCHITECTURES

# Not remembered: it may be otherwise the next time.
_PASSING = frozenset(
    {errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EINTR}
)

CAP_SYS_PTRACE = 19

COSTS: Mapping[str, str] = {
    "arch": "nothing can be run",
    "user_namespaces": "nothing can be run",
    "subuid": "jobs share the caller's user id, its groups and its quotas (pipes, signals)",
    "overlay": "a writable root needs fuse-overlayfs or is made of binds on a tmpfs",
    "fuse_overlayfs": "without the kernel's overlay a writable root is made of binds on a tmpfs",
    "memfd_exec": "the slow executor is used in place of the machine",
    "landlock": "no domain round the job: one layer of defence less",
    "seccomp": "system calls are not filtered",
    "time_namespaces": "[clock] offsets are not possible",
    "tun": "no program has a way out (network.mode = 'user')",
    "nftables": "no program has a way out (network.mode = 'user')",
    "bridge": "members of a group have no addresses of their own",
    "net_bytes": "network.bytes caps nothing",
    "net_rate": "network.rate slows nothing",
    "carrier": "no program has a way out (network.mode = 'user')",
    "proc": "no new proc can be mounted: only policies with root.proc = 'none' run",
    "processes": "without cgroups nothing is sampled: memory and idle time are not limited",
    "cgroup": "memory cannot be limited for a whole run, cpu time is a lower bound",
    "cgroup.memory": "memory cannot be limited for a whole run",
    "cgroup.pids": "processes are limited per user id (RLIMIT_NPROC)",
    "cgroup.cpu": "no share of a cpu can be given (limits.cpus)",
    "cgroup.io": "reads and writes are not counted",
    "cgroup.cpuset": "runs are not pinned to cpus",
    "cgroup.kill": "a run is ended through the pidfd of its init alone",
    "memory.peak": "the peak of memory is sampled",
    "pids.peak": "the peak of processes is sampled",
}
"""Capability -> what is lost without it. The keys are those of Host.fault_notes."""
_OF_A_CGROUP = frozenset(
    {key for key in COSTS if key.startswith("cgroup")} | {"memory.peak", "pids.peak"}
)


class Examination(msgspec.Struct, frozen=True, kw_only=True):
    """A Host, and what it was made of."""

    host: Host
    why_not: dict[str, str]
    """Capability -> why it is missing, without what that costs."""
    outcomes: dict[str, Outcome]
    tools: Tools
    cgroup: Climb


def probe(*, cached: bool = True, cgroup: str | None = None) -> Host:
    """What this machine offers. `cached=False` tries everything afresh, and remembers that.

    `cgroup` as for the ladder (ladder.py). A scope of systemd's that the ladder opened is closed
    again: the host says what such a scope offers, and a runner opens another.
    """
    with climbed(cgroup) as climb:
        host = examine(climb, cached=cached).host
    if host.cgroup and host.cgroup.scope:
        host = msgspec.structs.replace(
            host, cgroup=msgspec.structs.replace(host.cgroup, path="", scope="a new one")
        )
    return host


def examine(climb: Climb, *, cached: bool = True) -> Examination:
    """The same with all outcomes.

    The ladder was climbed before: nobody of ours who is more privileged sits in the subtree then.
    """
    tools = Tools.in_path()
    host, notes = _plain_facts()
    ranges = _ranges(tools)
    if isinstance(ranges, str):
        notes["subuid"] = ranges
    else:
        uids, gids = ranges
        host = msgspec.structs.replace(
            host, subuid=uids, subgid=gids, direct_maps=os.geteuid() == 0
        )
    outcomes = _outcomes(host, tools, cached)
    host = _with_outcomes(host, outcomes, tools, notes)
    host = with_cgroup(msgspec.structs.replace(host, fault_notes=_costs(notes)), climb)
    notes |= _cgroup_notes(climb)
    return Examination(host=host, why_not=notes, outcomes=outcomes, tools=tools, cgroup=climb)


def with_cgroup(host: Host, climb: Climb) -> Host:
    """The host with what the ladder led to."""
    others = {key: why for key, why in host.fault_notes.items() if key not in _OF_A_CGROUP}
    return msgspec.structs.replace(
        host,
        cgroup=climb.subtree,
        cgroup_why_not=climb.found.why_not,
        fault_notes=others | _costs(_cgroup_notes(climb)),
    )


def _cgroup_notes(climb: Climb) -> dict[str, str]:
    none = {"cgroup": climb.found.why_not} if climb.subtree is None else {}
    return {**climb.found.notes, **none}


def _costs(notes: Mapping[str, str]) -> dict[str, str]:
    return {key: f"{why}: {COSTS[key]}" for key, why in notes.items()}


def _plain_facts() -> tuple[Host, dict[str, str]]:
    """What one reads, in this process."""
    notes = {}
    abi = 0
    try:
        abi = landlock.abi()
    except OSError as error:
        known = {
            errno.EOPNOTSUPP: "not enabled at boot (lsm=)",
            errno.ENOSYS: "not in this kernel (Linux 5.13)",
        }
        notes["landlock"] = known.get(error.errno or 0, str(error))
    system = os.uname()
    if system.machine not in ARCHITECTURES:
        notes["arch"] = f"no machine code for {system.machine}"
    hidden = _hidden_by()
    if hidden:
        notes["processes"] = hidden
    links, folders = _top()
    host = Host(
        arch=system.machine,
        kernel=system.release,
        uid=os.geteuid(),
        gid=os.getegid(),
        other_groups=bool(set(os.getgroups()) - {os.getegid()}),
        cpus=len(os.sched_getaffinity(0)),
        cores=cores(os.sched_getaffinity(0)),
        page_size=os.sysconf("SC_PAGE_SIZE"),
        huge_pages=huge_pages(),
        landlock=abi,
        hides_processes=bool(hidden),
        root_links=links,
        root_dirs=folders,
        etc_entries=kinds(Path("/etc")),
        proc_entries=_proc(),
        hard_limits=_hard_limits(),
    )
    return host, notes


def _hidden_by() -> str:
    """The option of /proc that hides init from us, which is not dumpable (proc(5)); "" if none."""
    status = dict(line.partition(":\t")[::2] for line in _lines("/proc/self/status"))
    if int(status.get("CapEff", "0"), 16) >> CAP_SYS_PTRACE & 1:
        return ""
    options: dict[str, str] = {}
    for line in _lines("/proc/self/mountinfo"):
        words = line.split(" ")
        if words[4] == "/proc":  # the last one is on top
            options = dict(option.partition("=")[::2] for option in words[-1].split(","))
    how = options.get("hidepid", "0")
    # Its group sees all, but for hidepid=ptraceable (has_pid_permissions in fs/proc/base.c).
    ours = {str(group) for group in (os.getegid(), *os.getgroups())}
    if how in ("0", "off") or (how not in ("4", "ptraceable") and options.get("gid", "0") in ours):
        return ""
    return f"/proc is mounted with hidepid={how}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def cores(
    cpus: AbstractSet[int], at: Path = Path("/sys/devices/system/cpu")
) -> tuple[tuple[int, ...], ...]:
    """These CPUs by core (Documentation/admin-guide/cputopology.rst); alone where nobody says."""
    found: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        try:
            core = (at / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            core = str(cpu)
        found.setdefault(core, []).append(cpu)
    return tuple(map(tuple, found.values()))


def huge_pages(at: Path = Path("/sys/kernel/mm/hugepages")) -> dict[str, int]:
    """The machine's pools of huge pages (Documentation/admin-guide/mm/hugetlbpage.rst)."""
    found = {}
    for pool in sorted(at.glob("hugepages-*kB")):
        kilobytes = int(pool.name.removeprefix("hugepages-").removesuffix("kB"))
        unit, many = (
            ("GB", 20)
            if kilobytes >= 1 << 20
            else ("MB", 10)
            if kilobytes >= 1 << 10
            else ("KB", 0)
        )
        with contextlib.suppress(OSError, ValueError):
            pages = [
                (pool / name).read_text() for name in ("nr_hugepages", "nr_overcommit_hugepages")
            ]
            found[f"{kilobytes >> many}{unit}"] = sum(map(int, pages))
    return found


def _top() -> tuple[dict[str, str], frozenset[str]]:
    with os.scandir("/") as entries:
        all_of_them = sorted(entries, key=lambda entry: entry.name)
    links = {entry.name: os.readlink(entry) for entry in all_of_them if entry.is_symlink()}
    folders = (entry.name for entry in all_of_them if entry.is_dir(follow_symlinks=False))
    return links, frozenset(folders)


def kinds(folder: Path) -> dict[str, str]:
    """Name -> "file" or "dir", links followed; what is neither, or leads nowhere, is left out."""
    found = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            mode = os.stat(folder / name).st_mode
            if stat.S_ISDIR(mode):
                found[name] = "dir"
            elif stat.S_ISREG(mode):
                found[name] = "file"
    return found


def _proc() -> frozenset[str]:
    try:
        names = os.listdir("/proc/self") and os.listdir("/proc")
    except OSError as error:
        raise HostError(
            "proc", f"/proc/self: {error.strerror}", hint="mount -t proc proc /proc"
        ) from None
    return frozenset(name for name in names if not name.isdecimal())


def _hard_limits() -> dict[str, int]:
    limits = {}
    for name in dir(resource):
        if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE":  # BSD's name of NOFILE
            _, hard = resource.getrlimit(getattr(resource, name))
            if hard != resource.RLIM_INFINITY:
                limits[name.removeprefix("RLIMIT_")] = hard
    return limits


def _ranges(tools: Tools) -> tuple[IdRange, IdRange] | str:
    ranges = idrange.of_caller()
    if isinstance(ranges, str) or os.geteuid() == 0:
        return ranges
    missing = [
        name
        for name, path in (("newuidmap", tools.newuidmap), ("newgidmap", tools.newgidmap))
        if path is None
    ]
    return f"no {' and no '.join(missing)} in PATH (package uidmap)" if missing else ranges


def _outcomes(host: Host, tools: Tools, cached: bool) -> dict[str, Outcome]:
    ids = tenant_ids(host) if host.subuid else None
    names = ["user_namespace", "overlay", "time_namespace", "proc", "seccomp", "memfd_exec"]
    names += ["tun", "nftables", "net_bytes", "net_rate", "bridge"]
    if ids is not None:
        names.insert(1, "id_maps")
    if tools.fuse_overlayfs is not None:
        names.append("fuse_overlayfs")
    key = hostcache.key(tools, ids)
    outcomes = hostcache.load(key) if cached else {}
    if set(outcomes) == set(names):
        return outcomes
    outcomes = attempt(names, ids=ids, tools=tools)
    if all(outcome.ok or _lasting(outcome) for outcome in outcomes.values()):
        hostcache.save(key, outcomes)
    return outcomes


def _lasting(outcome: Outcome) -> bool:
    """Whether a failure will be the same next time; one without an errno and a tool may not be."""
    return outcome.errno not in _PASSING and not outcome.why.startswith("the prober")


def _with_outcomes(
    host: Host, outcomes: Mapping[str, Outcome], tools: Tools, notes: dict[str, str]
) -> Host:
    """Take back what did not work, and say why."""
    for trial, name in (
        ("user_namespace", "user_namespaces"),
        ("id_maps", "subuid"),
        ("overlay", "overlay"),
        ("fuse_overlayfs", "fuse_overlayfs"),
        ("time_namespace", "time_namespaces"),
        ("proc", "proc"),
        ("seccomp", "seccomp"),
        ("memfd_exec", "memfd_exec"),
        ("tun", "tun"),
        ("nftables", "nftables"),
        ("bridge", "bridge"),
        ("net_bytes", "net_bytes"),
        ("net_rate", "net_rate"),
    ):
        if trial in outcomes and not outcomes[trial].ok:
            notes[name] = outcomes[trial].why
    if tools.fuse_overlayfs is None:
        notes["fuse_overlayfs"] = "no fuse-overlayfs in PATH"
    if tools.slirp4netns is None and tools.pasta is None:
        notes["carrier"] = "no slirp4netns and no pasta in PATH"
    if "subuid" in notes:
        host = msgspec.structs.replace(host, subuid=None, subgid=None, direct_maps=False)
    procs = outcomes["proc"].found
    return msgspec.structs.replace(
        host,
        user_namespaces=outcomes["user_namespace"].ok,
        overlay=outcomes["overlay"].ok,
        fuse_overlayfs=None if "fuse_overlayfs" in notes else tools.fuse_overlayfs,
        time_namespaces=outcomes["time_namespace"].ok,
        seccomp=outcomes["seccomp"].ok,
        memfd_exec=outcomes["memfd_exec"].ok,
        slirp4netns=tools.slirp4netns,
        pasta=tools.pasta,
        tun=outcomes["tun"].ok,
        nftables=outcomes["nftables"].ok,
        bridge=outcomes["bridge"].ok,
        net_bytes=outcomes["net_bytes"].ok,
        net_rate=outcomes["net_rate"].ok,
        proc_whole=isinstance(procs, list) and "whole" in procs,
        proc_subset=isinstance(procs, list) and "subset" in procs,
    )
