"""Networks with a way out: asked for from launch/netkeeper.py, filtered, configured, made ahead.

One netkeeper serves a tenant. It is started with the first job that has such a network, and again
after it was lost; what it had made and started is lost with it, and said to the runs concerned.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from errno import ETIMEDOUT
from ipaddress import IPv4Address, IPv6Address
from itertools import count
from typing import Any

import trio

from sandboxd.compile import counted, netlink, nfmessages, nftables
from sandboxd.compile.carrying import (
    ADDRESS,
    ADDRESS6,
    BITS,
    BITS6,
    GATEWAY,
    GATEWAY6,
    INTERFACE,
    MTU,
    RESOLVER,
    command,
    forwards,
)
from sandboxd.compile.egress import Egress, IPAddress
from sandboxd.errors import LaunchError
from sandboxd.host import Place
from sandboxd.linux import packets
from sandboxd.linux.descriptors import SCARCE, Descriptors, told
from sandboxd.script.command import netkeeper_command
from sandboxd.supervise.processes import reap, starting
from sandboxd.supervise.tenants import PACKAGE_PARENT

TIMEOUT = 20.0
"""Seconds for a program to make its interface; slirp4netns takes 3 ms, pasta 20."""
LONGEST = 1 << 16


@dataclass(slots=True, eq=False)
class UserNetwork:
    """A namespace with a filter and a way out, for one sandbox, once."""

    keeper: Netkeeper
    name: str
    egress: Egress
    fds: Descriptors
    namespace: int
    routes: socket.socket
    links: socket.socket
    tables: socket.socket
    listeners: socket.socket
    names: socket.socket
    """Where the sandbox sends its questions to."""
    own: tuple[IPAddress, ...]
    """The host's addresses, which are nothing public."""
    ipv6: bool
    pidfd: int = -1
    lost: str = ""
    """Why there is no way out any more."""
    pinned: dict[tuple[IPAddress, int], float] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    """Names that were asked for and not allowed -> how often."""
    place: Place | None = None
    """Of a member of a group, which the network outlives: the group ends it."""
    beside: nftables.Beside | None = None
    """Its interface to the group's bridge."""
    refused_more: int = 0
    """Questions for names that were too many to be written down."""

    # -- what the filter and the interface say

    def pin(self, address: IPAddress, groups: Iterable[int], seconds: float) -> None:
        """Let an address of an allowed name through; OSError if the kernel refuses."""
        now = trio.current_time()
        for group in groups:
            known = self.pinned.get((address, group), 0.0) > now
            self.pinned[address, group] = now + seconds
            if known:  # an element that is there keeps its time: it has to go first
                with suppress(FileNotFoundError):  # it has just timed out
                    ask(self.tables, nftables.pin(address, [group], seconds, again=True))
                    continue
            ask(self.tables, nftables.pin(address, [group], seconds))

    def denied(self, name: str = "denied") -> list[counted.Denied]:
        """Who was refused, the most often refused first; "full": for want of connections."""
        found = [
            one
            for version in (4, 6)
            for answer in ask(self.tables, counted.get_refused(name, version))
            for one in counted.denied(answer)
        ]
        return sorted(found, key=lambda one: (-one.packets, str(one.address), one.port))

    def counters(self) -> dict[str, counted.Counted]:
        """All of nftables.COUNTERS."""
        answers = ask(self.tables, counted.get_counters())
        return {name: n for one in answers for name, n in counted.counters(one).items()}

    def link(self) -> netlink.Link | None:
        """The interface; None if it is not there."""
        with suppress(OSError):
            for answer in ask(self.routes, netlink.get_link(INTERFACE)):
                if (found := netlink.link(answer)) is not None:
                    return found
        return None

    # -- its life

    def is_alive(self) -> bool:
        if self.pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    async def wait_lost(self) -> str:
        """Until what carries its packets has ended; why. In a group several may wait for that."""
        with Descriptors() as fds:  # only one task may wait for a descriptor
            await trio.lowlevel.wait_readable(fds.own(os.dup(self.pidfd)))
        if self.lost:
            return self.lost
        self.lost = f"{self.egress.kind} ended while the job ran"
        self.lost += await self.keeper.last_words(self.name)
        return self.lost

    @property
    def is_carried(self) -> bool:
        """Whether somebody carries its packets: a group may have no way out."""
        return bool(self.egress.program)

    def kill(self) -> None:
        if self.pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def close(self) -> None:
        """Nothing of it is left when this returns, unless it is a group's."""
        if self.place is None:
            await self.end()

    async def end(self) -> None:
        self.kill()
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.wait_readable(pidfd)
        self.keeper.forget(self.name, started=pidfd >= 0)
        for one in (self.routes, self.links, self.tables, self.listeners, self.names):
            one.close()
        self.fds.close_all()


def ask(link: socket.socket, request: bytes) -> list[netlink.Answer]:
    """What the kernel says: it does so while the request is sent. OSError for a refusal."""
    link.send(request)
    found: list[netlink.Answer] = []
    with suppress(BlockingIOError):
        while True:  # all of it, or the rest would be taken for the next answer
            found += netlink.answers(link.recv(LONGEST))
    for answer in found:
        if answer.error:
            raise OSError(answer.error, os.strerror(answer.error))
    return found


def own_addresses() -> tuple[IPAddress, ...]:
    """Those of this host's interfaces at the moment."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_NETLINK, kind, 0) as link:
        answers = ask(link, netlink.get_addresses())
    return tuple(sorted({one for one in map(netlink.address, answers) if one}, key=str))


def has_ipv6() -> bool:
    """Whether a packet to some address of the Internet would have a way (none is sent)."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
            one.connect(("2001:db8::1", 9))  # for documentation, as good as any (RFC 3849)
    except OSError:
        return False
    return True


# -- the netkeeper ---------------------------------------------------------------------------


class Netkeeper:
    """Made by open_netkeeper()."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket) -> None:
        self._process = process
        self._link = link
        self._lock = trio.Lock()
        self._ended: dict[str, str] = {}
        self._numbers = count(1)
        self._live: set[str] = set()
        self._ahead: dict[Egress, list[UserNetwork]] = {}
        self._lost = False
        self._closed = False

    async def take(self, egress: Egress) -> UserNetwork:
        """One made ahead, or now."""
        ahead = self._ahead.get(egress, [])
        while ahead:
            network = ahead.pop()
            if network.is_alive():
                return network
            await network.close()
        return await self._make(egress)

    @property
    def dead(self) -> bool:
        return self._lost or self._process.poll() is not None

    def ahead(self, egress: Egress) -> int:
        return len(self._ahead.get(egress, []))

    async def refill(self, egress: Egress, wanted: int) -> None:
        """Make some ahead, while nobody waits for one.

        Each is a process of its own, so those of policies that were used longest ago go: there are
        no more than twice as many as are wanted of one.
        """
        self._ahead[egress] = self._ahead.pop(egress, [])  # the latest is the last
        while self.ahead(egress) < wanted and not self.dead:
            while sum(map(len, self._ahead.values())) >= 2 * wanted:
                oldest = next(one for one, made in self._ahead.items() if made)
                await self._ahead[oldest].pop().close()
            self._ahead = {one: made for one, made in self._ahead.items() if made or one == egress}
            made = await self._make(egress)
            self._ahead.setdefault(egress, []).append(made)

    def forget(self, name: str, *, started: bool) -> None:
        """Nobody will ask how it ended. If nobody waited for its start, it is ended here."""
        self._live.discard(name)
        self._ended.pop(name, None)
        if not started:
            with suppress(OSError):
                packets.send(self._link, json.dumps({"end": name}).encode(), [])

    async def last_words(self, name: str) -> str:
        """How a program ended, and what it said."""
        async with self._lock:
            while name not in self._ended:
                if not await self._hear(()):
                    return ""
            return self._ended.pop(name)

    async def _make(self, egress: Egress) -> UserNetwork:
        network = await self.bare(egress)
        await self.furnish(network)
        if self._closed:  # nobody would end it
            await network.end()
            raise self._died()
        return network

    async def bare(
        self, egress: Egress, place: Place | None = None, group: str = ""
    ) -> UserNetwork:
        """A namespace with loopback; with `place` a group's, which is "member" or "bridge"."""
        name = f"n{next(self._numbers)}"
        try:
            own = own_addresses()
        except OSError as error:
            what = "ask for the addresses of this host"
            raise LaunchError("network", 0, error.errno or 0, what) from None
        try:
            made, received = await self._ask({"make": name, "group": group}, "made", name)
        except OSError as error:
            raise told(error, "a network") from error
        if "why" in made or len(received) != 6:
            packets.close(received)
            raise LaunchError("network", 0, 0, f"no network namespace: {made.get('why')}")
        kept = Descriptors()
        namespace = kept.own(received[0])
        routes, links, tables, listeners, names = (socket.socket(fileno=fd) for fd in received[1:])
        return UserNetwork(
            self, name, egress, kept, namespace, routes, links, tables, listeners, names, own,
            has_ipv6(), place=place,
        )  # fmt: skip

    async def furnish(self, network: UserNetwork) -> None:
        """A filter, and who carries packets; nothing is left of the network if that fails."""
        try:
            with trio.fail_after(TIMEOUT):
                await self._furnish(network)
        except trio.TooSlowError:
            await network.end()
            what = f"{network.egress.kind} made no interface"
            raise LaunchError("network", 2, 110, what) from None
        except BaseException:
            await network.end()
            raise

    async def _furnish(self, network: UserNetwork) -> None:
        """The filter first: there is no moment without."""
        egress, step = network.egress, 0
        try:
            ask(network.tables, nftables.ruleset(egress, network.own, network.beside))
            step = 1
            self._live.add(network.name)
            argv = command(egress, network.name, network.ipv6)
            request: dict[str, Any] = {"start": network.name, "argv": argv}
            started, received = await self._ask(
                request, "started", network.name, (network.namespace,)
            )
            if not received:
                raise LaunchError("network", 1, 0, f"{egress.kind} did not start"
                                  + started.get("said", ""))  # fmt: skip
            network.pidfd = network.fds.own(received[0])
            step = 2
            found = await self._wait_link(network)
            step = 3
            configure(network, found)
        except OSError as error:
            what = ("filter", "start", "wait for its interface", "configure")[step]
            raise LaunchError("network", step, error.errno or 0, what) from None
        if wanted := forwards(egress):
            request = {"publish": network.name, "requests": wanted}
            done, _ = await self._ask(request, "published", network.name)
            if done["why"]:
                raise LaunchError("network", 4, 0, f"network.publish: {done['why']}")

    async def _wait_link(self, network: UserNetwork) -> netlink.Link:
        """Until its interface is there, or what should make it is not."""
        while (found := network.link()) is None:
            with select.epoll() as ears:
                ears.register(network.links, select.EPOLLIN)
                ears.register(network.pidfd, select.EPOLLIN)
                await trio.lowlevel.wait_readable(ears)
            if not network.is_alive():
                words = await self.last_words(network.name)
                raise LaunchError("network", 2, 0, f"{network.egress.kind} ended at once{words}",
                                  hint="`sandboxd doctor` tries it and knows a fix")  # fmt: skip
            with suppress(BlockingIOError):
                network.links.recv(LONGEST)
        return found

    # -- talking to it

    async def _ask(
        self, request: dict[str, Any], kind: str, name: str, fds: tuple[int, ...] = ()
    ) -> tuple[dict[str, Any], list[int]]:
        """Its answer; the descriptors that came with it are the caller's."""
        async with self._lock:
            await self._send(json.dumps(request).encode(), list(fds))
            while True:
                heard = await self._hear((kind, "ended"))
                if heard is None:
                    raise self._died()
                message, received = heard
                if message.get(kind) == name:
                    return message, received
                packets.close(received)
                if message.get("ended") == name and kind == "started":
                    return {"said": self._ended.pop(name)}, []

    async def _send(self, content: bytes, fds: list[int]) -> None:
        try:
            while True:
                with suppress(BlockingIOError):
                    return packets.send(self._link, content, fds)
                await trio.lowlevel.wait_writable(self._link)
        except (OSError, trio.ClosedResourceError) as error:
            if isinstance(error, OSError) and error.errno in SCARCE:
                raise  # it was not asked, and lives
            raise self._died() from None

    async def _hear(self, kinds: tuple[str, ...]) -> tuple[dict[str, Any], list[int]] | None:
        """One message; None is the end. What ended is remembered."""
        try:
            if not self._lost:
                await trio.lowlevel.wait_readable(self._link)
            data, received = packets.receive(self._link)
        except (OSError, trio.ClosedResourceError) as error:
            if isinstance(error, OSError) and error.errno in SCARCE:
                raise  # what it has brought is lost, and no more
            data, received = b"", []
        if not data:
            self._lost = True
            return None
        message = json.loads(data)
        if "ended" in message and message["ended"] in self._live:
            self._live.discard(message["ended"])
            self._ended[message["ended"]] = ending(message["status"], message["said"])
        if not any(kind in message for kind in kinds):
            packets.close(received)
        return message, received

    def _died(self) -> LaunchError:
        self._lost = True
        return LaunchError("network", 0, 0, "the netkeeper is gone", hint="it is started anew")

    async def _close(self) -> None:
        self._closed = True
        for ahead in self._ahead.values():
            while ahead:
                await ahead.pop().close()
        self._lost = True
        trio.lowlevel.notify_closing(self._link)
        self._link.close()
        with trio.CancelScope(shield=True):
            await reap(self._process)


def ending(status: int, said: str) -> str:
    """How it ended, to be put behind its name."""
    how = f"exit status {status}"
    if status < 0:
        how = f"signal {-status} ({signal.Signals(-status).name})"
    last = said.rpartition("\n")[2]
    return f" ({how}{f': {last}' if last else ''})"


def configure(network: UserNetwork, link: netlink.Link) -> None:
    """Addresses and routes, as the programs expect them on the other side."""
    plans: list[tuple[IPv4Address | IPv6Address, int, IPv4Address | IPv6Address]] = [
        (ADDRESS, BITS, GATEWAY)
    ]
    if network.ipv6:
        plans.append((ADDRESS6, BITS6, GATEWAY6))
    if (rate := network.egress.caps.rate) is not None:
        ask(network.routes, netlink.add_shaper(link.index, rate, max(rate, nfmessages.BURST)))
    ask(network.routes, netlink.set_up(link.index, MTU))
    for address, bits, gateway in plans:
        ask(network.routes, netlink.add_address(link.index, address, bits))
        ask(network.routes, netlink.add_default_route(link.index, gateway))


def start(link: int, user_namespace: int) -> subprocess.Popen[bytes]:
    """On the thread of trio, as it ends with the thread that started it."""
    return subprocess.Popen(
        netkeeper_command(PACKAGE_PARENT, link, user_namespace, f"{RESOLVER}:53"),
        pass_fds=(link, user_namespace), cwd="/",
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@asynccontextmanager
async def open_netkeeper(user_namespace: int) -> AsyncIterator[Netkeeper]:
    """A netkeeper in this user namespace; leaving ends all that it made."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, starting("network", "start the netkeeper"):
        ours.setblocking(False)
        process = start(theirs.fileno(), user_namespace)
    keeper = Netkeeper(process, ours)
    try:
        with trio.move_on_after(TIMEOUT) as waiting:
            heard = await keeper._hear(("ready", "failed"))
        if waiting.cancelled_caught:
            raise LaunchError("network", 0, ETIMEDOUT, "start the netkeeper")
        if heard is None or "ready" not in heard[0]:
            why = heard[0].get("failed", "") if heard else "it ended at once"
            raise LaunchError("network", 0, 0, f"netkeeper: {why}")
        yield keeper
    finally:
        await keeper._close()
