"""Runs that cannot go on: what callers are told, and waiting until the last of them is over."""

from __future__ import annotations

import trio

from sandboxd.errors import LaunchError, SandboxError
from sandboxd.supervise.run import Run


class Begun:
    """The runs whose blocks are open, in whatever task."""

    def __init__(self) -> None:
        self._scopes: dict[Run, trio.CancelScope] = {}
        self._one_left = trio.Event()

    def add(self, run: Run, scope: trio.CancelScope) -> None:
        self._scopes[run] = scope

    def remove(self, run: Run) -> None:
        self._scopes.pop(run, None)
        self._one_left.set()

    async def end(self) -> None:
        """End the blocks; who is in one is told when it is left."""
        for run, scope in self._scopes.items():
            run._error = run._error or closed()
            scope.cancel()
        while self._scopes:
            self._one_left = trio.Event()
            await self._one_left.wait()


def closed() -> SandboxError:
    return SandboxError("the runner is closed", hint="use it inside `async with`")


def unforeseen(error: OSError) -> LaunchError:
    """For what nobody nearer to it has told."""
    what = f"carry it out: {error.filename}" if error.filename else "carry it out"
    return LaunchError("run", 0, error.errno or 0, what)


async def drained(slots: trio.CapacityLimiter) -> None:
    """Until nobody has a slot, nor any of those who wait for one now; they are free again then."""
    taken = [object() for _ in range(int(slots.total_tokens))]
    for token in taken:
        await slots.acquire_on_behalf_of(token)
    for token in taken:
        slots.release_on_behalf_of(token)
