"""Whatever comes in go-judge's protocol becomes jobs, or a Refusal; never anything else is raised.

So of requests, of messages on its streams, and of forms with a file. And whatever bytes come on a
WebSocket are messages within its bound, or its end.

    ./do fuzz gojudge          # until stopped by an error, or after a million examples
    ./do fuzz gojudge 5000     # that many examples
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.job import Job
from sandboxd.serve.gojudge import wire
from sandboxd.serve.gojudge.orders import Sources, inside, orders
from sandboxd.serve.gojudge.server import uploaded
from sandboxd.serve.http import Conversation, Gone, Peer, Request
from sandboxd.serve.swift import Plain
from sandboxd.serve.websocket import accepted
from sandboxd.serve.wire import Refusal
from sandboxd.serve.wires import Wire
from sandboxd.supervise import policies
from sandboxd.supervise.pipeline import check

POLICY = policies.find("go-judge")


def local(name: str) -> Path:
    if "missing" in name:
        raise FileNotFoundError(2, "No such file or directory", name)
    if not name.startswith("/"):
        raise Refusal(400, "file", "elsewhere")
    return Path(name.replace("\0", "_"))


def stored(key: str) -> Path:
    if key == "none":
        raise Refusal(500, "file", "no such file")
    return Path("/store/x")


SOURCES = Sources(local, stored)

names = st.one_of(
    st.sampled_from(["a", "/w/a", "../a", "/etc/a", "a/../b", "", ".", "/w", "a?", "stdout", "\0"]),
    st.text(max_size=4),
)
numbers = st.one_of(st.integers(-2, 5), st.integers(-(1 << 70), 1 << 70), st.floats(0, 9))
file = st.one_of(
    st.none(),
    st.fixed_dictionaries({"content": st.text(max_size=3)}),
    st.fixed_dictionaries({"name": names, "max": numbers}),
    st.fixed_dictionaries(
        {},
        optional={
            "src": st.sampled_from(["/dev/null", "/x", "relative", "/missing", "/a\0b"]),
            "fileId": st.sampled_from(["some", "none"]),
            "symlink": names,
            "streamIn": st.booleans(),
            "streamOut": st.booleans(),
            "pipe": st.booleans(),
        },
    ),
)
cmd = st.fixed_dictionaries(
    {"args": st.lists(st.sampled_from(["a", "b\0", "\u00e9", ""]), max_size=3)},
    optional={
        "env": st.lists(
            st.sampled_from(["A=b", "", "=", "A=\0", "A", "\u00e9=\u00e9"]), max_size=2
        ),
        "files": st.lists(file, max_size=4),
        "tty": st.booleans(),
        **{
            f"{one}Limit": numbers
            for one in ("cpu", "realCpu", "clock", "memory", "stack", "proc", "cpuRate")
        },
        "cpuSetLimit": st.sampled_from(["", "0", "0-1", "x"]),
        "addressSpaceLimit": st.booleans(),
        "copyIn": st.dictionaries(names, file, max_size=3),
        "copyOut": st.lists(names, max_size=3),
        "copyOutCached": st.lists(names, max_size=3),
        "copyOutMax": numbers,
        "copyOutTruncate": st.booleans(),
    },
)
end = st.fixed_dictionaries({}, optional={"index": st.integers(-1, 3), "fd": st.integers(-1, 3)})
pipe = st.fixed_dictionaries(
    {"in": end, "out": end},
    optional={"name": names, "max": numbers, "proxy": st.booleans()},
)
likely = st.fixed_dictionaries(
    {"cmd": st.lists(cmd, max_size=3)},
    optional={"pipeMapping": st.lists(pipe, max_size=3), "requestId": st.text(max_size=3)},
)
requests = st.one_of(
    likely.map(msgspec.json.encode),
    st.binary(max_size=30),
    st.sampled_from([b"null", b"[]", b"{}", b"[" * 5000, b'{"cmd":[{"args":["\\ud800"]}]}']),
)
messages = st.one_of(
    st.binary(max_size=20),
    st.tuples(st.sampled_from([b"\1", b"\2", b"\3"]), requests).map(b"".join),
)
kinds = st.one_of(
    st.sampled_from(
        [
            "multipart/form-data; boundary=b",
            'multipart/form-data; boundary="b b"',
            "multipart/form-data; boundary*=utf-8''b",
            "multipart/form-data",
            "text/plain",
            "",
        ]
    ),
    st.text(max_size=20),
)
forms = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b"--b\r\n", b"--b--", b"\r\n", b"--b b\r\n", b"\r\n\r\n",
                b'Content-Disposition: form-data; name="file"; filename="x"',
                b"Content-Disposition: form-data; name*=utf-8''file; filename*=x''%ff",
                b"Content-Disposition: \xff\xff; name=file; filename=",
            ]
        ),
        st.binary(max_size=9),
    ),
    max_size=8,
).map(b"".join)  # fmt: skip

UPGRADE = [
    ("Host", "localhost"), ("Upgrade", "websocket"), ("Connection", "Upgrade"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="), ("Sec-WebSocket-Version", "13"),
]  # fmt: skip
frames = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.builds(
            lambda first, size, rest: bytes((first, 0x80 | size)) + bytes(4) + rest[:size],
            st.sampled_from([0x81, 0x82, 0x01, 0x00, 0x80, 0x88, 0x89, 0x8A, 0xC1, 0x8F]),
            st.integers(0, 125),
            st.binary(max_size=125),
        ),
    ),
    max_size=5,
).map(b"".join)


def check_request(body: bytes, live: bool) -> None:
    try:
        found = orders(wire.request(body), POLICY, SOURCES, live=live)
    except Refusal:
        return
    for number, order in enumerate(found.orders):
        if number not in found.faults:
            assert isinstance(order.job, Job)
            assert len(order.streams) <= 2
    if len(found.orders) > 1 and not found.faults:
        check([order.job for order in found.orders], found.pipes)


def check_message(data: bytes) -> None:
    try:
        said = wire.message(data)
    except Refusal:
        return
    if isinstance(said, wire.Input):
        assert wire.output(said.index, said.fd, said.content)[1:] == data[1:]


def check_form(kind: str, body: bytes) -> None:
    try:
        name, content = uploaded(kind, body)
    except Refusal:
        return
    assert name
    assert content in body


class Stream:
    """A connection that brings these bytes in these pieces, then its end."""

    def __init__(self, data: bytes, size: int) -> None:
        self._pieces = [data[start : start + size] for start in range(0, len(data), size)]

    async def receive_some(self, _: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._pieces.pop(0) if self._pieces else b""

    async def send_all(self, _: bytes) -> None:
        await trio.lowlevel.checkpoint()


async def listen(data: bytes, size: int) -> None:
    stream = Stream(data, size)
    conversation = Conversation(Wire(stream), Peer(address="x"))  # type: ignore[arg-type]
    head = Plain("GET", "/ws", {name.lower(): value for name, value in UPGRADE}, b"", b"")
    try:
        async with accepted(Request(conversation, head), 100) as socket:
            while True:
                assert len(await socket.receive()) <= 100
    except Gone:
        return


def check_socket(data: bytes, size: int) -> None:
    trio.run(listen, data, size)


def check_name(name: str) -> None:
    place = inside(name)
    if place is not None:
        assert place
        assert not place.startswith("/")
        assert ".." not in place.split("/")


def fuzz(examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck),
        database=None,
    )  # fmt: skip
    @given(
        requests, st.booleans(), messages, st.tuples(kinds, forms), names,
        st.tuples(frames, st.sampled_from([1, 3, 999])),
    )  # fmt: skip
    def whatever(
        body: bytes,
        live: bool,
        message: bytes,
        form: tuple[str, bytes],
        name: Any,
        frame: tuple[bytes, int],
    ) -> None:
        check_socket(*frame)
        check_request(body, live)
        check_message(message)
        check_form(*form)
        check_name(name)

    whatever()


if __name__ == "__main__":
    fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
