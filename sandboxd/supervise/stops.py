"""The hands on a running sandbox: why it was stopped, pausing it, and asking what it uses."""

from __future__ import annotations

import math

import trio

from sandboxd.errors import HostError, SandboxError
from sandboxd.linux.descriptors import told
from sandboxd.result import Status, Usage
from sandboxd.supervise import account
from sandboxd.supervise.sandboxes import PATIENCE, Sandbox
from sandboxd.supervise.watch import Watcher

FREEZE_TIMEOUT = 2.0
FREEZE_LOOK = 0.001


class Stops:
    """Why a run was stopped: the first cause wins and is remembered."""

    def __init__(self, box: Sandbox) -> None:
        self.cause: tuple[Status, str] | None = None
        self.insist_at = math.inf
        """When init gets killed that was asked to stop and has not."""
        self.waiting: trio.CancelScope | None = None
        self.dead = False
        self._box = box

    def stop(self, status: Status, why: str) -> None:
        if self.cause is None and not self.dead:
            self.cause = (status, why)
            self._box.ask_to_stop()
            self.look_again(trio.current_time() + PATIENCE)

    def look_again(self, when: float) -> None:
        """Whoever waits for the run does so no longer than that."""
        if self.cause is not None:
            self.insist_at = when
        if self.waiting is not None:
            self.waiting.deadline = min(self.waiting.deadline, when)

    def insist(self, now: float) -> None:
        """Kill it if it was asked to stop and has not."""
        if now >= self.insist_at:
            self.insist_at = math.inf
            self._box.kill()

    def over(self) -> None:
        """The run is dead: nothing more to stop, and nobody to insist."""
        self.dead = True
        self.insist_at = math.inf


class Control:
    """What the caller may do with a run that has started."""

    def __init__(self, box: Sandbox, stops: Stops, watcher: Watcher) -> None:
        self.stops = stops
        self._box = box
        self.watcher = watcher

    def usage(self) -> Usage:
        """What it has used up to now. SandboxError once it is over."""
        if self.stops.dead:
            raise SandboxError("the run is over", hint="its usage is in the result")
        return account.live(
            self._box, self.watcher.seen, self.watcher.wall_time(trio.current_time())
        )

    async def pause(self) -> None:
        """Freeze every process of the run; it returns when all of them stand still."""
        leaf = self._box.leaf
        if leaf is None:
            raise HostError("cgroup", "a run can be paused in a cgroup only",
                            hint="`sandboxd doctor` says how to get one delegated")  # fmt: skip
        if self.stops.dead or self.stops.cause is not None:
            raise SandboxError("the run is over", hint="it can be paused while it goes on")
        try:
            self._box.freeze()
            leaf.is_frozen()
        except OSError as error:
            self.resume()
            raise told(error, "pause a run") from error
        self.watcher.pause(trio.current_time())
        with trio.move_on_after(FREEZE_TIMEOUT):
            # In a moment: a process that is in an uninterruptible sleep freezes when it wakes.
            while not (  # noqa: ASYNC110  told by POLLPRI alone, which trio does not wait for
                leaf.is_frozen() or self.stops.dead or not self._box.frozen
            ):
                await trio.sleep(FREEZE_LOOK)

    def resume(self) -> None:
        """Let it go on; nothing happens to one that was not paused."""
        if self._box.frozen:
            self._box.thaw()
            now = trio.current_time()
            self.watcher.resume(now)
            self.stops.look_again(now)
