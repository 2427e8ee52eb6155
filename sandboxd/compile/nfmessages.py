"""nf_tables' messages, and the expressions that its rules are made of; nothing is sent here.

A rule in the kernel's form is a row of expressions that load a register or compare one
(include/uapi/linux/netfilter/nf_tables.h).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from sandboxd.compile.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    attribute,
    message,
    nested,
    text,
)

TABLE = "sandboxd"
SUBSYSTEM = 10 << 8
BEGIN, END = 0x10, 0x11
NEWTABLE, NEWCHAIN, NEWRULE, NEWSET, NEWSETELEM, DELSETELEM = 0, 3, 6, 9, 12, 14
NEWOBJ = 18
BURST = 256 << 10
"""Bytes that may go at once whatever the rate: four of the largest packets."""
INET, IPV4, IPV6 = 1, 2, 10
ACCEPT, DROP, GOTO = 1, 0, -4
VERDICT, REGISTER = 0, 8
COUNTER, QUOTA = 1, 2
OVER = 1
"""NFT_QUOTA_F_INV, NFT_LIMIT_F_INV: what is beyond, instead of what is within."""


def integer(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">i" if value < 0 else ">I", value))


def load(kind: int, content: bytes) -> bytes:
    return nested(kind, attribute(1, content))


def expression(name: str, *data: bytes) -> bytes:
    return nested(1, text(1, name), nested(2, *data))


def meta(key: int, register: int = REGISTER) -> bytes:
    return expression("meta", integer(1, register), integer(2, key))


def payload(base: int, offset: int, length: int, register: int = REGISTER) -> bytes:
    places = (register, base, offset, length)
    return expression("payload", *(integer(n, value) for n, value in enumerate(places, 1)))


def compare(operation: int, value: bytes) -> bytes:
    return expression("cmp", integer(1, REGISTER), integer(2, operation), load(3, value))


def masked(mask: bytes) -> bytes:
    return expression(
        "bitwise", integer(1, REGISTER), integer(2, REGISTER), integer(3, len(mask)),
        load(4, mask), load(5, bytes(len(mask))),
    )  # fmt: skip


def lookup(name: str, *, inverted: bool = False) -> bytes:
    flags = (integer(5, 1),) if inverted else ()
    return expression("lookup", text(1, name), integer(2, REGISTER), *flags)


def verdict(code: int, chain: str = "") -> bytes:
    inner = integer(1, code) + (text(2, chain) if chain else b"")
    return expression("immediate", integer(1, VERDICT), nested(2, nested(2, inner)))


def refer(kind: int, name: str) -> bytes:
    return expression("objref", integer(1, kind), text(2, name))


def count(name: str) -> bytes:
    return refer(COUNTER, name)


def refuse(kind: int, code: int) -> bytes:
    return expression("reject", integer(1, kind), attribute(2, bytes([code])))


def note(name: str, *more: bytes) -> bytes:
    """Add the key in the registers; go no further if there is no room for it."""
    return expression("dynset", text(1, name), integer(3, 0), integer(4, REGISTER), *more)


def noted(name: str) -> bytes:
    """The same, with a counter of its own."""
    return note(name, nested(7, text(1, "counter"), nested(2)))


def constant(register: int, value: bytes) -> bytes:
    return expression("immediate", integer(1, register), load(2, value))


def over(rate: int) -> bytes:
    """What is more than so many bytes a second; the kernel adds a second's worth to the burst."""
    limits = (attribute(1, struct.pack(">Q", rate)), attribute(2, struct.pack(">Q", 1)))
    return expression("limit", *limits, integer(3, BURST), integer(4, 1), integer(5, OVER))


# -- messages --------------------------------------------------------------------------------


def generic(family: int, resource: int = 0) -> bytes:
    return struct.pack(">BBH", family, 0, resource)


def request(kind: int, *parts: bytes, flags: int = 0) -> bytes:
    return message(SUBSYSTEM | kind, flags, generic(INET) + b"".join(parts))


def batch(requests: Iterable[bytes]) -> bytes:
    """Messages that happen together or not at all; one acknowledgement, or the errors."""
    inner = list(requests)
    last = bytearray(inner[-1])
    last[6] |= NLM_F_ACK  # nlmsg_flags
    body = generic(0, 10)
    return b"".join((message(BEGIN, 0, body), *inner[:-1], bytes(last), message(END, 0, body)))


def chain(name: str, hook: int | None = None) -> bytes:
    parts = [text(1, TABLE), text(3, name)]
    if hook is not None:
        parts += [nested(4, integer(1, hook), integer(2, 0)), integer(5, DROP), text(7, "filter")]
    return request(NEWCHAIN, *parts, flags=NLM_F_CREATE)


def rule(chain: str, *expressions: bytes) -> bytes:
    parts = (text(1, TABLE), text(2, chain), nested(4, *expressions))
    return request(NEWRULE, *parts, flags=NLM_F_CREATE | NLM_F_APPEND)


def make_set(name: str, length: int, flags: int, number: int, size: int = 0) -> bytes:
    parts = [
        text(1, TABLE), text(2, name), integer(3, flags), integer(4, key_type(name, length)),
        integer(5, length), integer(10, number),
    ]  # fmt: skip
    if size:
        parts.append(nested(9, integer(1, size)))
    return request(NEWSET, *parts, flags=NLM_F_CREATE)


def key_type(name: str, length: int) -> int:
    """So that nft(8) can show the sets: its numbers, one behind the other."""
    address = _IPV4_ADDR if length in (4, 12) else _IPV6_ADDR
    if length in (4, 16):
        return address
    if name.startswith("askers"):
        return address << 12 | _INET_SERVICE << 6 | _INET_SERVICE
    if name == "opened":
        return address << 12 | _INTEGER << 6 | _INTEGER
    return address << 12 | _INET_PROTO << 6 | _INET_SERVICE


_INTEGER, _IPV4_ADDR, _IPV6_ADDR, _INET_PROTO, _INET_SERVICE = 4, 7, 8, 12, 13


def elements(name: str, elements: Iterable[bytes]) -> bytes:
    parts = (text(1, TABLE), text(2, name), nested(3, *elements))
    return request(NEWSETELEM, *parts, flags=NLM_F_CREATE)
