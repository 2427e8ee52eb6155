"""What the filter of a network counted (compile/nftables.py): how to ask, and the answers read."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from sandboxd.compile.egress import IPAddress
from sandboxd.compile.netlink import NLM_F_DUMP, Answer, attribute, attributes, message, text
from sandboxd.compile.nfmessages import TABLE

_SUBSYSTEM = 10 << 8
_NEWSETELEM, _GETSETELEM = _SUBSYSTEM | 12, _SUBSYSTEM | 13
_NEWOBJ, _GETOBJ = _SUBSYSTEM | 18, _SUBSYSTEM | 19
_WHERE = struct.pack(">BBH", 1, 0, 0)
"""struct nfgenmsg: NFPROTO_INET."""
_COUNTERS = attribute(3, struct.pack(">I", 1))
"""NFTA_OBJ_TYPE: NFT_OBJECT_COUNTER."""


def get_refused(name: str, version: int, sequence: int = 1) -> bytes:
    """Ask for what a set of refused destinations holds: "denied" or "full"."""
    body = _WHERE + text(1, TABLE) + text(2, f"{name}{version}")
    return message(_GETSETELEM, NLM_F_DUMP, body, sequence)


def get_counters(sequence: int = 1) -> bytes:
    body = _WHERE + text(1, TABLE) + _COUNTERS
    return message(_GETOBJ, NLM_F_DUMP, body, sequence)


@dataclass(frozen=True, slots=True)
class Counted:
    """A counter: bytes are those of IP packets, their headers included."""

    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Denied:
    """A destination that was refused, and how many packets to it were."""

    address: IPAddress
    protocol: int
    port: int
    packets: int


def denied(answer: Answer) -> Iterator[Denied]:
    """The elements in one answer to `get_refused`."""
    if answer.kind != _NEWSETELEM:
        return
    elements = dict(attributes(answer.body, 4)).get(3, b"")
    for _, element in attributes(elements):
        found = dict(attributes(element))
        key = dict(attributes(found.get(1, b""))).get(1, b"")
        if len(key) not in (12, 24):
            continue
        packed, protocol, port = key[:-8], key[-8], struct.unpack_from(">H", key, len(key) - 4)[0]
        address = IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
        yield Denied(address, protocol, port, _packets(found.get(7, found.get(11, b""))))


def _packets(expression: bytes) -> int:
    data = dict(attributes(expression)).get(2, b"")
    counted = dict(attributes(data)).get(2, bytes(8))
    return int(struct.unpack(">Q", counted)[0])


def counters(answer: Answer) -> dict[str, Counted]:
    """Name -> what it counted, in one answer to `get_counters`."""
    if answer.kind != _NEWOBJ:
        return {}
    found = dict(attributes(answer.body, 4))
    name = found.get(2, b"").rstrip(b"\0").decode(errors="replace")
    counted = dict(attributes(found.get(4, b"")))
    size, packets = (struct.unpack(">Q", counted.get(kind, bytes(8)))[0] for kind in (1, 2))
    return {name: Counted(packets, size)}
