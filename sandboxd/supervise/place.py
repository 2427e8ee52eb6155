"""The machine as one runner has it: what it offers, and a cgroup subtree held meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import trio

from sandboxd.cgroup.ladder import NONE, climbed
from sandboxd.errors import HostError
from sandboxd.host import Host
from sandboxd.probe import host as probe


@asynccontextmanager
async def open_place(host: Host | None, cgroup: str | None) -> AsyncIterator[Host]:
    """The host for a runner: looked at now, or the given one. Once per runner, never per job.

    A snapshot's subtree is used as it is, but for a scope of systemd's, which went when who looked
    at it was done: then the ladder is climbed again. HostError if `cgroup` cannot be used.
    """
    with ExitStack() as held:
        try:
            # Threads, and no cancelling half-way: what was opened comes back to be closed.
            yield await trio.to_thread.run_sync(_look, host, cgroup, held)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(held.close)


def _look(host: Host | None, cgroup: str | None, held: ExitStack) -> Host:
    stale = host is not None and host.cgroup is not None and bool(host.cgroup.scope)
    if host is not None and cgroup is None and not stale:
        return host
    climb = held.enter_context(climbed(cgroup))
    if cgroup not in (None, NONE) and climb.subtree is None:
        raise HostError("cgroup", climb.found.why_not,
                        hint="`sandboxd doctor` says what can be had here")  # fmt: skip
    if host is not None:
        return probe.with_cgroup(host, climb)
    return probe.examine(climb).host
