"""What a run used, summed up: at its end for the result, and before that for whoever asks.

CPU time comes from the run's cgroup where there is one (exact, nothing escapes it), else from
/proc while it runs and from init's rusage afterwards: a lower bound, because a process whose
parent ignores SIGCHLD is waited for by nobody (wait(2), NOTES).
"""

from __future__ import annotations

from typing import Any

from sandboxd.cgroup.leaf import Counters, Leaf, Memory
from sandboxd.messages import Ended
from sandboxd.result import Usage
from sandboxd.supervise.sampling import own_cpu, sample_tree
from sandboxd.supervise.sandboxes import Sandbox
from sandboxd.supervise.watch import Watch

CGROUP = "cgroup2 cpu.stat"
RUSAGE = "rusage of the reaped"
SAMPLED = "sampled /proc"
NOTHING = Counters()


def usage(box: Sandbox, ended: Ended | None, watch: Watch, wall_time: float) -> Usage:
    """Sum up. `wall_time` is the supervisor's, for a run whose init could not report."""
    used = box.leaf.used() if box.leaf is not None else NOTHING
    user = ended.cpu_user if ended else None
    system = ended.cpu_system if ended else None
    if used.cpu_time is not None:
        cpu, user, system = without(used, ended.own_cpu if ended else watch.own_cpu)
        source = CGROUP
    elif ended is not None:
        cpu, source = max(ended.cpu_user + ended.cpu_system, watch.cpu_time), RUSAGE
    else:
        cpu, source = watch.cpu_time, SAMPLED
    peak, peak_source = used.memory_peak, "cgroup2 memory.peak"
    if peak is None:
        sampled = watch.memory_peak
        largest = ended.max_rss if ended else 0
        peak = max(sampled, largest) or None
        peak_source = "rusage of the largest process" if largest >= sampled else "sampled statm"
    blocks = ended.disk_size - ended.disk_free if ended else None
    processes = used.processes_peak or watch.processes_peak or None
    return Usage(
        cpu_time=cpu,
        cpu_user=user,
        cpu_system=system,
        cpu_time_source=source,
        wall_time=ended.ended - ended.started - watch.paused if ended else wall_time,
        idle_longest=watch.idle_longest,
        memory_peak=peak,
        memory_peak_source=peak_source if peak is not None else None,
        processes_peak=processes,
        processes_peak_source=_processes_source(used) if processes else None,
        disk_used=blocks * ended.disk_block if ended and blocks is not None else None,
        inodes_used=ended.inodes - ended.inodes_free if ended else None,
        context_switches_voluntary=ended.context_switches_voluntary if ended else None,
        context_switches_forced=ended.context_switches_forced if ended else None,
        **(counted(box, used, watch) if box.leaf is not None and box.leaf.controllers else {}),
        pressure=watch.pressure_at_end(box.leaf) if box.leaf is not None else None,
        **carried(box),
    )


def carried(box: Sandbox) -> dict[str, Any]:
    """What went through its way out, where it has one."""
    if box.way_out is None or not box.way_out.is_carried:
        return {}
    counters = box.way_out.counters()
    return {
        "net_received": counters["received"].bytes,
        "net_sent": counters["sent"].bytes,
        "net_connections": counters["connections"].packets,
    }


def without(used: Counters, own: float) -> tuple[float | None, float | None, float | None]:
    """CPU time, user and system of the run: init is in the cgroup, too, and is no part of it.

    Nearly all of what init does are system calls. The kernel's two parts are estimates, their sum
    is not (cputime_adjust in kernel/sched/cputime.c): it stays the sum.
    """
    if used.cpu_time is None:
        return None, used.cpu_user, used.cpu_system
    cpu = max(0.0, used.cpu_time - own)
    if used.cpu_user is None:
        return cpu, None, None
    user = min(used.cpu_user, cpu)
    return cpu, user, cpu - user


def _processes_source(used: Counters) -> str:
    return SAMPLED if used.processes_peak is None else "cgroup2 pids.peak"


def counted(box: Sandbox, used: Counters, watch: Watch) -> dict[str, Any]:
    """The fields of Usage that need controllers."""
    events = used.memory_events
    seen = watch.memory
    base = box.memory_base if used.memory_peak is not None else None
    return {
        "memory_base": base,
        "memory_program_peak": watch.held - base if watch.held and base is not None else None,
        "swap_peak": used.swap_peak,
        "oom_kills": events.get("oom_kill") if events is not None else None,
        "memory_events": events,
        "memory_anon_peak": seen.anon if seen else None,
        "memory_file_peak": seen.file if seen else None,
        "memory_shmem_peak": seen.shmem if seen else None,
        "memory_kernel_peak": seen.kernel if seen else None,
        "process_limit_hits": used.process_limit_hits,
        "io_read": used.io_read,
        "io_written": used.io_written,
        "cpu_throttled": used.throttled,
        "cpu_throttlings": used.throttlings,
    }


def remains(box: Sandbox, watch: Watch, used: Usage) -> Memory | None:
    """Of what the memory consisted when the kernel's killer came, as far as that is known.

    What processes had is gone; files in memory are there until the kernel has taken the mounts
    of the dead apart, and the page cache stays.
    """
    if box.leaf is None or not used.oom_kills:
        return None
    watch.see(box.leaf.memory())
    return watch.memory


def live(box: Sandbox, watch: Watch, wall_time: float) -> Usage:
    """What a run has used up to now, and what it has at the moment."""
    leaf = box.leaf
    if leaf is None:
        return _live_without(box, watch, wall_time)
    used = leaf.used()
    watch.see(leaf.memory())
    limited = "memory" in leaf.controllers
    tree = None if limited and "pids" in leaf.controllers else sample_tree(box.pid())
    threads = leaf.level("pids.current") if tree is None else None
    if tree is not None:
        watch.memory_peak = max(watch.memory_peak, tree.memory)
        watch.processes_peak = max(watch.processes_peak, len(tree.pids))
    peak = used.memory_peak if limited else watch.memory_peak or None
    cpu, user, system = without(used, own_cpu(box.pid()))
    processes = used.processes_peak or watch.processes_peak or None
    return Usage(
        cpu_time=cpu,
        cpu_user=user,
        cpu_system=system,
        cpu_time_source=CGROUP,
        wall_time=wall_time,
        idle_longest=watch.idle_longest,
        memory_current=_current(leaf) if limited or tree is None else tree.memory,
        memory_peak=peak,
        memory_peak_source=_live_source(used, peak),
        processes_current=threads - 1 if threads else len(tree.pids) if tree else None,
        processes_peak=processes,
        processes_peak_source=_processes_source(used) if processes else None,
        **(counted(box, used, watch) if leaf.controllers else {}),
        pressure=watch.pressure_since(leaf),
        **carried(box),
    )


def _current(leaf: Leaf) -> int | None:
    return leaf.level("memory.current")


def _live_source(used: Counters, peak: int | None) -> str | None:
    if peak is None:
        return None
    return "sampled statm" if used.memory_peak is None else "cgroup2 memory.peak"


def _live_without(box: Sandbox, watch: Watch, wall_time: float) -> Usage:
    tree = sample_tree(box.pid())
    watch.cpu_time = max(watch.cpu_time, tree.cpu_time)
    watch.memory_peak = max(watch.memory_peak, tree.memory)
    watch.processes_peak = max(watch.processes_peak, len(tree.pids))
    return Usage(
        cpu_time=watch.cpu_time,
        cpu_time_source=SAMPLED,
        wall_time=wall_time,
        idle_longest=watch.idle_longest,
        memory_current=tree.memory,
        memory_peak=watch.memory_peak,
        memory_peak_source="sampled statm",
        processes_current=len(tree.pids),
        processes_peak=watch.processes_peak,
        processes_peak_source=SAMPLED,
        **carried(box),
    )
