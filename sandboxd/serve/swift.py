"""Requests and replies of the plainest form, without h11: most are, and each takes h11 longer than
all that the daemon does for a short job besides. Pure.

A request that came whole, in one piece and alone, with none but these headers and each of them
once. Whatever is not exactly so is h11's to read; tests/serve/test_swift.py holds the two against
each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus

import msgspec

_NAMES = rb"host|content-length|content-type|accept|accept-encoding|user-agent|authorization"
_MORE = rb"idempotency-key|traceparent"
_HEADER = rb"((?i:" + _NAMES + rb"|" + _MORE + rb")):[ \t]?([!-~]+(?: [!-~]+)*)\r\n"
_REQUEST = re.compile(rb"(GET|POST) (/[!-~]*) HTTP/1\.1\r\n((?:" + _HEADER + rb"){1,12})\r\n")
_HEADERS = re.compile(_HEADER)
_LENGTH = re.compile(r"\d{1,9}", re.ASCII)
LONGEST = 16 << 10
"""Bytes of a head."""


class Plain(msgspec.Struct, frozen=True):
    """The parts of such a request; `data` is all of it."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    data: bytes


def read(data: bytes) -> Plain | None:
    """None: h11 shall say."""
    found = _REQUEST.match(data, 0, LONGEST)
    if found is None:
        return None
    fields = _HEADERS.findall(found[3])
    headers = {name.decode().lower(): value.decode() for name, value in fields}
    body = data[found.end() :]
    length = headers.get("content-length", "0")
    if "host" not in headers or len(headers) != len(fields) or not _LENGTH.fullmatch(length):
        return None
    if int(length) != len(body):
        return None
    return Plain(found[1].decode(), found[2].decode(), headers, body, data)


def written(status: int, headers: Iterable[tuple[str, str]], body: bytes) -> bytes:
    """A reply; ValueError for a header that is more than a line."""
    lines = [f"HTTP/1.1 {status} {_PHRASES[status]}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if status != 204:
        lines.append(f"Content-Length: {len(body)}")
    text = "\r\n".join(lines)
    if text.count("\n") != len(lines) - 1 or text.count("\r") != len(lines) - 1:
        raise ValueError("a header of more than a line")
    return text.encode("ascii") + b"\r\n\r\n" + body


_PHRASES = {one.value: one.phrase for one in HTTPStatus}
