"""What /proc says of a run: all there is to know while it lives where no cgroup counts for it."""

from __future__ import annotations

import os
import time
from contextlib import suppress

import msgspec

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class Sample(msgspec.Struct):
    """What /proc says of a tree at one moment."""

    cpu_time: float = 0.0
    memory: int = 0
    """Private pages; what is shared between processes is not in it."""
    resident: int = 0
    """All pages in memory, shared ones once a process: no less than what the tree uses."""
    pids: list[int] = msgspec.field(default_factory=list)


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


def own_cpu(pid: int) -> float:
    """CPU seconds of this process alone, if it has one thread; 0 where the kernel does not say.

    /proc/PID/schedstat, the first number, in nanoseconds (Documentation/scheduler/sched-stats.rst).
    """
    try:
        with open(f"/proc/{pid}/schedstat", "rb") as file:
            return int(file.read().split()[0]) / 1e9
    except (OSError, IndexError):
        return 0.0


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
