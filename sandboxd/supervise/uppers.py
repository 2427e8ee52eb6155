"""Directories on disk that sandboxes write to, instead of a tmpfs: made, measured and removed.

    PLACE/RUNNER/NUMBER     a directory for each sandbox; RUNNER is locked (flock(2)) while it lives

RUNNER is closed to all others: a job may make programs that change their user (chmod u+s), and
nobody on the host must get at one.

What is in one belongs to ids that we are not, so a porter removes it, in the user namespace of the
tenant. What a runner left that was killed is removed by the next one that makes a directory: its
lock is free then.

A tenant may end before the last of its directories goes: what is in one may still be collected. So
who has the last one ends what removes them.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from sandboxd.errors import HostError, LaunchError, SandboxError
from sandboxd.plan import IdMap
from sandboxd.policy import Limits
from sandboxd.stores import folders

if TYPE_CHECKING:
    from sandboxd.supervise.porter import Porter

RESERVE, RESERVE_MOST = 0.05, 1 << 30
"""Of a file system this share, and no more than so many bytes, is left free by runs."""
_TRIES = 10
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def own_place() -> Path:
    """Where the directories are: as all stores, but state and no data (stores/folders.py)."""
    return folders.own_place("uppers", "XDG_STATE_HOME", "~/.local/state")


class Uppers:
    """The directories of one runner. Made by open_uppers()."""

    def __init__(self, folder: Path, porter: Porter) -> None:
        self.porter = porter
        self._folder = folder
        self._made = 0
        self._used: set[Path] = set()
        self._left = False
        self._ending: AsyncExitStack | None = None

    def make(self, ids: IdMap, limits: Limits) -> Path:
        """An empty directory that belongs to the root of the tenant; HostError without room."""
        if self._left:
            raise LaunchError("tenant", 0, 0, "the zygote is gone", hint="it is started anew")
        path = self._folder / str(self._made)
        self._made += 1
        reserve, free = room(os.statvfs(self._folder))
        wanted = reserve + (limits.disk or 0)
        if free < wanted:
            raise HostError("disk", f"{self._folder.parent}: {free} bytes are free, and a run may "
                            f"write {limits.disk or 0} of what is above {reserve}",
                            hint="make room, lower limits.disk, or SANDBOXD_UPPERS=DIR names "
                            "another place")  # fmt: skip
        try:
            path.mkdir(mode=0o755)
            if ids.writer == "direct":
                os.chown(path, ids.uids[0][1], ids.gids[0][1])
        except OSError as error:
            raise unusable(path, error) from error
        self._used.add(path)
        return path

    async def remove(self, path: Path) -> None:
        """What cannot be removed now is left to the next runner."""
        with suppress(OSError, SandboxError):
            await remove(path, self.porter)
        self._used.discard(path)
        await self._end()

    async def leave(self, ending: AsyncExitStack) -> None:
        """No more are made; `ending` ends what removes those that there are."""
        self._left, self._ending = True, ending
        await self._end()

    async def _end(self) -> None:
        if self._ending is not None and not self._used:
            ending, self._ending = self._ending, None
            await ending.aclose()


def room(found: os.statvfs_result) -> tuple[int, int]:
    """Bytes that runs leave alone on a file system, and bytes that are free."""
    whole = found.f_blocks * found.f_frsize
    return min(int(whole * RESERVE), RESERVE_MOST), found.f_bavail * found.f_frsize


def unusable(path: Path, error: OSError) -> HostError:
    return HostError("uppers", f"{path}: {error.strerror}",
                     hint="SANDBOXD_UPPERS=DIR names another place")  # fmt: skip


async def remove(path: Path, porter: Porter) -> None:
    """A directory and all in it."""
    opened = os.open(path, _FOLDER)
    try:
        await porter.ask({"do": "empty"}, [opened])
    finally:
        os.close(opened)
    os.rmdir(path)


@asynccontextmanager
async def open_uppers(namespace: int, ids: IdMap) -> AsyncIterator[Uppers]:
    """A place for a runner's directories; what dead runners left goes first.

    They have a porter of their own: to look at how full they are must not wait for files.
    """
    from sandboxd.supervise.porter import open_porter

    async with AsyncExitStack() as stack:
        porter = await stack.enter_async_context(open_porter(namespace))
        folder = await stack.enter_async_context(_folder(porter, ids))
        await sweep(folder.parent, porter)
        found = Uppers(folder, porter)
        try:
            yield found
        finally:
            with trio.CancelScope(shield=True):
                await found.leave(stack.pop_all())


@asynccontextmanager
async def _folder(porter: Porter, ids: IdMap) -> AsyncIterator[Path]:
    folder, lock = _make(own_place(), ids)
    try:
        yield folder
    finally:
        os.close(lock)
        with trio.CancelScope(shield=True):
            await _sweep_one(folder, porter)


def _make(place: Path, ids: IdMap) -> tuple[Path, int]:
    """A directory of our own there, and the descriptor that holds its lock."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            place.chmod(0o711)
        for _ in range(_TRIES):
            folder = place / os.urandom(8).hex()
            folder.mkdir(mode=0o700)
            if ids.writer == "direct":
                os.chown(folder, ids.uids[0][1], ids.gids[0][1])
            lock = os.open(folder, _FOLDER)
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if folder.exists():
                    return folder, lock
            os.close(lock)  # somebody who tidies up was faster, and took it for a dead one's
    except OSError as error:
        raise unusable(place, error) from error
    raise unusable(place, OSError(errno.EBUSY, os.strerror(errno.EBUSY)))


def _below(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


async def sweep(place: Path, porter: Porter) -> None:
    """Remove the directories of runners that are gone."""
    for folder in _below(place):
        with suppress(OSError):
            await _sweep_one(folder, porter)


async def _sweep_one(folder: Path, porter: Porter) -> None:
    try:
        lock = os.open(folder, _FOLDER)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            raise
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # it is in use
        return
    else:
        with suppress(OSError, LaunchError):
            for path in _below(folder):
                with suppress(SandboxError):
                    await remove(path, porter)
            os.rmdir(folder)
    finally:
        os.close(lock)
