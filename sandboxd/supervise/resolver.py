"""The name server of one sandbox: answers allowed names, and lets through what they lead to.

Theory of operation. Its socket is bound on the loopback of the sandbox's network namespace, so a
question never crosses an interface, and no other name server can be reached but one the policy
opens. A name that no entry of network.allow admits does not exist (NXDOMAIN) and is written down.
One that is admitted is asked of the host's name servers, or those of the policy, from here. Of the
answer only addresses count, and aliases on the way to them, which admit nothing by themselves:

- an address of the host's, of a private network or otherwise no part of the public Internet is
  left out unless the policy names it itself, so that nobody's name server can lead a job there;
- what is left joins the filter's sets for the ports of the entries that match, before the job
  hears of it, for as long as the answer is good;
- the job gets the addresses under the name it asked for.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import msgspec
import trio

from sandboxd.compile import dns, grouping
from sandboxd.compile.counted import Counted
from sandboxd.compile.egress import Caps, IPAddress, entry, is_closed
from sandboxd.errors import LaunchError
from sandboxd.policy import Policy
from sandboxd.result import Violation
from sandboxd.supervise.netkeeper import UserNetwork
from sandboxd.supervise.sandboxes import Sandbox
from sandboxd.supervise.supervise import Conduct, Observed, supervise

RATE, BURST = 500.0, 1000.0
"""Questions a second from one sandbox, and at once; what is more waits in its own socket."""
AT_ONCE = 32
"""Questions of one sandbox that we ask others for."""
TIMEOUT = 2.0
"""Seconds a name server has; then comes the next one, and the first once more."""
ROUNDS = 2
SHORTEST, LONGEST = 60.0, 3600.0
"""Seconds for which an address is let through, whatever the answer says: who gets one uses it a
moment later, and one that is good for a week may be somebody else's tomorrow."""
MOST_PINNED = 4096
"""Addresses that one sandbox has let through at a time; beyond them a name is not answered."""
MOST_REFUSED = 256
PORT = 53
LIFETIME = 60
"""Seconds for which a member's address is good: its group does not outlive it."""
PATIENCE = 1.0


class Resolver:
    """Serves one network while its job runs."""

    def __init__(self, network: UserNetwork) -> None:
        self._network = network
        self._egress = network.egress
        self._socket = trio.socket.from_stdlib_socket(network.names.dup())
        self._limiter = trio.CapacityLimiter(AT_ONCE)
        self._tokens, self._counted = BURST, trio.current_time()

    async def serve(self) -> None:
        with self._socket:
            async with trio.open_nursery() as nursery:
                while True:
                    await self._may_ask()
                    data, sender = await self._socket.recvfrom(dns.BUFFER)
                    try:
                        query = dns.read_query(data)
                    except dns.DnsError:
                        continue
                    token = object()
                    await self._limiter.acquire_on_behalf_of(token)
                    nursery.start_soon(self._answer, query, sender, token)

    async def _may_ask(self) -> None:
        now = trio.current_time()
        self._tokens = min(BURST, self._tokens + (now - self._counted) * RATE)
        self._counted = now
        if self._tokens < 1:
            await trio.sleep((1 - self._tokens) / RATE)
        self._tokens -= 1

    async def _answer(self, query: dns.Query, sender: tuple[str, int], token: object) -> None:
        try:
            answer = await self._resolve(query)
            with suppress(OSError):  # the sandbox has closed its own end
                await self._socket.sendto(answer, sender)
        finally:
            self._limiter.release_on_behalf_of(token)

    async def _resolve(self, query: dns.Query) -> bytes:
        if not dns.is_standard(query):
            return dns.answer(query, dns.NOTIMP)
        if (ours := self._of_group(query)) is not None:
            return ours
        if not self._egress.admits(query.name):
            refused = self._network.refused
            if query.name in refused or len(refused) < MOST_REFUSED:
                refused[query.name] = refused.get(query.name, 0) + 1
            else:
                self._network.refused_more += 1
            return dns.answer(query, dns.NXDOMAIN)
        if not dns.is_plain(query):
            return dns.answer(query, dns.NXDOMAIN)  # no host has such a name: nobody is asked
        if query.kind not in (dns.A, dns.AAAA) or (
            query.kind == dns.AAAA and not self._network.ipv6
        ):
            return dns.answer(query, dns.NOERROR)
        said = await self._ask(query.name, query.kind)
        if said is None:
            return dns.answer(query, dns.SERVFAIL)
        found, lifetime = dns.addresses(said)
        kept = [one for one in found if self._is_admissible(one)]
        if kept and not self._pin(query.name, kept, lifetime):
            return dns.answer(query, dns.SERVFAIL)
        return dns.answer(query, said.code, kept, lifetime)

    def _of_group(self, query: dns.Query) -> bytes | None:
        """The answer for a member's name; nothing of the group's domain is asked of others."""
        place = self._network.place
        found = grouping.look_up(place, query.name) if place is not None else None
        if found is None:
            return None
        if found == "missing":
            return dns.answer(query, dns.NXDOMAIN)
        addresses = [] if query.kind != dns.A or isinstance(found, str) else [found]
        return dns.answer(query, dns.NOERROR, addresses, LIFETIME)

    def _is_admissible(self, address: IPAddress) -> bool:
        network = self._network
        return self._egress.is_named(address) or not is_closed(address, network.own)

    def _pin(self, name: str, found: list[IPAddress], lifetime: int) -> bool:
        """Whether the filter lets them through by now."""
        groups = self._egress.pins(name)
        pinned = self._network.pinned
        if len(pinned) + len(found) * len(groups) > MOST_PINNED:
            now = trio.current_time()
            for key in [key for key, until in pinned.items() if until <= now]:
                del pinned[key]
            if len(pinned) + len(found) * len(groups) > MOST_PINNED:
                return False
        seconds = min(max(float(lifetime), SHORTEST), LONGEST)
        try:
            for address in found:
                if not is_closed(address, self._network.own):  # else its own entry says what for
                    self._network.pin(address, groups, seconds)
        except OSError:
            return False
        return True

    # -- asking others

    async def _ask(self, name: str, kind: int) -> dns.Answer | None:
        for server in (*(self._egress.resolvers or of_host()),) * ROUNDS:
            # What it does to the connection is no error of ours.
            with trio.move_on_after(TIMEOUT), suppress(OSError, trio.BrokenResourceError):
                found = await ask_server(server, name, kind)
                if found.code in (dns.NOERROR, dns.NXDOMAIN):
                    return found
        return None


async def ask_server(server: str, name: str, kind: int) -> dns.Answer:
    """One name server: over UDP, and over TCP if the answer is too long for that (RFC 7766)."""
    number = int.from_bytes(os.urandom(2))
    content = dns.query(number, name, kind)
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with trio.socket.socket(family, socket.SOCK_DGRAM) as one:
        await one.connect((server, PORT))  # answers of others are not heard
        await one.send(content)
        while True:
            found = matching(await one.recv(65535), number, name, kind)
            if found is not None:
                break
    if not found.truncated:
        return found
    async with await trio.open_tcp_stream(server, PORT) as stream:
        await stream.send_all(len(content).to_bytes(2) + content)
        data = b""
        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2]):
            part = await stream.receive_some()
            if not part:
                raise ConnectionResetError
            data += part
    found = matching(data[2:], number, name, kind)
    if found is None:
        raise ConnectionResetError
    return found


def matching(data: bytes, number: int, name: str, kind: int) -> dns.Answer | None:
    """The answer to this very question, or None."""
    with suppress(dns.DnsError):
        found = dns.read_answer(data)
        if (found.number, found.name, found.kind) == (number, name, kind):
            return found
    return None


def of_host(path: str = "/etc/resolv.conf") -> list[str]:
    """The host's name servers (resolv.conf(5)); its own address if it names none."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    words = [line.split() for line in lines]
    found = [word[1] for word in words if len(word) > 1 and word[0] == "nameserver"]
    return [one for one in found if is_address(one)] or ["127.0.0.1"]


def is_address(text: str) -> bool:
    for kind in (IPv4Address, IPv6Address):
        with suppress(ValueError):
            kind(text)
            return True
    return False


async def with_way_out(run: Conduct, box: Sandbox, network: UserNetwork) -> Observed:
    """One run whose questions are answered meanwhile; LaunchError if its way out ends before it."""

    told = trio.Event()

    async def watch() -> None:
        await network.wait_lost()
        box.kill()
        told.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Resolver(network).serve)
        if network.is_carried:
            nursery.start_soon(watch)
        try:
            seen = await supervise(run, box)
        except LaunchError:
            if network.lost:
                raise lost(network) from None
            raise
        if network.is_carried and not network.is_alive():
            with trio.move_on_after(PATIENCE):
                await told.wait()
            raise lost(network)
        seen = msgspec.structs.replace(
            seen,
            facts=msgspec.structs.replace(seen.facts, beyond=beyond(network)),
            refused=refused(network, run.compiled.policy),
        )
        nursery.cancel_scope.cancel()
    return seen


def lost(network: UserNetwork) -> LaunchError:
    """It is nothing that the job did: no result could tell what it would have done."""
    hint = "by the machine's out-of-memory killer or a person; the job may be run again"
    why = network.lost or f"{network.egress.kind} ended while the job ran"
    return LaunchError("network", 5, 0, why, hint=hint)


def refused(network: UserNetwork, policy: Policy) -> tuple[Violation, ...]:
    """Who was asked for and not to be reached, with the entry that would have let it."""
    rule = policy.origin("network.allow")
    found = []
    for name, times in network.refused.items():
        found.append(_violation(name, times, f'{rule} = ["{entry(name, "PORT")}"]'))
    if network.refused_more:
        found.append(_violation(None, network.refused_more, rule))
    if not network.is_carried:
        return tuple(found)
    counters, told = network.counters(), 0
    for one in network.denied():
        told += one.packets
        wanted = entry(one.address, one.port, one.protocol)
        found.append(_violation(wanted, one.packets, f'{rule} = ["{wanted}"]'))
    if (rest := counters["denied"].packets - told) > 0:
        found.append(_violation(None, rest, rule))
    return *found, *_beyond(network, policy, counters)


def beyond(network: UserNetwork) -> frozenset[str]:
    """The caps of [network] at which packets were refused."""
    if network.egress.caps == Caps() or not network.is_carried:
        return frozenset()
    counters = network.counters()
    caps = {"network_connections": "full", "network_bytes": "spent"}
    return frozenset(name for name, counter in caps.items() if counters[counter].packets)


def _beyond(
    network: UserNetwork, policy: Policy, counters: Mapping[str, Counted]
) -> Iterator[Violation]:
    """What was more than the caps of [network] allow."""
    caps = network.egress.caps
    if full := counters["full"].packets:
        rule, told = f"{policy.origin('network.connections')} = {caps.connections}", 0
        for one in network.denied("full"):
            told += one.packets
            wanted = entry(one.address, one.port, one.protocol)
            yield _violation(wanted, one.packets, rule)
        if full > told:
            yield _violation(None, full - told, rule)
    if spent := counters["spent"].packets:
        yield _violation(None, spent, f"{policy.origin('network.bytes')} = {caps.bytes}")


def _violation(name: str | None, count: int, rule: str) -> Violation:
    return Violation(kind="network", name=name, count=count, rule=rule)
