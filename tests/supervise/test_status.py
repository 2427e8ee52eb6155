"""The table of docs/reference/result.md: whatever holds at once, the first match wins."""

from __future__ import annotations

import errno
import signal
from typing import Any

import msgspec
import pytest

from sandboxd.messages import Ended
from sandboxd.policy import Limits, Network, Policy, Rule, Syscalls
from sandboxd.result import ArtifactError, Usage
from sandboxd.supervise.quality import judge
from sandboxd.supervise.status import Facts, classify, violations

MIB = 1 << 20
LIMITS = Limits(memory=64 * MIB, cpu_time=1.0, wall_time=2.0, idle_time=1.0, output=100, disk=MIB,
                inodes=10, processes=4, file_size=MIB, cpus=1.0)  # fmt: skip
CGROUP = {"memory": "cgroup2", "processes": "cgroup2", "cpus": "cgroup2"}
NO_EVENTS = {"low": 0, "high": 0, "max": 0, "oom": 0, "oom_kill": 0, "oom_group_kill": 0}
CODE = 256


def ended(status: int | None = 0, **more: int) -> Ended:
    values: dict[str, Any] = {one.name: 0 for one in msgspec.structs.fields(Ended)}
    values |= {"disk_free": 1, "inodes": 10, "inodes_free": 1, "disk_size": 2, "disk_block": 4096}
    return Ended(**(values | {"wait_status": status} | more))


def usage(kills: int = 0, oom: int = 0, at_limit: int = 0, **more: Any) -> Usage:
    events = NO_EVENTS | {"oom_kill": kills, "oom": oom, "max": at_limit}
    peak = 64 * MIB if at_limit else MIB
    values: dict[str, Any] = {"oom_kills": kills, "memory_events": events, "memory_peak": peak}
    return Usage(**(values | {"cpu_time": 0.1, "wall_time": 0.2} | more))


def facts(end: Ended | None = None, used: Usage | None = None, **more: Any) -> Facts:
    values: dict[str, Any] = {"output": 0, "enforcement": CGROUP} | more
    return Facts(ended=end, usage=used or usage(), **values)


ABOVE: dict[str, Any] = {"stopped_by": ("wall_time_limit", "x")}
MISSING: dict[str, Any] = {"start_error": (errno.ENOENT, "x")}
TOO_LARGE: dict[str, Any] = {"segments": 65 * MIB}
REFUSED: dict[str, Any] = {"artifact_errors": (ArtifactError(path="a", reason="missing"),)}
TABLE: list[tuple[Facts, tuple[str, ...]]] = [
    (facts(ended()), ()),
    (facts(ended(3 * CODE)), ("nonzero_exit",)),
    (facts(ended(signal.SIGSEGV)), ("signaled",)),
    (facts(ended(signal.SIGSYS)), ("syscall_denied", "signaled")),
    (facts(), ("signaled",)),
    (facts(ended(), **REFUSED), ("artifact_error",)),
    (facts(ended(CODE), **REFUSED), ("nonzero_exit",)),
    # our own failure to start it, before all else but a program that is too large
    (facts(ended(127 * CODE), **MISSING), ("start_failed",)),
    (facts(ended(127 * CODE), **MISSING, **ABOVE), ("start_failed", "wall_time_limit")),
    (facts(ended(127 * CODE), start_error=(errno.ENOMEM, "x"), **TOO_LARGE),
     ("memory_limit", "start_failed")),
    (facts(ended(signal.SIGKILL), **TOO_LARGE), ("memory_limit", "signaled")),
    (facts(ended(signal.SIGKILL), segments=MIB), ("signaled",)),
    # cancelled, before limits
    (facts(None, usage(1, 1), stopped_by=("cancelled", "x")), ("cancelled", "memory_limit")),
    # the kernel killed for our own limit: before timers, whoever the victim was
    (facts(None, usage(3, 1, 5)), ("memory_limit", "signaled")),
    (facts(ended(), usage(1, 1, 5)), ("memory_limit",)),
    (facts(ended(137 * CODE), usage(1, 1, 5)), ("memory_limit", "nonzero_exit")),
    (facts(ended(signal.SIGKILL), usage(1, 1), **ABOVE), ("memory_limit", "wall_time_limit")),
    # it killed for somebody else's
    (facts(None, usage(1, 0)), ("signaled",)),
    (facts(ended(signal.SIGKILL), usage(1, 0), **ABOVE), ("wall_time_limit",)),
    # it refused an allocation, and that was fatal or was not
    (facts(ended(CODE), usage(0, 1, 5)), ("memory_limit", "nonzero_exit")),
    (facts(ended(), usage(0, 1, 5)), ()),
    (facts(ended(signal.SIGKILL), usage(0, 1, 5), **ABOVE), ("wall_time_limit", "memory_limit")),
    # page cache filled it: no fault at all
    (facts(ended(CODE), usage(0, 0, 999)), ("nonzero_exit",)),
    (facts(ended(), usage(0, 0, 999)), ()),
    # what we ended it for, before what was found afterwards
    (facts(ended(signal.SIGKILL), usage(cpu_time=2.0), **ABOVE),
     ("wall_time_limit", "cpu_time_limit")),
    (facts(ended(), usage(cpu_time=2.0)), ("cpu_time_limit",)),
    (facts(ended(), usage(cpu_time=2.0, wall_time=3.0, idle_longest=2.0), output=101),
     ("cpu_time_limit", "wall_time_limit", "idle_limit", "output_limit")),
    # only if fatal
    (facts(ended(disk_free=0)), ()),
    (facts(ended(CODE, disk_free=0)), ("disk_limit", "nonzero_exit")),
    (facts(ended(CODE, inodes_free=0)), ("disk_limit", "nonzero_exit")),
    (facts(ended(signal.SIGXFSZ)), ("disk_limit", "signaled")),
    (facts(ended(), usage(process_limit_hits=2, processes_peak=4)), ()),
    (facts(ended(CODE), usage(process_limit_hits=2)), ("process_limit", "nonzero_exit")),
    (facts(ended(), usage(cpu_throttled=1.0)), ()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("seen", "causes"), TABLE, ids=[str(number) for number, _ in enumerate(TABLE)]
)
def test_precedence(seen: Facts, causes: tuple[str, ...]) -> None:
    found = classify(seen, LIMITS)
    # An exact second cause for code 137 and the like is not the point; the order of all is.
    assert found.causes == causes
    assert found.status == (causes[0] if causes else "ok")


def test_faults_and_messages_of_memory() -> None:
    above = classify(facts(None, usage(1, 0)), LIMITS)
    assert (above.fault, above.signal and above.signal.sender) == ("host", "kernel: out of memory")
    assert above.limits["memory"].action == "none"
    assert "around the run" in above.message
    own = classify(facts(None, usage(3, 1, 5)), LIMITS)
    assert (own.fault, own.limits["memory"].action) == ("job", "killed")
    large = classify(facts(ended(signal.SIGKILL), **TOO_LARGE), LIMITS)
    assert str(65 * MIB) in large.message
    assert "segments" in large.message


@pytest.mark.parametrize(
    ("means", "processes", "action"),
    [("cgroup2", 1, "none"), ("sampled", 1, "none"), ("sampled", None, "not enforced"),
     ("none", 1, "not enforced")],
)  # fmt: skip
def test_a_limit_that_is_not_in_force_says_so(means: str, processes: int, action: str) -> None:
    used = usage(processes_peak=processes, wall_time=1.0)
    found = classify(facts(ended(), used, enforcement={"memory": means}), LIMITS)
    assert found.limits["memory"].action == action


@pytest.mark.parametrize(
    ("means", "used", "action", "exceeded"),
    [
        ("cgroup2", {}, "none", False),
        ("cgroup2", {"cpu_throttled": 0.5}, "refused", False),
        ("none", {"cpu_time": 0.1}, "not enforced", False),
        ("none", {"cpu_time": 0.8}, "not enforced", True),
    ],
)
def test_cpus(means: str, used: dict[str, Any], action: str, exceeded: bool) -> None:
    report = classify(facts(ended(), usage(**used), enforcement={"cpus": means}), LIMITS).limits
    assert (report["cpus"].action, report["cpus"].exceeded) == (action, exceeded)


@pytest.mark.parametrize(
    ("name", "means", "sent", "beyond", "told"),
    [
        ("connections", "nftables", 9, (), (3, False, "none")),
        ("connections", "nftables", 9, ("network_connections",), (3, False, "refused")),
        ("bytes", "nftables", 9, ("network_bytes",), (10, False, "refused")),
        ("bytes", "none", 9, (), (10, False, "not enforced")),
        ("bytes", "none", 5000, (), (5001, True, "not enforced")),
        ("bytes", "nftables", None, (), (None, None, "none")),
        ("rate", "nftables and tbf", 9, (), (4.5, False, "none")),
        ("rate", "none", 5000, (), (2500.0, True, "not enforced")),
    ],
)
def test_caps_of_a_way_out(
    name: str, means: str, sent: int | None, beyond: tuple[str, ...], told: tuple[Any, ...]
) -> None:
    used = usage(net_sent=sent, net_received=1, net_connections=3, wall_time=2.0)
    seen = facts(ended(), used, enforcement={f"network_{name}": means}, beyond=frozenset(beyond))
    network = msgspec.structs.replace(Network(mode="user"), **{name: 2000})
    report = classify(seen, LIMITS, network).limits[f"network_{name}"]
    assert (report.used, report.exceeded, report.action) == told
    assert report.limit == 2000


def test_no_caps_where_there_is_no_way_out() -> None:
    for network in (Network(bytes=1), Network(mode="user")):
        assert not any("network" in name for name in classify(facts(), LIMITS, network).limits)


def test_violations_name_what_kills() -> None:
    dead = facts(ended(signal.SIGSYS))
    policy = Policy(name="p", syscalls=Syscalls(kill=("sync",), default="kill",
                    rules=(Rule(calls=("ptrace",), action="kill"),)))  # fmt: skip
    (found,) = violations(dead, policy)
    assert (found.kind, found.name, found.count) == ("syscall", None, 1)
    for key in ("syscalls.kill", "syscalls.rules", "syscalls.default", "syscalls.abi32"):
        assert f"p: {key}" in found.rule
    (found,) = violations(dead, Policy(name="p"))
    assert found.rule == "p: syscalls.abi32"
    assert violations(facts(ended(signal.SIGSEGV)), policy) == ()


QUIET = {"cpu": 0.0, "memory": 0.0, "io": 0.0}


@pytest.mark.parametrize(
    ("used", "grade", "reason"),
    [
        ({"pressure": QUIET, "wall_time": 0.005}, "unknown", "shorter"),
        ({"wall_time": None}, "unknown", "shorter"),
        ({"pressure": None}, "unknown", "no cgroup"),
        ({"pressure": QUIET}, "good", ""),
        ({"pressure": QUIET | {"cpu": 0.02}}, "good", ""),
        ({"pressure": QUIET | {"cpu": 0.1}}, "noisy", "0.100 s for cpu"),
        ({"pressure": QUIET | {"cpu": 0.9}, "cpu_time": 1.99}, "good", ""),  # its own threads
        ({"pressure": QUIET | {"io": 0.3}, "cpu_time": 1.99}, "noisy", "for io"),
        ({"pressure": QUIET, "cpu_throttled": 0.4}, "noisy", "throttled"),
        ({"pressure": QUIET, "context_switches_forced": 9}, "good", ""),
        ({"pressure": QUIET, "context_switches_forced": 200}, "noisy", "200 forced"),
        ({"context_switches_forced": 200}, "noisy", "200 forced"),
    ],
)
def test_quality(used: dict[str, Any], grade: str, reason: str) -> None:
    found = judge(Usage(**({"cpu_time": 0.8, "wall_time": 1.0} | used)), 2.0, crowded=False)
    assert found.grade == grade
    assert (reason in " ".join(found.reasons)) if reason else found.reasons == ()


def test_crowded_is_noisy() -> None:
    used = Usage(cpu_time=0.8, wall_time=1.0, pressure=QUIET)
    assert judge(used, 2.0, crowded=True).grade == "noisy"
