"""Jobs that run together and reach each other: their network, who is started when, who ends whom.

Theory of operation. A bridge lies in a network namespace where nothing else is: no address, no
process, no IPv6. Each member has a namespace as any run with a way out has one, and in it one end
of a pair of interfaces, whose other end is a port of the bridge. All of these namespaces belong to
one user namespace, that of the first member's tenant; members whose root is another one have a
tenant of their own in it (homes.py). So who is in no namespace of the group can have no packet in
it, and no member has a capability over any. A way out is a member's own, with the filter and the
name server of its own policy: nobody's packets go through a namespace of somebody else's, so there
is no router that could be attacked or filled, and what was refused is told to whom it concerns.

All members have their slots before the first one is started, or two groups could wait for each
other for ever. A member that comes after others waits where a job waits that has no slot yet.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

from sandboxd.compile import bridge, netlink, nftables
from sandboxd.compile.egress import PROTOCOLS, Egress
from sandboxd.compile.grouping import BRIDGE, INTERFACE, MTU, Layout, lay_out
from sandboxd.errors import JobError, LaunchError, SandboxError
from sandboxd.group import Group
from sandboxd.job import Job
from sandboxd.result import Event, Result
from sandboxd.supervise import volumes
from sandboxd.supervise.netkeeper import Netkeeper, UserNetwork, ask
from sandboxd.supervise.one_error import one_error
from sandboxd.supervise.seat import Seat

if TYPE_CHECKING:
    from sandboxd.supervise.run import Run
    from sandboxd.supervise.runner import Runner

LOOK = 0.01
"""Seconds between two looks at who listens: the kernel tells nobody."""
NO_WAY_OUT = Egress("", "")

Emit = Callable[[str, Event], Awaitable[object]]
"""Gets the name of a member and what happened to it."""


class GroupRun:
    """A group in progress: `runs` by name, each as of Runner.start. Somebody must read the events
    of all of them."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.runs: dict[str, Run] = {}
        self.ended: list[str] = []
        """Members whose run is over, in that order."""
        self.ended_by: str | None = None
        """The member whose end stopped the others."""
        self._ready = {name: trio.Event() for name in group.members}
        self._over = trio.Event()

    def kill(self, why: str = "cancelled by the caller") -> None:
        """End all members that are left; their status will be `cancelled`."""
        for run in self.runs.values():
            run.kill(why)

    async def wait(self) -> dict[str, Result]:
        """The results by name, in the order of the members."""
        found = {name: await run.wait() for name, run in self.runs.items()}
        await self.wait_over()
        return found

    async def wait_over(self) -> None:
        """Until `ended` and `ended_by` are what they will be."""
        await self._over.wait()

    def decisive(self, results: Mapping[str, Result]) -> str | None:
        """Whose status is the group's: `main`; or the first that did not end well by itself."""
        return decisive(self.group, self.ended, results)

    # -- who waits for whom

    def _gate(self, name: str) -> Callable[[], Awaitable[object]]:
        after = self.group.every()[name].after

        async def wait_ready() -> None:
            for one in after:
                await self._ready[one].wait()

        return wait_ready

    async def _watch(self, name: str, seat: Seat) -> None:
        run = self.runs[name]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look, name, run, seat)
            await run._done.wait()
            nursery.cancel_scope.cancel()
        self.ended.append(name)
        ok = run._result is not None and run._result.status == "ok"
        if ok and self.group.every()[name].ready == "ended":
            self._ready[name].set()
        if not self._ready[name].is_set():
            self._give_up_after(name)
        how = {"failure": not ok, "exit": True, "never": False}[self.group.stop]
        if run._error is not None or how or name == self.group.main:
            if self.ended_by is None and len(self.ended) < len(self.runs):
                self.ended_by = name
            self.kill(f"its group was stopped when {name} ended")
        if len(self.ended) == len(self.runs):
            self._over.set()

    def _give_up_after(self, name: str) -> None:
        """What waits for it would wait for ever."""
        every = self.group.every()
        for other, run in self.runs.items():
            if name in every[other].after:
                run.kill(f"{name} ended before it was ready")

    async def _look(self, name: str, run: Run, seat: Seat) -> None:
        """Until a member is ready."""
        ready = self.group.every()[name].ready
        if ready == "ended":
            return
        await run._begun.wait()
        kind, _, port = ready.partition(":")
        if port:
            assert seat.network is not None
            while int(port) not in listeners(seat.network, PROTOCOLS[kind]):  # noqa: ASYNC110
                await trio.sleep(LOOK)
        self._ready[name].set()


def decisive(group: Group, ended: Sequence[str], results: Mapping[str, Result]) -> str | None:
    """See GroupRun.decisive; `ended`: the members in the order in which they ended."""
    if group.main is not None:
        return group.main
    bad = [name for name in ended if results[name].status != "ok"]
    own = [name for name in bad if results[name].status != "cancelled"]
    return next(iter((*own, *bad)), None)


def listeners(network: UserNetwork, protocol: int) -> set[int]:
    """Ports of a namespace at which somebody waits; LaunchError if the kernel cannot tell."""
    found: set[int] = set()
    try:
        for family in bridge.FAMILIES:
            for answer in ask(network.listeners, bridge.get_listeners(family, protocol)):
                found.update(bridge.ports(answer))
    except OSError as error:  # ENOENT: no such module
        hint = "modprobe -a tcp_diag udp_diag, or leave `ready` out"
        raise LaunchError("group", 4, error.errno or 0, "ask who listens", hint=hint) from None
    return found


# -- the network -----------------------------------------------------------------------------


@asynccontextmanager
async def open_networks(
    keeper: Netkeeper, layout: Layout, seats: Mapping[str, Seat], ways: Mapping[str, Egress]
) -> AsyncIterator[None]:
    """Give each seat its network; leaving ends them. LaunchError names the step."""
    async with AsyncExitStack() as stack:

        async def bare(egress: Egress, seat: Seat, group: str = "member") -> UserNetwork:
            network = await keeper.bare(egress, seat.place, group)
            stack.push_async_callback(network.end)
            return network

        if layout.shared:
            name, seat = next(iter(seats.items()))
            network = await bare(ways[name], seat)
            if network.is_carried:
                await keeper.furnish(network)
            for one in seats.values():
                one.network = network
        else:
            middle = await bare(NO_WAY_OUT, next(iter(seats.values())), "bridge")
            index = make_bridge(middle)
            for name, seat in seats.items():
                seat.network = network = await bare(ways[name], seat)
                connect(middle, index, network, layout, name)
                if network.is_carried:
                    await keeper.furnish(network)
        yield


def make_bridge(middle: UserNetwork) -> int:
    """Its index."""
    try:
        ask(middle.routes, bridge.add_bridge(BRIDGE))
        return index_of(middle, BRIDGE)
    except OSError as error:
        raise LaunchError("group", 0, error.errno or 0, "make a bridge",
                          hint="`sandboxd doctor` tries that") from None  # fmt: skip


def connect(
    middle: UserNetwork, index: int, network: UserNetwork, layout: Layout, name: str
) -> None:
    """A pair of interfaces between the bridge and a member, its filter, and its address."""
    step, own = 1, layout.addresses[name]
    try:
        peer = bridge.Peer(INTERFACE, bridge.hardware(own), network.namespace)
        port = f"port{list(layout.addresses).index(name)}"
        ask(middle.routes, bridge.add_pair(port, index, peer, MTU))
        at = index_of(network, INTERFACE)
        network.beside = nftables.Beside(at, layout.reachable())
        step = 2
        if not network.is_carried:  # else it is a part of the filter of the way out
            ask(network.tables, nftables.ruleset(network.egress, (), network.beside))
        step = 3
        ask(network.routes, netlink.set_up(at, MTU))
        ask(network.routes, netlink.add_address(at, own, layout.bits))
        for other in layout.addresses.values():
            if other != own:
                ask(network.routes, bridge.add_neighbour(at, other))
    except OSError as error:
        what = ("join a member to the bridge", "filter what a member sends", "give it its address")
        raise LaunchError("group", step, error.errno or 0, f"{name}: {what[step - 1]}",
                          hint="`sandboxd doctor` tries that") from None  # fmt: skip


def index_of(network: UserNetwork, name: str) -> int:
    for answer in ask(network.routes, netlink.get_link(name)):
        if (found := netlink.link(answer)) is not None:
            return found.index
    raise OSError(19, f"no interface {name}")


# -- a whole group ---------------------------------------------------------------------------


@asynccontextmanager
async def open_group(
    runner: Runner, group: Group, usage_every: float | None = None
) -> AsyncIterator[GroupRun]:
    """All members, started; leaving ends what is left of them and their network."""
    layout = lay_out(group)
    every = group.every()
    if runner._closed:
        raise SandboxError("the runner is closed", hint="use it inside `async with`")
    if len(every) > runner.slots:
        raise JobError(f"group: {len(every)} members, and {runner.slots} jobs may run at once",
                       hint=f"open_runner(slots={len(every)})")  # fmt: skip
    live = GroupRun(group)
    with one_error():
        async with AsyncExitStack() as stack:
            first = next(iter(every))
            seats = {name: Seat(layout.place(name), None, live._gate(name)) for name in every}
            ground = runner._known.ready(every[first].job, None, seats[first]).home
            stack.enter_context(ground.in_use())  # also while none of its own members runs
            for seat in seats.values():
                seat.ground = ground
            ways = _ways_out(runner, group, seats)
            for home in runner._known.homes:  # the network belongs to the tenant that there is now
                if home.living is not None:
                    home.living.look()
            for one in every.values():  # before slots, as all who wait for caches (volumes.py)
                await stack.enter_async_context(volumes.lent(runner.policy(one.job)))
            await stack.enter_async_context(_slots(runner, seats))
            keeper = await ground.netkeeper()
            await stack.enter_async_context(open_networks(keeper, layout, seats, ways))
            for name, one in every.items():
                begun = runner._begin(one.job, usage_every, seats[name])
                live.runs[name] = await stack.enter_async_context(begun)
            async with trio.open_nursery() as nursery:
                for name, seat in seats.items():
                    nursery.start_soon(live._watch, name, seat)
                try:
                    yield live
                finally:
                    live.kill()
                    nursery.cancel_scope.cancel()
                    live._over.set()


def check(group: Group) -> None:
    """JobError for what cannot be laid out, before anything is begun."""
    lay_out(group)


def _ways_out(runner: Runner, group: Group, seats: Mapping[str, Seat]) -> dict[str, Egress]:
    """Each member's, by its own policy; PolicyError where one of them cannot be."""
    found: dict[str, Egress] = {}
    for name, one in group.every().items():
        kept = runner._known.ready(one.job, None, seats[name])
        found[name] = kept.prepared.compiled.egress or NO_WAY_OUT
    if group.share == "network" and len(set(found.values())) > 1:
        raise JobError('group: share = "network": members differ in [network]',
                       hint="one network has one way out; or share nothing")  # fmt: skip
    return found


@asynccontextmanager
async def _slots(runner: Runner, seats: Mapping[str, Seat]) -> AsyncIterator[None]:
    """One for each seat, at once. A member gives its own back when its run is over."""
    taken: list[Seat] = []
    try:
        async with runner._grouping:
            for seat in seats.values():
                await runner._limiter.acquire_on_behalf_of(seat)
                taken.append(seat)
        yield
    finally:
        for seat in taken:
            with suppress(RuntimeError):  # it has given it back
                runner._limiter.release_on_behalf_of(seat)


async def run_group(runner: Runner, group: Group, emit: Emit | None) -> dict[str, Result]:
    """All of it, to the end."""
    for name, one in group.every().items():
        check_job(name, one.job)
    async with open_group(runner, group) as live:
        with one_error():
            async with trio.open_nursery() as nursery:
                for name, run in live.runs.items():
                    nursery.start_soon(_read, name, run, emit)
        return await live.wait()


def check_job(name: str, job: Job) -> None:
    if job.stdin is None:
        raise JobError(f"{name}: stdin=None: there is nobody to feed it",
                       hint="use start_group")  # fmt: skip
    if job.collect_to == "stream":
        raise JobError(f'{name}: collect_to="stream": there is nobody to read it',
                       hint="use start_group")  # fmt: skip


async def _read(name: str, run: Run, emit: Emit | None) -> None:
    async for event in run.events:
        if emit is not None:
            await emit(name, event)
