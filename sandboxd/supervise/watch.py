"""Looks at a run while it lives, as rarely as its limits allow, and stops it at one of them.

Theory of operation. Whoever waits for the run calls `look` when it is `due`; nothing ticks.

- CPU time: what is left of the limit, divided by the CPUs the run may use, is the time in which it
  cannot be reached; then is the next look. Near the limit that is SHORTEST, and longer while the
  run uses no CPU.
- Idle: the slope of the CPU time over a tenth of the limit at a time.
- Memory that no controller limits is sampled every SAMPLE. What memory consists of, where there is
  a controller, is looked at ever more rarely, from SPLIT_FIRST to SPLIT_MOST apart.
- Pressure: what the cgroup has counted when the run ends, for runs of at least LONG. A leaf that
  served others is looked at once before, when the run has lasted LONG: it counts from there on.

The time for which a run is frozen is taken out of everything: of the wall clock, and of idleness.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import msgspec

from sandboxd.cgroup.leaf import Leaf, Memory
from sandboxd.compile.build import Compiled
from sandboxd.host import Host
from sandboxd.result import Status
from sandboxd.supervise.sampling import (
    Sample,
    own_cpu,
    proportional,
    running_for,
    sample_tree,
)
from sandboxd.supervise.sandboxes import Sandbox

SHORTEST = 0.001
SLACK = 0.01
"""Seconds between two looks at a run that is close to its CPU limit and uses no CPU."""
SAMPLE = 0.02
SPLIT_FIRST, SPLIT_MOST = 0.02, 0.25
IDLE_CPU = 0.01
"""A second in which the tree used less than this share of a CPU was idle."""
IDLE_LOOKS = 10
"""Looks in the length of the idle limit."""
LONG = 0.01
"""Seconds from which on a run's pressure is read: three files."""


class Watch(msgspec.Struct):
    """What was seen while a run was watched."""

    memory_peak: int = 0
    processes_peak: int = 0
    cpu_time: float = 0.0
    own_cpu: float = 0.0
    """What init itself had used when the limit of CPU time was looked at closely."""
    idle_longest: float | None = None
    memory: Memory | None = None
    """The most of each kind that was seen, not necessarily at the same time."""
    latest: Memory | None = None
    held: int = 0
    """The most of all kinds that was seen in one look."""
    paused: float = 0.0
    long: bool = False
    """It has lasted LONG."""
    pressure_base: dict[str, float] | None = None

    def see(self, now: Memory | None) -> None:
        if now is None:
            return
        self.latest = now
        self.held = max(self.held, now.total or 0)
        old = self.memory or now
        self.memory = Memory(
            anon=max(old.anon, now.anon),
            file=max(old.file, now.file),
            shmem=max(old.shmem, now.shmem),
            kernel=max(old.kernel or 0, now.kernel) if now.kernel is not None else None,
        )

    def pressure_since(self, leaf: Leaf) -> dict[str, float] | None:
        """Seconds that something of the run waited; None where the start is not known."""
        if not leaf.fresh and self.pressure_base is None:
            return None
        now = leaf.pressure()
        base = self.pressure_base or {}
        return now and {name: seconds - base.get(name, 0.0) for name, seconds in now.items()}

    def pressure_at_end(self, leaf: Leaf) -> dict[str, float] | None:
        """The same, for a run that was long enough for it to mean something."""
        return self.pressure_since(leaf) if self.long else None


class Watcher:
    """Stops a run at its limits: whoever waits for the run calls `look` when it is `due`."""

    def __init__(
        self, box: Sandbox, compiled: Compiled, host: Host, stop: Callable[[Status, str], None]
    ) -> None:
        self.box = box
        self.limits = compiled.policy.limits
        self._blind = host.hides_processes
        if self._blind and host.cgroup is None:  # nothing seen is not nothing done
            self.limits = msgspec.structs.replace(self.limits, idle_time=None)
        self.seen = Watch()
        self.due = math.inf
        self.started = 0.0
        """Later than it was by as much as the run was paused."""
        self._stop = stop
        self._cpus = compiled.cpus
        controllers = host.cgroup.controllers if host.cgroup else frozenset()
        limited = "memory" in controllers
        self._samples_memory = self.limits.memory is not None and not limited
        self._split_at = math.inf
        self._splits = limited
        self._rebase_at = math.inf
        self._window = self._window_cpu = 0.0
        self._idle_since = 0.0
        self._last_cpu = 0.0
        self._paused_at: float | None = None

    def start(self, started: float) -> None:
        """The program may run now."""
        self.started = started
        self._window = self._idle_since = started
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
            due.append(limits.idle_time / IDLE_LOOKS)
        if self._splits:
            self._split_at = started + SPLIT_FIRST
            due.append(SPLIT_FIRST)
        if self.box.leaf is not None and not self.box.leaf.fresh:
            self._rebase_at = started + LONG
            due.append(LONG)
        self.due = started + min(due)

    def pause(self, now: float) -> None:
        """The run is frozen from now on: nothing is due."""
        if self._paused_at is None:
            self._paused_at = now
            self.due = math.inf

    def resume(self, now: float) -> None:
        """It goes on: everything is as much later as it was frozen."""
        if self._paused_at is None:
            return
        lost = now - self._paused_at
        self._paused_at = None
        self.seen.paused += lost
        self.started += lost
        self._window += lost
        self._idle_since += lost
        self.due = now

    def wall_time(self, now: float) -> float:
        """Seconds for which it has run."""
        return (now if self._paused_at is None else self._paused_at) - self.started

    def look(self, now: float) -> None:
        """Stop the run if it is at a limit; `due` is when to look again."""
        if now < self.due or self._paused_at is not None:
            return
        limits, started = self.limits, self.started
        pauses = [math.inf]
        self._look_at_leaf(now, pauses)
        if limits.wall_time is not None:
            left = limits.wall_time - (now - started)
            if left <= 0 and not self._blind:  # since it was sent; a slow set-up is not its own
                left = limits.wall_time - running_for(self.box.pid()) + self.seen.paused
            if left <= 0:
                self._over("wall_time_limit", f"wall time {limits.wall_time:g} s")
                return
            pauses.append(left)
        if self._needs_sample():
            pauses += self._sampled(now, started)
            if not pauses[-1]:
                return
        self.due = now + max(SHORTEST, min(pauses))

    def end(self, now: float) -> float:
        """The run is over; how long it ran."""
        self.resume(now)
        wall_time = now - self.started
        self.seen.long = wall_time >= LONG
        return wall_time

    def _look_at_leaf(self, now: float, pauses: list[float]) -> None:
        """What no limit asks for: of what memory consists, and where pressure is counted from."""
        leaf = self.box.leaf
        if leaf is None:
            return
        if now >= self._rebase_at:
            self._rebase_at = math.inf
            self.seen.pressure_base = leaf.pressure()
        if now >= self._split_at:
            self.seen.see(leaf.memory())
            pause = min(SPLIT_MOST, max(SPLIT_FIRST, (now - self.started) / 2))
            self._split_at = now + pause
        pauses += [self._rebase_at - now, self._split_at - now]

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
            if left <= 0 and self.box.leaf is not None:  # init is in there, and no part of the run
                seen.own_cpu = own_cpu(self.box.pid())
                left += seen.own_cpu
            if left <= 0:
                self._over("cpu_time_limit", f"cpu time {limits.cpu_time:g} s")
                return [0.0]
            still = sample.cpu_time - self._last_cpu < SHORTEST * IDLE_CPU
            pauses.append(max(left / self._cpus, SLACK if still else 0.0))
            self._last_cpu = sample.cpu_time
        if self._samples_memory and limits.memory is not None:
            pauses.append(self._sampled_memory(sample, limits.memory))
            if not pauses[-1]:
                return [0.0]
        if limits.idle_time is not None:
            if self._idle(now, sample.cpu_time, limits.idle_time) >= limits.idle_time:
                self._over("idle_limit", f"idle for {limits.idle_time:g} s")
                return [0.0]
            pauses.append(self._window + limits.idle_time / IDLE_LOOKS - now)
        return [max(SHORTEST, min(pauses))]

    def _sampled_memory(self, sample: Sample, limit: int) -> float:
        """How long until the next look; 0 if this one found the limit reached."""
        pause = SAMPLE
        if sample.resident > limit:
            began = time.monotonic()
            sample.memory = proportional(sample.pids)
            self.seen.memory_peak = max(self.seen.memory_peak, sample.memory)
            # No more than a tenth of our time goes into looking.
            pause = max(SAMPLE, 10 * (time.monotonic() - began))
        if sample.memory > limit:
            self._over("memory_limit", f"memory {limit} bytes, seen by sampling")
            return 0.0
        return pause

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

    def _idle(self, now: float, cpu_time: float, limit: float) -> float:
        """Seconds for which the tree has used next to no CPU."""
        length = now - self._window
        if length >= limit / IDLE_LOOKS - SHORTEST:
            slope = (cpu_time - self._window_cpu) / length
            self._window, self._window_cpu = now, cpu_time
            if slope > IDLE_CPU:
                self._idle_since = now
            idle = now - self._idle_since
            self.seen.idle_longest = max(self.seen.idle_longest or 0.0, idle)
        return self.seen.idle_longest or 0.0
