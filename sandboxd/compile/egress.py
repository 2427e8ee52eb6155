"""[network] of mode "user", understood: who may be reached, and through what.

An entry of `allow` is WHO:PORTS. WHO is a name, `*.` and a name (whatever lies below it, but not
itself), an address or a network (IPv6 in brackets), or `*`, the public Internet. PORTS is a port,
FIRST-LAST or `*`; `/tcp` or `/udp` behind it leaves the other one out. `*` alone is `*:*`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import msgspec

from sandboxd.errors import PolicyError
from sandboxd.policy import Network

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

TCP, UDP = 6, 17
PROTOCOLS = {"tcp": TCP, "udp": UDP}

CLOSED: tuple[IPNetwork, ...] = tuple(
    map(
        ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15"),
            *("224.0.0.0/4", "240.0.0.0/4"),
            *("::/128", "::1/128", "::ffff:0:0/96", "fc00::/7", "fe80::/10", "fec0::/10"),
            "ff00::/8",
            # What carries an IPv4 address inside, and would lead to the closed ones of those:
            # NAT64 (RFC 6052, 8215), Teredo (RFC 4380), 6to4 (RFC 3056), compatible (RFC 4291).
            *("64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16", "::/96"),
        ),
    )
)
"""No part of "the public Internet": this host, private networks, link-local with the metadata
services of clouds, multicast, and what is reserved (RFC 6890). An entry of `allow` may name one."""
NEVER: tuple[IPNetwork, ...] = tuple(
    map(ip_network, ("127.0.0.0/8", "0.0.0.0/32", "::1/128", "::/128", "224.0.0.0/4", "ff00::/8"))
)
"""What no entry can open: it would mean the sandbox itself, or nobody."""

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
_PORTS = re.compile(r"(?:(\*)|(\d{1,5})(?:-(\d{1,5}))?)(?:/(tcp|udp))?")
_PUBLISHED = re.compile(r"(?:(?:\[([^]]*)\]|([0-9.]+)):)?(\d{1,5}):(\d{1,5})(?:/(tcp|udp))?")

FORMS = "NAME:PORT, *.NAME:PORT, ADDRESS[/BITS]:PORT, [IPV6/BITS]:PORT, *:PORT or *"


class Ports(msgspec.Struct, frozen=True):
    """Destination ports, and the protocols for which they count."""

    first: int
    last: int
    protocols: tuple[int, ...] = (TCP, UDP)


class Published(msgspec.Struct, frozen=True):
    """A port of the host's that leads into the sandbox."""

    address: str
    host: int
    inside: int
    protocol: int = TCP

    @property
    def is_datagrams_at_loopback(self) -> bool:
        return self.protocol == UDP and ip_address(self.address).is_loopback

    @property
    def needs_pasta(self) -> bool:
        """slirp4netns has no IPv6 there, and carries no answer to the host's loopback.

        So with --disable-host-loopback, without which a job would reach all that listens there.
        """
        return ":" in self.address or self.is_datagrams_at_loopback


class Caps(msgspec.Struct, frozen=True):
    """How much at most; None is as much as there is. The policy says what each means."""

    connections: int | None = None
    bytes: int | None = None
    rate: int | None = None


class Egress(msgspec.Struct, frozen=True):
    """All of it. Names are lower case without the last dot; "*.x" is what lies below x."""

    program: str
    """The path of what carries packets: slirp4netns or pasta."""
    kind: str
    names: tuple[tuple[str, Ports], ...] = ()
    networks: tuple[tuple[IPNetwork, Ports], ...] = ()
    public: tuple[Ports, ...] = ()
    resolvers: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()
    caps: Caps = Caps()

    @property
    def groups(self) -> tuple[Ports, ...]:
        """The kinds of ports that names have: each has a set of pinned addresses of its own."""
        return tuple(dict.fromkeys(ports for _, ports in self.names))

    def admits(self, name: str) -> bool:
        """Whether this name may be looked up."""
        return bool(self.public) or bool(self.pins(name))

    def pins(self, name: str) -> tuple[int, ...]:
        """The numbers of the groups that the addresses of this name join."""
        found = {ports for pattern, ports in self.names if _matches(pattern, name)}
        return tuple(number for number, ports in enumerate(self.groups) if ports in found)

    def is_named(self, address: IPAddress) -> bool:
        """Whether the policy itself opens the address, at some port."""
        return any(address in network for network, _ in self.networks)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("*."):
        return name.endswith(pattern[1:]) and len(name) >= len(pattern)
    return pattern == name


def is_closed(address: IPAddress, own: Iterable[IPAddress] = ()) -> bool:
    """Whether "the public Internet" is without it; `own` are the host's addresses."""
    return address in own or any(address in network for network in CLOSED)


def parse(entries: Iterable[str]) -> Egress:
    """`allow`, without what carries it. PolicyError names the entry: network.allow[2]."""
    names: list[tuple[str, Ports]] = []
    networks: list[tuple[IPNetwork, Ports]] = []
    public: list[Ports] = []
    for number, entry in enumerate(entries):
        where = f"network.allow[{number}]"
        who, ports = _split(entry, where)
        if who == "*":
            public.append(ports)
        elif (network := _network(who, where)) is not None:
            networks.append((network, ports))
        else:
            names.append((_name(who, where), ports))
    return Egress("", "", tuple(names), tuple(networks), tuple(public))


def _split(entry: str, where: str) -> tuple[str, Ports]:
    who, colon, text = entry.rpartition(":")
    if entry == "*":
        return "*", Ports(1, 65535)
    found = _PORTS.fullmatch(text)
    if not colon or found is None or not who:
        raise PolicyError(where, f"{entry!r} says no port", hint=f"one of {FORMS}")
    every, low, high, protocol = found.groups()
    first, last = (1, 65535) if every else (int(low), int(high or low))
    if not 1 <= first <= last <= 65535:
        raise PolicyError(where, f"{entry!r}: ports are 1 to 65535, the lower one first")
    return who, Ports(first, last, (PROTOCOLS[protocol],) if protocol else (TCP, UDP))


def _network(who: str, where: str) -> IPNetwork | None:
    bare = who[1:-1] if who.startswith("[") and who.endswith("]") else who
    try:
        network = ip_network(bare)
    except ValueError as error:
        if who != bare or "/" in who or re.fullmatch(r"[0-9.]+", who):
            raise PolicyError(where, f"{who!r}: {error}", hint=f"one of {FORMS}") from None
        return None
    if isinstance(network, IPv6Network) != (who == f"[{bare}]"):
        raise PolicyError(where, f"{who!r}: an IPv6 address, and no other, stands in brackets")
    inside = next((one for one in NEVER if _within(network, one)), None)
    if inside is not None:
        hint = "loopback inside is the sandbox's own and needs no entry; the host's cannot be had"
        raise PolicyError(where, f"{who!r} cannot be opened", hint=hint)
    return network


def _within(network: IPNetwork, outer: IPNetwork) -> bool:
    if isinstance(network, IPv4Network) and isinstance(outer, IPv4Network):
        return network.subnet_of(outer)
    if isinstance(network, IPv6Network) and isinstance(outer, IPv6Network):
        return network.subnet_of(outer)
    return False


def _name(who: str, where: str) -> str:
    name = who.lower().removesuffix(".")
    if not _NAME.fullmatch(name.removeprefix("*.")):
        raise PolicyError(where, f"{who!r} is no name and no address", hint=f"one of {FORMS}")
    return name


def published(entries: Iterable[str]) -> tuple[Published, ...]:
    """`publish`: [ADDRESS:]PORT:PORT_INSIDE[/udp], at 127.0.0.1 if nothing else is said."""
    found: list[Published] = []
    for number, entry in enumerate(entries):
        where = f"network.publish[{number}]"
        match = _PUBLISHED.fullmatch(entry)
        if match is None:
            raise PolicyError(where, f"{entry!r} is not [ADDRESS:]PORT:PORT_INSIDE[/udp]",
                              hint="without an address it is 127.0.0.1")  # fmt: skip
        six, four, host, inside, protocol = match.groups()
        address = six or four or "127.0.0.1"
        if not _is_address(address) or (":" in address) != (six is not None) or "%" in address:
            raise PolicyError(where, f"{entry!r}: an address of this host's, IPv6 in brackets")
        if not (1 <= int(host) <= 65535 and 1 <= int(inside) <= 65535):
            raise PolicyError(where, f"{entry!r}: ports are 1 to 65535")
        kind = PROTOCOLS[protocol or "tcp"]
        one = Published(f"{ip_address(address)}", int(host), int(inside), kind)
        if one.is_datagrams_at_loopback and one.host != one.inside:
            # pasta of 2023 sends what answers such a port to nowhere.
            raise PolicyError(where, f"{entry!r}: at loopback both ports of UDP are the same",
                              hint="or publish at another address of this host's")  # fmt: skip
        found.append(one)
    if len({(one.address, one.host, one.protocol) for one in found}) < len(found):
        raise PolicyError("network.publish", "a port of the host's can lead to one place only")
    return tuple(found)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def resolvers(entries: Iterable[str]) -> tuple[str, ...]:
    """`resolvers`: addresses of DNS servers, asked in this order."""
    for number, entry in enumerate(entries):
        if not _is_address(entry):
            raise PolicyError(f"network.resolvers[{number}]", f"{entry!r} is no address")
    return tuple(entries)


def problems(network: Network) -> tuple[PolicyError, ...]:
    """What is wrong with a [network]; `where` of each is the dotted key."""
    found: list[PolicyError] = []
    readings: tuple[tuple[Callable[[tuple[str, ...]], object], tuple[str, ...]], ...] = (
        (parse, network.allow), (resolvers, network.resolvers), (published, network.publish),
    )  # fmt: skip
    for read, entries in readings:
        try:
            read(entries)
        except PolicyError as error:
            found.append(error)
    return tuple(found)


@lru_cache(maxsize=256)
def understood(network: Network) -> Egress:
    """A whole [network], but for what carries it; PolicyError if it is not clear."""
    found = parse(network.allow)
    return Egress("", "", found.names, found.networks, found.public,
                  resolvers(network.resolvers), published(network.publish),
                  Caps(network.connections, network.bytes, network.rate))  # fmt: skip


def entry(address: IPAddress | str, port: int | str, protocol: int | None = None) -> str:
    """The entry of `allow` that would have let something through."""
    who = f"[{address}]" if isinstance(address, IPv6Address) else str(address)
    kind = next((f"/{name}" for name, number in PROTOCOLS.items() if number == protocol), "")
    return f"{who}:{port}{kind}"
