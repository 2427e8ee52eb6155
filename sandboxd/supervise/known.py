"""The policies a runner knows: found, tightened, made ready, and in time forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import msgspec
import trio

from sandboxd import plan
from sandboxd.compile import build
from sandboxd.compile.load import tighten
from sandboxd.host import Host, Place
from sandboxd.job import Job
from sandboxd.policy import Policy
from sandboxd.reference import Inputs
from sandboxd.supervise import keeping, policies
from sandboxd.supervise.cgroups import Cgroups
from sandboxd.supervise.homes import Home, Kept
from sandboxd.supervise.seat import Seat
from sandboxd.supervise.seen import host_for
from sandboxd.supervise.tenants import Prepared

_Key = tuple[bytes, bool, Inputs | None, Place | None, Home | None]

MOST = 256
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
        self._recent: dict[tuple[int, bool, Inputs | None], Kept] = {}
        self._homes: dict[tuple[plan.TenantPlan, Home | None], Home] = {}

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
        policy, keep = self.policy(job), bool(job.keep_root)
        if keep:
            keeping.check(job, policy)
        kept = self._recent.get((id(policy), keep, attached)) if seat is None else None
        if kept is not None and not kept.over:
            return kept
        place, ground = (seat.place, seat.ground) if seat is not None else (None, None)
        key = (msgspec.msgpack.encode(policy), keep, attached, place, ground)
        if key not in self._kept:
            self._forget()
            host = dataclasses.replace(host_for(policy, self._host), inputs=attached, place=place)
            prepared = Prepared.of(build.compile_policy(policy, host, keep=keep), host)
            self._kept[key] = Kept(policy, prepared, self._home(prepared, ground))
        kept = self._kept[key]
        if kept.policy is policy and seat is None:  # so that the id stays this policy's
            self._recent[id(policy), keep, attached] = kept
        if attached is not None:
            self._forget_attached()
        return kept

    def _home(self, prepared: Prepared, ground: Home | None) -> Home:
        """The home of its tenant; in the user namespace of `ground`, if it is not that one."""
        tenant = prepared.compiled.tenant
        if ground is not None and ground.is_of(tenant):
            return ground
        if (tenant, ground) not in self._homes:
            if ground is not None:
                prepared = dataclasses.replace(prepared, compiled=build.joined(prepared.compiled))
            home = Home(prepared, self._host, self._cgroups, ground)
            self._homes[tenant, ground] = home
        return self._homes[tenant, ground]

    def _forget(self) -> None:
        """Leave room for another policy: who asks for a new one each time must not fill memory."""
        for key, kept in list(self._kept.items()):
            if len(self._kept) < MOST:
                break
            if not kept.has_some_ahead:
                self._drop(key)

    def _forget_attached(self) -> None:
        """The last sets of references are kept; what was made ahead for an older one goes."""
        attached = [key for key in self._kept if key[2] is not None]
        for key in attached[:-ATTACHED]:
            kept = self._drop(key)
            if kept.has_some_ahead and not kept.refilling:
                self._nursery.start_soon(kept.forget)

    def _drop(self, key: _Key) -> Kept:
        kept = self._kept.pop(key)
        kept.over = True
        self._recent.pop((id(kept.policy), *key[1:3]), None)
        kept.home.kept.remove(kept)
        return kept

    async def close(self) -> None:
        """End what was made ahead, and all tenants."""
        for home in self._homes.values():
            await home.leave()
