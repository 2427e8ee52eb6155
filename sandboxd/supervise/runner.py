"""The Runner: takes jobs, has tenants and sandboxes for them, and gives results."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import msgspec
import trio

from sandboxd.cgroup.leaves import Cgroups, open_cgroups, slots_within
from sandboxd.compile.load import tighten_artifacts
from sandboxd.errors import JobError, LaunchError
from sandboxd.host import Host
from sandboxd.job import Job, Pipe
from sandboxd.linux.descriptors import SCARCE, Descriptors, told
from sandboxd.policy import Policy
from sandboxd.result import Event, Result
from sandboxd.supervise import inputs, record, volumes
from sandboxd.supervise.artifacts import check_place
from sandboxd.supervise.asking import Asking, RunnerStatistics, name_of
from sandboxd.supervise.attend import NO_VIGIL
from sandboxd.supervise.homes import Kept
from sandboxd.supervise.known import Known
from sandboxd.supervise.maker import Maker
from sandboxd.supervise.one_error import one_error
from sandboxd.supervise.pipes import Pipes, open_pipes
from sandboxd.supervise.place import open_place
from sandboxd.supervise.run import FASTEST, Followed, Hands, Run, forwarding, leaving
from sandboxd.supervise.sandboxes import Sandbox
from sandboxd.supervise.seat import Seat
from sandboxd.supervise.seen import host_for
from sandboxd.supervise.supervise import (
    Conduct,
    Dispatch,
    GivenUp,
    Reports,
    supervise,
)
from sandboxd.supervise.undertaker import Undertaker
from sandboxd.supervise.wound_up import Begun, closed, drained, unforeseen

PATIENCE = 20.0
"""Seconds in which the runs of other tasks end when the runner is left."""

if TYPE_CHECKING:
    from sandboxd import plan
    from sandboxd.group import Group
    from sandboxd.supervise import builds, groups, pipeline
    from sandboxd.supervise.netkeeper import UserNetwork


class Runner:
    """Runs jobs on this machine. Made by `open_runner`; may be used by many tasks at once."""

    def __init__(
        self, host: Host, slots: int, spares: int, cgroups: Cgroups | None, nursery: trio.Nursery
    ) -> None:
        self.host = host
        self.slots = slots
        self._cgroups = cgroups
        self._maker = Maker(slots, spares, cgroups)
        self._nursery = nursery
        self._limiter = trio.CapacityLimiter(slots)
        self._grouping = trio.Lock()
        self._closing = trio.CapacityLimiter(2 * slots + 8)
        self._finished = 0
        self._closed = False
        self._begun = Begun()
        self._undertaker = Undertaker(cgroups.tidy if cgroups else lambda: None)
        self._known = Known(host, cgroups, nursery)
        self._building: builds.Building | None = None

    # -- what callers use

    async def run(self, job: Job) -> Result:
        """Carry a job out. What the workload did is in the result; SandboxError is our failure."""
        if job.stdin is None:
            raise JobError("stdin=None: there is nobody to feed it", hint="use Runner.start")
        if job.collect_to == "stream":
            raise JobError('collect_to="stream": there is nobody to read it',
                           hint="use Runner.start")  # fmt: skip
        return await self._run(job, None)

    async def build(self, job: Job, *, salt: bytes = b"") -> builds.Build:
        """Carry a job out unless that was done before with the same inputs, and keep what it left.

        What it collects lies in a store, and its reference is a value of other jobs' `files`. It is
        not removed before the runner is closed, or this many others were built: builds.HELD.
        `salt` is one input more, for what the key does not see. A build that did not end well is a
        Build without a reference, and nothing is kept of it.
        """
        from sandboxd.supervise import builds

        if self._building is None:
            self._building = builds.Building()
        return await builds.build(self, job, self._building, salt)

    def seen(self, job: Job) -> tuple[Policy, Host]:
        """The policy of a job, and the host as that sees it."""
        policy = self._known.policy(job)
        return policy, host_for(policy, self.host)

    async def run_group(
        self, group: Group, *, emit: groups.Emit | None = None
    ) -> dict[str, Result]:
        """Carry jobs out that reach each other; their results by name.

        `emit` gets what happens meanwhile: a member's name and an Event. JobError for a group that
        cannot be; it needs as many slots as it has members. What one member of it could not have
        (SandboxError) ends all of them.
        """
        from sandboxd.supervise import groups

        return await groups.run_group(self, group, emit)

    def start_group(
        self, group: Group, *, usage_every: float | None = None
    ) -> AbstractAsyncContextManager[groups.GroupRun]:
        """The same while the events of all members are read; leaving the block kills what is
        left."""
        from sandboxd.supervise import groups

        return groups.open_group(self, group, usage_every)

    def start(
        self, job: Job, *, usage_every: float | None = None
    ) -> AbstractAsyncContextManager[Run]:
        """Carry a job out while its events are read; leaving the block kills what is left.

        `usage_every`: seconds between two events that say what it has used; None for no such.
        """
        return self._begin(job, usage_every)

    async def run_pipeline(self, jobs: Sequence[Job], pipes: Sequence[Pipe]) -> list[Result]:
        """Carry jobs out at the same time, joined by pipes; their results, in their order."""
        from sandboxd.supervise import pipeline

        return await pipeline.run_pipeline(self, jobs, pipes)

    def start_pipeline(
        self, jobs: Sequence[Job], pipes: Sequence[Pipe], *, usage_every: float | None = None
    ) -> AbstractAsyncContextManager[pipeline.Pipeline]:
        """The same while the events of each are read; leaving the block kills what is left."""
        from sandboxd.supervise import pipeline

        return pipeline.start_pipeline(self, jobs, pipes, usage_every)

    @asynccontextmanager
    async def _begin(
        self,
        job: Job,
        usage_every: float | None,
        seat: Seat | None = None,
        joint: pipeline.Joint | None = None,
    ) -> AsyncIterator[Run]:
        if usage_every is not None and not FASTEST <= usage_every < math.inf:
            raise JobError(f"usage_every={usage_every!r}", hint=f"{FASTEST:g} seconds or more")
        with Descriptors() as fds:
            pipes = Pipes(fds, given=joint.given(fds) if joint else {})
            if not isinstance(job.stdin, bytes) or job.terminal is not None:
                open_pipes(job, pipes)  # else the sandbox is asked for first
            stdin = None
            if pipes.stdin is not None:
                stdin = trio.lowlevel.FdStream(os.dup(pipes.stdin))
                if job.terminal is None:
                    fds.close(pipes.stdin)
            run = Run(job.id or record.new_id(), stdin)
            run._reports = Reports(usage_every, run._tell) if usage_every else None
            run._terminal = pipes.stdin if job.terminal else None
            run._limiter = joint.limiter if joint else None
            try:
                with one_error():
                    async with trio.open_nursery() as nursery:
                        self._begun.add(run, nursery.cancel_scope)
                        nursery.start_soon(self._conduct, job, run, pipes, seat)
                        try:
                            yield run
                        finally:
                            run.events.close()
                            run.kill()
                            nursery.cancel_scope.cancel()
            finally:
                run._terminal = None  # its number may be another's next
                try:
                    await run._let_go()
                finally:
                    self._begun.remove(run)
                if stdin is not None:
                    with trio.CancelScope(shield=True):
                        await stdin.aclose()
            if run._error is not None and not run._error_told:
                raise run._error

    async def follow(self, job: Job, run: Followed) -> Result:
        """Carry a job out in this task; what happens before its end is told to `run`.

        As `start`, for who needs no byte at once: of a run that lasts a moment only all is told at
        its end, so that it costs as little as with `run`. No stdin to feed, and no terminal.
        """
        await run._emit(Event(seq=0, type="start"))
        return await self._run(job, run)

    def plan(self, job: Job) -> plan.Plan:
        """What would be done for a job, without doing it."""
        from sandboxd.supervise.planning import plan_on

        return plan_on(job, self._known.policy(job), self.host).plan

    def policy(self, job: Job) -> Policy:
        """The policy it would run under: found, and tightened by the job's limits."""
        policy = self._known.policy(job)
        tighten_artifacts(policy, job.artifacts)
        return policy

    def shares(self, domain: str) -> str:
        """Why the jobs of a domain (Job.domain) have no ids of their own; "" if they have."""
        return self._known.domains.why_not(domain)

    def never_started(self, job: Job, queued: float) -> Result:
        """The record of a job that its caller cancelled after `queued` seconds of waiting."""
        return self._never_started(job, trio.current_time() - queued)

    def statistics(self) -> RunnerStatistics:
        waiting = self._limiter.statistics()
        return RunnerStatistics(
            slots=self.slots,
            running=waiting.borrowed_tokens,
            waiting=waiting.tasks_waiting,
            finished=self._finished,
            tenants=sum(home.living is not None for home in self._known.homes),
            spares=sum(len(kept.spares) for kept in self._known.all()),
        )

    # -- one run

    async def _conduct(self, job: Job, run: Run, pipes: Pipes, seat: Seat | None) -> None:
        try:
            try:
                await run._emit(Event(seq=0, type="start"))
            except trio.BrokenResourceError:  # the events were closed before anything happened
                run.kill()
            run._result = await self._run(job, run, pipes, seat)
            with suppress(trio.BrokenResourceError):  # nobody reads any more; wait() has it
                await run._emit(Event(seq=run._seq, type="exit", result=run._result))
        except Exception as error:  # told by wait(), or at the end of the block
            run._error = error
        finally:
            run._done.set()
            run._send.close()

    async def _run(
        self, job: Job, run: Hands | None, pipes: Pipes | None = None, seat: Seat | None = None
    ) -> Result:
        if self._closed:
            raise closed()
        asked = trio.current_time()
        check_place(job)
        token = seat or object()
        split = inputs.split(job)
        job, policy = split.job, self._known.policy(job)
        lent = AsyncExitStack() if split.attached or volumes.stored(policy) else None
        if not await self._take_slot(token, run, policy, lent):
            return self._never_started(job, asked, run, seat)
        try:
            if self._closed:
                raise closed()
            queued = trio.current_time() - asked
            attached = lent.enter_context(inputs.held(split.attached)) if lent else None
            kept = self._known.ready(job, attached, seat)
            kept.home.runs += 1
            try:
                with Descriptors() as fds:
                    asking = Asking(job, run, pipes or Pipes(fds), split.attached, lent)
                    result = await self._in_sandbox(kept, asking, (asked, queued), seat)
            except GivenUp:
                return self._never_started(job, asked, run, seat)
            except (OSError, LaunchError) as error:
                raise self._told(error) from error
            finally:
                kept.home.runs -= 1
                self._known.used(kept)
            self._finished += 1
            kept.runs += 1
            if seat is None:
                self._make_ahead(kept)
            return result
        finally:
            self._limiter_of(run).release_on_behalf_of(token)
            if lent is not None:
                await lent.aclose()

    def _make_ahead(self, kept: Kept) -> None:
        if not kept.refilling and self._maker.lacks(kept):
            kept.refilling = True
            self._known.makes_ahead(kept)
            self._nursery.start_soon(self._maker.refill, kept)
        if self._maker.weighs(kept):
            self._nursery.start_soon(self._maker.weigh, kept)

    def _told(self, error: OSError | LaunchError) -> Exception:
        """As the caller is to hear it. Where there were no descriptors, those that are only kept
        are given up."""
        if self._closed:
            return closed()
        if not isinstance(error, OSError):
            return error
        if error.errno not in SCARCE:
            return unforeseen(error)
        if self._cgroups is not None:
            self._cgroups.shrink()
        self._known.end_ahead()
        return told(error, "a run")

    def _never_started(
        self, job: Job, asked: float, run: Hands | None = None, seat: Seat | None = None
    ) -> Result:
        seen, waited = record.never_started(asked, run._cancelled if run is not None else "")
        kept = self._known.ready(job, None, seat)
        return record.make(job, name_of(job, run), kept.kind, seen, self.host, waited)

    def _limiter_of(self, run: Hands | None) -> trio.CapacityLimiter:
        return (run and run._limiter) or self._limiter

    def _is_alone(self) -> bool:
        """Whether there is one run, and a CPU for it beside ours."""
        return self.host.cpus > 1 and self._limiter.borrowed_tokens == 1

    async def _take_slot(
        self, token: object, run: Hands | None, policy: Policy, lent: AsyncExitStack | None
    ) -> bool:
        """After the caches of its policy. False if the run was killed before it got one."""
        limiter = self._limiter_of(run)
        if lent is None and not isinstance(token, Seat):
            with suppress(trio.WouldBlock):
                limiter.acquire_on_behalf_of_nowait(token)
                return True
        with run._queue if run is not None else trio.CancelScope():
            if isinstance(token, Seat):  # it has all that, and those before it may not be ready
                await token.gate()
                return True
            try:
                if lent is not None:
                    await lent.enter_async_context(volumes.lent(policy))
                await limiter.acquire_on_behalf_of(token)
            except BaseException:
                if lent is not None:
                    await lent.aclose()
                raise
            return True
        return False

    async def _in_sandbox(
        self, kept: Kept, asking: Asking, waited: tuple[float, float], seat: Seat | None
    ) -> Result:
        box = await self._take(kept, seat)
        try:  # the kernel makes it meanwhile
            conduct = await self._prepare(kept, asking)
            conduct.dispatch.begin(box.socket)
            if conduct.emit is None:  # else what it prints comes first
                self._undertaker.bury()
            if box.way_out is None:
                seen = await supervise(conduct, box)
            else:
                from sandboxd.supervise.resolver import with_way_out

                with one_error():
                    seen = await with_way_out(conduct, box, box.way_out)
        except BaseException:
            await box.end()
            raise
        leaves_by_itself = box.reported and box.area is None
        keeps = bool(conduct.job.keep_root)
        if not leaves_by_itself and not keeps:
            await box.end()
        name = name_of(asking.job, asking.run)
        result = record.make(asking.job, name, kept.kind, seen, self.host, waited)
        if keeps:
            result = await self._keep_root(kept, conduct.job, result, box)
        elif leaves_by_itself:
            self._undertaker.add(box, at_once=not self._is_alone())
            if box.way_out is not None and seat is None:
                way_out, box.way_out = box.way_out, None
                await self._close_later(way_out)
        self._undertaker.call()
        return result

    async def _keep_root(self, kept: Kept, job: Job, result: Result, box: Sandbox) -> Result:
        from sandboxd.supervise import keeping

        try:
            await box.finish()
            porter = await kept.home.porter()
            found = await keeping.keep(job, result, box, kept.prepared, porter)
        finally:
            await box.end()
        return msgspec.structs.replace(result, kept=found)

    async def _close_later(self, way_out: UserNetwork) -> None:
        """End it while others go on: the kernel takes tens of ms to give an interface up."""
        way_out.kill()

        async def close() -> None:
            await way_out.close()
            self._closing.release_on_behalf_of(way_out)

        with trio.CancelScope(shield=True):  # no longer than one of those that are ending
            await self._closing.acquire_on_behalf_of(way_out)
        self._nursery.start_soon(close)

    async def _take(self, kept: Kept, seat: Seat | None) -> Sandbox:
        """A spare or a new sandbox."""
        if self._is_alone():
            kept.wake()
        await self._undertaker.make_room(self.slots)
        box = await self._maker.spare(kept) or await self._maker.new(kept, seat)
        box.memory_base = kept.memory_base
        return box

    async def _prepare(self, kept: Kept, asking: Asking) -> Conduct:
        """All that a run needs besides its sandbox."""
        job, run, porter = asking.job, asking.run, kept.home.porter
        dispatch = Dispatch(job, kept.prepared, asking.pipes)
        dispatch.prepare()
        conduct = Conduct(
            job=job,
            compiled=kept.prepared.compiled,
            host=self.host,
            dispatch=dispatch,
            caps=tighten_artifacts(kept.policy, job.artifacts),
            porter=porter,
            giving_up=run._files if run and job.files else None,
            leave=leaving(run, job, porter),
            emit=forwarding(run),
            at_once=run._at_once if run else None,
            patient=run is not None and run.patient,
            on_start=run._started if run else lambda _: None,
            reports=run._reports if run else None,
            vigil=kept.vigil if self._is_alone() else NO_VIGIL,
            attached=frozenset(map(os.fsencode, asking.attached)),
        )
        if asking.lent is not None:
            watched = volumes.watched(kept.policy, kept.prepared.host, conduct.on_start)
            conduct.on_start = await asking.lent.enter_async_context(watched)
        return conduct

    async def _end_runs(self) -> None:
        """Those that are still under way in other tasks, and who waits for a slot."""
        self._closed = True
        with trio.CancelScope(shield=True), trio.move_on_after(PATIENCE):
            await self._begun.end()
            if self._limiter.borrowed_tokens:
                await self._known.close()
                await drained(self._limiter)

    async def _close(self) -> None:
        if self._building is not None:
            self._building.close()
        with trio.CancelScope(shield=True):
            await self._undertaker.close()
            await self._known.close()


@asynccontextmanager
async def open_runner(
    *,
    slots: int | None = None,
    spares: int = 0,
    host: Host | None = None,
    cgroup: str | None = None,
) -> AsyncIterator[Runner]:
    """A Runner; leaving the block ends all its runs and everything they had.

    `slots` is how many jobs run at once (default: one a CPU), `spares` how many sandboxes of each
    policy are kept ready, `host` a snapshot to use instead of probing now, `cgroup` a delegated
    cgroup v2 directory to use and no other, or "none". Without it one is looked for (ladder.py).
    HostError if what `cgroup` names cannot be used.
    """
    if slots is not None and slots < 1:
        raise ValueError(f"slots={slots}: at least one job must be able to run")
    with one_error():
        async with open_place(host, cgroup) as here, open_cgroups(here.cgroup) as cgroups:
            room = here.cgroup.room if here.cgroup else None
            slots = slots_within(room, slots, spares, here.cpus)
            async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
                runner = Runner(here, slots, spares, cgroups, nursery)
                nursery.start_soon(runner._undertaker.work)
                # When no task is left that could still make something: a spare, a network.
                stack.push_async_callback(runner._close)
                try:
                    yield runner
                finally:
                    await runner._end_runs()
                    nursery.cancel_scope.cancel()
