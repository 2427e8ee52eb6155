"""One run in progress, as its caller sees it: events, stdin, and the hands on it."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from sandboxd.errors import SandboxError
from sandboxd.job import Job
from sandboxd.result import Artifact, Event, Result, Status, Usage
from sandboxd.supervise.areas import Area
from sandboxd.supervise.leavings import Leavings, OpenArtifacts
from sandboxd.supervise.pipes import resize_terminal
from sandboxd.supervise.stops import Control
from sandboxd.supervise.supervise import Emit, Reports

if TYPE_CHECKING:
    from sandboxd.supervise.porter import Porter

EVENTS_BUFFER = 16
"""Events a reader may lag behind before the job is stalled."""
FASTEST = 0.01
"""Seconds between two looks at what a run uses, at least."""


class Hands:
    """What may be done to a run while it goes on."""

    patient = False
    """Whether a run that lasts a moment only may be told of when it is over."""

    def __init__(self, run_id: str, stdin: trio.abc.SendStream | None = None) -> None:
        self.id = run_id
        self.stdin = stdin
        self._seq = 0
        self._control: Control | None = None
        self._reports: Reports | None = None
        self._cancelled = ""
        """Why it is to end."""
        self._begun = trio.Event()
        self._terminal: int | None = None
        self._limiter: trio.CapacityLimiter | None = None
        """Of its pipeline, which has slots already; None: the runner's."""

    @functools.cached_property
    def _queue(self) -> trio.CancelScope:
        """Of its waiting for a slot."""
        return trio.CancelScope()

    @functools.cached_property
    def _files(self) -> trio.CancelScope:
        """Of the time in which its files are on their way in."""
        return trio.CancelScope()

    def kill(self, why: str = "cancelled by the caller") -> None:
        """End it now; its status will be `cancelled`."""
        self._cancelled = self._cancelled or why
        if self._control is not None:
            self._control.stops.stop("cancelled", self._cancelled)
        else:
            self._queue.cancel()
            self._files.cancel()

    def _stop(self, status: Status, why: str) -> None:
        """End it at a limit that is watched elsewhere."""
        if self._control is not None:
            self._control.stops.stop(status, why)

    def usage(self) -> Usage:
        """What it has used up to now; SandboxError before the program starts and after its end."""
        return self._running().usage()

    async def pause(self) -> None:
        """Freeze the whole run (cgroup.freeze); HostError without a cgroup. Its clocks stop."""
        await self._running().pause()

    def resume(self) -> None:
        """Let it go on."""
        self._running().resume()

    def _running(self) -> Control:
        if self._control is None:
            raise SandboxError("the program has not started yet", hint="wait for its first output")
        return self._control

    def resize(self, rows: int, columns: int) -> None:
        """Tell the job's terminal its new size."""
        if self._terminal is not None:
            resize_terminal(self._terminal, rows, columns)

    def _started(self, control: Control) -> None:
        self._control = control
        self._begun.set()
        if self._cancelled:
            self.kill(self._cancelled)

    async def _forward(self, name: str, data: bytes) -> None:
        try:
            await self._emit(Event(seq=self._seq, type=name, data=data))  # type: ignore[arg-type]
        except trio.BrokenResourceError:  # the reader has gone: so has the reason to run
            self.kill()

    def _at_once(self, name: str, data: bytes) -> bool:
        """What was printed, told without waiting; False if that cannot be."""
        return False

    async def _emit(self, event: Event) -> None:
        raise NotImplementedError

    def _leave(self, leavings: Leavings) -> None:
        raise NotImplementedError


class Followed(Hands):
    """One run whose events are told to `tell`, in turn: while that waits, the job does."""

    patient = True

    def __init__(self, run_id: str, tell: Callable[[Event], Awaitable[None]]) -> None:
        super().__init__(run_id)
        self._tell_event = tell
        self._turn = trio.Lock()

    async def _forward(self, name: str, data: bytes) -> None:
        """Of two streams at once one waits; alone, nobody does."""
        try:
            self._turn.acquire_nowait()
        except trio.WouldBlock:
            await self._turn.acquire()
        try:
            await super()._forward(name, data)
        finally:
            self._turn.release()

    async def _emit(self, event: Event) -> None:
        self._seq += 1
        await self._tell_event(event)


class Run(Hands):
    """One run in progress. Reading `events` is what keeps it going; see Runner.start."""

    def __init__(self, run_id: str, stdin: trio.abc.SendStream | None) -> None:
        super().__init__(run_id, stdin)
        self._send, self.events = trio.open_memory_channel[Event](EVENTS_BUFFER)
        self._done = trio.Event()
        self._result: Result | None = None
        self._error: Exception | None = None
        self._error_told = False
        self._artifacts = OpenArtifacts(self._collected)
        self._leavings: Leavings | None = None

    async def wait(self) -> Result:
        """The result. Someone must read `events` meanwhile: a full channel stalls the job."""
        await self._done.wait()
        if self._error is not None:
            self._error_told = True
            raise self._error
        if self._result is None:
            raise SandboxError("the run was left before it ended", hint="wait inside the block")
        return self._result

    def artifacts(self) -> OpenArtifacts:
        """Each collected file, open, once the run is over (collect_to="stream").

        As with wait(), someone must read `events` until then. What is not read costs nothing.
        """
        return self._artifacts

    def _leave(self, leavings: Leavings) -> None:
        self._artifacts.leavings = self._leavings = leavings

    async def _let_go(self) -> None:
        if self._leavings is not None:
            await self._leavings.close()

    async def _collected(self) -> tuple[Artifact, ...]:
        found = (await self.wait()).artifacts
        if found and self._artifacts.leavings is None:
            raise SandboxError("the artifacts are elsewhere", hint='collect_to="stream" in the job')
        return found

    def _tell(self, usage: Usage) -> None:
        """Nobody waits for a reader who is behind: there will be a newer one."""
        try:
            self._send.send_nowait(Event(seq=self._seq, type="usage", usage=usage))
            self._seq += 1
        except trio.WouldBlock:
            return
        except trio.BrokenResourceError:
            self.kill()

    def _at_once(self, name: str, data: bytes) -> bool:
        event = Event(seq=self._seq, type=name, data=data)  # type: ignore[arg-type]
        try:
            self._send.send_nowait(event)
        except (trio.WouldBlock, trio.BrokenResourceError):
            return False
        self._seq += 1
        return True

    async def _emit(self, event: Event) -> None:
        self._seq += 1
        await self._send.send(event)


def forwarding(run: Hands | None) -> Emit | None:
    """Who gets what is printed as it comes."""
    return run._forward if run is not None else None


def leaving(
    run: Hands | None, job: Job, porter: Callable[[], Awaitable[Porter]]
) -> Callable[[int, Area | None], None] | None:
    """Who collects a run's files later has the working directory and what it lies in."""
    if run is None or job.collect_to != "stream":
        return None

    def leave(directory: int, area: Area | None) -> None:
        remove = area.hand_over() if area is not None else None
        run._leave(Leavings(directory, porter, remove))

    return leave
