"""The policies a runner knows: found, tightened, made ready, and in time forgotten."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AsyncExitStack

import msgspec
import trio

from sandboxd import plan
from sandboxd.cgroup.leaves import Cgroups
from sandboxd.compile import build
from sandboxd.compile.load import tighten
from sandboxd.host import Host, Place
from sandboxd.job import Job
from sandboxd.policy import Policy
from sandboxd.reference import Inputs
from sandboxd.supervise import policies, volumes
from sandboxd.supervise.domains import Domains
from sandboxd.supervise.homes import Home, Kept
from sandboxd.supervise.prepared import Prepared
from sandboxd.supervise.seat import Seat
from sandboxd.supervise.seen import host_for

_Key = tuple[bytes, bool, Inputs | None, str | None, Place | None, Home | None]

MOST = 256
MOST_LIVING = 64
"""Tenants that live while nobody uses them."""
MOST_AHEAD = 32
"""Policies that have something made ahead."""
ATTACHED = 32
"""Sets of references whose sandboxes are made ready once, and have spares."""


class Known:
    """Policies made ready, and the homes of their tenants. Equal ones are one."""

    def __init__(self, host: Host, cgroups: Cgroups | None, nursery: trio.Nursery) -> None:
        self._host = host
        self._cgroups = cgroups
        self._nursery = nursery
        self._found: dict[str, Policy] = {}
        self._kept: dict[_Key, Kept] = {}
        self._recent: dict[tuple[int, bool, Inputs | None, str | None], Kept] = {}
        self._homes: dict[tuple[plan.TenantPlan, str | None, Home | None], Home] = {}
        self._ahead: dict[Kept, None] = {}
        """Those for which something was made ahead, the last one last."""
        self.domains = Domains(host)

    @property
    def homes(self) -> Iterable[Home]:
        return self._homes.values()

    def all(self) -> Iterable[Kept]:
        return self._kept.values()

    def policy(self, job: Job) -> Policy:
        """The policy a job runs under: found, and tightened by the job's limits."""
        policy = job.policy
        if isinstance(policy, str):
            if policy not in self._found:
                self._found[policy] = policies.find(policy)
            policy = self._found[policy]
        return tighten(policy, job.limits) if job.limits is not None else policy

    def ready(self, job: Job, attached: Inputs | None = None, seat: Seat | None = None) -> Kept:
        """A job's policy, made ready for sandboxes in which these inputs are attached, and that
        have this seat in a group."""
        policy, keep, domain = self.policy(job), bool(job.keep_root), job.domain
        if keep:
            from sandboxd.supervise import keeping

            keeping.check(job, policy)
        recent = (id(policy), keep, attached, domain)
        kept = self._recent.get(recent) if seat is None else None
        if kept is not None and not kept.over:
            return kept
        place, ground = (seat.place, seat.ground) if seat is not None else (None, None)
        key = (msgspec.msgpack.encode(policy), keep, attached, domain, place, ground)
        if key not in self._kept:
            prepared = self._prepare(job, policy, attached, place)
            self._kept[key] = Kept(policy, prepared, self._home(prepared, domain, ground))
            self._forget()
        kept = self._kept[key]
        if kept.policy is policy and seat is None:  # so that the id stays this policy's
            self._recent[recent] = kept
        if attached is not None:
            self._forget_attached()
        return kept

    def _home(self, prepared: Prepared, domain: str | None, ground: Home | None) -> Home:
        """The home of its tenant; in the user namespace of `ground`, if it is not that one."""
        tenant = prepared.compiled.tenant
        if ground is not None and ground.is_of(tenant):
            return ground
        where = (tenant, domain, ground)
        if where not in self._homes:
            if ground is not None:
                prepared = msgspec.structs.replace(
                    prepared, compiled=build.joined(prepared.compiled)
                )
            self._homes[where] = Home(prepared, self._host, self._cgroups, ground)
        return self._homes[where]

    def _prepare(
        self, job: Job, policy: Policy, attached: Inputs | None, place: Place | None
    ) -> Prepared:
        keep = bool(job.keep_root)
        host = msgspec.structs.replace(host_for(policy, self._host), inputs=attached, place=place)
        why = ""
        if job.domain is not None:
            whole = keep or host.image is not None or bool(volumes.stored(policy))
            host, why = self.domains.host(job.domain, host, whole=whole)
        compiled = build.compile_policy(policy, host, keep=keep)
        if why:
            noted = (*compiled.degraded, ("tenant", why))
            compiled = msgspec.structs.replace(compiled, degraded=noted)
        return Prepared.of(compiled, host)

    def used(self, kept: Kept) -> None:
        """A run of its is over; where too many tenants live, one that nobody uses need not."""
        home = kept.home
        kept.used = home.used = trio.current_time()
        if len(self._homes) <= MOST_LIVING:
            return
        living = [one for one in self._homes.values() if one.living is not None]
        idle = [one for one in living if not one.runs]
        if len(living) > MOST_LIVING and idle:
            self._nursery.start_soon(min(idle, key=lambda one: one.used).retire)

    def makes_ahead(self, kept: Kept) -> None:
        """Something will be made ahead for it; what was for those used long ago goes."""
        self._ahead.pop(kept, None)
        self._ahead[kept] = None
        for old in list(self._ahead)[:-MOST_AHEAD]:
            if not old.refilling:
                del self._ahead[old]
                self._end_ahead(old)

    def end_ahead(self) -> None:
        """All that was made ahead, in a moment: it has descriptors that are needed."""
        for kept in self._ahead:
            self._end_ahead(kept)

    def _end_ahead(self, kept: Kept) -> None:
        if kept.has_some_ahead and not kept.refilling:
            self._nursery.start_soon(kept.forget)

    def _forget(self) -> None:
        """Who asks for a new policy each time must not fill memory: those used long ago go."""
        while len(self._kept) > MOST:
            oldest = min(self._kept, key=lambda key: self._kept[key].used)
            self._end_ahead(self._drop(oldest))
        for where, home in list(self._homes.items()):
            if not home.kept and not home.runs:
                home.over = True
                del self._homes[where]
                self._nursery.start_soon(home.close)

    def _forget_attached(self) -> None:
        """The last sets of references are kept; what was made ahead for an older one goes."""
        attached = [key for key in self._kept if key[2] is not None]
        for key in attached[:-ATTACHED]:
            self._end_ahead(self._drop(key))

    def _drop(self, key: _Key) -> Kept:
        kept = self._kept.pop(key)
        kept.over = True
        self._recent.pop((id(kept.policy), *key[1:4]), None)
        self._ahead.pop(kept, None)
        kept.home.kept.remove(kept)
        return kept

    async def close(self) -> None:
        """End what was made ahead, and all tenants, for good."""
        async with AsyncExitStack() as stack:  # each, whatever becomes of the others
            for home in self._homes.values():
                stack.push_async_callback(home.close)
