"""What comes after a run: its init ends, and what the sandbox had borrowed is given back.

Theory of operation. An init that has reported waits until its socket is closed, and is then taken
apart by the kernel, for a tenth of a millisecond or more, on a CPU that somebody may wait for. So
nobody waits for that; and of a run that was the only one the socket is closed by a task of its own,
when the caller has the result and waits for something else.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from sandboxd.supervise.sandboxes import Sandbox

PAUSE = 0.02
"""Seconds in which init, having reported, is dead and what it held is given back."""


class Undertaker:
    """`tidy` is called now and then while there are runs, and after the last."""

    def __init__(self, tidy: Callable[[], None]) -> None:
        self._tidy = tidy
        self._dying: list[Sandbox] = []
        self._called = trio.Event()
        self.is_busy = False
        """Whether something is still to be given back."""

    def add(self, box: Sandbox, *, at_once: bool) -> None:
        """One that has reported; `at_once`: its init may go before the caller has the result."""
        self._dying.append(box)
        if at_once:
            box.socket.close()
        else:
            self._called.set()

    def call(self) -> None:
        """A run is over."""
        if not self.is_busy:
            self.is_busy = True
            self._called.set()

    def bury(self) -> None:
        """What those had who are dead by now is used again."""
        if self._dying:
            self._dying = [box for box in self._dying if not box.is_gone()]

    async def make_room(self, most: int) -> None:
        """No more than so many have something of ours."""
        if len(self._dying) > most:
            self.bury()
        while len(self._dying) > most:
            await self._dying.pop(0).end()

    async def work(self) -> None:
        """One task for all of them: one for each would cost more than its run."""
        while True:
            await self._called.wait()
            due = trio.current_time() + PAUSE
            while trio.current_time() < due:
                self._called = trio.Event()
                for box in self._dying:
                    box.socket.close()
                with trio.CancelScope(deadline=due):
                    await self._called.wait()
            self.bury()
            self._tidy()
            self.is_busy = bool(self._dying)
            if self.is_busy:
                self._called.set()

    async def close(self) -> None:
        """End those that are left."""
        while self._dying:
            await self._dying.pop().end()
