"""One cgroup of one sandbox: what it has counted, read as rarely and as briefly as possible.

The files are those of Documentation/admin-guide/cgroup-v2.rst; what a kernel or a subtree does not
have reads as None.
"""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from sandboxd.linux.descriptors import SCARCE

CPU_WORDS = ["usage_usec", "user_usec", "system_usec"]
THROTTLED = "throttled_usec"
INIT = 1
"""init is in the leaf as well and is not the job's."""
OFTEN = frozenset({"cpu.stat", "cgroup.events", "memory.current", "memory.stat", "pids.current"})
"""Files that are looked at again and again, and stay open: each takes a descriptor meanwhile."""
LONGEST = 8192
"""Bytes of the longest file that is read here, memory.stat."""
MOMENTARY = frozenset({"memory_peak", "swap_peak", "processes_peak"})
"""Counters that are a level: there is no difference to take."""


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What a leaf has counted so far; None where the kernel does not count it here."""

    cpu_time: float | None = None
    cpu_user: float | None = None
    cpu_system: float | None = None
    throttled: float | None = None
    throttlings: int | None = None
    memory_peak: int | None = None
    swap_peak: int | None = None
    memory_events: dict[str, int] | None = None
    processes_peak: int | None = None
    process_limit_hits: int | None = None
    io_read: int | None = None
    io_written: int | None = None


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Of what the memory of a leaf consists at one moment, in bytes (memory.stat)."""

    anon: int
    file: int
    """Page cache; what is shmem is not in it."""
    shmem: int
    """tmpfs, memfd_create(2), shared anonymous maps, System V."""
    kernel: int | None
    """Stacks, page tables, sockets, slab ... (Linux 5.18)."""

    @property
    def total(self) -> int | None:
        """All that is charged to it, exact to a page."""
        return None if self.kernel is None else self.anon + self.file + self.shmem + self.kernel


class Leaf(msgspec.Struct):
    """A cgroup for one sandbox. `since` is what it had counted when the sandbox got it."""

    path: Path
    fd: int
    presets: dict[str, str] = msgspec.field(default_factory=dict)
    cpus: str = ""
    """The CPUs that it is pinned to, by the directory it lies in; "" for all."""
    since: Counters = msgspec.field(default_factory=Counters)
    killed: bool = False
    controllers: frozenset[str] = frozenset()
    fresh: bool = True
    """No other sandbox had it before: everything in it is this one's."""
    _open: dict[str, int | None] = msgspec.field(default_factory=dict)

    def read(self, name: str) -> str | None:
        """A file of the leaf, None if there is no such file here."""
        fd = self._opened(name)
        if fd is None:
            return None
        try:
            return os.pread(fd, LONGEST, 0).decode()
        except OSError:  # EOPNOTSUPP: cgroup.pressure is off here
            return None
        finally:
            if name not in OFTEN:
                del self._open[name]
                os.close(fd)

    def _opened(self, name: str) -> int | None:
        if name not in self._open:
            try:
                self._open[name] = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
            except OSError as error:
                if error.errno in SCARCE:  # it may be there
                    raise
                self._open[name] = None
        return self._open[name]

    def close(self) -> None:
        for fd in self._open.values():
            if fd is not None:
                os.close(fd)
        self._open.clear()
        os.close(self.fd)

    def write(self, name: str, content: str) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.write(fd, content.encode())
        finally:
            os.close(fd)

    def table(self, name: str) -> dict[str, int] | None:
        """A file of lines `word number` (cgroup-v2.rst, flat keyed); None without the file."""
        text = self.read(name)
        if text is None:
            return None
        rows = (line.split() for line in text.splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2}

    def cpu_time(self) -> float:
        """CPU seconds of everything that ever ran in the leaf since the sandbox got it."""
        total = (self.cpu()[0] or 0) / 1e6
        return total - (self.since.cpu_time or 0.0)

    def cpu(self) -> tuple[int | None, int | None, int | None, list[str]]:
        """usage_usec, user_usec and system_usec of cpu.stat in one look, and all its words."""
        words = (self.read("cpu.stat") or "").split()
        if words[0:6:2] == CPU_WORDS:  # as every kernel writes it
            return int(words[1]), int(words[3]), int(words[5]), words
        rows = dict(zip(words[::2], map(int, words[1::2]), strict=False))
        usage, user, system = (rows.get(name) for name in CPU_WORDS)
        return usage, user, system, words

    def counters(self) -> Counters:
        usage, user, system, words = self.cpu()
        if not self.controllers:
            return Counters(cpu_time=_seconds(usage), cpu_user=_seconds(user),
                            cpu_system=_seconds(system))  # fmt: skip
        throttled = throttlings = None
        if THROTTLED in words:
            throttled = int(words[words.index(THROTTLED) + 1])
            throttlings = int(words[words.index("nr_throttled") + 1])
        limited = "memory" in self.controllers
        counted = "pids" in self.controllers
        read, written = self.io() if "io" in self.controllers else (None, None)
        return Counters(
            cpu_time=_seconds(usage),
            cpu_user=_seconds(user),
            cpu_system=_seconds(system),
            throttled=_seconds(throttled),
            throttlings=throttlings,
            memory_peak=_number(self.read("memory.peak")) if limited else None,
            swap_peak=_number(self.read("memory.swap.peak")) if limited else None,
            memory_events=self.table("memory.events") if limited else None,
            processes_peak=_less(_number(self.read("pids.peak")), INIT) if counted else None,
            process_limit_hits=(self.table("pids.events") or {}).get("max") if counted else None,
            io_read=read,
            io_written=written,
        )

    def used(self) -> Counters:
        """The counters of this sandbox alone."""
        now, since = self.counters(), self.since
        if self.fresh:
            return now
        if not self.controllers:
            return Counters(
                cpu_time=minus(now.cpu_time, since.cpu_time),
                cpu_user=minus(now.cpu_user, since.cpu_user),
                cpu_system=minus(now.cpu_system, since.cpu_system),
            )
        return Counters(**{
            name: minus(getattr(now, name), getattr(since, name))
            if name not in MOMENTARY else getattr(now, name)
            for name in Counters.__struct_fields__
        })  # fmt: skip

    def io(self) -> tuple[int, int]:
        """Bytes that went to and from disks, all devices together (io.stat)."""
        words = (self.read("io.stat") or "").replace("=", " ").split()
        pairs = list(pairwise(words))
        read, written = (
            sum(int(number) for name, number in pairs if name == key)
            for key in ("rbytes", "wbytes")
        )
        return read, written

    def memory(self) -> Memory | None:
        """What its memory consists of now; None without the memory controller."""
        stat = self.table("memory.stat") if "memory" in self.controllers else None
        if not stat or "shmem" not in stat:
            return None
        shmem = stat["shmem"]
        kernel = stat.get("kernel")
        return Memory(anon=stat["anon"], file=stat["file"] - shmem, shmem=shmem, kernel=kernel)

    def level(self, name: str) -> int | None:
        """A file of one number, as memory.current and pids.current."""
        return _number(self.read(name))

    def pressure(self) -> dict[str, float] | None:
        """Seconds in which some process waited, by what for (Documentation/accounting/psi.rst)."""
        found = {}
        for name in ("cpu", "memory", "io"):
            text = self.read(f"{name}.pressure")
            if text is None or not text.startswith("some"):
                return None
            found[name] = int(text.split("\n", 1)[0].rpartition("total=")[2]) / 1e6
        return found

    def is_empty(self) -> bool:
        return "populated 1" not in (self.read("cgroup.events") or "")

    def is_frozen(self) -> bool:
        return "frozen 1" in (self.read("cgroup.events") or "")

    def freeze(self, *, frozen: bool) -> None:
        """Stop, or let go on, every process in it; it takes effect a moment later (Linux 5.2).

        The file stays open: to let go on what was stopped needs no descriptor more.
        """
        name = "cgroup.freeze"
        fd = self._open.get(name)
        if fd is None:
            fd = self._open[name] = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self.fd)
        os.write(fd, b"1" if frozen else b"0")

    def kill(self) -> None:
        """SIGKILL for every process in it at once (cgroup.kill, Linux 5.14).

        A leaf that was killed once is not used again: kernels with kill_seq (6.14) compare the
        number of kills of the cloner's own cgroup with the leaf's, and kill what CLONE_INTO_CGROUP
        brings when they differ (cgroup_css_set_fork and cgroup_post_fork in kernel/cgroup).
        """
        self.killed = True
        with suppress(OSError):
            self.write("cgroup.kill", "1")


def _less(value: int | None, part: int) -> int | None:
    return None if value is None else max(0, value - part)


def _seconds(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / 1e6


def _number(text: str | None) -> int | None:
    return int(text) if text and text.strip().isdecimal() else None


def minus(value: Any, base: Any) -> Any:
    """The difference, of tables by key; what is not known stays so."""
    if isinstance(value, dict) and isinstance(base, dict):
        return {name: number - base.get(name, 0) for name, number in value.items()}
    if isinstance(value, int | float) and isinstance(base, int | float):
        return value - base
    return value
