"""How what carries packets is started, and what a network looks like from inside."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

from sandboxd.compile.egress import TCP, UDP, Egress, understood
from sandboxd.errors import HostError, PolicyError
from sandboxd.host import Host
from sandboxd.policy import Policy

INTERFACE = "tap0"
MTU = 65520
"""Bytes; the largest that both take, rounded to words (slirp4netns(1), passt(1))."""
ADDRESS, GATEWAY, BITS = IPv4Address("10.0.2.100"), IPv4Address("10.0.2.2"), 24
ADDRESS6, GATEWAY6, BITS6 = IPv6Address("fd00::100"), IPv6Address("fd00::2"), 64
"""What slirp4netns has always given; pasta is told to."""
RESOLVER = "127.0.0.53"
"""The sandbox's own loopback: a question never leaves its network namespace."""
ONLY_PASTA = "publishing at IPv6, or UDP at loopback"
API = "/tmp"
"""Where the netkeeper, and nobody else, sees API sockets."""
RESOLV_CONF = f"nameserver {RESOLVER}\noptions timeout:5 attempts:2\n"


def command(egress: Egress, name: str, ipv6: bool) -> list[str]:
    """The argv; `{netns}` is the path of the network namespace.

    Both leak the host's loopback, each in its own way, unless they are told not to: slirp4netns
    as the gateway and through its DNS, pasta as the gateway and by ports that are bound.
    """
    if egress.kind == "slirp4netns":
        api = [f"--api-socket={API}/{name}"] if egress.published else []
        return [
            egress.program, "--netns-type=path", f"--mtu={MTU}", "--disable-host-loopback",
            "--disable-dns", "--enable-sandbox", "--enable-seccomp",
            *(["--enable-ipv6"] if ipv6 else []), *api, "{netns}", INTERFACE,
        ]  # fmt: skip
    ports = [
        word
        for flag, protocol in (("-t", TCP), ("-u", UDP))
        for spec in [
            f"{one.address}/{one.host}:{one.inside}"
            for one in egress.published
            if one.protocol == protocol
        ]
        or ["none"]
        for word in (flag, spec)
    ]
    addresses = [ADDRESS, ADDRESS6] if ipv6 else [ADDRESS]
    gateways = [GATEWAY, GATEWAY6] if ipv6 else [GATEWAY]
    return [
        egress.program, "--foreground", "--quiet", "--stderr", "--netns", "{netns}",
        "--no-netns-quit", "--ns-ifname", INTERFACE, "--mtu", f"{MTU}", "--no-map-gw",
        *(word for one in addresses for word in ("--address", f"{one}")),
        *(word for one in gateways for word in ("--gateway", f"{one}")),
        "--netmask", f"{BITS}", *([] if ipv6 else ["--ipv4-only"]),
        "--no-dhcp", "--no-dhcpv6", "--no-ra", *ports,
        *("-T", "none", "-U", "none"),
    ]  # fmt: skip


def forwards(egress: Egress) -> list[dict[str, Any]]:
    """What slirp4netns is told over its API (slirp4netns(1)); pasta has it in its argv."""
    if egress.kind != "slirp4netns":
        return []
    return [
        {
            "execute": "add_hostfwd",
            "arguments": {
                "proto": "udp" if one.protocol == UDP else "tcp",
                "host_addr": one.address,
                "host_port": one.host,
                "guest_addr": f"{ADDRESS}",
                "guest_port": one.inside,
            },
        }
        for one in egress.published
    ]


def program(policy: Policy, host: Host) -> tuple[str, str]:
    """Name and path of what carries the packets here; HostError if nothing does."""
    wanted, where = policy.network.helper, policy.origin("network.mode")
    found = {"slirp4netns": host.slirp4netns, "pasta": host.pasta}
    kinds = tuple(found) if wanted == "auto" else (wanted,)
    published = understood(policy.network).published
    hard = next((str(n) for n, one in enumerate(published) if one.needs_pasta), None)
    if hard is not None:
        kinds = tuple(kind for kind in kinds if kind != "slirp4netns")
        where = f"{policy.origin('network.publish')}[{hard}]"
    if not kinds:
        raise PolicyError(where, f"{ONLY_PASTA}: slirp4netns cannot",
                          hint='network.helper = "pasta" can')  # fmt: skip
    for kind in kinds:
        if path := found[kind]:
            for fact, there in (("tun", host.tun), ("nftables", host.nftables)):
                if not there:
                    why = host.fault_notes.get(fact, "not there")
                    raise HostError(fact, f'{where}: "user" needs {fact}: {why}',
                                    hint="run `sandboxd doctor`")  # fmt: skip
            return kind, path
    if hard is not None:
        raise HostError("pasta", f"{where}: {ONLY_PASTA}: needs pasta",
                        hint="apt-get install passt")  # fmt: skip
    raise HostError("user networking", f'{where}: "user" needs {" or ".join(kinds)}',
                    hint="apt-get install slirp4netns (or passt)")  # fmt: skip
