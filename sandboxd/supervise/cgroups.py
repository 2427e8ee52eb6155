"""Cgroup leaves: one per live sandbox, handed on only when provably empty.

Below the delegated subtree every runner has a directory `sandboxd-PID-START` of its own, so two
runners never touch each other's leaves and a later one can tell what a dead one left.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import trio

from sandboxd.errors import HostError
from sandboxd.host import CgroupSubtree
from sandboxd.supervise import systemd

Number = TypeVar("Number", int, float)
PREFIX = "sandboxd-"
GONE_TIMEOUT = 3.0
FIXED = 2
PER_SLOT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What a leaf has counted so far; None where the kernel does not count it here."""

    cpu_time: float | None = None
    cpu_user: float | None = None
    cpu_system: float | None = None
    throttled: float | None = None
    memory_peak: int | None = None
    swap_peak: int | None = None
    oom_kills: int | None = None
    processes_peak: int | None = None
    process_limit_hits: int | None = None


@dataclass(slots=True)
class Leaf:
    """A cgroup for one sandbox. `since` is what it had counted when the sandbox got it."""

    path: Path
    fd: int
    presets: dict[str, str] = field(default_factory=dict)
    since: Counters = field(default_factory=Counters)
    killed: bool = False
    controllers: bool = True
    _open: dict[str, int | None] = field(default_factory=dict)

    def read(self, name: str) -> str | None:
        """A file of the leaf, None if there is no such file here; it stays open for next time."""
        if name not in self._open:
            try:
                self._open[name] = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
            except OSError:
                self._open[name] = None
        fd = self._open[name]
        return None if fd is None else os.pread(fd, 4096, 0).decode()

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

    def table(self, name: str) -> dict[str, int]:
        """A file of lines `word number` (cgroup-v2.rst, flat keyed)."""
        rows = (line.split() for line in (self.read(name) or "").splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2}

    def cpu_time(self) -> float:
        """CPU seconds of everything that ever ran in the leaf since the sandbox got it."""
        total = (self.cpu()[0] or 0) / 1e6
        return total - (self.since.cpu_time or 0.0)

    def cpu(self) -> tuple[int | None, int | None, int | None, int | None]:
        """usage_usec, user_usec, system_usec and throttled_usec of cpu.stat, in one look."""
        words = (self.read("cpu.stat") or "").split()
        if words[0:6:2] == CPU_WORDS:  # as every kernel writes it
            throttled = int(words[words.index(THROTTLED) + 1]) if THROTTLED in words else None
            return int(words[1]), int(words[3]), int(words[5]), throttled
        rows = dict(zip(words[::2], map(int, words[1::2]), strict=False))
        usage, user, system = (rows.get(name) for name in CPU_WORDS)
        return usage, user, system, rows.get(THROTTLED)

    def counters(self) -> Counters:
        usage, user, system, throttled = self.cpu()
        if not self.controllers:
            return Counters(cpu_time=_seconds(usage), cpu_user=_seconds(user),
                            cpu_system=_seconds(system))  # fmt: skip
        return Counters(
            cpu_time=_seconds(usage),
            cpu_user=_seconds(user),
            cpu_system=_seconds(system),
            throttled=_seconds(throttled),
            memory_peak=_number(self.read("memory.peak")),
            swap_peak=_number(self.read("memory.swap.peak")),
            oom_kills=self.table("memory.events").get("oom_kill"),
            processes_peak=_less(_number(self.read("pids.peak")), INIT),
            process_limit_hits=self.table("pids.events").get("max"),
        )

    def used(self) -> Counters:
        """The counters of this sandbox alone."""
        now, since = self.counters(), self.since
        return Counters(
            cpu_time=_minus(now.cpu_time, since.cpu_time),
            cpu_user=_minus(now.cpu_user, since.cpu_user),
            cpu_system=_minus(now.cpu_system, since.cpu_system),
            throttled=_minus(now.throttled, since.throttled),
            oom_kills=_minus(now.oom_kills, since.oom_kills),
            process_limit_hits=_minus(now.process_limit_hits, since.process_limit_hits),
            memory_peak=now.memory_peak,
            swap_peak=now.swap_peak,
            processes_peak=now.processes_peak,
        )

    def is_empty(self) -> bool:
        return "populated 1" not in (self.read("cgroup.events") or "")

    def kill(self) -> None:
        """SIGKILL for every process in it at once (cgroup.kill, Linux 5.14).

        A leaf that was killed once is not used again: kernels with kill_seq (6.14) compare the
        number of kills of the cloner's own cgroup with the leaf's, and kill what CLONE_INTO_CGROUP
        brings when they differ (cgroup_css_set_fork and cgroup_post_fork in kernel/cgroup).
        """
        self.killed = True
        with suppress(OSError):
            self.write("cgroup.kill", "1")


CPU_WORDS = ["usage_usec", "user_usec", "system_usec"]
THROTTLED = "throttled_usec"


INIT = 1
"""init is in the leaf as well and is not the job's."""


def _less(value: int | None, part: int) -> int | None:
    return None if value is None else max(0, value - part)


def _seconds(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / 1e6


def _number(text: str | None) -> int | None:
    return int(text) if text and text.strip().isdecimal() else None


def _minus(value: Number | None, base: Number | None) -> Number | None:
    return value if value is None or base is None else value - base


class Cgroups:
    """The leaves of one runner."""

    def __init__(self, top: Path, subtree: CgroupSubtree) -> None:
        self.top = top
        self.subtree = subtree
        self.owner: int | None = None
        self._free: list[Leaf] = []
        self._made = 0

    def take(self, files: dict[str, str]) -> Leaf:
        """An empty leaf with these limits. Without the memory controller leaves are used again:
        what they count is then all differences (memory.peak cannot be set back before 6.12)."""
        for place, leaf in enumerate(self._free):
            if leaf.presets == files:
                return self._free.pop(place)
        path = self._make()
        if self.owner is not None:
            os.chown(path / "cgroup.procs", self.owner, -1)
        leaf = Leaf(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), dict(files),
                    controllers=bool(self.subtree.controllers))  # fmt: skip
        for name, value in files.items():
            try:
                leaf.write(name, value)
            except OSError as error:
                self._remove(leaf)
                raise HostError("cgroup", f"{path}/{name} = {value}: {error.strerror}") from None
        return leaf

    def _make(self) -> Path:
        """A new directory; where no more may be made, a free leaf of other limits makes room."""
        self._made += 1
        path = self.top / str(self._made)
        while True:
            try:
                path.mkdir()
            except OSError as error:
                if error.errno == errno.EAGAIN and self._free:
                    self._remove(self._free.pop(0))
                    continue
                full = "cgroup.max.descendants or cgroup.max.depth is reached: fewer slots, spares"
                hint = full if error.errno == errno.EAGAIN else ""
                raise HostError("cgroup", f"mkdir {path}: {error.strerror}", hint=hint) from None
            return path

    async def admit(self, pid: int, uid: int | None) -> None:
        """Let a tenant clone into our leaves; `uid` is its root on the host if that is not us.

        CLONE_INTO_CGROUP needs write access to cgroup.procs of the leaf and of the common ancestor
        (cgroup-v2.rst, Delegation Containment). An ordinary user has both where we run in the
        subtree. In a scope of systemd's we do not, and a tenant started by root is somebody else:
        they are moved below our directory; root's is made its own.
        """
        if uid is None and not self.subtree.scope:
            return
        home = self.top / "tenants"
        home.mkdir(exist_ok=True)
        try:
            (home / "cgroup.procs").write_text(str(pid))
        except PermissionError:
            if not self.subtree.scope:
                raise
            below = f"/{home.relative_to(self.subtree.path)}"
            await trio.to_thread.run_sync(systemd.attach, self.subtree.scope, below, pid)
        if uid is not None:
            self.owner = uid
            for path in (self.top, *self.top.glob("*/")):
                os.chown(path / "cgroup.procs", uid, -1)

    def give_back(self, leaf: Leaf) -> None:
        """The sandbox is dead; its leaf is used again or goes."""
        if "memory" not in self.subtree.controllers and not leaf.killed and leaf.is_empty():
            leaf.since = leaf.counters()
            self._free.append(leaf)
        else:
            self._remove(leaf)

    def _remove(self, leaf: Leaf) -> None:
        leaf.close()
        with suppress(OSError):  # a process that cannot be killed; the directory is swept later
            leaf.path.rmdir()

    async def close(self) -> None:
        for leaf in self._free:
            self._remove(leaf)
        self._free.clear()
        await remove_tree(self.top)


def slots_within(room: int | None, slots: int | None, spares: int, cpus: int) -> int:
    """How many jobs may run at once where only `room` more cgroups may be made.

    A runner has its directory and its tenants'; each slot a leaf in use and one of a sandbox that
    is on its way out; each spare a leaf. HostError if that many slots were asked for.
    """
    wanted = slots or cpus
    if room is None:
        return wanted
    most = (room - FIXED - spares) // PER_SLOT
    if most >= wanted:
        return wanted
    if slots is None and most > 0:
        return most
    need = FIXED + PER_SLOT * wanted + spares
    raise HostError(
        "cgroup", f"{wanted} slots and {spares} spares need {need} cgroups, and only {room} may be"
        " made (cgroup.max.descendants)",
        hint=f"at most slots={max(0, most)}, or fewer spares, or cgroup='none'",
    )  # fmt: skip


@asynccontextmanager
async def open_cgroups(subtree: CgroupSubtree | None) -> AsyncIterator[Cgroups | None]:
    """The leaves of a runner in a delegated subtree; None where there is none."""
    if subtree is None:
        yield None
        return
    base = Path(subtree.path)
    sweep(base)
    top = base / f"{PREFIX}{os.getpid()}-{start_time(os.getpid())}-{trio.current_time():.6f}"
    top.mkdir()
    cgroups = Cgroups(top, subtree)
    try:
        if subtree.controllers:
            words = " ".join(f"+{name}" for name in sorted(subtree.controllers))
            (top / "cgroup.subtree_control").write_text(words)
        yield cgroups
    finally:
        with trio.CancelScope(shield=True):
            await cgroups.close()


def start_time(pid: int) -> str:
    """When a process started, in clock ticks since boot (proc_pid_stat(5), field 22)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def sweep(base: Path) -> None:
    """Remove what runners left that are dead: only their directories, only empty ones."""
    for top in base.glob(f"{PREFIX}[0-9]*-[0-9]*"):
        pid, _, rest = top.name.removeprefix(PREFIX).partition("-")
        with suppress(OSError, IndexError):
            if start_time(int(pid)) == rest.partition("-")[0]:
                continue
        for leaf in (*top.glob("*/"), top):
            with suppress(OSError):
                leaf.rmdir()


async def remove_tree(top: Path) -> None:
    """rmdir a runner's directory and what is left in it, waiting until processes are gone."""
    with trio.move_on_after(GONE_TIMEOUT):
        while not _removed(top):  # noqa: ASYNC110  the kernel tells nobody
            await trio.sleep(0.002)


def _removed(top: Path) -> bool:
    for path in (*top.glob("*/"), top):
        with suppress(OSError):
            path.rmdir()
    return not top.exists()
