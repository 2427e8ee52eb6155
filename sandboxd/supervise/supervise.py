"""One run from plan to result.

Theory of operation. A sandbox that is ready gets its exec script and descriptors over its socket.
From then on three things happen at once: the pumps read stdout and stderr, the watcher holds the
counters against the limits, and the main line waits for init's report. The first who finds a
reason to stop says so to `Stops`, which remembers it and asks init to end everything; init kills,
reaps and reports within a moment, or is killed itself. When the pidfd says that the PID namespace
is dead the pipes are at their end, the counters final, and the files nobody's any more.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import msgspec
import trio

from sandboxd.compile.build import Compiled, exec_plan
from sandboxd.errors import LaunchError
from sandboxd.host import Host
from sandboxd.job import Copied, Job, Names
from sandboxd.linux.descriptors import Descriptors, no_room
from sandboxd.messages import FILES, GO, Ended, Failure, StartHeader
from sandboxd.plan import TENANT_UID
from sandboxd.policy import Artifacts
from sandboxd.result import Artifact, ArtifactError, Usage, Violation
from sandboxd.script.init import exec_script
from sandboxd.script.record import Image
from sandboxd.supervise import account, budgets, segments, stream
from sandboxd.supervise.areas import Area
from sandboxd.supervise.artifacts import open_sink
from sandboxd.supervise.attend import GRACE, NO_VIGIL, attend, is_complete, received
from sandboxd.supervise.pipes import Pipes, open_pipes
from sandboxd.supervise.prepared import Prepared, Script
from sandboxd.supervise.sandboxes import Sandbox
from sandboxd.supervise.status import Facts
from sandboxd.supervise.stops import Control, Stops
from sandboxd.supervise.tenants import MESSAGE, failure
from sandboxd.supervise.vigil import LENGTH, Vigil
from sandboxd.supervise.watch import Watcher

if TYPE_CHECKING:
    from sandboxd.supervise.porter import Porter

SCRIPTS_KEPT = 64
SCRIPT_KEPT = 64 << 10
Emit = Callable[[str, bytes], Awaitable[None]]


class Reports(msgspec.Struct, frozen=True):
    """A caller who wants to know, every so many seconds, what the run has used."""

    every: float
    send: Callable[[Usage], None]


class Observed(msgspec.Struct):
    """What one run showed; the Result is made of it."""

    facts: Facts
    captures: dict[str, stream.Capture]
    artifacts: tuple[Artifact, ...]
    started: float
    ended: float
    crowded: bool = False
    """Another run was on the CPUs that it was pinned to."""
    refused: tuple[Violation, ...] = ()
    """Who was not to be reached."""


class Dispatch:
    """A job on its way into a sandbox: its script and descriptors.

    `prepare` comes before the sandbox is asked for; the rest while the zygote makes it.
    """

    def __init__(self, job: Job, prepared: Prepared, pipes: Pipes) -> None:
        self.pipes = pipes
        self._job = job
        self._prepared = prepared
        self._rest = memoryview(b"")
        self._fds: list[int] = []

    def prepare(self) -> None:
        """Make the script, and open the streams."""
        if not self.pipes.job_ends:
            open_pipes(self._job, self.pipes)
        self.plan, self.image, message = self._script()
        self._rest = memoryview(message)
        self._fds = list(self.pipes.job_ends)

    def begin(self, sock: socket.socket) -> None:
        """Send what the socket takes at once."""
        self._push(sock)

    def _script(self) -> Script:
        """What a job of these words gets; the last ones are kept, for they often come again."""
        job, compiled, kept = self._job, self._prepared.compiled, self._prepared.scripts
        inherited = compiled.policy.environment.inherit
        key = (
            *job.argv, None, job.cwd, bool(job.files), bool(job.collect), job.terminal is None,
            *job.env.items(), *(os.environ.get(name) for name in inherited),
        )  # fmt: skip
        made = kept.get(key)
        if made is None:
            steps = exec_plan(job, compiled, os.environb)
            image, script = exec_script(self._prepared.host.arch, steps)
            made = steps, image, StartHeader(len(script)).pack() + script
            if len(script) <= SCRIPT_KEPT:
                if len(kept) >= SCRIPTS_KEPT:
                    kept.clear()
                kept[key] = made
        return made

    def _push(self, sock: socket.socket) -> bool:
        """Whether everything is sent. The descriptors travel with the first byte."""
        while self._rest:
            try:
                sent = socket.send_fds(sock, [self._rest], self._fds)
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                break  # it failed while it was set up: its report says why
            self._fds = []
            self._rest = self._rest[sent:]
        self._rest = memoryview(b"")
        for fd in self.pipes.job_ends:
            self.pipes.fds.close(fd)
        return True

    async def finish(self, sock: socket.socket) -> None:
        """Send the rest, and let go of the job's ends."""
        while not self._push(sock):
            await trio.lowlevel.wait_writable(sock)


class Conduct(msgspec.Struct, kw_only=True):
    """Everything one run needs, so that `supervise` reads as what happens."""

    job: Job
    compiled: Compiled
    host: Host
    dispatch: Dispatch
    caps: Artifacts
    porter: Callable[[], Awaitable[Porter]]
    giving_up: trio.CancelScope | None
    """Cancelled when the run is killed while its files are on their way in."""
    leave: Callable[[int, Area | None], None] | None
    """Gets the working directory and what it lies in when files were collected from there, if
    somebody will read them."""
    emit: Emit | None
    at_once: Callable[[str, bytes], bool] | None
    """As `emit`, but without waiting: whether that was possible."""
    patient: bool
    """Whether what is printed may be told a moment later, if that is cheaper."""
    on_start: Callable[[Control], None]
    reports: Reports | None = None
    vigil: Vigil = NO_VIGIL
    attached: Collection[bytes] = ()
    """What is there by reference, below the working directory."""


class GivenUp(Exception):
    """The run was killed before its program started."""


async def supervise(run: Conduct, box: Sandbox) -> Observed:
    """Carry one job out in a sandbox that is its own."""
    limits = run.compiled.policy.limits
    stops = Stops(box)
    pipes, image = run.dispatch.pipes, run.dispatch.image
    captures = {name: stream.Capture(run.job.keep) for name in pipes.reads}
    budget = stream.Budget(limits.output)
    pumps = [
        stream.Pump(name, fd, captures[name], budget,
                    lambda: stops.stop("output_limit", f"output {limits.output} bytes"))
        for name, fd in pipes.reads.items()
    ]  # fmt: skip
    watcher = Watcher(box, run.compiled, run.host, stops.stop)
    control = Control(box, stops, watcher)
    with Descriptors() as fds:
        await run.dispatch.finish(box.socket)
        directory = await share_files(run, box, image, fds)
        started = trio.current_time()
        watcher.start(started)
        run.on_start(control)
        report, area = await observe(run, box, control, pumps)
        await box.check_served()
        ended, failed = parse_report(report)
        ended = await budgets.at_end(area, ended, limits)
        box.reported = ended is not None
        if not box.reported:
            await box.wait_dead()
        stops.over()
        rest = [(pump.name, data) for pump in pumps for data in pump.drain()]
        ended_at = trio.current_time()
        if run.emit is not None:
            for name, data in rest:
                await run.emit(name, data)
        error = start_error(run, box, image, failed)
        usage = account.usage(box, ended, watcher.seen, watcher.end(ended_at))
        if ended is None and error is None and stops.cause is None and not usage.oom_kills:
            raise LaunchError("sandbox", 0, 0, "its init was killed from outside",
                              hint="by the machine's out-of-memory killer or a person")  # fmt: skip
        artifacts: tuple[Artifact, ...] = ()
        problems: tuple[ArtifactError, ...] = ()
        if directory is not None and run.job.collect and error is None:
            artifacts, problems = await collect(run, directory, box.area)
    facts = Facts(
        ended=ended, usage=usage, output=budget.used, stopped_by=stops.cause, start_error=error,
        artifact_errors=problems, enforcement=run.compiled.enforcement,
        remains=account.remains(box, watcher.seen, usage),
    )  # fmt: skip
    if segments.are_in_question(facts, limits):
        facts = msgspec.structs.replace(facts, segments=segments.of_program(run.job, run.compiled))
    return Observed(facts, captures, artifacts, started, ended_at, box.is_crowded())


async def observe(
    run: Conduct, box: Sandbox, control: Control, pumps: list[stream.Pump]
) -> tuple[bytes, budgets.Budget | None]:
    """init's report; and what was watched meanwhile, if the run writes to a directory."""
    if box.area is None:
        return await attend_run(run, box, control, pumps), None
    limits = run.compiled.policy.limits
    async with budgets.watching(box, limits, control.stops.stop) as area:
        return await attend_run(run, box, control, pumps), area


async def attend_run(
    run: Conduct, box: Sandbox, control: Control, pumps: list[stream.Pump]
) -> bytes:
    if run.emit is None and run.dispatch.pipes.source is None:
        return await attend(box, control.stops, control.watcher, pumps, run.vigil)
    if run.patient and await is_brief(run, box, control):
        report = received(box.socket) or b""
        if is_complete(report):
            return report
        return await attend(box, control.stops, control.watcher, [], begun=report)
    report, unsaid = await attend_awake(run, box, control, pumps)
    if is_complete(report) and not unsaid:
        return report
    return await attend_streams(run, box, control, pumps, report, unsaid)


async def attend_awake(
    run: Conduct, box: Sandbox, control: Control, pumps: list[stream.Pump]
) -> tuple[bytes, dict[str, bytes]]:
    """The beginning of `attend_streams` where somebody looks out for it (supervise/vigil.py).

    What has come of the report, and what was read that could not be passed on at once.
    """
    at_once, report = run.at_once, b""
    if at_once is None or run.dispatch.pipes.source is not None:
        return report, {}
    until = min(control.watcher.due, trio.current_time() + LENGTH)
    while not report:
        heard = [box.socket.fileno(), *(pump.fd for pump in pumps if not pump.over)]
        if not await run.vigil.keep(heard, until):
            break
        unsaid = {}
        for pump in pumps:
            data = pump.look()
            if data and not at_once(pump.name, data):
                unsaid[pump.name] = data
        await trio.lowlevel.checkpoint()  # the reader's turn
        part = received(box.socket)
        if unsaid or part == b"":
            return part or b"", unsaid
        report = part or b""
    return report, {}


async def is_brief(run: Conduct, box: Sandbox, control: Control) -> bool:
    """Whether init reports within GRACE: then all there is to pass on is in the pipes."""
    watcher = control.watcher
    if await run.vigil.keep([box.socket.fileno()], watcher.due):
        return True
    with trio.CancelScope(deadline=min(watcher.due, watcher.started + GRACE)) as scope:
        await trio.lowlevel.wait_readable(box.socket)
    return not scope.cancelled_caught


async def attend_streams(
    run: Conduct,
    box: Sandbox,
    control: Control,
    pumps: list[stream.Pump],
    begun: bytes,
    unsaid: dict[str, bytes],
) -> bytes:
    """The same as `attend` while the caller gets what is printed as it comes."""
    pipes = run.dispatch.pipes
    await box.wait_known()
    async with trio.open_nursery() as streams:
        if pipes.source is not None and pipes.stdin is not None:
            streams.start_soon(stream.feed, pipes.source, pipes.stdin, pipes.fds.close)
        for pump in pumps:
            begin = unsaid.get(pump.name, b"")
            streams.start_soon(stream.forward, pump, run.emit or stream.nowhere, begin)
        living = trio.CancelScope()
        if run.reports is not None:
            streams.start_soon(tell, run.reports, control, living)
        report = await attend(box, control.stops, control.watcher, [], begun=begun)
        living.cancel()
    return report


async def tell(reports: Reports, control: Control, living: trio.CancelScope) -> None:
    """What the run uses, at the rate its caller wants, until it is over."""
    with living:
        due = trio.current_time()
        while True:
            due = max(due + reports.every, trio.current_time())
            await trio.sleep_until(due)
            reports.send(control.usage())


# -- talking to init -------------------------------------------------------------------------


async def share_files(run: Conduct, box: Sandbox, image: Image, fds: Descriptors) -> int | None:
    """The working directory's descriptor, when the job has files to copy in or out."""
    if not (run.job.files or run.job.collect):
        return None
    await trio.lowlevel.wait_readable(box.socket)
    try:
        data, received, _, _ = socket.recv_fds(box.socket, len(FILES), 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:  # it was killed before it read what was sent
        data, received = b"", []
    for fd in received:
        fds.own(fd)
    if data == FILES and not received:
        raise no_room("the files of a job")
    if data != FILES:
        await box.wait_known()
        data += await read_all(box.socket)
        raise setup_failure(run, box, image, data)
    if run.job.files:
        # What is there by reference has been attached.
        files = cast("Names[Copied]", run.job.files)
        giving_up = run.giving_up or trio.CancelScope()
        with giving_up:
            porter = await run.porter()
            await porter.copy_in(received[0], files, owner(box), run.attached)
            await budgets.check_room(box.area, run.compiled.policy.limits)
        if giving_up.cancelled_caught:
            raise GivenUp
        with suppress(BrokenPipeError, ConnectionResetError):  # its end will be noticed
            box.socket.send(GO)
    return received[0]


def owner(box: Sandbox) -> tuple[int, int]:
    """The job's ids inside the tenant, where the porter is."""
    inside = TENANT_UID if box.uid is None else box.uid
    return inside, inside


async def collect(
    run: Conduct, directory: int, area: Area | None
) -> tuple[tuple[Artifact, ...], tuple[ArtifactError, ...]]:
    porter = await run.porter()
    async with open_sink(run.job) as sink:
        found, problems = await porter.collect(directory, run.job.collect, run.caps, sink)
    if run.leave is not None:
        run.leave(directory, area)
    return tuple(found), tuple(problems)


async def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end of a nonblocking socket."""
    parts = []
    while True:
        try:
            data = sock.recv(MESSAGE)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            continue
        except ConnectionResetError:
            break
        if not data:
            break
        parts.append(data)
    return b"".join(parts)


def parse_report(data: bytes) -> tuple[Ended | None, bytes]:
    """init's report, and what came before it: a messages.Failure, or nothing."""
    if not is_complete(data):
        return None, data
    position = len(data) - Ended.FORM.size
    return Ended.unpack(data[position:]), data[:position]


def setup_failure(run: Conduct, box: Sandbox, image: Image, data: bytes) -> LaunchError:
    """What a Failure means: a step of the sandbox's setup, or of the job's own script."""
    if len(data) >= Failure.FORM.size:
        address = Failure.unpack(data[: Failure.FORM.size]).address
        if address >= image.origin:
            return failure(data, image, run.dispatch.plan.steps)
    return failure(data, box.image, run.compiled.setup.steps)


def start_error(run: Conduct, box: Sandbox, image: Image, failed: bytes) -> tuple[int, str] | None:
    """errno and words if the program could not be started; LaunchError if that is our failure."""
    if not failed:
        return None
    error = setup_failure(run, box, image, failed)
    if error.stage == "exec":
        return error.errno, os.fsdecode(os.fsencode(run.job.argv[0]))
    if error.stage == "change_dir":
        return error.errno, f"working directory {os.fsdecode(run.job.cwd or '/box')}"
    raise error
