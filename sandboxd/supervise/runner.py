"""The Runner: takes jobs, has tenants and sandboxes for them, and gives results."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress

import msgspec
import trio

from sandboxd import plan
from sandboxd.compile.load import tighten_artifacts
from sandboxd.errors import InternalError, JobError, LaunchError, SandboxError
from sandboxd.host import Host
from sandboxd.job import Job, Pipe
from sandboxd.policy import Policy
from sandboxd.result import Event, Result
from sandboxd.supervise import builds, inputs, keeping, pipeline, record, volumes
from sandboxd.supervise.areas import Area, open_area
from sandboxd.supervise.artifacts import check_place
from sandboxd.supervise.cgroups import Cgroups, open_cgroups, slots_within
from sandboxd.supervise.descriptors import Descriptors
from sandboxd.supervise.homes import Kept
from sandboxd.supervise.known import Known
from sandboxd.supervise.leavings import Leavings
from sandboxd.supervise.netkeeper import UserNetwork
from sandboxd.supervise.one_error import one_error
from sandboxd.supervise.pipes import Pipes, open_pipes
from sandboxd.supervise.place import open_place
from sandboxd.supervise.planning import plan_on
from sandboxd.supervise.porter import Porter
from sandboxd.supervise.resolver import with_way_out
from sandboxd.supervise.run import FASTEST, Run
from sandboxd.supervise.sandboxes import Sandbox, make
from sandboxd.supervise.seen import host_for
from sandboxd.supervise.supervise import (
    NO_VIGIL,
    Conduct,
    Dispatch,
    GivenUp,
    Reports,
    supervise,
)

UNDERTAKER = 0.02
"""Seconds in which init, having reported, is dead and what it held is given back."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunnerStatistics:
    """Counts since the runner was opened; `running` and `spares` are of this moment."""

    slots: int
    running: int
    waiting: int
    finished: int
    tenants: int
    spares: int


class Runner:
    """Runs jobs on this machine. Made by `open_runner`; may be used by many tasks at once."""

    def __init__(
        self, host: Host, slots: int, spares: int, cgroups: Cgroups | None, nursery: trio.Nursery
    ) -> None:
        self.host = host
        self.slots = slots
        self._spares_wanted = spares
        self._cgroups = cgroups
        self._nursery = nursery
        self._limiter = trio.CapacityLimiter(slots)
        self._grouping = trio.Lock()
        self._closing = trio.CapacityLimiter(2 * slots + 8)
        self._finished = 0
        self._closed = False
        self._dying: list[Sandbox] = []
        self._burying = False
        self._known = Known(host, cgroups, nursery)
        self._building = builds.Building()

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
        return await builds.build(self, job, self._building, salt)

    def seen(self, job: Job) -> tuple[Policy, Host]:
        """The policy of a job, and the host as that sees it."""
        policy = self._known.policy(job)
        return policy, host_for(policy, self.host)

    def start(
        self, job: Job, *, usage_every: float | None = None
    ) -> AbstractAsyncContextManager[Run]:
        """Carry a job out while its events are read; leaving the block kills what is left.

        `usage_every`: seconds between two events that say what it has used; None for no such.
        """
        return self._start(job, usage_every, None)

    async def run_pipeline(self, jobs: Sequence[Job], pipes: Sequence[Pipe]) -> list[Result]:
        """Carry jobs out at the same time, joined by pipes (pipeline.py); results in their order."""
        return await pipeline.run_pipeline(self, jobs, pipes)

    def start_pipeline(
        self, jobs: Sequence[Job], pipes: Sequence[Pipe], *, usage_every: float | None = None
    ) -> AbstractAsyncContextManager[pipeline.Pipeline]:
        """The same while the events of each are read; leaving the block kills what is left."""
        return pipeline.start_pipeline(self, jobs, pipes, usage_every)

    @asynccontextmanager
    async def _start(
        self, job: Job, usage_every: float | None, joint: pipeline.Joint | None
    ) -> AsyncIterator[Run]:
        if usage_every is not None and not FASTEST <= usage_every < math.inf:
            raise JobError(f"usage_every={usage_every!r}", hint=f"{FASTEST:g} seconds or more")
        with Descriptors() as fds:
            pipes = open_pipes(job, Pipes(fds, given=joint.given(fds) if joint else {}))
            stdin = None
            if pipes.stdin is not None:
                stdin = trio.lowlevel.FdStream(os.dup(pipes.stdin))
                if job.terminal is None:
                    fds.close(pipes.stdin)
            run = Run(job.id or record.new_id(), stdin)
            run._reports = Reports(usage_every, run._tell) if usage_every else None
            run._terminal = pipes.stdin if job.terminal else None
            run._limiter = joint.limiter if joint else None
            job = dataclasses.replace(job, id=run.id)
            try:
                with one_error():
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._conduct, job, run, pipes)
                        try:
                            yield run
                        finally:
                            run.events.close()
                            run.kill()
                            nursery.cancel_scope.cancel()
            finally:
                await run._let_go()
                if stdin is not None:
                    with trio.CancelScope(shield=True):
                        await stdin.aclose()
            if run._error is not None and not run._error_told:
                raise run._error

    def plan(self, job: Job) -> plan.Plan:
        """What would be done for a job, without doing it."""
        return plan_on(job, self._known.policy(job), self.host).plan

    def policy(self, job: Job) -> Policy:
        """The policy it would run under: found, and tightened by the job's limits."""
        return self._known.policy(job)

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

    async def _conduct(self, job: Job, run: Run, pipes: Pipes) -> None:
        try:
            try:
                await run._emit(Event(seq=0, type="start"))
            except trio.BrokenResourceError:  # the events were closed before anything happened
                run.kill()
            run._result = await self._run(job, run, pipes)
            with suppress(trio.BrokenResourceError):  # nobody reads any more; wait() has it
                await run._emit(Event(seq=run._seq, type="exit", result=run._result))
        except Exception as error:  # told by wait(), or at the end of the block
            run._error = error
        finally:
            run._done.set()
            run._send.close()

    async def _run(self, job: Job, run: Run | None, pipes: Pipes | None = None) -> Result:
        if self._closed:
            raise SandboxError("the runner is closed", hint="use it inside `async with`")
        asked = trio.current_time()
        check_place(job)
        token = object()
        split = inputs.split(job)
        job, policy = split.job, self._known.policy(job)
        lent = AsyncExitStack() if split.attached or volumes.stored(policy) else None
        if not await self._take_slot(token, run, policy, lent):
            return self._never_started(job, asked)
        try:
            queued = trio.current_time() - asked
            attached = lent.enter_context(inputs.held(split.attached)) if lent else None
            with Descriptors() as fds:
                kept = self._known.ready(job, attached)
                caps = tighten_artifacts(kept.policy, job.artifacts)
                porter = kept.home.porter
                conduct = Conduct(
                    job=job,
                    compiled=kept.prepared.compiled,
                    host=self.host,
                    dispatch=Dispatch(job, kept.prepared, pipes or Pipes(fds)),
                    caps=caps,
                    porter=porter,
                    giving_up=run._files if run else trio.CancelScope(),
                    leave=_leaving(run, job, porter),
                    emit=run._forward if run else None,
                    on_start=run._started if run else lambda _: None,
                    reports=run._reports if run else None,
                    vigil=kept.vigil if self._is_alone() else NO_VIGIL,
                    attached=frozenset(map(os.fsencode, split.attached)),
                )
                if lent is not None:
                    host, started = kept.prepared.host, conduct.on_start
                    watched = volumes.watched(kept.policy, host, started)
                    conduct.on_start = await lent.enter_async_context(watched)
                try:
                    result = await self._in_sandbox(kept, conduct, (asked, queued))
                except GivenUp:
                    return self._never_started(job, asked)
            self._finished += 1
            kept.runs += 1
            if not kept.refilling and self._lacks(kept):
                kept.refilling = True
                self._nursery.start_soon(self._refill, kept)
            return result
        finally:
            self._limiter_of(run).release_on_behalf_of(token)
            if lent is not None:
                await lent.aclose()

    def _never_started(self, job: Job, asked: float) -> Result:
        seen, waited = record.never_started(asked)
        return record.make(job, self._known.ready(job).kind, seen, self.host, waited)

    def _limiter_of(self, run: Run | None) -> trio.CapacityLimiter:
        return (run and run._limiter) or self._limiter

    def _is_alone(self) -> bool:
        """Whether there is one run, and a CPU for it beside ours."""
        return self.host.cpus > 1 and self._limiter.borrowed_tokens == 1

    async def _take_slot(
        self, token: object, run: Run | None, policy: Policy, lent: AsyncExitStack | None
    ) -> bool:
        """After the caches of its policy. False if the run was killed before it got one."""
        limiter = self._limiter_of(run)
        if lent is None:
            with suppress(trio.WouldBlock):
                limiter.acquire_on_behalf_of_nowait(token)
                return True
        with run._queue if run is not None else trio.CancelScope():
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
        self, kept: Kept, conduct: Conduct, waited: tuple[float, float]
    ) -> Result:
        box = await self._take(kept, conduct.dispatch)
        try:
            if box.way_out is None:
                seen = await supervise(conduct, box)
            else:
                with one_error():
                    seen = await with_way_out(conduct, box, box.way_out)
        except BaseException:
            await box.end()
            raise
        leaves_by_itself = box.reported and box.area is None
        keeps = bool(conduct.job.keep_root)
        if not leaves_by_itself and not keeps:
            await box.end()
        result = record.make(conduct.job, kept.kind, seen, self.host, waited)
        if keeps:
            result = await self._keep_root(kept, conduct.job, result, box)
        elif leaves_by_itself:
            box.socket.close()  # which init waits for: its end is the kernel's work, and not ours
            self._dying.append(box)
            if box.way_out is not None:
                way_out, box.way_out = box.way_out, None
                await self._close_later(way_out)
        if not self._burying:
            self._burying = True
            self._nursery.start_soon(self._undertaker)
        return result

    async def _keep_root(self, kept: Kept, job: Job, result: Result, box: Sandbox) -> Result:
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

    async def _take(self, kept: Kept, dispatch: Dispatch) -> Sandbox:
        """A spare or a new sandbox, with the job on its way into it."""
        dispatch.prepare()
        self._bury()  # what they had is used again
        while len(self._dying) > self.slots:
            await self._dying.pop(0).end()
        box = await self._spare(kept) or await self._new(kept)
        try:
            dispatch.begin(box.socket)
        except BaseException:
            await box.end()
            raise
        return box

    def _bury(self) -> None:
        if self._dying:
            self._dying = [box for box in self._dying if not box.is_gone()]

    async def _undertaker(self) -> None:
        """Once in a while for all of them: a task for each would cost more than its run."""
        self._burying = True
        while self._burying:
            await trio.sleep(UNDERTAKER)
            self._bury()
            if self._cgroups is not None:
                self._cgroups.tidy()
            self._burying = bool(self._dying)

    async def _spare(self, kept: Kept) -> Sandbox | None:
        while kept.spares:
            box = kept.spares.pop()
            if not box.is_dead() and not (box.area and box.area.is_lost()):
                return box
            await box.end()  # it died with its tenant
        return None

    async def _new(self, kept: Kept) -> Sandbox:
        """Made now; a tenant that has died is started anew, once."""
        for attempt in range(2):
            try:
                return await self._make(kept)
            except LaunchError as error:
                if error.stage != "tenant" or attempt:
                    raise
        raise InternalError("unreachable")

    async def _make(self, kept: Kept) -> Sandbox:
        tenant, uppers = await kept.home.tenant(), await kept.uppers()
        area, way_out = await kept.take_area(tenant), None
        try:
            if (egress := kept.prepared.compiled.egress) is not None:
                way_out = await (await kept.home.netkeeper()).take(egress)
        except BaseException:
            if area is not None:
                await area.close()
            raise
        return await make(tenant, kept.prepared, self._cgroups, uppers, area, way_out)

    def _lacks(self, kept: Kept) -> bool:
        """Whether there is something to make ahead."""
        if kept.over:
            return False
        egress = kept.prepared.compiled.egress
        if egress is not None and egress.published:
            return False  # a port of the host's cannot be held ahead
        if len(kept.spares) < self._spares_wanted:
            return True
        if self._lacks_area(kept):
            return True
        if egress is not None:
            keeper = kept.home.living_netkeeper
            return keeper is not None and keeper.ahead(egress) < self.slots
        tenant = kept.home.living
        again = kept.prepared.compiled.network_serves_again
        return tenant is not None and not again and tenant.networks_ahead < self.slots

    def _lacks_area(self, kept: Kept) -> bool:
        """A sidecar takes long to start; but who runs one job only does not need another."""
        wanted = kept.runs > 1 and not self._spares_wanted and kept.ahead is None
        return wanted and "area" in kept.prepared.compiled.setup.descriptors

    async def _refill(self, kept: Kept) -> None:
        """Make what a policy lacks of spares and networks: after a job, not while one starts."""
        try:
            compiled = kept.prepared.compiled
            if compiled.egress is not None:
                await (await kept.home.netkeeper()).refill(compiled.egress, self.slots)
            elif not compiled.network_serves_again:
                await (await kept.home.tenant()).refill_networks(self.slots)
            if self._lacks_area(kept):
                tenant = await kept.home.tenant()
                kept.ahead = await open_area(tenant, kept.prepared, await kept.uppers())
            while len(kept.spares) < self._spares_wanted and not kept.over:
                box = await self._make(kept)
                kept.spares.append(box)
                await box.wait_known()
        except SandboxError:
            return  # the next job meets the same error, and can tell somebody
        finally:
            kept.refilling = False
            if kept.over:
                await kept.forget()

    async def _close(self) -> None:
        self._building.close()
        with trio.CancelScope(shield=True):
            while self._dying:
                await self._dying.pop().end()
            await self._known.close()


def _leaving(
    run: Run | None, job: Job, porter: Callable[[], Awaitable[Porter]]
) -> Callable[[int, Area | None], None] | None:
    """Who collects a run's files later has the working directory and what it lies in."""
    if run is None or job.collect_to != "stream":
        return None

    def leave(directory: int, area: Area | None) -> None:
        remove = area.hand_over() if area is not None else None
        run._leave(Leavings(directory, porter, remove))

    return leave


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
                # When no task is left that could still make something: a spare, a network.
                stack.push_async_callback(runner._close)
                try:
                    yield runner
                finally:
                    runner._closed = True
                    nursery.cancel_scope.cancel()
