"""Whatever bytes come over a connection, the daemon answers or hangs up; it never raises.

And whatever JSON is a submission becomes a Job, or a Refusal, or a SandboxError; never another.
So does what is one of jobs that run together.

    ./do fuzz serve          # until stopped by an error, or after a million examples
    ./do fuzz serve 5000     # that many examples
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import h11
import msgspec
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.errors import SandboxError
from sandboxd.job import Job
from sandboxd.serve.ensemble import (
    GroupSubmission,
    PipelineSubmission,
    group_of,
    member_line,
    pipes_of,
)
from sandboxd.serve.ensemble import bodies as whole
from sandboxd.serve.http import Conversation, Peer, Reply, Request, converse
from sandboxd.serve.wire import Refusal, Submission, decode, digests, job_of, submission, words
from sandboxd.serve.wires import Wire
from sandboxd.supervise import groups, pipeline

METHODS = [b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PRI", b"", b"get", b"\xff"]
TARGETS = [b"/", b"*", b"/a?b=c&d", b"/%00%ff", b"http://[x", b"//", b"/a b", b"?" + b"&" * 50]
HEADERS = [
    *(b"Host: x", b"Host: y", b"Content-Length: 3", b"Content-Length: 0", b"Content-Length: -1"),
    *(b"Content-Length: 3, 3", b"Content-Length: 99999999999999999999", b"Expect: 100-continue"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Connection: close", b": x"),
    *(
        b"Connection: upgrade",
        b"Upgrade: h2c",
        b"A: \xff",
        b"A:\0",
        b" folded",
        b"A: " + b"x" * 999,
    ),
]
BODIES = [
    b"",
    b"abc",
    b"3\r\nabc\r\n0\r\n\r\n",
    b"fffffffff\r\n",
    b"0\r\n\r\n",
    b"x\r\n",
    b"abcabc",
]

requests = st.builds(
    lambda method, target, version, headers, body: b"\r\n".join(
        [b" ".join((method, target, version)), *headers, b"", body]
    ),
    st.sampled_from(METHODS),
    st.one_of(st.sampled_from(TARGETS), st.binary(max_size=8)),
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b""]),
    st.lists(st.sampled_from(HEADERS), max_size=5),
    st.one_of(st.sampled_from(BODIES), st.binary(max_size=8)),
)
connections = st.lists(st.one_of(requests, st.binary(max_size=30)), max_size=4).map(b"".join)


def handler(reads: int, streams: bool) -> Any:
    """One that reads nothing, some or all of a body, and answers with a body or a stream."""

    async def stream() -> Any:
        yield b"a"
        yield b"b"

    async def handle(request: Request) -> Reply:
        if reads == 1:
            async with contextlib.aclosing(request.chunks(5)) as pieces:
                async for _ in pieces:
                    break
        elif reads == 2:
            await request.body(5)
        return Reply(stream=stream()) if streams else Reply(body=b"x")

    return handle


class Stream:
    """A connection that brings these bytes in these pieces, then its end."""

    def __init__(self, data: bytes, size: int) -> None:
        self._pieces = [data[start : start + size] for start in range(0, len(data), size)]
        self.sent = b""

    async def receive_some(self, _: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._pieces.pop(0) if self._pieces else b""

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += data


def check_connection(data: bytes, size: int, handle: Any) -> None:
    stream = Stream(data, size)
    conversation = Conversation(Wire(stream), Peer(address="x"))  # type: ignore[arg-type]
    trio.run(converse, conversation, handle, lambda: "now")
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(stream.sent)
    if stream.sent:  # and what it said is HTTP
        assert isinstance(client.next_event(), h11.Response | h11.InformationalResponse)


KEYS = Submission.__struct_fields__
scalars = st.one_of(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 1 << 70), st.floats(allow_nan=False)),
    st.text(max_size=4),
    st.sampled_from(["base", "a/b", "../x", "\0", "retry", "stall", "é", "0" * 64]),
)  # fmt: skip
names = st.one_of(
    st.sampled_from([*KEYS, "b64", "data", "sha256", "mode", "rows", "memory", "limits", ""]),
    st.text(max_size=3),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=6,
)
likely = st.fixed_dictionaries(
    {"argv": st.lists(st.one_of(st.text(max_size=3), st.just({"b64": "/w=="})), max_size=3)},
    optional={
        "env": st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2),
        "files": st.dictionaries(
            st.text(max_size=4), st.sampled_from([{"data": ""}, {"b64": "AA=="}, {}]), max_size=2
        ),
        "stdin": st.one_of(st.text(max_size=2), st.just({"sha256": "0" * 64})),
        "keep": st.integers(-1, 1 << 30),
        "interactive": st.booleans(),
        "on_lost": st.sampled_from(["retry", "report", ""]),
        "limits": st.dictionaries(st.sampled_from(["memory", "cpu_time"]), st.integers(-1, 9)),
    },
)
bodies = st.one_of(
    likely.map(msgspec.json.encode),
    st.dictionaries(names, values, max_size=5).map(msgspec.json.encode),
    st.binary(max_size=30),
    st.sampled_from(
        [b'{"argv":["\\ud800"]}', b'{"argv":["\\udc80"]}', b"[" * 5000, b'{"argv":' * 99]
    ),
)


def check_submission(body: bytes) -> None:
    try:
        wanted = submission(body)
        assert words(wanted)
        assert digests(wanted) <= {"0" * 64}
        job = job_of(wanted, ("x", None), lambda digest: Path("/store", digest))
    except (Refusal, SandboxError):
        return
    assert isinstance(job, Job)


some = st.one_of(likely, st.dictionaries(names, values, max_size=3), st.just({"argv": ["a"]}))
called = st.one_of(st.sampled_from(["a", "b", "A", "localhost", "x" * 64, ""]), st.text(max_size=3))
places = st.sampled_from(["192.168.100.9", "192.168.100.1", "8.8.8.0/24", "10.0.0.0/29", "x", ""])
member = st.fixed_dictionaries(
    {"job": some},
    optional={
        "address": places,
        "after": st.lists(called, max_size=2),
        "ready": st.sampled_from(["started", "tcp:80", "udp:0", "tcp:99999", "ended", ""]),
    },
)
together = st.one_of(
    st.fixed_dictionaries(
        {"members": st.dictionaries(called, member, max_size=3)},
        optional={"name": called, "main": called, "subnet": places, "id": called,
                  "share": st.sampled_from(["bridge", "network", ""]), "stop": st.just("exit")},
    ),
    st.fixed_dictionaries(
        {"jobs": st.lists(some, max_size=3)},
        optional={
            "pipes": st.lists(st.fixed_dictionaries(
                {"writer": st.integers(-1, 17), "reader": st.integers(-1, 3)},
                optional={"stream": st.sampled_from(["stdout", "stderr", ""])},
            ), max_size=3),
            "usage_every": st.floats(),
        },
    ),
    values,
).map(msgspec.json.encode)  # fmt: skip


def check_together(body: bytes) -> None:
    for kind in (GroupSubmission, PipelineSubmission):
        try:
            wanted = decode(body, kind)
            jobs = {
                name: job_of(submission(one), (name, None), lambda digest: Path("/store", digest))
                for name, one in whole(wanted).items()
            }
            if isinstance(wanted, GroupSubmission):
                groups.check(group_of(wanted, jobs))
            else:
                pipeline.check(list(jobs.values()), pipes_of(wanted))
        except (Refusal, SandboxError):
            continue
        assert member_line(b'{"v":1,"seq":0,"type":"start"}', next(iter(jobs)))


def fuzz(examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck),
        database=None,
    )  # fmt: skip
    @given(
        connections, st.sampled_from([1, 3, 50, 9999]),
        st.builds(handler, st.integers(0, 2), st.booleans()), bodies, together,
    )  # fmt: skip
    def whatever(data: bytes, size: int, handle: Any, body: bytes, several: bytes) -> None:
        check_connection(data, size, handle)
        check_submission(body)
        check_together(several)

    whatever()


if __name__ == "__main__":
    fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
