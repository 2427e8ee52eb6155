"""Cgroup leaves: one per live sandbox, handed on only when provably empty.

Below the delegated subtree every runner has a directory `sandboxd-PID-START` of its own, so two
runners never touch each other's leaves and a later one can tell what a dead one left:

    sandboxd-PID-START/            all controllers are enabled in here
        any/                       all but cpuset
            1  2  3 ...            leaves, with their limits written before anybody asks for one
        cpus-0,4/                  the same, pinned: cpuset.cpus is written here, once
            4 ...
        tenants/                   the zygotes of root's tenants

So no run costs a write to a file of cpuset, which on a machine with many CPUs waits for a lock of
the whole kernel. A leaf that counts memory or processes serves one run only: memory.peak cannot be
set back before Linux 6.12, pids.peak never, and pages of files stay charged. New ones are made
when runs have ended (`tidy`), not while one starts.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from sandboxd.cgroup import systemd
from sandboxd.cgroup.leaf import Leaf
from sandboxd.errors import HostError
from sandboxd.host import CgroupSubtree
from sandboxd.linux.descriptors import SCARCE

PREFIX = "sandboxd-"
ANY = "any"
GONE_TIMEOUT = 3.0
MOST_READY = 64
"""Leaves that are kept ready."""
MOST_USED = 32
"""Leaves that wait to be removed."""
ONCE = frozenset({"memory", "pids"})
"""Controllers that count what cannot be set back."""
FIXED = 3
PER_SLOT = 2


class Cgroups:
    """The leaves of one runner."""

    def __init__(self, top: Path, subtree: CgroupSubtree) -> None:
        self.top = top
        self.subtree = subtree
        self.owner: int | None = None
        self._free: list[Leaf] = []
        self._used: list[Leaf] = []
        self._made = 0
        self._places: set[str] = set()
        self._pinned: Counter[str] = Counter()
        self._again = not (ONCE & subtree.controllers)

    def take(self, files: Mapping[str, str], cpu_sets: Sequence[str] = ()) -> Leaf:
        """An empty leaf with these limits, on that of the sets of CPUs that has the fewest runs."""
        cpus = min(cpu_sets, key=lambda one: self._pinned[one]) if cpu_sets else ""
        for place in range(len(self._free) - 1, -1, -1):
            leaf = self._free[place]
            if leaf.presets == files and leaf.cpus == cpus:
                del self._free[place]
                break
        else:
            leaf = self._make(files, cpus)
        if cpus:
            self._pinned[cpus] += 1
        return leaf

    def shares(self, leaf: Leaf) -> bool:
        """Whether another run is pinned to the same CPUs."""
        return self._pinned[leaf.cpus] > 1

    def give_back(self, leaf: Leaf) -> None:
        """The sandbox is dead; its leaf is used again or goes."""
        if leaf.cpus:
            self._pinned[leaf.cpus] -= 1
        if self._again and not leaf.killed and leaf.is_empty():
            leaf.since = leaf.counters()
            leaf.fresh = False
            self._free.append(leaf)
        else:
            self._used.append(leaf)
            if len(self._used) > MOST_USED:
                self.tidy()

    def shrink(self) -> None:
        """Nothing is kept ready: each free leaf holds descriptors, and there are none left."""
        free, self._free = self._free, []
        for leaf in free:
            self._remove(leaf)

    def tidy(self) -> None:
        """Remove leaves that served, and make as many new ones of their kind."""
        used, self._used = self._used, []
        for leaf in used:
            self._remove(leaf)
            if len(self._free) < MOST_READY and not self._again:
                with suppress(
                    HostError, OSError
                ):  # who needs one will meet it, and can tell somebody
                    self._free.append(self._make(leaf.presets, leaf.cpus))

    def _make(self, files: Mapping[str, str], cpus: str) -> Leaf:
        self._made += 1
        path = self._place(cpus) / str(self._made)
        self._mkdir(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            path.rmdir()
            raise
        leaf = Leaf(path, fd, dict(files), cpus, controllers=self.subtree.controllers)
        for name, value in files.items():
            try:
                for line in value.splitlines():  # io.max takes one device at a time
                    leaf.write(name, line)
            except FileNotFoundError:
                if name == "memory.swap.max" and not swap_is_on():
                    continue
                self._refuse(leaf, f"{path} has no {name}: another kernel is needed")
            except OSError as error:
                if error.errno in SCARCE:
                    self._remove(leaf)
                    raise
                self._refuse(leaf, f"{path}/{name} = {value}: {error.strerror}")
        return leaf

    def _refuse(self, leaf: Leaf, why: str) -> None:
        self._remove(leaf)
        raise HostError("cgroup", why) from None

    def _place(self, cpus: str) -> Path:
        """The directory whose leaves are on these CPUs; made when first needed."""
        name = f"cpus-{cpus}" if cpus else ANY
        path = self.top / name
        if name not in self._places:
            self._mkdir(path)
            if cpus:
                try:
                    (path / "cpuset.cpus").write_text(cpus)
                except OSError as error:
                    path.rmdir()
                    raise HostError("cgroup", f"{path}/cpuset.cpus = {cpus}: {error.strerror}",
                                    hint="these CPUs are not ours: see cpuset.cpus.effective of "
                                    f"{self.subtree.path}") from None  # fmt: skip
            try:
                enable(path, self.subtree.controllers - {"cpuset"})
            except OSError:
                path.rmdir()  # or the next one would find it
                raise
            self._places.add(name)
        return path

    def _mkdir(self, path: Path) -> None:
        """Where no more may be made, a free leaf of other limits makes room."""
        while True:
            try:
                path.mkdir()
                break
            except OSError as error:
                if error.errno == errno.EAGAIN and self._free:
                    self._remove(self._free.pop(0))
                    continue
                full = "cgroup.max.descendants or cgroup.max.depth is reached: fewer slots, spares"
                hint = full if error.errno == errno.EAGAIN else ""
                raise HostError("cgroup", f"mkdir {path}: {error.strerror}", hint=hint) from None
        if self.owner is not None:
            os.chown(path / "cgroup.procs", self.owner, -1)

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
            for path in _upwards(self.top):
                os.chown(path / "cgroup.procs", uid, -1)

    def _remove(self, leaf: Leaf) -> None:
        leaf.close()
        with suppress(OSError):  # a process that cannot be killed; the directory is swept later
            leaf.path.rmdir()

    async def close(self) -> None:
        for leaf in (*self._free, *self._used):
            self._remove(leaf)
        self._free.clear()
        self._used.clear()
        await remove_tree(self.top)


def slots_within(room: int | None, slots: int | None, spares: int, cpus: int) -> int:
    """How many jobs may run at once where only `room` more cgroups may be made.

    A runner has its directory, that of its leaves and that of its tenants; each slot a leaf in use
    and one of a sandbox on its way out; each spare a leaf. HostError if slots were asked for.
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


def has_room_for_one_more(room: int | None, slots: int, spares: int) -> bool:
    """Whether a leaf beside all those is none that a job might have to do without."""
    return room is None or room > FIXED + PER_SLOT * slots + spares


def swap_is_on() -> bool:
    """Whether anything could be swapped out (proc_swaps(5)): its first line is a heading."""
    with suppress(OSError):
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    return True


def enable(path: Path, controllers: frozenset[str]) -> None:
    """For what will be made in `path`."""
    if controllers:
        words = " ".join(f"+{name}" for name in sorted(controllers))
        (path / "cgroup.subtree_control").write_text(words)


def _upwards(top: Path) -> Iterator[Path]:
    """A directory and all below it, the deepest first."""
    for folder, _, _ in os.walk(top, topdown=False):
        yield Path(folder)


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
        enable(top, subtree.controllers)
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
        _removed(top)


async def remove_tree(top: Path) -> None:
    """rmdir a runner's directory and what is left in it, waiting until processes are gone."""
    with trio.move_on_after(GONE_TIMEOUT):
        while not _removed(top):  # noqa: ASYNC110  the kernel tells nobody
            await trio.sleep(0.002)


def _removed(top: Path) -> bool:
    for path in _upwards(top):
        with suppress(OSError):
            path.rmdir()
    return not top.exists()
