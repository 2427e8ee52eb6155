"""What a runner remembers: policies it has seen, made ready, and the places of tenants."""

from __future__ import annotations

from contextlib import AsyncExitStack

import trio

from sandboxd.policy import Policy
from sandboxd.supervise import record
from sandboxd.supervise.areas import Area
from sandboxd.supervise.porter import Porter
from sandboxd.supervise.sandboxes import Sandbox
from sandboxd.supervise.tenants import Prepared, Tenant
from sandboxd.supervise.uppers import Uppers


class Home:
    """A tenant's place: it is started when first needed, and anew when it died."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.tenant: Tenant | None = None
        self.porter: Porter | None = None
        self.uppers: Uppers | None = None
        self.stack = AsyncExitStack()


class Kept:
    """A policy the runner has seen: prepared, with the tenant that serves it while it lives."""

    def __init__(self, policy: Policy, prepared: Prepared, home: Home) -> None:
        self.policy = policy
        self.prepared = prepared
        self.home = home
        self.kind = record.Kind.of(prepared.compiled)
        self.spares: list[Sandbox] = []
        self.ahead: Area | None = None
        """Of the next sandbox, where one needs a sidecar's."""
        self.runs = 0
        self.refilling = False

    async def take_area(self, tenant: Tenant) -> Area | None:
        area, self.ahead = self.ahead, None
        if area is not None and (area.is_lost() or area.tenant is not tenant):
            await area.close()
            return None
        return area

    async def forget(self) -> None:
        """End what was made ahead."""
        while self.spares:
            await self.spares.pop().end()
        area, self.ahead = self.ahead, None
        if area is not None:
            await area.close()
