"""What lasts longer than a run: policies made ready, tenants, and what serves their sandboxes.

Everything is started when it is first needed, and anew when it has died.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import trio

from sandboxd.cgroup.leaves import Cgroups
from sandboxd.errors import LaunchError
from sandboxd.host import Host
from sandboxd.linux.descriptors import Descriptors
from sandboxd.plan import TenantPlan
from sandboxd.policy import Policy
from sandboxd.supervise import record, volumes
from sandboxd.supervise.areas import Area
from sandboxd.supervise.prepared import Prepared
from sandboxd.supervise.sandboxes import Sandbox
from sandboxd.supervise.tenants import Tenant, open_tenant
from sandboxd.supervise.vigil import Vigil

if TYPE_CHECKING:
    from sandboxd.supervise.netkeeper import Netkeeper
    from sandboxd.supervise.porter import Porter
    from sandboxd.supervise.uppers import Uppers


class Home:
    """A tenant's place. Policies whose tenants have equal plans share one."""

    def __init__(
        self, prepared: Prepared, host: Host, cgroups: Cgroups | None, ground: Home | None = None
    ) -> None:
        self.ground = ground
        """Whose tenant's user namespace this one's shares: they are members of one group."""
        self._beside: Tenant | None = None
        self.living: Tenant | None = None
        self.living_netkeeper: Netkeeper | None = None
        self.kept: list[Kept] = []
        self.runs = 0
        """Of this moment."""
        self.used = 0.0
        """When the last of them ended, by trio's clock."""
        self.over = False
        """Nothing more is started in it."""
        self._prepared = prepared
        self._host = host
        self._cgroups = cgroups
        self._porter: Porter | None = None
        self._uppers: Uppers | None = None
        self._lock = trio.Lock()
        self._stack = AsyncExitStack()
        self._carrying = AsyncExitStack()
        """The netkeeper, within that."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """As by a run: meanwhile nobody ends it because it is idle."""
        self.runs += 1
        try:
            yield
        finally:
            self.runs -= 1

    async def tenant(self) -> Tenant:
        """The tenant; LaunchError or HostError if it cannot be started."""
        beside = await self.ground.tenant() if self.ground is not None else None
        if self._lives(beside):
            assert self.living is not None
            return self.living
        async with self._lock:
            if self.over:
                raise LaunchError("tenant", 0, 0, "nobody is to be started any more",
                                  hint="the runner was closed")  # fmt: skip
            if self.living is not None and not self._lives(beside):
                await self._leave()
            if self.living is None:
                self._beside = beside
                try:
                    self.living = await self._open()
                except BaseException:
                    await self._leave()  # of what it was to use, too, or each attempt adds to that
                    raise
            return self.living

    def _lives(self, beside: Tenant | None) -> bool:
        return self.living is not None and not self.living.dead and self._beside is beside

    def is_of(self, tenant: TenantPlan) -> bool:
        """Whether this is the tenant that is had here."""
        return self._prepared.compiled.tenant == tenant

    async def _open(self) -> Tenant:
        compiled = self._prepared.compiled
        if (image := self._prepared.host.image) is not None:
            from sandboxd.images.store import using

            self._stack.enter_context(using(image))
        self._stack.enter_context(volumes.using(compiled.policy, self._host))
        opened = open_tenant(compiled, self._host, self._cgroups, self._beside)
        tenant = await self._stack.enter_async_context(opened)
        self._carrying = await self._stack.enter_async_context(AsyncExitStack())
        return tenant

    @asynccontextmanager
    async def _with_tenant(self) -> AsyncIterator[Tenant]:
        """The tenant, while nobody else starts or ends anything here."""
        while True:
            tenant = await self.tenant()
            async with self._lock:
                if tenant is self.living:  # and has not ended while we waited
                    yield tenant
                    return

    async def porter(self) -> Porter:
        """The process that carries files for this tenant's sandboxes."""
        async with self._with_tenant() as tenant:
            if self._porter is None:
                self._porter = await self._open_porter(tenant)
            return self._porter

    async def uppers(self) -> Uppers:
        """Where the directories are that this tenant's sandboxes write to."""
        async with self._with_tenant() as tenant:
            if self._uppers is None:
                from sandboxd.supervise.uppers import open_uppers

                with Descriptors() as fds:
                    opened = open_uppers(_namespace(tenant, fds), tenant.compiled.tenant.ids)
                    self._uppers = await self._stack.enter_async_context(opened)
            return self._uppers

    async def netkeeper(self) -> Netkeeper:
        """What makes networks with a way out for this tenant."""
        async with self._with_tenant() as tenant:
            if self.living_netkeeper is None or self.living_netkeeper.dead:
                from sandboxd.supervise.netkeeper import open_netkeeper

                await self._carrying.aclose()  # what it had made ahead is of no use any more
                with Descriptors() as fds:
                    opened = open_netkeeper(_namespace(tenant, fds))
                    self.living_netkeeper = await self._carrying.enter_async_context(opened)
            return self.living_netkeeper

    async def _open_porter(self, tenant: Tenant) -> Porter:
        from sandboxd.supervise.porter import open_porter

        with Descriptors() as fds:
            opened = open_porter(_namespace(tenant, fds))
            return await self._stack.enter_async_context(opened)

    async def retire(self) -> None:
        """End all of it if nobody uses it; who comes later gets a new one."""
        async with self._lock:
            if self.runs or self.living is None:
                return
            stack, self._stack = self._stack, AsyncExitStack()
            self.living = self.living_netkeeper = self._porter = self._uppers = None
            boxes = [box for kept in self.kept for box in kept.spares]
            for kept in self.kept:
                kept.spares.clear()  # before anything is waited for: who comes takes no dying one
            with trio.CancelScope(shield=True):
                for box in boxes:
                    await box.end()
                for kept in self.kept:
                    await kept.forget()
                await stack.aclose()

    async def close(self) -> None:
        """End all of it for good: who asks for its tenant gets a LaunchError."""
        self.over = True
        await self.leave()

    async def leave(self) -> None:
        """End all of it; who comes later gets a new one."""
        with trio.CancelScope(shield=True):
            async with self._lock:
                await self._leave()

    async def _leave(self) -> None:
        with trio.CancelScope(shield=True):
            for kept in self.kept:
                await kept.forget()
            await self._stack.aclose()
        self.living = self.living_netkeeper = self._porter = self._uppers = None
        self._stack = AsyncExitStack()


def _namespace(tenant: Tenant, fds: Descriptors) -> int:
    return fds.own(os.open(tenant.user_namespace(), os.O_RDONLY | os.O_CLOEXEC))


class Kept:
    """A policy the runner has seen: prepared, with the home of the tenant that serves it."""

    def __init__(self, policy: Policy, prepared: Prepared, home: Home) -> None:
        self.policy = policy
        self.prepared = prepared
        self.home = home
        self.kind = record.Kind.of(prepared.compiled)
        self.used = trio.current_time()
        """When the last run of it ended, or else it was made."""
        self.spares: list[Sandbox] = []
        self.ahead: Area | None = None
        """Of the next sandbox, where one needs a sidecar's."""
        self.runs = 0
        self.refilling = False
        self.vigil = Vigil()
        self.memory_base: int | None = None
        self.weighed = False
        """Whether that was looked for (supervise/floor.py)."""
        self.over = False
        """Nothing more is made ahead for it."""
        home.kept.append(self)

    @property
    def has_some_ahead(self) -> bool:
        """Whether something was made ahead, or is being made."""
        return bool(self.spares or self.ahead or self.refilling)

    def wake(self) -> None:
        """A sandbox will be asked for in a moment, if there is no spare."""
        tenant = self.home.living
        if tenant is not None and not self.spares and not tenant.dead:
            tenant.ring()

    async def uppers(self) -> Uppers | None:
        """Where the directories are that its sandboxes write to, if they write to some."""
        return await self.home.uppers() if self.policy.root.upper == "directory" else None

    async def take_area(self, tenant: Tenant) -> Area | None:
        area, self.ahead = self.ahead, None
        if area is not None and (area.is_lost() or area.tenant is not tenant):
            await area.close()
            return None
        return area

    async def forget(self) -> None:
        """End what was made ahead."""
        with trio.CancelScope(shield=True):
            while self.spares:
                await self.spares.pop().end()
            area, self.ahead = self.ahead, None
            if area is not None:
                await area.close()
