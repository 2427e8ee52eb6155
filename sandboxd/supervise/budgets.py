"""Holds a run to its limits of disk where the area is a directory, which no kernel limits for us.

Theory of operation. Looking at every file takes long, asking the file system how much is free does
not. So the second is done every LOOK, and the first when so much is gone since that the run could
be at a limit by now, or every WALK anyway, but never so often that more than a tenth of the time
is spent on it. Files without a name are counted as far as processes have them open: if more is
gone than the names explain. And when the file system itself is nearly full, the run is ended
whatever was found. docs/explanation/overlays.md says what that can promise and what not.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import trio

from sandboxd.errors import JobError
from sandboxd.messages import Ended
from sandboxd.policy import Limits
from sandboxd.result import Status
from sandboxd.supervise.areas import Area
from sandboxd.supervise.sampling import sample_tree
from sandboxd.supervise.sandboxes import Sandbox
from sandboxd.supervise.uppers import room

LOOK = 0.02
WALK = 1.0
SHARE = 10
"""One part in so many of the time is for looking at files."""
MOST = 1 << 20
"""Entries looked at where limits.inodes says nothing."""
_BLOCK = 512  # the unit of st_blocks (stat(2))


class Level(msgspec.Struct):
    """How full an area is. `whole` is false if there is more than was looked at."""

    bytes: int = 0
    inodes: int = 0
    whole: bool = True


class Budget:
    """A watched area."""

    def __init__(
        self, box: Sandbox, area: Area, limits: Limits, stop: Callable[[Status, str], None]
    ) -> None:
        self.level = Level()
        self._box = box
        self._area = area
        self._limits = limits
        self._stop = stop
        self._file_system = area.mounts["area"]

    async def watch(self) -> None:
        """Until it is over a limit."""
        free, nodes = self._free()
        start, walked, next_walk = free, trio.current_time(), 0.0
        while True:
            await trio.sleep(LOOK)
            now, (left, left_nodes) = trio.current_time(), self._free()
            reserve, available = room(os.fstatvfs(self._file_system))
            if available < reserve:
                self._stop("disk_limit", f"the file system has no more than {available} bytes free")
                return
            lost = self._may_be_full(free - left, nodes - left_nodes)
            if not (lost and now >= next_walk) and now < max(walked + WALK, next_walk):
                continue
            free, nodes = left, left_nodes
            await self.look(self._limits.inodes and self._limits.inodes + 1)
            if start - left > self.level.bytes and lost:
                self.level.bytes += await trio.to_thread.run_sync(nameless, self._box.pid())
            walked = trio.current_time()
            next_walk = walked + (0.0 if lost else SHARE * (walked - now))
            if why := self._over():
                self._stop("disk_limit", why)
                return

    async def look(self, most: int | None) -> None:
        """Count what is there, and no more entries than need be."""
        with trio.CancelScope(shield=True):  # given up half-way it would cost the porter
            self.level = await measured(self._area, MOST if most is None else most)

    def _free(self) -> tuple[int, int]:
        found = os.fstatvfs(self._file_system)
        return found.f_bfree * found.f_frsize, found.f_ffree

    def _may_be_full(self, bytes_gone: int, inodes_gone: int) -> bool:
        limits, level = self._limits, self.level
        disk = limits.disk is not None and level.bytes + bytes_gone >= limits.disk
        return disk or (limits.inodes is not None and level.inodes + inodes_gone >= limits.inodes)

    def is_over(self, level: Level) -> bool:
        limit = self._limits.disk
        return limit is not None and level.bytes > limit

    def _over(self) -> str:
        limits, level = self._limits, self.level
        if self.is_over(level):
            return f"disk {limits.disk} bytes"
        if limits.inodes is not None and level.inodes > limits.inodes:
            return f"inodes {limits.inodes}"
        return "" if level.whole else "more files, or deeper directories, than are looked at"


async def measured(area: Area, most: int) -> Level:
    assert area.uppers is not None
    request = {"do": "measure", "entries": most}
    found = await area.uppers.porter.ask(request, [area.mounts["area"]])
    return Level(found["bytes"], found["entries"], found["whole"])


async def check_room(area: Area | None, limits: Limits) -> None:
    """JobError if what was copied in is more than the run may have: no tmpfs has refused it."""
    if area is None or area.directory is None:
        return
    level = await measured(area, MOST if limits.inodes is None else limits.inodes + 1)
    wrong = "disk" if limits.disk is not None and level.bytes > limits.disk else ""
    if limits.inodes is not None and level.inodes > limits.inodes:
        wrong = "inodes"
    if wrong:
        raise JobError("files: the files do not fit into the sandbox",
                       hint=f"raise limits.{wrong}, or give it less")  # fmt: skip


def nameless(init: int) -> int:
    """Bytes of files on disk that have no name, and that a process of the run has open."""
    found: dict[tuple[int, int], int] = {}
    for pid in sample_tree(init).pids:
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for number in numbers:
            try:
                seen = os.stat(f"/proc/{pid}/fd/{number}")
                is_memory = os.readlink(f"/proc/{pid}/fd/{number}").startswith("/memfd:")
            except OSError:
                continue
            if seen.st_nlink == 0 and stat.S_ISREG(seen.st_mode) and not is_memory:
                found[seen.st_dev, seen.st_ino] = seen.st_blocks * _BLOCK
    return sum(found.values())


@asynccontextmanager
async def watching(
    box: Sandbox, limits: Limits, stop: Callable[[Status, str], None]
) -> AsyncIterator[Budget | None]:
    """Meanwhile the run is held to its limits of disk, if its area is a directory."""
    area = box.area
    if area is None or area.directory is None:
        yield None
        return
    budget = Budget(box, area, limits, stop)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(budget.watch)
        try:
            yield budget
        finally:
            nursery.cancel_scope.cancel()


async def at_end(budget: Budget | None, ended: Ended | None, limits: Limits) -> Ended | None:
    """init's report with how full the directory is, in the place of the disk that it is on."""
    if budget is None or ended is None:
        return ended
    before = budget.level
    await budget.look(None)
    # What was seen without a name is gone with the processes, and was there when the run was ended.
    used = max(budget.level.bytes, before.bytes if budget.is_over(before) else 0)
    inodes = budget.level.inodes
    size, most = limits.disk or used, limits.inodes or inodes
    return msgspec.structs.replace(
        ended, disk_block=1, disk_size=max(size, used), disk_free=max(0, size - used),
        inodes=max(most, inodes), inodes_free=max(0, most - inodes),
    )  # fmt: skip
