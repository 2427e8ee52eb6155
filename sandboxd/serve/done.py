"""An event for who waits for two things at once: a task of its own for one of them costs more."""

from __future__ import annotations

import trio


class Done:
    """Whether something has happened, for those who wait for that and something else at once."""

    __slots__ = ("_set", "_waits")

    def __init__(self) -> None:
        self._set = False
        self._waits: list[trio.CancelScope] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        for scope in self._waits:
            scope.cancel()

    def until(self) -> trio.CancelScope:
        """A scope that is cancelled when it happens, to be entered at once."""
        scope = trio.CancelScope()
        self._waits.append(scope)
        if self._set:
            scope.cancel()
        return scope

    async def wait(self) -> None:
        """Returns when it has happened."""
        scope = self.until()
        try:
            with scope:
                await trio.sleep_forever()
        finally:
            self.forget(scope)

    def forget(self, scope: trio.CancelScope) -> None:
        """Nobody waits there any more."""
        self._waits.remove(scope)
