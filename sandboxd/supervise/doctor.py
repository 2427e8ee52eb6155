"""Asks this machine, by doing, for all that sandboxd can make use of; and what follows from it."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from sandboxd.cgroup import subtree, systemd
from sandboxd.cgroup.ladder import RUNGS, Climb, climbed
from sandboxd.compile.carrying import command
from sandboxd.compile.egress import Egress
from sandboxd.compile.idmap import tenant_ids
from sandboxd.errors import HostError
from sandboxd.host import CgroupSubtree, Host
from sandboxd.probe import fixes
from sandboxd.probe.attempts import Outcome, attempt
from sandboxd.probe.host import Examination, examine
from sandboxd.supervise.netkeeper import has_ipv6

State = Literal["ok", "warn", "FAIL"]
Level = Literal["kernel", "partly", "none"]

CARRIED = "user networking"
OPEN_FILES = 4096 * 4096
"""Of all processes of one job together, under the most generous policies of sandboxd's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One capability. `fix` is a command to type, or what to boot; "" where all is well."""

    what: str
    state: State
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantee:
    """What is in force for every run on this machine, and by what means."""

    what: str
    level: Level
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    checks: tuple[Check, ...]
    guarantees: tuple[Guarantee, ...]

    @property
    def ok(self) -> bool:
        """Whether programs can be run at all."""
        return all(check.state != "FAIL" for check in self.checks)


def diagnose(cgroup: str | None = None) -> Report:
    """Everything afresh: nothing is taken from the cache of probe/host.py.

    `cgroup` is the one to use instead of looking for one, as for a runner.
    """
    with climbed(cgroup) as climb:
        return _report(examine(climb, cached=False), cgroup)


def _report(seen: Examination, cgroup: str | None) -> Report:
    parts: tuple[Callable[[Examination], Iterator[Check]], ...] = (
        _machine,
        _namespaces,
        _overlays,
        _network,
        functools.partial(_cgroups, given=cgroup),
        _defences,
        _kernel,
    )
    checks = [check for part in parts for check in part(seen)]
    if not seen.host.user_namespaces:
        checks = [_blamed(check) for check in checks]
    host = seen.host
    if any(check.what == CARRIED and check.state != "ok" for check in checks):
        host = msgspec.structs.replace(host, slirp4netns=None, pasta=None)
    return Report(checks=tuple(checks), guarantees=tuple(guarantees(host)))


def _check(what: str, why_not: str, found: str, fix: str, bad: State = "warn") -> Check:
    """A row that is fine unless there is a reason why not."""
    if why_not:
        return Check(what=what, state=bad, found=why_not, fix=fix)
    return Check(what=what, state="ok", found=found)


_NEED_A_USER_NAMESPACE = frozenset(
    {
        *("id maps", "new /proc", "time namespace", "kernel overlay", "fuse-overlayfs", "TUN"),
        *("nftables", "network caps", "groups"),
    }
)


def _blamed(check: Check) -> Check:
    """What fails only because there is no user namespace to try it in."""
    if check.what not in _NEED_A_USER_NAMESPACE:
        return check
    return _check(check.what, "no user namespace", "", "see user namespace")


def _machine(seen: Examination) -> Iterator[Check]:
    host = seen.host
    found = f"Linux {host.kernel} on {host.arch}, {host.cpus} cpus"
    yield _check("machine", seen.why_not.get("arch", ""), found, "use x86-64 or aarch64")
    yield _check(
        "memfd exec",
        seen.outcomes["memfd_exec"].why,
        "the machine runs from memory",
        fixes.admin("sysctl -w vm.memfd_noexec=1"),
    )


def _namespaces(seen: Examination) -> Iterator[Check]:
    host, outcomes = seen.host, seen.outcomes
    why = outcomes["user_namespace"].why
    yield _check(
        "user namespace",
        why,
        "with mount, pid, ipc, uts, net and cgroup namespaces",
        fixes.user_namespaces(why),
        bad="FAIL",
    )
    yield _apparmor(host.user_namespaces)
    ids = seen.why_not.get("subuid", "")
    yield _check("id maps", ids, _ids(host), fixes.id_maps(ids))
    kinds = " and ".join(
        name for name, there in (("whole", host.proc_whole), ("pid", host.proc_subset)) if there
    )
    yield _check("new /proc", outcomes["proc"].why, f"mounts ({kinds})", fixes.proc(), bad="FAIL")
    hidden = seen.why_not.get("processes", "")
    yield _check("seeing processes", hidden, "all in /proc", fixes.hidepid())
    yield _check(
        "time namespace",
        outcomes["time_namespace"].why,
        "with an offset",
        "boot Linux 5.6 or later (CONFIG_TIME_NS)",
    )


def _ids(host: Host) -> str:
    if host.subuid is None or host.subgid is None:
        return ""
    writer = "written by root" if host.direct_maps else "by newuidmap"
    uids, gids = (f"{some.start}+{some.count}" for some in (host.subuid, host.subgid))
    return f"uids {uids}, gids {gids}, {writer}"


def _apparmor(works: bool) -> Check:
    """Ubuntu 23.10 and later: unconfined programs get user namespaces without capabilities."""
    name = "kernel/apparmor_restrict_unprivileged_userns"
    value = fixes.sysctl(name)
    if value == "1" and not works:
        why = "user namespaces are restricted to programs with a profile"
        return _check("AppArmor", why, "", fixes.user_namespaces(why))
    found = {"": "no restriction of user namespaces in this kernel", "0": "does not restrict them"}
    return _check("AppArmor", "", found.get(value, "restricts others, not this program"), "")


def _overlays(seen: Examination) -> Iterator[Check]:
    yield _check(
        "kernel overlay",
        seen.outcomes["overlay"].why,
        "in a user namespace, upper layer on tmpfs",
        fixes.overlay(),
    )
    path = seen.tools.fuse_overlayfs
    why = seen.why_not.get("fuse_overlayfs", "")
    yield _check("fuse-overlayfs", why, f"{path} mounts", fixes.fuse_overlayfs(path is not None))


def _network(seen: Examination) -> Iterator[Check]:
    yield _check(
        "TUN",
        seen.outcomes["tun"].why,
        "a TAP device in a network namespace",
        fixes.device("/dev/net/tun", "tun"),
    )
    why = seen.outcomes["nftables"].why
    yield _check("nftables", why, "a filter loads in a user namespace", fixes.nftables())
    why = seen.outcomes["nftables"].why or seen.why_not.get("net_bytes", "")
    why = why or seen.why_not.get("net_rate", "")
    yield _check("network caps", why, "a quota, a limit, a shaper", fixes.network_caps())
    yield _user_networking(seen)
    yield _check(
        "groups",
        seen.outcomes["bridge"].why,
        "a bridge and pairs of interfaces in a user namespace",
        fixes.bridge(),
    )
    yield _check("IPv6", "", "out of here" if has_ipv6() else "no way out: none inside either", "")


def _user_networking(seen: Examination) -> Check:
    """Each that is installed is tried; who has one that works need not have the other."""
    what, carriers = CARRIED, _carriers(seen)
    if not carriers:
        why = seen.why_not.get("carrier", "")
        return _check(what, why, "", fixes.carrier(found=False, why=why))
    works = " and ".join(path for path, outcome in carriers.items() if outcome.ok)
    fails = "; ".join(f"{path}: {one.why}" for path, one in carriers.items() if not one.ok)
    if not works:
        return _check(what, fails, "", fixes.carrier(found=True, why=fails))
    found = f"{works}; but {fails}" if fails else works
    if not next(iter(carriers.values())).ok:  # what "auto" takes
        return _check(what, found, "", 'network.helper = "pasta" in the policy')
    return _check(what, "", found, "")


def _carriers(seen: Examination) -> dict[str, Outcome]:
    """Path of each that is installed -> how it went; untried where there is no TUN."""
    paths = {"slirp4netns": seen.tools.slirp4netns, "pasta": seen.tools.pasta}
    found = {kind: path for kind, path in paths.items() if path}
    if not (found and seen.host.tun and seen.host.user_namespaces):
        return {path: Outcome() for path in found.values()}
    argvs = {
        kind: command(Egress(program=path, kind=kind), "trial", has_ipv6())
        for kind, path in found.items()
    }
    ids = tenant_ids(seen.host) if seen.host.subuid else None
    outcomes = attempt(argvs, ids=ids, tools=seen.tools, carriers=argvs)
    return {path: outcomes[kind] for kind, path in found.items()}


def _cgroups(seen: Examination, given: str | None) -> Iterator[Check]:
    """The rows are the same with and without a subtree."""
    top, _ = subtree.mounted()
    climb, found = seen.cgroup, seen.cgroup.found
    why_not = "" if found.subtree else found.why_not
    fix = fixes.subtree(top, why_not, given)
    yield _check("cgroup v2 subtree", why_not, _whose(climb), fix)
    yield from _rungs(climb)
    entered, swap = _in_a_leaf(seen) if found.subtree else (Outcome(), "")
    no_subtree = "" if found.subtree else "no subtree"
    if no_subtree:
        fix = "see cgroup v2 subtree"
    yield _check("start in a cgroup", no_subtree or entered.why, "clone3 into a leaf", fix)
    for name in subtree.CONTROLLERS:
        why = no_subtree or found.notes.get(f"cgroup.{name}", "")
        remedy = fix if no_subtree else fixes.controller(name, why, top)
        yield _check(f"cgroup {name}", why, "enabled for leaves", remedy)
    yield from _cgroup_files(found.subtree, no_subtree, fix)
    yield _swap(no_subtree or swap)


def _whose(climb: Climb) -> str:
    found = climb.subtree
    if found is None:
        return ""
    room = "" if found.room is None else f", room for {found.room} cgroups"
    return f"{found.path} is ours ({RUNGS[climb.rung]}){room}"


def _rungs(climb: Climb) -> Iterator[Check]:
    """Which rung of the ladder was taken, why those above it were not, and what was not tried."""
    for rung, text in RUNGS.items():
        found = f"passed: {climb.passed[rung]}" if rung in climb.passed else "not tried"
        if rung == climb.rung:
            found = f"taken: {text}"
        elif rung == "given" and rung not in climb.passed:
            found = "no --cgroup, no $SANDBOXD_CGROUP"
        yield _check(f"cgroup: {rung}", "", found, "")


def _in_a_leaf(seen: Examination) -> tuple[Outcome, str]:
    """Whether a process can start in a leaf, and why the leaf does not limit swap."""
    found = seen.cgroup.subtree
    assert found is not None

    def let_in(pid: int) -> None:
        if found.scope:  # into the leaf that its holder is in
            systemd.attach(found.scope, f"/{systemd.HOLDER}", pid)

    try:
        with subtree.leaf(Path(found.path)) as made:
            trial = ("into_cgroup",)
            entered = attempt(trial, tools=seen.tools, cgroup=str(made), place=let_in)[trial[0]]
            limits = (made / "memory.swap.max").exists()
    except OSError as error:
        return Outcome(why=str(error.strerror), errno=error.errno), "no leaf to look in"
    except HostError as error:
        return Outcome(why=str(error.args[0])), "no leaf to look in"
    return entered, "" if limits else "leaves have no memory.swap.max"


def _cgroup_files(found: CgroupSubtree | None, no_subtree: str, fix: str) -> Iterator[Check]:
    for name, there, since, controller in (
        ("cgroup.kill", found and found.has_kill, "5.14", ""),
        ("memory.peak", found and found.has_memory_peak, "5.19", "memory"),
        ("pids.peak", found and found.has_pids_peak, "6.1", "pids"),
    ):
        why, remedy = no_subtree, fix
        if found and not there:
            off = controller and controller not in found.controllers
            why = f"no {controller} controller" if off else "not in this kernel"
            remedy = f"see cgroup {controller}" if off else f"boot Linux {since} or later"
        yield _check(name, why, "there", remedy)


def _swap(not_limited: str) -> Check:
    """With swap and no memory.swap.max a run of twice its memory limit survives."""
    try:
        used = Path("/proc/swaps").read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    except OSError:
        used = []
    if not used:
        return _check("swap", "", "none", "")
    why = f"on, and {not_limited}: runs can swap past a memory limit" if not_limited else ""
    return _check("swap", why, "on, and limited (memory.swap.max)", fixes.admin("swapoff -a"))


def _defences(seen: Examination) -> Iterator[Check]:
    yield _check(
        "seccomp",
        seen.outcomes["seccomp"].why,
        "a filter loads and acts",
        "boot a kernel with CONFIG_SECCOMP_FILTER, and allow seccomp(2) here",
    )
    abi = seen.host.landlock
    why = seen.why_not.get("landlock", "")
    if 0 < abi < 6:
        why = f"ABI {abi}: no scopes for signals and abstract sockets (ABI 6)"
    yield _check("Landlock", why, f"ABI {abi}", fixes.landlock())
    yield _binding()
    yield _sysctls()


def _binding() -> Check:
    """libseccomp is the judge of our own filters, in tests and in `sandboxd policy explain`."""
    reasons = []
    for name in ("seccomp", "pyseccomp"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"{name}: {error}")
        else:
            return _check("libseccomp", "", f"by the module {name}", "")
    fix = f"{fixes.admin('apt-get install libseccomp2')} && pip install pyseccomp"
    return _check("libseccomp", "; ".join(reasons), "", fix)


def _sysctls() -> Check:
    """What seccomp keeps from a job anyway should not be open to the machine's users either."""
    wanted = (
        ("kernel/unprivileged_bpf_disabled", ("0",), "2"),
        ("vm/unprivileged_userfaultfd", ("1",), "0"),
        ("kernel/perf_event_paranoid", ("-1", "0", "1"), "2"),
    )
    bad = [(name.replace("/", "."), good) for name, values, good in wanted
           if fixes.sysctl(name) in values]  # fmt: skip
    found = ", ".join(name for name, _ in bad)
    fix = fixes.admin("sysctl -w " + " ".join(f"{name}={good}" for name, good in bad))
    return _check("sysctls", found and f"open to all users: {found}", "nothing open to all", fix)


def _open_files() -> Check:
    """One number for the whole machine, which systemd sets to the largest there is."""
    most = fixes.sysctl("fs/file-max")
    many = not most.isdecimal() or int(most) >= OPEN_FILES
    found = f"fs.file-max is {most}, for all: one job may have {OPEN_FILES} open"
    fix = fixes.admin(f"sysctl -w fs.file-max={sys.maxsize}")
    return _check("open files", "" if many else found, "enough for all", fix)


def _kernel(seen: Examination) -> Iterator[Check]:
    yield _open_files()
    yield _psi()
    smt = Path("/sys/devices/system/cpu/smt/active")
    on = smt.exists() and smt.read_text(encoding="ascii").strip() == "1"
    why = "threads of one core share caches: times are noisy, and data can be guessed from them"
    fix = fixes.admin("sh -c 'echo off >/sys/devices/system/cpu/smt/control'")
    yield _check("SMT", why if on else "", "off", fix)


def _psi() -> Check:
    """psi.rst: an ordinary user's trigger has a window of a multiple of 2 s (Linux 6.4)."""
    path = "/proc/pressure/memory"
    try:
        Path(path).read_text(encoding="ascii")
    except OSError as error:
        return _check("pressure (PSI)", f"{path}: {error.strerror}", "", "boot with psi=1")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return _check("pressure (PSI)", "", f"readable; no triggers ({error.strerror})", "")
    try:
        os.write(descriptor, b"some 150000 2000000\0")
    except OSError as error:
        return _check("pressure (PSI)", "", f"readable; no triggers ({error.strerror})", "")
    finally:
        os.close(descriptor)
    return _check("pressure (PSI)", "", "readable, with triggers", "")


def guarantees(host: Host) -> Iterator[Guarantee]:
    """What holds for every run, from the facts alone."""
    if not host.user_namespaces:
        yield Guarantee(what="everything", level="none", how="no program can be run")
        return
    for what, in_force, how, level, else_how in (*_limits(host), *_isolation(host)):
        if in_force:
            yield Guarantee(what=what, level="kernel", how=how)
        else:
            yield Guarantee(what=what, level=level, how=else_how)


# What, whether the kernel enforces it for a whole run, how; else how far, and by what.
_Row = tuple[str, bool, str, Level, str]


def _limits(host: Host) -> tuple[_Row, ...]:
    have = host.cgroup.controllers if host.cgroup else frozenset[str]()
    return (
        (
            *("memory limit", "memory" in have, "memory.max, of the whole run"),
            *(
                ("none", "not enforced: /proc hides processes (hidepid)")
                if host.hides_processes
                else ("partly", "sampled: peaks can be missed; files by the size of their tmpfs")
            ),
        ),
        (
            *("cpu time", host.cgroup is not None, "cpu.stat, of the whole run", "partly"),
            "a lower bound: what nobody waits for is missed; RLIMIT_CPU per process",
        ),
        ("processes", "pids" in have, "pids.max", "kernel", "RLIMIT_NPROC of ids of its own"),
        ("cpus", "cpu" in have, "cpu.max", "none", "not enforced"),
        ("disk", True, "size and inodes of a tmpfs", "none", ""),
        (
            *("nothing left", bool(host.cgroup and host.cgroup.has_kill)),
            *("cgroup.kill, and the end of the pid namespace", "kernel"),
            "the end of the pid namespace",
        ),
    )


def _isolation(host: Host) -> tuple[_Row, ...]:
    overlay = "overlayfs of the kernel" if host.overlay else host.fuse_overlayfs or ""
    carrier = host.slirp4netns or host.pasta
    return (
        ("network", True, "a namespace with loopback only", "none", ""),
        (
            *("way out", bool(carrier and host.tun and host.nftables)),
            *(f"on request: {os.path.basename(carrier or '')}, a filter of nftables", "none"),
            "there is none (network.mode = user)",
        ),
        (
            *("groups", host.bridge and host.nftables),
            "on request: a bridge of their own with a filter of nftables, or one namespace",
            *("partly", "one namespace for all members, no addresses of their own"),
        ),
        (
            *("writable root", bool(overlay), overlay, "partly"),
            "binds on a tmpfs: /usr stays as it is",
        ),
        (
            *("user ids", host.subuid is not None, "one of its own for every run", "partly"),
            "all runs share the caller's, its groups and its quotas",
        ),
        ("system calls", host.seccomp, "a seccomp allowlist", "none", "not filtered"),
        (
            *("signals, sockets", host.landlock >= 6, f"Landlock ABI {host.landlock}", "partly"),
            "namespaces only, no Landlock scopes",
        ),
    )
