"""DNS messages, read and written: what the resolver of a sandbox needs of RFC 1035, and no more.

Whatever bytes come in, from a sandbox or from a name server, they are understood or DnsError is
raised. Names are lower-case text; one that has other bytes in it than names of hosts have (RFC
1123, and the underscore) is understood with `\\000` in their place, and so never matches an entry.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

A, CNAME, AAAA, OPT = 1, 5, 28, 41
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5
MOST_PLAIN = 512
"""Bytes of an answer over UDP to who does not say that more are welcome (RFC 1035, 4.2.1)."""
BUFFER = 1232
"""Bytes we take over UDP: what is never fragmented (DNS flag day 2020)."""
MOST_LINKS = 16
_HEADER = struct.Struct(">6H")
_FIXED = struct.Struct(">HHIH")
_RESPONSE, _TRUNCATED, _WANTED, _AVAILABLE = 0x8000, 0x0200, 0x0100, 0x0080
_OPCODE = 0x7800
_USUAL = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")


class DnsError(ValueError):
    """These bytes are no DNS message, or none that we have a use for."""


@dataclass(frozen=True, slots=True)
class Query:
    """A question. `kind` is a type of records; `raw` is the question as it was written."""

    number: int
    flags: int
    name: str
    kind: int
    family: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class Record:
    name: str
    kind: int
    lifetime: int
    """Seconds."""
    target: str | IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Answer:
    """What a name server said; of the records only addresses and aliases."""

    number: int
    code: int
    truncated: bool
    name: str
    kind: int
    records: tuple[Record, ...]


def read_query(data: bytes) -> Query:
    """A packet from inside."""
    number, flags, questions, *_ = _header(data)
    if flags & _RESPONSE or questions != 1:
        raise DnsError("no query")
    name, at = _name(data, _HEADER.size)
    if at + 4 > len(data):
        raise DnsError("cut off")
    kind, family = struct.unpack_from(">HH", data, at)
    return Query(number, flags, name, kind, family, data[_HEADER.size : at + 4])


def is_standard(query: Query) -> bool:
    """Whether it asks something, in the Internet's class, and does not want to change anything."""
    return not query.flags & _OPCODE and query.family == IN


def is_plain(query: Query) -> bool:
    """Whether its name is one that can be asked of others: text, and not what stands for bytes."""
    return "\\" not in query.name


def read_answer(data: bytes) -> Answer:
    """A packet from a name server."""
    number, flags, questions, count, *_ = _header(data)
    if not flags & _RESPONSE or questions != 1:
        raise DnsError("no answer")
    name, at = _name(data, _HEADER.size)
    if at + 4 > len(data):
        raise DnsError("cut off")
    (kind,) = struct.unpack_from(">H", data, at)
    at += 4
    records: list[Record] = []
    truncated = bool(flags & _TRUNCATED)
    for _ in range(0 if truncated else count):
        record, at = _record(data, at)
        if record is not None:
            records.append(record)
    return Answer(number, flags & 0xF, truncated, name, kind, tuple(records))


def _header(data: bytes) -> tuple[int, ...]:
    if len(data) < _HEADER.size:
        raise DnsError("cut off")
    return _HEADER.unpack_from(data)


def _record(data: bytes, at: int) -> tuple[Record | None, int]:
    name, at = _name(data, at)
    if at + _FIXED.size > len(data):
        raise DnsError("cut off")
    kind, family, lifetime, size = _FIXED.unpack_from(data, at)
    at += _FIXED.size
    end = at + size
    if end > len(data):
        raise DnsError("cut off")
    content = data[at:end]
    if family == IN and kind == A and size == 4:
        return Record(name, kind, lifetime, IPv4Address(content)), end
    if family == IN and kind == AAAA and size == 16:
        return Record(name, kind, lifetime, IPv6Address(content)), end
    if family == IN and kind == CNAME:
        target, after = _name(data, at)
        if after != end:
            raise DnsError("a name of another length")
        return Record(name, kind, lifetime, target), end
    return None, end


def _name(data: bytes, at: int) -> tuple[str, int]:
    """The name that begins here, and where what follows it begins (RFC 1035, 4.1.4)."""
    labels: list[str] = []
    end = -1
    lowest, total = at, 0
    while True:
        if at >= len(data):
            raise DnsError("cut off")
        size = data[at]
        if size >= 0xC0:
            if at + 1 >= len(data):
                raise DnsError("cut off")
            end = at + 2 if end < 0 else end
            at = (size & 0x3F) << 8 | data[at + 1]
            if not _HEADER.size <= at < lowest:  # only ever backwards, so that there is an end
                raise DnsError("a pointer that leads nowhere")
            lowest = at
            continue
        if size > 63:
            raise DnsError("an unknown kind of label")
        label = data[at + 1 : at + 1 + size]
        at += 1 + size
        total += 1 + size
        if len(label) < size or total > 255:
            raise DnsError("cut off, or too long")
        if not size:
            return ".".join(labels), at if end < 0 else end
        labels.append(_text(label))


def _text(label: bytes) -> str:
    return "".join(chr(byte) if byte in _USUAL else "\\000" for byte in label.lower())


# -- writing ---------------------------------------------------------------------------------


def query(number: int, name: str, kind: int) -> bytes:
    """A question to a name server, which may answer with BUFFER bytes (RFC 6891)."""
    labels = b"".join(bytes([len(one)]) + one.encode() for one in name.split(".") if one)
    option = b"\0" + struct.pack(">HHIH", OPT, BUFFER, 0, 0)
    head = _HEADER.pack(number, _WANTED, 1, 0, 0, 1)
    return head + labels + b"\0" + struct.pack(">HH", kind, IN) + option


def answer(
    asked: Query, code: int, addresses: Iterable[IPv4Address | IPv6Address] = (), lifetime: int = 0
) -> bytes:
    """The answer to a sandbox: addresses under the very name that was asked for.

    It has as many as fit into MOST_PLAIN bytes, so that nobody has to ask again over TCP.
    """
    flags = _RESPONSE | _AVAILABLE | asked.flags & (_OPCODE | _WANTED) | code
    records: list[bytes] = []
    room = MOST_PLAIN - _HEADER.size - len(asked.raw)
    for one in addresses:
        kind = A if isinstance(one, IPv4Address) else AAAA
        record = b"\xc0\x0c" + _FIXED.pack(kind, IN, lifetime, len(one.packed)) + one.packed
        if len(record) > room:
            break
        room -= len(record)
        records.append(record)
    head = _HEADER.pack(asked.number, flags, 1, len(records), 0, 0)
    return head + asked.raw + b"".join(records)


def addresses(found: Answer) -> tuple[list[IPv4Address | IPv6Address], int]:
    """What the name in question leads to through its aliases, and for how many seconds."""
    name, lifetime = found.name, 1 << 31
    for _ in range(MOST_LINKS):
        here = [one for one in found.records if one.name == name]
        ends = [one for one in here if one.kind == found.kind and not isinstance(one.target, str)]
        if ends:
            lifetime = min([lifetime, *(one.lifetime for one in ends)])
            return [one.target for one in ends if not isinstance(one.target, str)], lifetime
        alias = next((one for one in here if isinstance(one.target, str)), None)
        if alias is None or not isinstance(alias.target, str):
            break
        name, lifetime = alias.target, min(lifetime, alias.lifetime)
    return [], 0
