"""The Runner: takes jobs, has tenants and sandboxes for them, and gives results."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import msgspec
import trio

from sandboxd import plan
from sandboxd.compile import build
from sandboxd.compile.load import tighten
from sandboxd.errors import InternalError, JobError, LaunchError, SandboxError
from sandboxd.host import Host
from sandboxd.images.store import using
from sandboxd.job import Job
from sandboxd.policy import Policy
from sandboxd.reference import Inputs
from sandboxd.result import Event, Result
from sandboxd.supervise import builds, inputs, policies, record, volumes
from sandboxd.supervise.cgroups import Cgroups, open_cgroups, slots_within
from sandboxd.supervise.descriptors import Descriptors
from sandboxd.supervise.one_error import one_error
from sandboxd.supervise.place import open_place
from sandboxd.supervise.planning import plan_on
from sandboxd.supervise.porter import Porter, open_porter
from sandboxd.supervise.run import FASTEST, Run
from sandboxd.supervise.sandboxes import Sandbox, make
from sandboxd.supervise.seen import host_for
from sandboxd.supervise.supervise import (
    Conduct,
    Dispatch,
    Emit,
    Pipes,
    Reports,
    open_pipes,
    supervise,
)
from sandboxd.supervise.tenants import Prepared, Tenant, open_tenant

POLICIES_KEPT = 256
ATTACHED_KEPT = 32
"""Sets of references whose sandboxes are made ready once, and have spares."""
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


class Home:
    """A tenant's place: it is started when first needed, and anew when it died."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.tenant: Tenant | None = None
        self.porter: Porter | None = None
        self.stack = AsyncExitStack()


class Kept:
    """A policy the runner has seen: prepared, with the tenant that serves it while it lives."""

    def __init__(self, policy: Policy, prepared: Prepared, home: Home) -> None:
        self.policy = policy
        self.prepared = prepared
        self.home = home
        self.kind = record.Kind.of(prepared.compiled)
        self.spares: list[Sandbox] = []
        self.refilling = False
        self.over = False
        """Nothing more is made ahead for it."""


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
        self._finished = 0
        self._closed = False
        self._dying: list[Sandbox] = []
        self._burying = False
        self._found: dict[str, Policy] = {}
        self._kept: dict[tuple[bytes, Inputs | None], Kept] = {}
        self._recent: dict[tuple[int, Inputs | None], Kept] = {}
        self._homes: dict[plan.TenantPlan, Home] = {}
        self._building = builds.Building()

    # -- what callers use

    async def run(self, job: Job) -> Result:
        """Carry a job out. What the workload did is in the result; SandboxError is our failure."""
        if job.stdin is None:
            raise JobError("stdin=None: there is nobody to feed it", hint="use Runner.start")
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
        policy = self._policy(job)
        return policy, host_for(policy, self.host)

    @asynccontextmanager
    async def start(self, job: Job, *, usage_every: float | None = None) -> AsyncIterator[Run]:
        """Carry a job out while its events are read; leaving the block kills what is left.

        `usage_every`: seconds between two events that say what it has used; None for no such.
        """
        if usage_every is not None and not FASTEST <= usage_every < math.inf:
            raise JobError(f"usage_every={usage_every!r}", hint=f"{FASTEST:g} seconds or more")
        with Descriptors() as fds:
            pipes = open_pipes(job, Pipes(fds))
            stdin = None
            if pipes.stdin is not None:
                stdin = trio.lowlevel.FdStream(os.dup(pipes.stdin))
                if job.terminal is None:
                    fds.close(pipes.stdin)
            run = Run(job.id or record.new_id(), stdin)
            run._reports = Reports(usage_every, run._tell) if usage_every else None
            run._terminal = pipes.stdin if job.terminal else None
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
                if stdin is not None:
                    with trio.CancelScope(shield=True):
                        await stdin.aclose()
            if run._error is not None and not run._error_told:
                raise run._error

    def plan(self, job: Job) -> plan.Plan:
        """What would be done for a job, without doing it."""
        return plan_on(job, self._policy(job), self.host).plan

    def statistics(self) -> RunnerStatistics:
        waiting = self._limiter.statistics()
        return RunnerStatistics(
            slots=self.slots,
            running=waiting.borrowed_tokens,
            waiting=waiting.tasks_waiting,
            finished=self._finished,
            tenants=sum(home.tenant is not None for home in self._homes.values()),
            spares=sum(len(kept.spares) for kept in self._kept.values()),
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
        token = object()
        split = inputs.split(job)
        job = split.job
        lent = AsyncExitStack()
        if not await self._take_slot(token, run, self._policy(job), lent):
            kept = self._keep(self._policy(job))
            seen, waited = record.never_started(asked)
            return record.make(job, kept.kind, seen, self.host, waited)
        try:
            queued = trio.current_time() - asked
            with inputs.held(split.attached) as attached, Descriptors() as fds:
                kept = self._keep(self._policy(job), attached)
                conduct = Conduct(
                    job=job,
                    compiled=kept.prepared.compiled,
                    host=self.host,
                    dispatch=Dispatch(job, kept.prepared, pipes or Pipes(fds)),
                    porter=lambda: self._porter(kept),
                    emit=_forwarding(run),
                    on_start=run._started if run else lambda _: None,
                    reports=run._reports if run else None,
                )
                async with volumes.watched(kept.policy, kept.prepared.host, conduct.on_start) as on:
                    conduct.on_start = on
                    result = await self._in_sandbox(kept, conduct, (asked, queued))
            self._finished += 1
            if not kept.refilling and self._lacks(kept):
                kept.refilling = True
                self._nursery.start_soon(self._refill, kept)
            return result
        finally:
            self._limiter.release_on_behalf_of(token)
            await lent.aclose()

    async def _take_slot(
        self, token: object, run: Run | None, policy: Policy, lent: AsyncExitStack
    ) -> bool:
        """After the caches of its policy. False if the run was killed before it got one."""
        if not volumes.stored(policy):
            with suppress(trio.WouldBlock):
                self._limiter.acquire_on_behalf_of_nowait(token)
                return True
        with run._queue if run is not None else trio.CancelScope():
            try:
                await lent.enter_async_context(volumes.lent(policy))
                await self._limiter.acquire_on_behalf_of(token)
            except BaseException:
                await lent.aclose()
                raise
            return True
        return False

    async def _in_sandbox(
        self, kept: Kept, conduct: Conduct, waited: tuple[float, float]
    ) -> Result:
        box = await self._take(kept, conduct.dispatch)
        try:
            seen = await supervise(conduct, box)
        except BaseException:
            await box.end()
            raise
        leaves_by_itself = box.reported and box.fuse is None
        if not leaves_by_itself:
            await box.end()
        result = record.make(conduct.job, kept.kind, seen, self.host, waited)
        if leaves_by_itself:
            box.socket.close()  # which init waits for: its end is the kernel's work, and not ours
            self._dying.append(box)
        if not self._burying:
            self._burying = True
            self._nursery.start_soon(self._undertaker)
        return result

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
            if not box.is_dead():
                return box
            await box.end()  # it died with its tenant
        return None

    async def _new(self, kept: Kept) -> Sandbox:
        """Made now; a tenant that has died is started anew, once."""
        for attempt in range(2):
            tenant = await self._tenant(kept)
            try:
                return await make(tenant, kept.prepared, self._cgroups)
            except LaunchError as error:
                if error.stage != "tenant" or attempt:
                    raise
        raise InternalError("unreachable")

    def _lacks(self, kept: Kept) -> bool:
        """Whether there is something to make ahead."""
        if kept.over:
            return False
        if len(kept.spares) < self._spares_wanted:
            return True
        tenant = kept.home.tenant
        again = kept.prepared.compiled.network_serves_again
        return tenant is not None and not again and tenant.networks_ahead < self.slots

    async def _refill(self, kept: Kept) -> None:
        """Make what a policy lacks of spares and networks: after a job, not while one starts."""
        try:
            tenant = await self._tenant(kept)
            if not kept.prepared.compiled.network_serves_again:
                await tenant.refill_networks(self.slots)
            while len(kept.spares) < self._spares_wanted and not kept.over:
                tenant = await self._tenant(kept)
                box = await make(tenant, kept.prepared, self._cgroups)
                kept.spares.append(box)
                await box.wait_known()
        except SandboxError:
            return  # the next job meets the same error, and can tell somebody
        finally:
            kept.refilling = False
            if kept.over:
                await self._let_go(kept)

    async def _let_go(self, kept: Kept) -> None:
        """End what was made ahead for references that others have followed."""
        with trio.CancelScope(shield=True):
            while kept.spares:
                await kept.spares.pop().end()

    # -- what lasts longer than a run

    def _policy(self, job: Job) -> Policy:
        policy = job.policy
        if isinstance(policy, str):
            if policy not in self._found:
                self._found[policy] = policies.find(policy)
            policy = self._found[policy]
        return tighten(policy, job.limits) if job.limits is not None else policy

    def _keep(self, policy: Policy, attached: Inputs | None = None) -> Kept:
        """The policy made ready; equal policies are one, and so are tenants of equal plans."""
        kept = self._recent.get((id(policy), attached))
        if kept is not None and not kept.over:
            return kept
        key = (msgspec.msgpack.encode(policy), attached)
        if key not in self._kept:
            host = dataclasses.replace(host_for(policy, self.host), inputs=attached)
            prepared = Prepared.of(build.compile_policy(policy, host), host)
            home = self._homes.setdefault(prepared.compiled.tenant, Home())
            self._kept[key] = Kept(policy, prepared, home)
        kept = self._kept[key]
        if kept.policy is policy:  # so that the id stays this policy's
            self._recent[id(policy), attached] = kept
        if attached is not None:
            self._forget()
        return kept

    def _forget(self) -> None:
        """The last sets of references are kept; what was made ahead for an older one goes."""
        attached = [one for one in self._kept if one[1] is not None]
        for one in attached[:-ATTACHED_KEPT]:
            kept = self._kept.pop(one)
            kept.over = True
            self._recent.pop((id(kept.policy), one[1]), None)
            if kept.spares and not kept.refilling:
                self._nursery.start_soon(self._let_go, kept)

    async def _tenant(self, kept: Kept) -> Tenant:
        home = kept.home
        if home.tenant is not None and not home.tenant.dead:
            return home.tenant
        async with home.lock:
            if home.tenant is not None and home.tenant.dead:
                await self._leave(home)
            if home.tenant is None:
                if (image := kept.prepared.host.image) is not None:
                    home.stack.enter_context(using(image))
                home.stack.enter_context(volumes.using(kept.policy, self.host))
                opened = open_tenant(kept.prepared.compiled, self.host, self._cgroups)
                home.tenant = await home.stack.enter_async_context(opened)
            return home.tenant

    async def _porter(self, kept: Kept) -> Porter:
        """The process that carries files for this tenant's sandboxes; started when first needed."""
        tenant = await self._tenant(kept)
        home = kept.home
        async with home.lock:
            if home.porter is None:
                with Descriptors() as fds:
                    path = tenant.user_namespace()
                    namespace = fds.own(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                    opened = open_porter(namespace)
                    home.porter = await home.stack.enter_async_context(opened)
            return home.porter

    async def _leave(self, home: Home) -> None:
        with trio.CancelScope(shield=True):
            await home.stack.aclose()
        home.tenant = home.porter = None
        home.stack = AsyncExitStack()

    async def _close(self) -> None:
        self._building.close()
        with trio.CancelScope(shield=True):
            while self._dying:
                await self._dying.pop().end()
            for kept in self._kept.values():
                while kept.spares:
                    await kept.spares.pop().end()
            for home in self._homes.values():
                await self._leave(home)


def _forwarding(run: Run | None) -> Emit | None:
    return run._forward if run is not None else None


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
