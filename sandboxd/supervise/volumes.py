"""What a policy's mounts show: found on the host, held while it is used, and kept to its size.

A tenant holds the volumes and caches of its policy as long as it lives, so nobody removes them
meanwhile. A run holds a cache as its lock says: `exclusive` alone, `shared-ro` and `copy` with
others of these two. Who has to wait does so before he takes a slot, so that nobody waits for him in
turn, and in the order of the names, so that no two wait for each other.

A size is not the kernel's to keep (a project quota can be set by root only): it is looked at before
a run that may write, and then every EVERY seconds; a run that is found beyond it is stopped.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import trio

from sandboxd import units
from sandboxd.compile.idmap import tenant_ids
from sandboxd.errors import Busy, JobError, PolicyError
from sandboxd.host import Host
from sandboxd.policy import Mount, Policy
from sandboxd.stores import folders
from sandboxd.stores.volumes import CACHE_SIZE, Shelf, used
from sandboxd.supervise.one_error import one_error
from sandboxd.supervise.stops import Control

EVERY = 0.25
"""Seconds between two looks at the size of what a run writes to."""
FIRST_WAIT, LONGEST_WAIT = 0.002, 0.1
"""Seconds between two tries to get a lock."""
_SHARE = 10
"""No more than one part in so many of the time goes into looking."""


def stored(policy: Policy) -> list[tuple[int, Mount]]:
    """The mounts that are volumes or caches, with their places in the policy."""
    return [(number, mount) for number, mount in enumerate(policy.mounts)
            if mount.type in ("volume", "cache")]  # fmt: skip


def found(policy: Policy, host: Host) -> Host:
    """The host with what the mounts of a policy are. PolicyError for a volume that is not there."""
    binds = {mount.source for mount in policy.mounts if mount.type == "bind" and mount.source}
    files = frozenset(source for source in binds if Path(source).is_file())
    if files:
        host = msgspec.structs.replace(host, files=files)
    places = {}
    quotas = {}
    for number, mount in stored(policy):
        shelf, name = Shelf.own(mount.type), mount.name or ""
        record = shelf.find(name)
        if record is None and mount.type == "volume":
            raise PolicyError(policy.origin(f"mounts[{number}]"), f"no volume {name!r}",
                              hint=f"`sandboxd volume create {name}` makes it; the directory is "
                              f"./{name}")  # fmt: skip
        size = record.size if record is not None else mount.size or CACHE_SIZE
        places[mount.asked] = os.path.realpath(shelf.data(name))
        if size is not None and mount.writes:
            quotas[mount.asked] = size
    if "/" not in policy.allow_sources:
        if policy.root.source != "host":
            binds.add(policy.root.source)
        places |= {source: os.path.realpath(source) for source in binds}
        allowed = tuple(os.path.realpath(one) for one in policy.allow_sources)
        host = msgspec.structs.replace(host, allow_sources=allowed)
    return msgspec.structs.replace(host, sources=places, quotas=quotas) if places else host


@contextmanager
def using(policy: Policy, host: Host) -> Iterator[None]:
    """Meanwhile its volumes and caches are there, and nobody removes them."""
    ids = tenant_ids(host)
    owner = (ids.uids[0][1], ids.gids[0][1]) if ids.writer == "direct" else None
    with ExitStack() as stack:
        for number, mount in stored(policy):
            shelf, name = Shelf.own(mount.type), mount.name or ""
            if mount.type == "cache" and shelf.find(name) is None:
                shelf.create(name, mount.size or CACHE_SIZE, owner)
            held = shelf.hold(name)
            if held is None:
                raise JobError(f"{policy.origin(f'mounts[{number}]')}: the {mount.asked} is gone",
                               hint="it was removed meanwhile")  # fmt: skip
            stack.callback(os.close, held)
            if owner is not None:  # who made it did not know which ids sandboxes have
                os.chown(shelf.data(name), *owner)
        yield


# -- for one run -------------------------------------------------------------------------------


class Quota(msgspec.Struct, frozen=True):
    """A place that a run may write to, and how much may lie in it."""

    name: str
    path: Path
    size: int
    where: str


def quotas(policy: Policy, host: Host) -> list[Quota]:
    return [
        Quota(mount.asked, Path(host.sources[mount.asked]), host.quotas[mount.asked],
              policy.origin(f"mounts[{number}]"))
        for number, mount in stored(policy)
        if mount.asked in host.quotas
    ]  # fmt: skip


@asynccontextmanager
async def lent(policy: Policy) -> AsyncIterator[None]:
    """While a run has its caches. Busy if others have them for longer than it waits."""
    mounts = sorted(stored(policy), key=lambda one: one[1].name or "")
    async with AsyncExitStack() as stack:
        for number, mount in mounts:
            if mount.type == "cache":
                where = policy.origin(f"mounts[{number}]")
                await stack.enter_async_context(_lent(mount, where))
        yield


@asynccontextmanager
async def _lent(mount: Mount, where: str) -> AsyncIterator[None]:
    shelf, name = Shelf.own("cache"), mount.name or ""
    if shelf.find(name) is None:
        shelf.create(name, mount.size or CACHE_SIZE)
    how = fcntl.LOCK_EX if mount.lock == "exclusive" else fcntl.LOCK_SH
    lock = os.open(shelf.lock_file(name), os.O_RDWR | os.O_CLOEXEC)
    try:
        deadline, pause = trio.current_time() + mount.wait, FIRST_WAIT
        while not folders.try_lock(lock, how):
            if trio.current_time() >= deadline:
                raise Busy(f"{where}: another run has had the cache {name} for {mount.wait:g} s",
                           hint="raise wait, or use lock = \"copy\" or \"shared-ro\"")  # fmt: skip
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_WAIT)
        yield
    finally:
        os.close(lock)


@asynccontextmanager
async def watched(
    policy: Policy, host: Host, on_start: Callable[[Control], None]
) -> AsyncIterator[Callable[[Control], None]]:
    """What is to be told of the run's start, to have it stopped at the size of what it writes to.

    JobError if there is no room left before it starts.
    """
    wanted = quotas(policy, host)
    if not wanted:
        yield on_start
        return
    for one in wanted:
        there = await trio.to_thread.run_sync(used, one.path)
        if there.bytes >= one.size:
            amount = f"{units.format_size(there.bytes)} of {units.format_size(one.size)}"
            raise JobError(f"{one.where}: the {one.name} is full: {amount}",
                           hint=f"make room in {one.path}")  # fmt: skip
    with one_error():
        async with trio.open_nursery() as nursery:

            def started(control: Control) -> None:
                nursery.start_soon(_watch, wanted, control)
                on_start(control)

            yield started
            nursery.cancel_scope.cancel()


async def _watch(wanted: list[Quota], control: Control) -> None:
    while True:
        began = trio.current_time()
        for one in wanted:
            there = await trio.to_thread.run_sync(used, one.path, abandon_on_cancel=True)
            if there.bytes > one.size:
                control.stops.stop("disk_limit", f"the {one.name}: {one.size} bytes")
                return
        await trio.sleep(max(EVERY, _SHARE * (trio.current_time() - began)))
