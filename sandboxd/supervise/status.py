"""Why a run ended, in one word: one table, first match wins. Nobody else compares with limits."""

from __future__ import annotations

import errno as errnos
import math
import os
import signal as signals
from typing import Literal

import msgspec

from sandboxd.cgroup.leaf import Memory
from sandboxd.messages import Ended
from sandboxd.policy import Attached, Limits, Network, Policy, Rule
from sandboxd.result import (
    ArtifactError,
    Fault,
    LimitReport,
    Signal,
    Status,
    Usage,
    Violation,
)

Shortage = Literal["killed", "refused", "killed from above"]
"""Killed, or an allocation refused, at the run's own limit; or killed because a cgroup around the
run's, or the whole machine, had no memory: `oom` of memory.events counts in the cgroup whose limit
was reached, `oom_kill` in that of the victim (cgroup-v2.rst)."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What was observed. `stopped_by` is the first cause for which we ended the run."""

    ended: Ended | None
    usage: Usage
    output: int
    stopped_by: tuple[Status, str] | None = None
    start_error: tuple[int, str] | None = None
    """errno and what could not be started."""
    artifact_errors: tuple[ArtifactError, ...] = ()
    enforcement: dict[str, str] = {}
    remains: Memory | None = None
    """Of what memory consisted when the kernel's killer came."""
    segments: int | None = None
    """Bytes that the program's segments take, if it died as one does whose segments do not fit."""
    beyond: frozenset[str] = frozenset()
    """Caps of [network] at which packets were refused, as `limits` names them."""

    @property
    def short_of_memory(self) -> Shortage | None:
        """Whether, and where, the kernel found no memory for the run (memory.events)."""
        events, kills = self.usage.memory_events, self.usage.oom_kills
        at_limit = events is None or bool(events.get("oom"))
        if kills:
            return "killed" if at_limit else "killed from above"
        return "refused" if events is not None and at_limit else None


class Classified(msgspec.Struct, frozen=True, kw_only=True):
    status: Status
    causes: tuple[Status, ...]
    fault: Fault | None
    message: str
    exit_code: int | None
    signal: Signal | None
    core_dumped: bool
    limits: dict[str, LimitReport]


LIMIT_STATUS: dict[str, Status] = {
    "memory": "memory_limit",
    "cpu_time": "cpu_time_limit",
    "wall_time": "wall_time_limit",
    "idle_time": "idle_limit",
    "output": "output_limit",
    "disk": "disk_limit",
    "inodes": "disk_limit",
    "file_size": "disk_limit",
    "processes": "process_limit",
}
FATAL_ONLY = frozenset({"disk", "inodes", "file_size", "processes"})
"""Being at these is a cause only for a program that then failed."""


def classify(facts: Facts, limits: Limits, network: Network | None = None) -> Classified:
    """The status and everything that goes with it (precedence: docs/reference/result.md)."""
    status = facts.ended.wait_status if facts.ended else None
    started = facts.start_error is None  # the 127 of a child that could not is not the program's
    code = os.waitstatus_to_exitcode(status) if status is not None and started else None
    reports = report_limits(facts, limits, failed=code != 0)
    causes = find_causes(facts, reports, code)
    if too_large(facts, limits):
        causes = tuple(dict.fromkeys(("memory_limit", *causes)))
    primary = causes[0] if causes else "ok"
    return Classified(
        status=primary,
        causes=causes,
        fault=find_fault(primary, facts),
        message=describe(primary, facts, reports, code),
        exit_code=code if code is not None and code >= 0 else None,
        signal=ending_signal(facts, code),
        core_dumped=bool(status is not None and os.WIFSIGNALED(status) and os.WCOREDUMP(status)),
        limits=reports | (report_network(facts, network) if network else {}),
    )


def find_causes(
    facts: Facts, reports: dict[str, LimitReport], code: int | None
) -> tuple[Status, ...]:
    """Every cause that holds, the one that counts first."""
    exceeded = [
        LIMIT_STATUS[name]
        for name, report in reports.items()
        if report.exceeded and name in LIMIT_STATUS
    ]
    stopped = [facts.stopped_by[0]] if facts.stopped_by else []
    killed_by_us = bool(stopped) and code in (None, -signals.SIGKILL)
    rows: list[tuple[bool, list[Status]]] = [
        (facts.start_error is not None, ["start_failed"]),
        (stopped == ["cancelled"], ["cancelled"]),
        (facts.short_of_memory == "killed", ["memory_limit"]),
        (bool(stopped), stopped),
        (True, exceeded),
        (code == -signals.SIGSYS, ["syscall_denied"]),
        (code is not None and code < 0 and not killed_by_us, ["signaled"]),
        (code is None and not stopped and facts.start_error is None, ["signaled"]),
        (code is not None and code > 0 and facts.start_error is None, ["nonzero_exit"]),
        (bool(facts.artifact_errors) and code == 0, ["artifact_error"]),
    ]
    causes: dict[Status, None] = {}
    for holds, words in rows:
        if holds:
            causes.update(dict.fromkeys(words))
    return tuple(causes)


def report_limits(facts: Facts, limits: Limits, *, failed: bool) -> dict[str, LimitReport]:
    """Each limit held against what was used."""
    usage, ended = facts.usage, facts.ended
    disk = ended.disk_size * ended.disk_block if ended else None
    full = ended is not None and ended.disk_free == 0
    no_inodes = ended is not None and ended.inodes > 0 and ended.inodes_free == 0
    too_large = _signal_number(facts) == signals.SIGXFSZ
    rows: dict[str, tuple[float | None, float | None, bool]] = {
        "memory": (limits.memory, usage.memory_peak, _more(usage.memory_peak, limits.memory)),
        "cpu_time": (limits.cpu_time, usage.cpu_time, _more(usage.cpu_time, limits.cpu_time)),
        "wall_time": (limits.wall_time, usage.wall_time, _more(usage.wall_time, limits.wall_time)),
        "idle_time": (limits.idle_time, usage.idle_longest,
                      _more(usage.idle_longest, limits.idle_time)),
        "output": (limits.output, facts.output, _more(facts.output, limits.output)),
        "disk": (limits.disk, usage.disk_used if disk is not None else None, full),
        "inodes": (limits.inodes, usage.inodes_used, no_inodes),
        "file_size": (limits.file_size, None, too_large),
        "processes": (limits.processes, usage.processes_peak, bool(usage.process_limit_hits)),
    }  # fmt: skip
    if facts.enforcement.get("memory") == "cgroup2":
        # Being at it is no fault: the kernel reclaims the page cache there.
        rows["memory"] = (*rows["memory"][:2], facts.short_of_memory == "refused" and failed)
    stopped = facts.stopped_by[0] if facts.stopped_by else None
    reports: dict[str, LimitReport] = {}
    for name, (limit, used, over) in rows.items():
        if limit is None:
            continue
        killed = stopped == LIMIT_STATUS[name] and (over or stopped != "disk_limit")
        killed |= name == "memory" and facts.short_of_memory == "killed"
        exceeded = over and (failed or name not in FATAL_ONLY)
        action = "killed" if killed else "exceeded" if exceeded else "refused" if over else "none"
        absent = facts.enforcement.get(name) == "none" or (name == "memory" and is_blind(facts))
        if absent and not exceeded and not killed:
            action = "not enforced"
        known = used is not None or killed or over or name == "file_size"
        reports[name] = LimitReport(
            limit=limit, used=used, exceeded=(killed or exceeded) if known else None,
            action=action,  # type: ignore[arg-type]
        )  # fmt: skip
    if limits.cpus is not None:
        reports["cpus"] = report_cpus(facts, limits.cpus)
    return reports


def is_blind(facts: Facts) -> bool:
    """Whether memory was sampled in vain: a /proc that hides other users' processes (hidepid)."""
    if facts.usage.processes_peak or (facts.usage.wall_time or 0.0) <= BLIND:
        return False
    return facts.enforcement.get("memory", "").startswith("sampled")


BLIND = 0.1
"""Seconds in which sampling must have seen a process."""


def report_cpus(facts: Facts, limit: float) -> LimitReport:
    """`used` is the average."""
    cpu, wall = facts.usage.cpu_time, facts.usage.wall_time
    used = cpu / wall if cpu is not None and wall else None
    return _unending(facts, "cpus", (limit, used), refused=bool(facts.usage.cpu_throttled))


def report_network(facts: Facts, network: Network) -> dict[str, LimitReport]:
    """The caps of a way out; of the rate, `used` is the average of the way that had more."""
    if network.mode == "none":
        return {}
    usage, both, rate = facts.usage, None, None
    if usage.net_received is not None and usage.net_sent is not None:
        both = usage.net_received + usage.net_sent
        most = max(usage.net_received, usage.net_sent)
        rate = most / usage.wall_time if usage.wall_time else None
    rows: dict[str, tuple[float | None, float | None]] = {
        "network_connections": (network.connections, usage.net_connections),
        "network_bytes": (network.bytes, both),
        "network_rate": (network.rate, rate),
    }
    return {
        name: _unending(facts, name, (limit, used), refused=name in facts.beyond)
        for name, (limit, used) in rows.items()
        if limit is not None
    }


def _unending(
    facts: Facts, name: str, figures: tuple[float, float | None], *, refused: bool
) -> LimitReport:
    """A limit that the kernel holds a run to, and that ends nobody."""
    limit, used = figures
    absent = facts.enforcement.get(name) == "none"
    action = "not enforced" if absent else "refused" if refused else "none"
    exceeded = None if used is None else absent and used > limit
    return LimitReport(limit=limit, used=used, exceeded=exceeded, action=action)  # type: ignore[arg-type]


def too_large(facts: Facts, limits: Limits) -> bool:
    """Whether the program's segments alone are more than it may have."""
    least = min(limits.memory or math.inf, limits.address_space or math.inf)
    return facts.segments is not None and facts.segments > least


def _more(used: float | None, limit: float | None) -> bool:
    return used is not None and limit is not None and used > limit


def _signal_number(facts: Facts) -> int | None:
    status = facts.ended.wait_status if facts.ended else None
    return os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None


def ending_signal(facts: Facts, code: int | None) -> Signal | None:
    number = -code if code is not None and code < 0 else None
    if code is None and facts.start_error is None and facts.usage.oom_kills:
        number = signals.SIGKILL  # for all of them at once (memory.oom.group), init too
    if number is None:
        return None
    sender = None
    if number == signals.SIGKILL and facts.usage.oom_kills:
        sender = "kernel: out of memory"
    elif number == signals.SIGKILL and facts.stopped_by:
        sender = "sandboxd"
    elif number == signals.SIGSYS:
        sender = "kernel: seccomp"
    elif number == signals.SIGXFSZ:
        sender = "kernel: file size"
    return Signal(number=number, name=signal_name(number), sender=sender)


def signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:  # a real-time signal between SIGRTMIN and SIGRTMAX
        return f"SIGRTMIN+{number - signals.SIGRTMIN}"


def find_fault(status: Status, facts: Facts) -> Fault | None:
    """Who has to act."""
    if status == "ok":
        return None
    if status == "signaled" and facts.short_of_memory == "killed from above":
        return "host"
    return "caller" if status in ("cancelled", "start_failed") else "job"


def describe(
    status: Status, facts: Facts, reports: dict[str, LimitReport], code: int | None
) -> str:
    """One line for a person."""
    if words := describe_memory(status, facts, reports):
        return words
    if facts.start_error and status == "start_failed":
        number, what = facts.start_error
        return f"{what}: {os.strerror(number)}"
    if facts.stopped_by and facts.stopped_by[0] == status:
        return f"stopped: {facts.stopped_by[1]}"
    for name, report in reports.items():
        if report.exceeded and LIMIT_STATUS.get(name) == status:
            return f"{name}: {_figure(report.used)} of {_figure(report.limit)} ({report.action})"
    if status == "artifact_error":
        first = facts.artifact_errors[0]
        return f"{first.path}: {first.reason}"
    if code is not None and code < 0:
        return f"ended by {signal_name(-code)}"
    if code is None and status == "signaled":
        return "ended without a report: its init was killed"
    return f"exit code {code}" if code else ""


def describe_memory(status: Status, facts: Facts, reports: dict[str, LimitReport]) -> str:
    """The same for what has to do with memory; "" for all else."""
    report = reports.get("memory")
    most = f"limits.memory, {report.limit} bytes" if report else "its limit"
    if status == "memory_limit" and facts.segments is not None:
        return f"the program's segments alone take {facts.segments} bytes; {most}"
    if status == "signaled" and facts.short_of_memory == "killed from above":
        peak = _figure(facts.usage.memory_peak)
        return f"killed by the kernel: no memory around the run, which had {peak} bytes at most"
    if status != "memory_limit" or facts.short_of_memory not in ("killed", "refused"):
        return ""
    if facts.short_of_memory == "refused":
        return f"memory: the kernel refused more at {most}"
    held = facts.remains
    files = f"; of it files in memory {held.shmem} bytes" if held and held.shmem else ""
    return f"memory: killed by the kernel at {most}{files}"


def violations(facts: Facts, policy: Policy) -> tuple[Violation, ...]:
    """What the filter killed for. Which call it was, the kernel tells root alone (its audit log).

    A parent learns of SIGSYS and no more: siginfo of wait(2) has no si_syscall, which only the
    signal's own handler would get.
    """
    if _signal_number(facts) != signals.SIGSYS:
        return ()
    syscalls = policy.syscalls
    rules = any(isinstance(rule, Rule) and rule.action == "kill" for rule in syscalls.rules)
    keys = [
        key
        for key, kills in (
            ("syscalls.kill", bool(syscalls.kill)),
            ("syscalls.rules", rules),
            ("syscalls.default", syscalls.default == "kill"),
            ("syscalls.abi32", True),  # if only for x32, which is always killed
        )
        if kills
    ]
    places = [policy.origin(key) for key in (["syscalls.oci"] if syscalls.oci else keys)]
    if isinstance(syscalls, Attached) and syscalls.on_top:
        from sandboxd.compile.oci_filter import IN_BUNDLE

        places.append(f"{syscalls.on_top_name}: {IN_BUNDLE}")
    return (Violation(kind="syscall", name=None, count=1, rule=" or ".join(places)),)


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def errno_name(number: int) -> str:
    return errnos.errorcode.get(number, str(number))
