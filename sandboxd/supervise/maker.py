"""Sandboxes for the jobs of one runner: made now, taken from those made ahead, or made ahead."""

from __future__ import annotations

import msgspec

from sandboxd.cgroup.leaves import Cgroups, has_room_for_one_more
from sandboxd.errors import InternalError, LaunchError, SandboxError
from sandboxd.supervise.areas import open_area
from sandboxd.supervise.homes import Kept
from sandboxd.supervise.sandboxes import Sandbox, make
from sandboxd.supervise.seat import Seat


class Maker:
    """`slots`: how many networks are kept ready; `spares`: how many sandboxes of each policy."""

    def __init__(self, slots: int, spares: int, cgroups: Cgroups | None) -> None:
        self._slots = slots
        self._spares = spares
        self._cgroups = cgroups

    async def spare(self, kept: Kept) -> Sandbox | None:
        while kept.spares:
            box = kept.spares.pop()
            if not (box.is_dead() or box.is_forsaken()):
                return box
            await box.end()  # it died with its tenant, or what serves it did
        return None

    async def new(self, kept: Kept, seat: Seat | None) -> Sandbox:
        """Made now; a tenant that has died is started anew, once."""
        for attempt in range(2):
            try:
                return await self._make(kept, seat)
            except LaunchError as error:
                if error.stage != "tenant" or attempt or seat is not None:
                    raise
        raise InternalError("unreachable")

    async def _make(self, kept: Kept, seat: Seat | None = None) -> Sandbox:
        tenant, uppers = await kept.home.tenant(), await kept.uppers()
        area, way_out = await kept.take_area(tenant), None
        try:
            if seat is not None:
                way_out = seat.network
            elif (egress := kept.prepared.compiled.egress) is not None:
                way_out = await (await kept.home.netkeeper()).take(egress)
        except BaseException:
            if area is not None:
                await area.close()
            raise
        return await make(tenant, kept.prepared, self._cgroups, uppers, area, way_out)

    def lacks(self, kept: Kept) -> bool:
        """Whether there is something to make ahead."""
        if kept.over:
            return False
        egress = kept.prepared.compiled.egress
        if egress is not None and egress.published:
            return False  # a port of the host's cannot be held ahead
        if len(kept.spares) < self._spares:
            return True
        if kept.runs < 2:  # who runs one job only needs no second network
            return False
        if self._lacks_area(kept):
            return True
        if egress is not None:
            keeper = kept.home.living_netkeeper
            return keeper is not None and keeper.ahead(egress) < self._slots
        tenant = kept.home.living
        again = kept.prepared.compiled.network_serves_again
        return tenant is not None and not again and tenant.networks_ahead < self._slots

    def _lacks_area(self, kept: Kept) -> bool:
        """A sidecar takes long to start."""
        wanted = kept.runs > 1 and not self._spares and kept.ahead is None
        return wanted and "area" in kept.prepared.compiled.setup.descriptors

    async def refill(self, kept: Kept) -> None:
        """Make what a policy lacks of spares and networks: after a job, not while one starts."""
        try:
            compiled = kept.prepared.compiled
            if compiled.egress is not None:
                await (await kept.home.netkeeper()).refill(compiled.egress, self._slots)
            elif not compiled.network_serves_again:
                await (await kept.home.tenant()).refill_networks(self._slots)
            if self._lacks_area(kept):
                tenant = await kept.home.tenant()
                kept.ahead = await open_area(tenant, kept.prepared, await kept.uppers())
            while len(kept.spares) < self._spares and not kept.over:
                box = await self._make(kept)
                kept.spares.append(box)
                await box.wait_known()
        except (SandboxError, OSError):
            return  # the next job meets the same error, and can tell somebody
        finally:
            kept.refilling = False
            if kept.over:
                await kept.forget()

    def weighs(self, kept: Kept) -> bool:
        """Whether to find out what its runs hold before their programs do anything."""
        if kept.weighed or kept.runs < 2:  # who runs one job only need not wait for it
            return False
        kept.weighed = True
        if self._cgroups is None:
            return False
        from sandboxd.supervise import floor

        if not floor.applies(kept.prepared):
            return False
        return has_room_for_one_more(self._cgroups.subtree.room, self._slots, self._spares)

    async def weigh(self, kept: Kept) -> None:
        """Find out what a run of a policy holds whose program does nothing."""
        from sandboxd.supervise import floor

        kept.home.runs += 1
        try:
            tenant = await kept.home.tenant()
            if tenant.networks_ahead:  # those are for jobs
                await tenant.refill_networks(tenant.networks_ahead + 1)
            # It is on nobody's cores: a run that has some for itself keeps them.
            compiled = msgspec.structs.replace(kept.prepared.compiled, cpu_sets=())
            prepared = msgspec.structs.replace(kept.prepared, compiled=compiled)
            box = await make(tenant, prepared, self._cgroups, None)
            try:
                kept.memory_base = await floor.measure(box, prepared)
            finally:
                await box.end()
        except (SandboxError, OSError):
            return  # it is not known, then
        finally:
            kept.home.runs -= 1
