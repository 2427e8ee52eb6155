"""What a run uses: watched while it lives, so that limits hold, and summed up when it is over.

CPU time comes from the run's cgroup where there is one (exact, nothing escapes it), else from
/proc while it runs and from init's rusage afterwards: a lower bound, because a process whose
parent ignores SIGCHLD is waited for by nobody (wait(2), NOTES).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from sandboxd.host import Host
from sandboxd.messages import Ended
from sandboxd.policy import Limits
from sandboxd.result import Status, Usage
from sandboxd.supervise.sandboxes import Sandbox

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
SHORTEST = 0.001
SAMPLE = 0.02
IDLE_CPU = 0.01
"""A second in which the tree used less than this share of a CPU was idle."""


@dataclass(slots=True)
class Sample:
    """What /proc says of a tree at one moment."""

    cpu_time: float = 0.0
    memory: int = 0
    """Private pages; what is shared between processes is not in it."""
    resident: int = 0
    """All pages in memory, shared ones once a process: no less than what the tree uses."""
    pids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Watch:
    """What was seen while a run was watched."""

    memory_peak: int = 0
    processes_peak: int = 0
    cpu_time: float = 0.0
    idle_longest: float | None = None


def sample_tree(pid: int) -> Sample:
    """Sum over init's descendants (proc_pid_task_children(5), proc_pid_stat(5))."""
    sample = Sample()
    todo = [pid]
    while todo:
        current = todo.pop()
        with suppress(OSError, IndexError, ValueError):
            with open(f"/proc/{current}/stat", "rb") as file:
                words = file.read().rpartition(b")")[2].split()
            # fields 14-17: utime stime cutime cstime; 24: rss
            times = words[11:15] if current != pid else words[13:15]
            sample.cpu_time += sum(map(int, times)) / TICKS
            if current != pid:
                sample.pids.append(current)
                with open(f"/proc/{current}/statm", "rb") as file:
                    _, resident, shared, *_ = map(int, file.read().split())
                sample.memory += (resident - shared) * PAGE
                sample.resident += resident * PAGE
            for thread in os.listdir(f"/proc/{current}/task"):
                with open(f"/proc/{current}/task/{thread}/children", "rb") as file:
                    todo += map(int, file.read().split())
    return sample


def proportional(pids: list[int]) -> int:
    """Anonymous and shared memory of these, shared pages divided by who has them mapped.

    proc_pid_smaps_rollup(5): Pss_Anon and Pss_Shmem; page cache is not in it. It takes time that
    grows with the memory, so it is asked only when cheaper figures leave the question open.
    """
    total = 0
    for pid in pids:
        with suppress(OSError):
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                rows = file.read().split(b"\n")
            kilobytes = [int(row.split()[1]) for row in rows if row.startswith(PROPORTIONAL)]
            total += sum(kilobytes) * 1024
    return total


PROPORTIONAL = (b"Pss_Anon:", b"Pss_Shmem:")


def running_for(init: int) -> float:
    """Seconds since init started the program, up to a clock tick less; 0 if it has not yet.

    proc_pid_stat(5), field 22: the start in whole ticks after boot, which CLOCK_BOOTTIME counts
    from. It may have started as late as at the end of that tick, and no run is stopped too early.
    """
    try:
        with open(f"/proc/{init}/task/{init}/children", "rb") as file:
            pids = file.read().split()
        with open(f"/proc/{int(pids[0])}/stat", "rb") as file:
            start = int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError):
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - (start + 1) / TICKS)


class Watcher:
    """Stops a run at its limits: whoever waits for the run calls `look` when it is `due`."""

    def __init__(
        self, box: Sandbox, limits: Limits, host: Host, stop: Callable[[Status, str], None]
    ) -> None:
        self.box = box
        self._blind = host.hides_processes
        if self._blind and host.cgroup is None:  # nothing seen is not nothing done
            limits = msgspec.structs.replace(limits, idle_time=None)
        self.limits = limits
        self.seen = Watch()
        self._stop = stop
        self._cpus = min(float(host.cpus), limits.cpus or float(host.cpus))
        controllers = host.cgroup.controllers if host.cgroup else frozenset()
        self._samples_memory = limits.memory is not None and "memory" not in controllers
        self.due = math.inf
        self.started = 0.0
        self._idle_since = 0.0
        self._idle_cpu = 0.0

    def start(self, started: float) -> None:
        """The program may run now."""
        self.started = started
        self._idle_since = started
        limits = self.limits
        due = [math.inf]
        if limits.wall_time is not None:
            due.append(limits.wall_time)
        if limits.cpu_time is not None:
            due.append(limits.cpu_time / self._cpus)
        if self._samples_memory:
            due.append(SAMPLE / 2)
        if limits.idle_time is not None:
            self.seen.idle_longest = 0.0
            due.append(limits.idle_time / 10)
        self.due = started + min(due)

    def look(self, now: float) -> None:
        """Stop the run if it is at a limit; `due` is when to look again."""
        if now < self.due:
            return
        limits, started = self.limits, self.started
        pauses = [math.inf]
        if limits.wall_time is not None:
            left = limits.wall_time - (now - started)
            if left <= 0 and not self._blind:  # since it was sent; a slow set-up is not its own
                left = limits.wall_time - running_for(self.box.pid())
            if left <= 0:
                self._over("wall_time_limit", f"wall time {limits.wall_time:g} s")
                return
            pauses.append(left)
        if self._needs_sample():
            pauses += self._sampled(now, started)
            if not pauses[-1]:
                return
        self.due = now + max(SHORTEST, min(pauses))

    def _over(self, status: Status, why: str) -> None:
        self.due = math.inf
        self._stop(status, why)

    def _needs_sample(self) -> bool:
        limits = self.limits
        return limits.cpu_time is not None or limits.idle_time is not None or self._samples_memory

    def _sampled(self, now: float, started: float) -> list[float]:
        """Look at the counters; how long each limit allows to sleep, or [0] when one is reached."""
        limits, seen = self.limits, self.seen
        sample = self._look(now - started)
        seen.memory_peak = max(seen.memory_peak, sample.memory)
        seen.processes_peak = max(seen.processes_peak, len(sample.pids))
        seen.cpu_time = max(seen.cpu_time, sample.cpu_time)
        pauses = []
        if limits.cpu_time is not None:
            left = limits.cpu_time - sample.cpu_time
            if left <= 0:
                self._over("cpu_time_limit", f"cpu time {limits.cpu_time:g} s")
                return [0.0]
            pauses.append(left / self._cpus)
        if self._samples_memory and limits.memory is not None:
            if sample.resident > limits.memory:
                began = time.monotonic()
                sample.memory = proportional(sample.pids)
                seen.memory_peak = max(seen.memory_peak, sample.memory)
                # No more than a tenth of our time goes into looking.
                pauses.append(max(SAMPLE, 10 * (time.monotonic() - began)))
            else:
                pauses.append(SAMPLE)
            if sample.memory > limits.memory:
                self._over("memory_limit", f"memory {limits.memory} bytes, seen by sampling")
                return [0.0]
        if limits.idle_time is not None:
            if self._idle(now, sample.cpu_time) >= limits.idle_time:
                self._over("idle_limit", f"idle for {limits.idle_time:g} s")
                return [0.0]
            pauses.append(limits.idle_time / 10)
        return [min(pauses)]

    def _look(self, elapsed: float) -> Sample:
        # In the first moments nothing can have reached a limit that is sampled: cheap runs stay so.
        leaf = self.box.leaf
        if leaf is not None and not self._samples_memory:
            return Sample(cpu_time=leaf.cpu_time())
        if elapsed < SAMPLE / 2:
            return Sample()
        sample = sample_tree(self.box.pid())
        if leaf is not None:
            sample.cpu_time = leaf.cpu_time()
        return sample

    def _idle(self, now: float, cpu_time: float) -> float:
        """Seconds for which the tree has used next to no CPU."""
        window = now - self._idle_since
        if cpu_time - self._idle_cpu > IDLE_CPU * max(window, 0.1):
            self._idle_since, self._idle_cpu = now, cpu_time
            return 0.0
        self.seen.idle_longest = max(self.seen.idle_longest or 0.0, window)
        return window


def usage(box: Sandbox, ended: Ended | None, watch: Watch, wall_time: float) -> Usage:
    """Sum up. `wall_time` is the supervisor's, for a run whose init could not report."""
    used = box.leaf.used() if box.leaf is not None else None
    exact = used is not None and used.cpu_time is not None
    user = ended.cpu_user if ended else None
    system = ended.cpu_system if ended else None
    if used is not None and exact:
        cpu, user, system, source = (
            used.cpu_time,
            used.cpu_user,
            used.cpu_system,
            "cgroup2 cpu.stat",
        )
    elif ended is not None:
        cpu, source = max(ended.cpu_user + ended.cpu_system, watch.cpu_time), "rusage of the reaped"
    else:
        cpu, source = watch.cpu_time, "sampled /proc"
    peak = used.memory_peak if used else None
    peak_source = "cgroup2 memory.peak"
    if peak is None:
        sampled = watch.memory_peak
        largest = ended.max_rss if ended else 0
        peak = max(sampled, largest) or None
        peak_source = "rusage of the largest process" if largest >= sampled else "sampled /proc"
    blocks = ended.disk_size - ended.disk_free if ended else None
    return Usage(
        cpu_time=cpu,
        cpu_user=user,
        cpu_system=system,
        cpu_time_source=source,
        wall_time=ended.ended - ended.started if ended else wall_time,
        idle_longest=watch.idle_longest,
        memory_peak=peak,
        memory_peak_source=peak_source if peak is not None else None,
        swap_peak=used.swap_peak if used else None,
        oom_kills=used.oom_kills if used else None,
        processes_peak=(used.processes_peak if used else None) or watch.processes_peak or None,
        process_limit_hits=used.process_limit_hits if used else None,
        disk_used=blocks * ended.disk_block if ended and blocks is not None else None,
        inodes_used=ended.inodes - ended.inodes_free if ended else None,
        context_switches_voluntary=ended.context_switches_voluntary if ended else None,
        context_switches_forced=ended.context_switches_forced if ended else None,
        cpu_throttled=used.throttled if used else None,
    )
