"""Who hung up? One task looks out for all connections whose callers wait for something."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio


class Lookout:
    """Calls who asked for it when the other side of a socket closes, or shuts down for writing.

    What the other side sends meanwhile stays in the socket, which holds so much and no more.
    """

    def __init__(self) -> None:
        self._ears = select.epoll()
        self._calls: dict[int, Callable[[], None]] = {}

    @contextmanager
    def watching(self, handle: int | None, call: Callable[[], None]) -> Iterator[None]:
        """Meanwhile; where there is no socket, nobody hangs up."""
        if handle is None:
            yield
            return
        self.watch(handle, call)
        try:
            yield
        finally:
            self.forget(handle)

    def watch(self, handle: int, call: Callable[[], None]) -> None:
        """Once, until `forget`; in a moment if it happened before. EPOLLRDHUP of epoll_ctl(2)."""
        self._ears.register(handle, select.EPOLLRDHUP | select.EPOLLONESHOT)
        self._calls[handle] = call

    def forget(self, handle: int) -> None:
        del self._calls[handle]
        self._ears.unregister(handle)

    async def work(self) -> None:
        """The task."""
        while True:
            await trio.lowlevel.wait_readable(self._ears.fileno())
            for handle, _ in self._ears.poll(0):
                self._calls[handle]()

    def close(self) -> None:
        """When nobody looks out any more."""
        self._ears.close()
