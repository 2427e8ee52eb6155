"""The network of a group, decided: who has which address, and what every name leads to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_network

from sandboxd.compile.carrying import RESOLVER
from sandboxd.errors import JobError
from sandboxd.group import Group
from sandboxd.host import Place

BRIDGE = "br0"
INTERFACE = "eth0"
"""What a member has of the bridge."""
MTU = 1500
"""As on any Ethernet; between two interfaces of veth(4) the kernel cuts nothing that is TCP."""
LOOPBACK = IPv4Address("127.0.0.1")
OWN = IPv4Network("10.0.2.0/24")
"""What a way out has on its own side (carrying.py)."""
PRIVATE = tuple(map(IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")))


@dataclass(frozen=True, slots=True)
class Layout:
    """A group's network."""

    domain: str
    shared: bool
    bits: int
    addresses: Mapping[str, IPv4Address]

    def reachable(self) -> tuple[IPv4Address, ...]:
        """Whom members may send to: each other, and all of them."""
        subnet = IPv4Network((next(iter(self.addresses.values())), self.bits), strict=False)
        everybody = (subnet.broadcast_address, IPv4Address("255.255.255.255"))
        return (*self.addresses.values(), *everybody)

    def place(self, name: str) -> Place:
        """What the sandbox of a member is told."""
        hosts = tuple((one, str(address)) for one, address in self.addresses.items())
        return Place(name=name, domain=self.domain, hosts=hosts, shared=self.shared)


def lay_out(group: Group) -> Layout:
    """Addresses as they are wanted, then the next free ones from the subnet's second on.

    JobError names the member.
    """
    every = group.every()
    if group.share == "network":
        if wanted := [name for name, one in every.items() if one.address is not None]:
            raise JobError(f'{wanted[0]}: address: share = "network" has localhost only')
        return Layout(group.name, True, 8, dict.fromkeys(every, LOOPBACK))
    subnet = _subnet(group.subnet)
    found: dict[str, IPv4Address] = {}
    for name, one in every.items():
        if one.address is None:
            continue
        address = _address(name, one.address, subnet)
        if other := next((who for who, its in found.items() if its == address), None):
            raise JobError(f"{name}: address: {address} is {other}'s")
        found[name] = address
    taken = set(found.values())
    free = (one for one in subnet.hosts() if one not in taken and one != _first(subnet))
    for name in every:
        if name not in found and (fresh := next(free, None)) is not None:
            found[name] = fresh
    if missing := [name for name in every if name not in found]:
        raise JobError(f"{missing[0]}: no address left in {subnet}", hint="use a larger subnet")
    return Layout(group.name, False, subnet.prefixlen, {name: found[name] for name in every})


def _subnet(text: str) -> IPv4Network:
    try:
        subnet = ip_network(text)
    except ValueError as error:
        raise JobError(f"group: subnet: {error}", hint="as 192.168.100.0/24") from None
    if not isinstance(subnet, IPv4Network) or not 16 <= subnet.prefixlen <= 29:
        raise JobError(f"group: subnet: {text}", hint="IPv4, /16 to /29")
    if not any(subnet.subnet_of(one) for one in PRIVATE) or subnet.overlaps(OWN):
        raise JobError(f"group: subnet: {text} is not private, or a way out's own",
                       hint=f"within {', '.join(map(str, PRIVATE))}, without {OWN}")  # fmt: skip
    return subnet


def _first(subnet: IPv4Network) -> IPv4Address:
    """What people take for a gateway, and there is none."""
    return subnet.network_address + 1


def _address(name: str, text: str, subnet: IPv4Network) -> IPv4Address:
    try:
        address = IPv4Address(text)
    except ValueError as error:
        raise JobError(f"{name}: address: {error}") from None
    ends = (subnet.network_address, subnet.broadcast_address, _first(subnet))
    if address not in subnet or address in ends:
        raise JobError(f"{name}: address: {address} is not for a member of {subnet}",
                       hint=f"from {_first(subnet) + 1} on")  # fmt: skip
    return address


# -- names -----------------------------------------------------------------------------------


def look_up(place: Place, name: str) -> IPv4Address | str | None:
    """A member's address; "missing" for what would be the group's but is not; None: not ours."""
    label, _, rest = name.partition(".")
    if rest not in ("", place.domain):
        return "missing" if name.endswith(f".{place.domain}") else None
    address = dict(place.hosts).get(label)
    if address is not None:
        return IPv4Address(address)
    return "missing" if rest or label == place.domain else None


def hosts(place: Place) -> str:
    """hosts(5): the same for all members, in one order."""
    names: dict[str, list[str]] = {}
    for name, address in place.hosts:
        names.setdefault(address, []).extend((name, f"{name}.{place.domain}"))
    lines = [("127.0.0.1", "localhost"), ("::1", "localhost")]
    if place.shared:
        lines[0] = ("127.0.0.1", " ".join(("localhost", *names.pop(str(LOOPBACK)))))
    lines += [(address, " ".join(found)) for address, found in names.items()]
    return "".join(f"{address} {found}\n" for address, found in lines)


def resolv_conf(place: Place) -> str:
    """resolv.conf(5): names of the group first, also without its domain."""
    return f"nameserver {RESOLVER}\nsearch {place.domain}\noptions timeout:5 attempts:2\n"
