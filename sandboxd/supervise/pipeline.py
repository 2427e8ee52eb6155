"""Jobs that run at the same time, joined by pipes: an interactive problem and who plays it.

Theory of operation. A pipe is one of the kernel's between two sandboxes, and nobody of ours in
between: what is written there costs what a pipe costs, and its end is seen when the last writer has
closed it. A relayed one is two pipes with a task here that carries from one to the other. It goes
on reading when the reader has gone, so that the writer is not ended by SIGPIPE, and closes the
second pipe when the first is at its end. A held one it does not close then: so whoever has the
pipeline knows how the writer ended before the reader can know that it did, and what the reader did
without knowing.

A pipeline takes as many slots as it has jobs, or all there are: pipelines take theirs one after the
other, so no two of them wait for what the other has. Its jobs then wait for nobody.
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import trio

from sandboxd.errors import JobError
from sandboxd.job import Job, Pipe
from sandboxd.linux.descriptors import Descriptors
from sandboxd.result import Result
from sandboxd.supervise.one_error import one_error
from sandboxd.supervise.run import Run
from sandboxd.supervise.stream import CHUNK, Capture

if TYPE_CHECKING:
    from sandboxd.supervise.runner import Runner

MOST = 16
"""Jobs of a pipeline."""


@dataclass(frozen=True, slots=True)
class Joint:
    """What a job has of its pipeline: a slot, and the ends of its pipes."""

    limiter: trio.CapacityLimiter
    ends: dict[str, int] = field(default_factory=dict)
    """Name of the stream -> the job's end, which is the pipeline's own."""

    def given(self, fds: Descriptors) -> dict[str, int]:
        """The ends once more, for `fds` to own."""
        return {name: fds.own(os.dup(fd)) for name, fd in self.ends.items()}


class Pipeline:
    """Jobs in progress. Made by `start_pipeline`; `runs` are in the order of the jobs."""

    def __init__(self, runs: Sequence[Run], relays: Mapping[int, _Relay]) -> None:
        self.runs = tuple(runs)
        self._relays = relays
        """By the number of the pipe."""

    def kill(self) -> None:
        """End all of them now; their status will be `cancelled`."""
        for run in self.runs:
            run.kill()

    async def wait(self) -> list[Result]:
        """The results, with what was relayed. Someone must read the events of each meanwhile."""
        return [await self.result(number) for number in range(len(self.runs))]

    async def result(self, number: int) -> Result:
        """The result of one of them. Someone must read its events meanwhile."""
        result = await self.runs[number].wait()
        for relay in self._relays.values():
            if relay.pipe.writer == number:
                await relay.done.wait()
                streams = {**result.streams, relay.pipe.stream: relay.capture.output()}
                result = msgspec.structs.replace(result, streams=streams)
        return result

    async def wait_end(self, number: int) -> None:
        """Until relayed pipe `number` is at its end, and all of it is carried."""
        await self._relays[number].done.wait()

    def pass_end(self, number: int) -> None:
        """Let the reader of held pipe `number` see its end, when it comes or now if it came."""
        self._relays[number].let_go()

    def unread(self, number: int) -> int:
        """Bytes carried through relayed pipe `number` that its reader has not yet read."""
        return self._relays[number].unread()


async def run_pipeline(runner: Runner, jobs: Sequence[Job], pipes: Sequence[Pipe]) -> list[Result]:
    """See Runner.run_pipeline."""
    async with start_pipeline(runner, jobs, pipes, None) as joined:
        with one_error():
            async with trio.open_nursery() as readers:
                for run in joined.runs:
                    readers.start_soon(_ignore, run)
        return await joined.wait()


async def _ignore(run: Run) -> None:
    """Read what keeps a run going; an error of one ends the others."""
    async for _ in run.events:
        pass
    await run.wait()


@asynccontextmanager
async def start_pipeline(
    runner: Runner, jobs: Sequence[Job], pipes: Sequence[Pipe], usage_every: float | None
) -> AsyncIterator[Pipeline]:
    """See Runner.start_pipeline."""
    check(jobs, pipes)
    with one_error(), Descriptors() as ours:
        async with _slots(runner, len(jobs)), trio.open_nursery() as nursery:
            limiter = trio.CapacityLimiter(len(jobs))
            joints = [Joint(limiter) for _ in jobs]
            async with AsyncExitStack() as stack:
                with Descriptors() as theirs:
                    relays = dict(_join(jobs, pipes, joints, (ours, theirs)))
                    runs = [
                        await stack.enter_async_context(
                            runner._begin(job, usage_every, joint=joint)
                        )
                        for job, joint in zip(jobs, joints, strict=True)
                    ]
                for relay in relays.values():
                    nursery.start_soon(relay.carry, runs[relay.pipe.writer])
                yield Pipeline(runs, relays)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def _slots(runner: Runner, count: int) -> AsyncIterator[None]:
    limiter, held = runner._limiter, list[object]()
    try:
        async with runner._grouping:
            for _ in range(min(count, runner.slots)):
                token = object()
                await limiter.acquire_on_behalf_of(token)
                held.append(token)
        yield
    finally:
        for token in held:
            limiter.release_on_behalf_of(token)


# -- what is joined --------------------------------------------------------------------------


def check(jobs: Sequence[Job], pipes: Sequence[Pipe]) -> None:
    """JobError if these jobs cannot be joined so."""
    if not 1 <= len(jobs) <= MOST:
        raise JobError(f"a pipeline of {len(jobs)} jobs", hint=f"1 to {MOST}")
    for number, job in enumerate(jobs):
        if job.collect_to == "stream":
            raise JobError(f'jobs[{number}]: collect_to="stream" in a pipeline',
                           hint="collect into memory or a directory")  # fmt: skip
    ends: Counter[tuple[int, str]] = Counter()
    for number, pipe in enumerate(pipes):
        _check_pipe(f"pipes[{number}]", jobs, pipe)
        ends.update([(pipe.writer, pipe.stream), (pipe.reader, "stdin")])
    for (index, stream), count in ends.items():
        if count > 1:
            raise JobError(f"pipes: {stream} of job {index} is joined {count} times", hint="once")


def _check_pipe(where: str, jobs: Sequence[Job], pipe: Pipe) -> None:
    for index in (pipe.writer, pipe.reader):
        if not 0 <= index < len(jobs):
            raise JobError(f"{where}: there is no job {index}", hint="the first is 0")
        if jobs[index].terminal is not None:
            raise JobError(f"{where}: job {index} has a terminal", hint="leave it out")
    if jobs[pipe.reader].stdin != b"":
        raise JobError(f"{where}: job {pipe.reader} has a stdin", hint="leave it out")
    if not pipe.relay and (pipe.hold or pipe.limit is not None):
        raise JobError(f"{where}: it is the kernel's own", hint="limit and hold need relay=True")


def _join(
    jobs: Sequence[Job],
    pipes: Sequence[Pipe],
    joints: Sequence[Joint],
    owners: tuple[Descriptors, Descriptors],
) -> Iterator[tuple[int, _Relay]]:
    """Make the pipes; what is to be relayed. `owners`: of our ends, and of the jobs'."""
    ours, theirs = owners
    for number, pipe in enumerate(pipes):
        source, target = os.pipe2(os.O_CLOEXEC)
        joints[pipe.writer].ends[pipe.stream] = theirs.own(target)
        if not pipe.relay:
            joints[pipe.reader].ends["stdin"] = theirs.own(source)
            continue
        ours.own(source)
        last, next_target = os.pipe2(os.O_CLOEXEC)
        joints[pipe.reader].ends["stdin"] = theirs.own(last)
        ours.own(next_target)
        for fd in (source, next_target):
            os.set_blocking(fd, False)
        yield number, _Relay(pipe, source, next_target, ours, Capture(jobs[pipe.writer].keep))


@dataclass(slots=True)
class _Relay:
    """From one pipe into the other, to the first one's end."""

    pipe: Pipe
    source: int
    target: int
    owner: Descriptors
    capture: Capture
    done: trio.Event = field(default_factory=trio.Event)
    _deaf: bool = False
    """The reader has gone, or is to get no more."""
    _free: bool = False
    """The reader of a held pipe may see its end."""

    async def carry(self, writer: Run) -> None:
        limit = self.pipe.limit
        while True:
            try:
                data = os.read(self.source, CHUNK)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.source)
                continue
            if not data:
                break
            self.capture.add(data)
            if limit is not None and self.capture.count > limit:
                writer._stop("output_limit", f"output {limit} bytes")
                self._deaf = True
            await self._pass_on(memoryview(data))
        self.done.set()
        if self._free or not self.pipe.hold:
            self.owner.close(self.target)

    def let_go(self) -> None:
        self._free = True
        if self.done.is_set():
            self.owner.close(self.target)

    def unread(self) -> int:
        """FIONREAD of a pipe (pipe(7)): what is in it. 0 when it is closed."""
        if self.done.is_set() and (self._free or not self.pipe.hold):
            return 0
        (count,) = struct.unpack("i", fcntl.ioctl(self.target, termios.FIONREAD, bytes(4)))
        return int(count)

    async def _pass_on(self, data: memoryview) -> None:
        """All of it, or nothing any more."""
        while data and not self._deaf:
            try:
                data = data[os.write(self.target, data) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.target)
            except BrokenPipeError:
                self._deaf = True
