"""Whatever bytes come in: an answer or a closed connection, never a traceback, and soon."""

from __future__ import annotations

import logging
import math
import runpy

import pytest
import trio

from sandboxd.serve import http, server
from sandboxd.serve.http import Conversation
from sandboxd.serve.wires import Wire
from tests.serve.serving import ROOT, daemon, head, raw

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
POST = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"

WRONG = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    "two lengths": (
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        400,
    ),
    "a length and chunks": (
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        400,
    ),
    "a length that is none": (POST.replace(b"%d", b"-1"), 400),
    "an encoding nobody knows": (
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501,
    ),
    "a chunk that is none": (
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400,
    ),
    "a line that is folded": (b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n\0c\r\n\r\n", 400),
    "a head without end": (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 70_000, 431),
    "a head that is too large, and all there": (
        GET.replace(b"\r\n\r\n", b"\r\nX: " + b"x" * 40_000 + b"\r\n\r\n"), 431),
    "a body that is too large": (POST % (1 << 40), 413),
    "no JSON": (POST % 1 + b"{", 400),
    "JSON that is too deep": (POST % 100_000 + b"[" * 100_000, 422),
    "half a pair of UTF-16": (POST % 19 + rb'{"argv":["\udc80"]}', 400),
    "a number that is too large": (POST % 30 + b'{"argv":["a"],"keep":1e999999}', 422),
    "a path that is none": (b"GET /%ff%00/../x HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "a target that is none": (b"GET http://[x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a method nobody knows": (b"BREW /v1/jobs HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "an upgrade": (b"GET /v1/info HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\n"
                   b"Upgrade: websocket\r\n\r\n", 200),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
async def test_what_is_wrong_is_answered(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "IDLE_TIME", 0.3)
    caplog.set_level(logging.ERROR)
    data, status = WRONG[name]
    async with daemon() as served:
        assert head(await raw(served.place, data)) == status
        assert head(await raw(served.place, LAST)) == 200
    assert not caplog.records


async def test_pipelined_requests_are_answered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "IDLE_TIME", 0.3)
    body = b'{"argv": ["true"]}'
    waiting = b"POST /v1/jobs?wait=1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with daemon() as served:
        data = await raw(served.place, waiting + body + GET + waiting + body + GET)
        assert data.count(b"HTTP/1.1 200 OK") == 4
        assert data.count(b'"status":"ok"') == 4  # of the view and of the record
        assert data.endswith(b"ok\n")


async def test_what_is_sent_ahead_stays_in_the_socket() -> None:
    body = b'{"argv": ["sleep", "100"]}'
    waiting = b"POST /v1/jobs?wait=1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with daemon() as served:
        async with await trio.open_unix_socket(str(served.place / "s")) as stream:
            await stream.send_all(waiting + body)
            while not (await served.ask("GET", "/v1/info"))["running"]:
                pass
            with trio.move_on_after(0.5) as patience:
                await stream.send_all(GET * 1_000_000)
            assert patience.cancelled_caught  # it is full, and the job goes on
            assert (await served.ask("GET", "/v1/info"))["running"] == 1
        while (await served.ask("GET", "/v1/info"))["running"]:
            pass


async def test_who_hangs_up_leaves_neither_slot_nor_place_in_the_queue() -> None:
    body = b'{"argv": ["sleep", "100"]}'
    waiting = b"POST /v1/jobs?wait=1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with daemon() as served:
        streams = []
        for number in range(40):
            stream = await trio.open_unix_socket(str(served.place / "s"))
            await stream.send_all(waiting + body)
            if number % 5 == 0:
                await stream.aclose()  # before it was looked at, perhaps
            elif number % 5 == 1:
                await stream.send_eof()  # who says that nothing more comes waits no more, either
                streams.append(stream)
            else:
                streams.append(stream)
        while (await served.ask("GET", "/v1/info"))["running"] == 0:
            pass
        for stream in streams[::2] + streams[1::2]:  # of those that run, and of those that wait
            await stream.aclose()
        while (found := await served.ask("GET", "/v1/info"))["running"] or found["queued"]:
            pass
        quick = await served.ask("POST", "/v1/jobs?wait=1", {"argv": ["true"]})
        assert quick["result"]["status"] == "ok"


async def test_half_a_head_and_half_a_body_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_TIME", 0.2)
    monkeypatch.setattr(http, "BODY_TIME", 0.2)
    async with daemon() as served:
        assert head(await raw(served.place, GET[:20])) == 408
        assert head(await raw(served.place, POST % 100 + b'{"argv"')) == 408


async def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "IDLE_TIME", 0.2)
    async with daemon() as served:
        assert await raw(served.place) == b""
        assert head(await raw(served.place, GET)) == 200


class Swept(Wire):
    """Something comes at the very moment that its connection is idle for too long."""

    conversation: Conversation

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        self.conversation.end_idle(math.inf)
        return GET


async def test_a_request_that_comes_when_the_patience_ends_is_not_begun() -> None:
    """Cancelled half-way it would have been: accepted, and nobody told, and nobody to run it."""
    near, _ = trio.testing.memory_stream_pair()
    wire = Swept(near)
    wire.conversation = Conversation(wire, http.Peer())
    handled = []

    async def handle(request: http.Request) -> http.Reply:
        handled.append(request)
        return http.Reply()

    await http.converse(wire.conversation, handle, lambda: "")
    assert not handled


async def test_a_body_is_asked_for_when_it_is_wanted() -> None:
    async with daemon() as served:
        async with await trio.open_unix_socket(str(served.place / "s")) as stream:
            asking = POST.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
            await stream.send_all(asking % 18)
            assert head(bytes(await stream.receive_some(1000))) == 100
            await stream.send_all(b'{"argv": ["true"]}')
            assert head(bytes(await stream.receive_some(1000))) == 202


async def test_many_who_say_nothing_hold_up_nobody() -> None:
    async with daemon() as served:
        async with trio.open_nursery() as nursery:
            streams = [await trio.open_unix_socket(str(served.place / "s")) for _ in range(100)]
            for number, stream in enumerate(streams):
                await stream.send_all((POST % 100)[: number % 60])
            view = await served.ask("POST", "/v1/jobs?wait=1", {"argv": ["true"]})
            assert view["status"] == "ok"
            for stream in streams:
                nursery.start_soon(stream.aclose)


async def test_one_connection_too_many_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "most_connections", lambda _: 2)
    async with daemon() as served:
        async with (
            await trio.open_unix_socket(str(served.place / "s")) as one,
            await trio.open_unix_socket(str(served.place / "s")) as two,
        ):
            for stream in (one, two):
                await stream.send_all(GET)
                assert head(bytes(await stream.receive_some(1000))) == 200
            assert head(await raw(served.place)) == 503
        while head(await raw(served.place, LAST)) != 200:  # they have left, or will at once
            pass


def test_what_the_fuzzer_does() -> None:
    """A moment of it; ./do fuzz serve goes on."""
    runpy.run_path(str(ROOT / "fuzz" / "serve.py"))["fuzz"](examples=150)
