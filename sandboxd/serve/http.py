"""One HTTP/1.1 connection: requests in, replies out, and noticing that the other side has gone.

Theory of operation. h11 knows the protocol; here are the bytes, the clocks and the bounds. A head
must come within HEAD_TIME and is at most HEAD_SIZE; a body comes at no less than SLOWEST bytes a
second and is at most what its route takes. One request is answered at a time. While a
job is waited for, what the peer sends ahead (a pipelined request) stays in the socket, and
lookout.py tells of its end. While a reply is streamed the socket is read for that: up to AHEAD
bytes are held, and more ends the connection.

Whoever breaks the protocol gets an answer if one can still be sent, and is disconnected.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import trio

from sandboxd.serve import swift
from sandboxd.serve.done import Done
from sandboxd.serve.wire import Refusal, encode
from sandboxd.serve.wires import BROKEN, Wire
from sandboxd.supervise.one_error import one_error

HEAD_SIZE = 32 << 10
HEAD_TIME = 10.0
"""Seconds in which a head must be complete, from its first byte."""
IDLE_TIME = 60.0
"""Seconds in which the next request must begin: looked at for all connections at once."""
BODY_TIME = 20.0
"""Seconds that a body may take on top of what its size takes at SLOWEST."""
SLOWEST = 4096
"""Bytes a second that a body comes at, at least."""
AHEAD = 64 << 10
LINGER = 1.0
"""Seconds in which what is still on its way to us is thrown away, so that our answer arrives."""

USUAL = 64
"""Characters of a target that others may well send, too: the last ones are read once."""

JSON = "application/json"
PROBLEM = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is on the other end of a connection: a uid on a Unix socket, else an address."""

    uid: int | None = None
    address: str = ""
    certificate: str = ""
    """The name in one that was verified."""


@dataclass(slots=True)
class Reply:
    """An answer: a body, or a stream of pieces that lasts as long as it takes."""

    status: int = 200
    body: bytes = b""
    kind: str = JSON
    headers: list[tuple[str, str]] = field(default_factory=list)
    stream: AsyncGenerator[bytes, None] | None = None
    replied: Callable[[], None] | None = None
    """Called when it is sent, or cannot be."""
    ended: Callable[[], Awaitable[None]] | None = None
    """Called in every ending of a stream, also where it never began."""

    @classmethod
    def of(cls, value: object, status: int = 200) -> Reply:
        return cls(status, encode(value))

    @classmethod
    def no(cls, refusal: Refusal) -> Reply:
        return cls(refusal.status, encode(refusal.json()), PROBLEM, list(refusal.headers))


Handler = Callable[["Request"], Awaitable[Reply]]


class Gone(Exception):
    """The other side closed the connection, or broke off."""


class Conversation:
    """The bytes of one connection, and h11's view of them."""

    def __init__(self, wire: Wire, peer: Peer) -> None:
        self.peer = peer
        self.wire = wire
        self.machine = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_SIZE)
        self._ahead = bytearray()
        self._ended = False
        self.scope = trio.CancelScope()
        """Round all of it."""
        self._idle_since = math.inf

    async def _receive(self) -> None:
        """Give h11 what comes next."""
        if self._ahead:
            data = bytes(self._ahead)
            self._ahead.clear()
        elif self._ended:
            data = b""
        else:
            data = await self._read()
        self.machine.receive_data(data)

    async def _read(self) -> bytes:
        """One task at a time: who reads a body does not wait for the end meanwhile."""
        data = await self.wire.receive()
        self._ended = not data
        return data

    def ahead(self) -> bytes:
        """What came behind a request, for who goes on without h11."""
        data, _ = self.machine.trailing_data
        return data + bytes(self._ahead)

    async def next_event(self, deadline: float = math.inf) -> h11.Event | type[h11.PAUSED]:
        """trio.TooSlowError after the deadline."""
        while True:
            event = self.machine.next_event()
            if not isinstance(event, type) or event is h11.PAUSED:
                return event
            if self.machine.they_are_waiting_for_100_continue:
                await self.send(h11.InformationalResponse(status_code=100, headers=[]))
            with trio.fail_at(deadline):
                await self._receive()

    async def send(self, *events: h11.Event) -> None:
        """Gone if the peer has."""
        await self.say(b"".join(self.machine.send(event) or b"" for event in events))

    async def wait_gone(self) -> None:
        """Returns when the peer has closed its side, or sends too much ahead."""
        while not self._ended:
            data = await self._read()
            self._ahead += data
            if len(self._ahead) > AHEAD:
                return

    def end_idle(self, now: float) -> None:
        """If no request has come for too long."""
        if now - self._idle_since > IDLE_TIME:
            self.scope.cancel()

    async def next_request(self) -> Request | None:
        """The next one; None at the connection's end. Refusal for what is none."""
        if not self.machine.trailing_data[0] and not self._ahead and not self._ended:
            self._idle_since = trio.current_time()
            self._ahead += await self._read()
            self._idle_since = math.inf
            if self.scope.cancel_called:  # at the very moment that something came
                return None
        if not self.machine.trailing_data[0]:
            if (plain := swift.read(bytes(self._ahead))) is not None:
                self._ahead.clear()
                return Request(self, plain)
            await self._receive()
        try:
            event = await self.next_event(trio.current_time() + HEAD_TIME)
        except trio.TooSlowError:
            raise Refusal(408, "request", "the head did not come to its end") from None
        if not isinstance(event, h11.Request):
            return None
        if _size(event) > HEAD_SIZE:  # it came so fast that h11 had all of it before it looked
            raise Refusal(431, "request", f"a head of more than {HEAD_SIZE} bytes")
        return Request(self, _plain(event))

    def read_formally(self, data: bytes) -> None:
        """Let h11 know of a request that it has not read, so that it can say the rest."""
        self.machine.receive_data(data)
        while not isinstance(self.machine.next_event(), h11.EndOfMessage):
            pass

    async def say(self, data: bytes) -> None:
        """Gone if the peer has."""
        try:
            await self.wire.send(data)
        except BROKEN:
            raise Gone from None

    async def linger(self) -> None:
        """Throw away what is still coming: closing with unread data would take our answer back."""
        with trio.move_on_after(LINGER):
            await self.wire.end()
            for _ in range(256):
                if self._ended or not await self._read():
                    break


class Request:
    """A request whose head is here; its body is read when somebody asks for it."""

    def __init__(self, conversation: Conversation, head: swift.Plain) -> None:
        self.conversation = conversation
        self.method = head.method
        self.headers = head.headers
        self.path, self.query = _places(head.target)
        self.body_read = bool(head.data)
        self.plain: swift.Plain | None = head if head.data else None
        """Where h11 has not seen it."""

    @property
    def peer(self) -> Peer:
        return self.conversation.peer

    @property
    def handle(self) -> int | None:
        """The socket it came by."""
        return self.conversation.wire.handle

    @property
    def length(self) -> int | None:
        """What the head says of the body's size; None where it comes in chunks."""
        if "transfer-encoding" in self.headers:
            return None
        return int(self.headers.get("content-length", "0"))

    async def chunks(self, most: int, *, patient: bool = False) -> AsyncGenerator[bytes, None]:
        """The body, piece by piece; 413 above `most`. A patient reader lets it come slowly."""
        if self.length is not None and self.length > most:
            raise Refusal(413, "request", f"a body of {self.length} bytes, and {most} is the most")
        if self.plain is not None:
            if self.plain.body:
                yield self.plain.body
            return
        count, began = 0, trio.current_time()
        while True:
            deadline = math.inf if patient else began + BODY_TIME + count / SLOWEST
            try:
                event = await self.conversation.next_event(deadline)
            except trio.TooSlowError:
                raise Refusal(408, "request", "the body came too slowly") from None
            if isinstance(event, h11.EndOfMessage):
                self.body_read = True
                return
            if not isinstance(event, h11.Data):
                raise Gone
            count += len(event.data)
            if count > most:
                raise Refusal(413, "request", f"a body of more than {most} bytes")
            ours = trio.current_time()
            yield bytes(event.data)
            began += trio.current_time() - ours

    async def body(self, most: int) -> bytes:
        if self.plain is not None and len(self.plain.body) <= most:
            return self.plain.body
        async with contextlib.aclosing(self.chunks(most)) as pieces:
            return b"".join([piece async for piece in pieces])

    async def waits(self, done: Done, seconds: float) -> bool:
        """Wait for it, or so long; False if the peer has gone meanwhile."""
        scope = done.until()
        if seconds < math.inf:
            scope.deadline = trio.current_time() + seconds
        try:
            with scope:
                await self.conversation.wait_gone()
        finally:
            done.forget(scope)
        return scope.cancelled_caught or done.is_set()

    @contextlib.asynccontextmanager
    async def until_gone(self) -> AsyncIterator[trio.CancelScope]:
        """Cancels the block when the peer goes away; the scope says whether it did."""
        with one_error():
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()

                async def watch() -> None:
                    await self.conversation.wait_gone()
                    scope.cancel()

                nursery.start_soon(watch)
                with scope:
                    yield scope
                nursery.cancel_scope.cancel()


def _size(head: h11.Request) -> int:
    return len(head.target) + sum(len(name) + len(value) + 4 for name, value in head.headers)


def _plain(head: h11.Request) -> swift.Plain:
    headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
    return swift.Plain(head.method.decode("ascii"), head.target.decode("ascii"), headers, b"", b"")


def _places(target: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The parts of the path, and the query; Refusal 400 if it cannot be read."""
    path, pairs = _usual(target) if len(target) <= USUAL else _parted(target)
    return path, dict(pairs)


def _parted(target: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    try:
        parts = urlsplit(target)
        pairs = parse_qsl(parts.query, keep_blank_values=True, max_num_fields=32)
    except ValueError as error:
        raise Refusal(400, "request", f"the target cannot be read: {error}") from None
    return tuple(unquote(part) for part in parts.path.split("/")[1:]), tuple(pairs)


_usual = functools.lru_cache(maxsize=256)(_parted)


# -- replies ---------------------------------------------------------------------------------


async def converse(conversation: Conversation, handle: Handler, date: Callable[[], str]) -> None:
    """Answer requests until the connection ends."""
    try:
        with conversation.scope:
            while await _exchange(conversation, handle, date):
                pass
    except (Gone, trio.BrokenResourceError, trio.ClosedResourceError):
        return
    except h11.LocalProtocolError:  # what we say does not fit what was said before: hang up
        return


async def _exchange(conversation: Conversation, handle: Handler, date: Callable[[], str]) -> bool:
    """One request and its reply; whether another may follow."""
    request = None
    try:
        request = await conversation.next_request()
        if request is None:
            return False
        reply = await handle(request)
    except Refusal as refusal:
        reply = Reply.no(refusal)
    except h11.RemoteProtocolError as error:
        status = error.error_status_hint
        reply = Reply.no(Refusal(status, "request", f"no HTTP/1.1: {error}"))
        request = None
    try:
        if request is not None and request.plain is not None and reply.stream is None:
            return await _reply_plainly(conversation, reply, date())
        return await _reply(conversation, reply, request, date())
    finally:
        if reply.replied is not None:
            reply.replied()


async def _reply(
    conversation: Conversation, reply: Reply, request: Request | None, date: str
) -> bool:
    """As h11 has it."""
    if request is not None and request.plain is not None:
        conversation.read_formally(request.plain.data)
    if request is not None and not request.body_read and await _has_no_body(request):
        request.body_read = True
    closing = request is None or not request.body_read
    try:
        await _send(conversation, reply, (date, closing, request))
    finally:
        if reply.ended is not None:
            with trio.CancelScope(shield=True):
                await reply.ended()
    if closing or conversation.machine.our_state is h11.MUST_CLOSE:
        if closing:
            await conversation.linger()
        return False
    if conversation.machine.their_state is h11.DONE:
        conversation.machine.start_next_cycle()
        return True
    return False


async def _reply_plainly(conversation: Conversation, reply: Reply, date: str) -> bool:
    """To a request that h11 knows nothing of."""
    await conversation.say(swift.written(reply.status, _headers(reply, date), reply.body))
    return True


def _headers(reply: Reply, date: str) -> list[tuple[str, str]]:
    headers = [("Date", date), ("Content-Type", reply.kind), *reply.headers]
    return [*headers, ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]


async def _has_no_body(request: Request) -> bool:
    """Whether there is nothing to read; its end is then taken from h11."""
    if request.length != 0:
        return False
    try:
        async with contextlib.aclosing(request.chunks(0)) as pieces:
            return [piece async for piece in pieces] == []
    except (Refusal, h11.RemoteProtocolError):
        return False


async def _send(
    conversation: Conversation, reply: Reply, how: tuple[str, bool, Request | None]
) -> None:
    date, closing, request = how
    if conversation.machine.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        raise Gone
    headers = _headers(reply, date)
    if closing:
        headers.append(("Connection", "close"))
    silent = request is not None and request.method == "HEAD"
    if reply.stream is None:
        if reply.status != 204:
            headers.append(("Content-Length", str(len(reply.body))))
        body = [] if silent or not reply.body else [h11.Data(data=reply.body)]
        await conversation.send(_head(reply.status, headers), *body, h11.EndOfMessage())
        return
    async with contextlib.aclosing(reply.stream):
        if silent or request is None:
            await conversation.send(_head(reply.status, headers), h11.EndOfMessage())
            return
        async with request.until_gone() as scope:
            await conversation.send(_head(reply.status, headers))
            async for piece in reply.stream:
                await conversation.send(h11.Data(data=piece))
            await conversation.send(h11.EndOfMessage())
        if scope.cancelled_caught:
            raise Gone


def _head(status: int, headers: Iterable[tuple[str, str]]) -> h11.Response:
    reason = HTTPStatus(status).phrase
    return h11.Response(status_code=status, headers=list(headers), reason=reason)


# -- who is there ----------------------------------------------------------------------------


def peer_of(stream: trio.SocketStream) -> Peer:
    """SO_PEERCRED of unix(7): the uid that connected, as the kernel saw it then."""
    if stream.socket.family == socket.AF_UNIX:
        credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return Peer(uid=int.from_bytes(credentials[4:8], "little", signed=False))
    try:
        return Peer(address=stream.socket.getpeername()[0])
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return Peer(address="gone")
