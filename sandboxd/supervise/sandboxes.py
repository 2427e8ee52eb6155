"""One sandbox: a process tree in namespaces of its own, used by one job, once.

Whoever holds a Sandbox owns its init (by pidfd), its socket, its uid, network namespace and
cgroup. Ending it kills first, and gives back what may be used again only when the pidfd says that
init, and with it the whole PID namespace, is dead.
"""

from __future__ import annotations

import select
import signal
import socket
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

import msgspec
import trio

from sandboxd.cgroup.leaf import Leaf
from sandboxd.cgroup.leaves import Cgroups
from sandboxd.errors import LaunchError
from sandboxd.messages import SIGNAL_STOP
from sandboxd.plan import TENANT_UID
from sandboxd.script.record import Image
from sandboxd.supervise.areas import Area, open_area
from sandboxd.supervise.prepared import Prepared, sandbox_script
from sandboxd.supervise.tenants import Clone, Tenant

if TYPE_CHECKING:
    from sandboxd.supervise.netkeeper import UserNetwork
    from sandboxd.supervise.uppers import Uppers

PATIENCE = 0.25
"""Seconds init gets to reap what it killed and to report, before it is killed as well."""
DEAD_TIMEOUT = 10.0


class Sandbox(msgspec.Struct):
    """A live sandbox, ready for its job or running it."""

    tenant: Tenant
    clone: Clone
    socket: socket.socket
    image: Image
    uid: int | None
    network: int | None
    """Of the tenant's, lent; None with a way out, which has one of its own."""
    leaf: Leaf | None
    cgroups: Cgroups | None
    area: Area | None = None
    way_out: UserNetwork | None = None
    signals: list[int] = msgspec.field(default_factory=list)
    """What it is to get as soon as its pidfd is known."""
    ended: bool = False
    dead: bool = False
    reported: bool = False
    """Its init has told everything and is about to exit; nothing else is alive in there."""
    network_serves_again: bool = False
    frozen: bool = False
    memory_base: int | None = None
    """What a run of its policy holds whose program does nothing, once that is known (floor.py)."""

    def signal(self, number: int) -> None:
        if self.ended:  # the number may be somebody else's by now
            return
        if self.clone.pidfd < 0:
            self.tenant.hear()
        if self.clone.pidfd < 0:
            self.signals.append(number)
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.clone.pidfd, number)

    async def wait_known(self) -> None:
        """Until its init can be signalled, which then gets the signals it was to get before."""
        await self.clone.wait()
        while self.signals:
            self.signal(self.signals.pop(0))

    def ask_to_stop(self) -> None:
        """init kills everything, reaps, and reports what it was."""
        self.thaw()
        self.signal(SIGNAL_STOP)

    def freeze(self) -> None:
        """Stop all of it, init too, until it is thawed or killed; it needs a leaf."""
        if self.leaf is not None and not self.ended:
            self.leaf.freeze(frozen=True)
            self.frozen = True

    def is_crowded(self) -> bool:
        """Whether it is pinned to CPUs that another run is on, too."""
        if self.leaf is None or self.cgroups is None or not self.leaf.cpus:
            return False
        return self.cgroups.shares(self.leaf)

    def thaw(self) -> None:
        if self.frozen and self.leaf is not None:
            self.frozen = False
            self.leaf.freeze(frozen=False)

    def kill(self) -> None:
        """Everything at once, without a report: the kernel ends the PID namespace with init."""
        self.thaw()
        if self.area is not None and self.is_served:
            self.area.kill()  # who waits for it cannot be killed before
        self.signal(signal.SIGKILL)
        if self.leaf is not None:
            self.leaf.kill()

    @property
    def is_served(self) -> bool:
        """Whether a sidecar must live for it to work."""
        return self.area is not None and self.area.is_served

    def is_forsaken(self) -> bool:
        """Whether what served it has ended: its sidecar, or who carries its packets."""
        if self.area is not None and self.area.is_lost():
            return True
        way_out = self.way_out
        return way_out is not None and way_out.is_carried and not way_out.is_alive()

    async def check_served(self) -> None:
        """LaunchError if its sidecar has failed it."""
        if self.area is not None:
            await self.area.check()

    async def wait_dead(self) -> None:
        await self.wait_known()
        await trio.lowlevel.wait_readable(self.clone.pidfd)
        self.dead = True

    def is_dead(self) -> bool:
        """Whether its init has ended already: a pidfd is readable then (pidfd_open(2))."""
        if self.clone.pidfd < 0:
            self.tenant.hear()
            if self.clone.pidfd < 0:
                return self.clone.error is not None
        poll = select.poll()
        poll.register(self.clone.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def pid(self) -> int:
        """init's pid as the supervisor sees it, or 0: pidfd_open(2), fdinfo."""
        with open(f"/proc/self/fdinfo/{self.clone.pidfd}") as file:
            for line in file:
                if line.startswith("Pid:"):
                    return max(0, int(line.split()[1]))
        return 0

    async def end(self) -> bool:
        """Kill it, wait, give back what it borrowed. False if it could not be killed."""
        await self.finish()
        return await self.release()

    async def finish(self) -> None:
        """Kill it and wait: afterwards it is dead, or could not be killed."""
        self.socket.close()
        if self.reported and not self.dead:
            await self._wait_gone(PATIENCE)
        if not self.dead:
            self.kill()
            await self._wait_gone(DEAD_TIMEOUT)

    async def _wait_gone(self, seconds: float) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + seconds):
            try:
                await self.wait_dead()
            except LaunchError:  # it was never born, or went with its tenant before we knew of it
                self.dead = True

    async def release(self) -> bool:
        """What it had goes, or goes back, if it is dead."""
        self._close()
        try:
            async with AsyncExitStack() as sidecars:  # each, whatever becomes of the other
                for sidecar in (self.way_out, self.area):
                    if sidecar is not None:
                        sidecars.push_async_callback(sidecar.close)
        finally:
            if self.dead:
                self._give_back()
            elif self.leaf is not None:  # in D state: nothing it had may be used again
                self.leaf.close()
        return self.dead

    def is_gone(self) -> bool:
        """For one that reported: whether it is dead by now, and what it had given back."""
        if not self.is_dead():
            return False
        self.dead = True
        self._close()
        self._give_back()
        return True

    def _close(self) -> None:
        self.ended = True
        self.clone.let_go()

    def _give_back(self) -> None:
        again = self.network_serves_again
        _return(self.tenant, self.cgroups, self.uid, self.network, self.leaf, again=again)


def _return(
    tenant: Tenant, cgroups: Cgroups | None, uid: int | None, network: int | None,
    leaf: Leaf | None, *, again: bool,
) -> None:  # fmt: skip
    """What was borrowed, by somebody who is dead."""
    if network is not None:
        tenant.return_network(network, again=again)
    if uid is not None:
        tenant.return_uid(uid)
    if leaf is not None and cgroups is not None:
        cgroups.give_back(leaf)


async def make(
    tenant: Tenant,
    prepared: Prepared,
    cgroups: Cgroups | None,
    uppers: Uppers | None,
    area: Area | None = None,
    way_out: UserNetwork | None = None,
) -> Sandbox:
    """Start the construction of a sandbox; it waits for its job, or reports why it failed.

    What the caller does next happens while the kernel works. `area` is one made ahead; that and
    `way_out` are the sandbox's from here on, also if nothing becomes of it.
    """
    compiled = prepared.compiled
    setup = compiled.setup
    uid = network = leaf = None
    try:
        uid = tenant.take_uid() if setup.own_uid else None
        if way_out is None:
            namespace = network = await tenant.take_network()
        else:
            namespace = way_out.namespace
        leaf = cgroups.take(compiled.cgroup_files, compiled.cpu_sets) if cgroups else None
        if area is None and "area" in setup.descriptors:
            area = await open_area(tenant, prepared, uppers)
        script = sandbox_script(prepared.image, TENANT_UID if uid is None else uid)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            ours.setblocking(False)
            offered = {"socket": theirs.fileno(), "network": namespace}
            if leaf is not None:
                offered["cgroup"] = leaf.fd
            if area is not None:
                offered |= area.mounts
            try:
                fds = [offered[name] for name in setup.descriptors]
                clone = await tenant.clone(setup, script, fds)
            except BaseException:
                ours.close()
                raise
    except BaseException:
        for sidecar in (area, way_out):
            if sidecar is not None:
                await sidecar.close()
        _return(tenant, cgroups, uid, network, leaf, again=False)
        raise
    box = Sandbox(tenant, clone, ours, prepared.image, uid, network, leaf, cgroups, area)
    box.network_serves_again = compiled.network_serves_again
    box.way_out = way_out
    return box
