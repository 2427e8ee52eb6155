"""The client of HTTP/1.1 on trio: connections that are kept, answers read as they come."""

from __future__ import annotations

import select
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import h11
import msgspec
import trio

from sandboxd.errors import SandboxError
from sandboxd.serve.address import Tcp, Unix
from sandboxd.serve.problems import check_peer, lost, no_daemon, not_believed, refused
from sandboxd.serve.tls import Trust, of_client

CHUNK = 64 << 10
KEPT = 16
"""Idle connections."""


@dataclass(slots=True)
class Answer:
    """The head of an answer; `pieces` is its body, to be read once."""

    status: int
    headers: Mapping[str, str]
    pieces: AsyncGenerator[bytes, None]

    async def body(self) -> bytes:
        async with aclosing(self.pieces) as pieces:
            return b"".join([piece async for piece in pieces])

    async def json(self) -> Any:
        return msgspec.json.decode(await self.body())


@dataclass(slots=True)
class _Link:
    stream: trio.abc.Stream
    handle: int
    machine: h11.Connection = field(default_factory=lambda: h11.Connection(h11.CLIENT))

    async def event(self) -> Any:
        while (event := self.machine.next_event()) is h11.NEED_DATA:
            self.machine.receive_data(bytes(await self.stream.receive_some(CHUNK)))
        return event

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        while isinstance(event := await self.event(), h11.Data):
            yield bytes(event.data)

    def is_dead(self) -> bool:
        """Whether the daemon has hung up meanwhile, or said something nobody asked for."""
        waiting = select.poll()
        waiting.register(self.handle, select.POLLIN)
        return bool(waiting.poll(0))


class Links:
    """Connections to one daemon."""

    def __init__(self, address: Unix | Tcp, token: str | None, trust: Trust | None = None) -> None:
        self.address = address
        self._token = token
        tls = isinstance(address, Tcp) and address.tls
        self._believed = of_client(trust or Trust()) if tls else None
        self._idle: list[_Link] = []

    async def _open(self) -> _Link:
        try:
            if isinstance(self.address, Unix):
                stream = await trio.open_unix_socket(str(self.address.path))
                check_peer(stream.socket.fileno(), self.address)
            else:
                stream = await trio.open_tcp_stream(self.address.host, self.address.port)
        except OSError as error:
            raise no_daemon(self.address, error) from None
        handle = stream.socket.fileno()
        if self._believed is None or isinstance(self.address, Unix):
            return _Link(stream, handle)
        secret = trio.SSLStream(
            stream, self._believed, server_hostname=self.address.host, https_compatible=True
        )
        try:
            await secret.do_handshake()
        except BaseException as error:
            await trio.aclose_forcefully(stream)
            if isinstance(error, trio.BrokenResourceError):
                raise not_believed(self.address, error.__cause__ or error) from None
            raise
        return _Link(secret, handle)

    async def _take(self) -> _Link:
        while self._idle:
            link = self._idle.pop()
            if not link.is_dead():
                return link
            await trio.aclose_forcefully(link.stream)
        return await self._open()

    @asynccontextmanager
    async def asking(
        self,
        method: str,
        target: str,
        body: bytes | AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Answer]:
        """An answer; the connection is kept if all of it was read. Problems are exceptions."""
        link = await self._take()
        whole = False
        try:
            with self.unbroken():
                answer = await self._ask(link, (method, target, headers or {}), body)
                if answer.status >= 400:
                    raise refused(answer.status, await answer.body())
                yield answer
                async with aclosing(answer.pieces):
                    pass
                states = (link.machine.our_state, link.machine.their_state)
                whole = states == (h11.DONE, h11.DONE)
        finally:
            if whole and len(self._idle) < KEPT:
                link.machine.start_next_cycle()
                self._idle.append(link)
            else:
                await trio.aclose_forcefully(link.stream)

    async def quietly(self, method: str, target: str, body: bytes | None = None) -> None:
        """Ask for what is as good as done if it is over, or the daemon is: who waits hears that."""
        with suppress(SandboxError):
            async with self.asking(method, target, body) as answer:
                await answer.body()

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """HostError in place of what a connection breaks off with; for who reads in a task too."""
        try:
            yield
        except (OSError, trio.BrokenResourceError, h11.ProtocolError) as error:
            raise lost(self.address, error) from error

    async def _ask(
        self,
        link: _Link,
        head: tuple[str, str, Mapping[str, str]],
        body: bytes | AsyncIterator[bytes] | None,
    ) -> Answer:
        method, target, more = head
        headers = {"Host": "localhost", **more}
        if isinstance(self.address, Tcp):
            headers["Host"] = self.address.place
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        if isinstance(body, bytes):
            headers["Content-Length"] = str(len(body))
        elif body is not None:
            headers["Transfer-Encoding"] = "chunked"
        request = h11.Request(method=method, target=target, headers=list(headers.items()))
        with suppress(trio.BrokenResourceError):  # it may have said why before it hung up
            await _send(link, request, body)
        event = await link.event()
        while isinstance(event, h11.InformationalResponse):
            event = await link.event()
        if not isinstance(event, h11.Response):
            raise h11.RemoteProtocolError("no answer")
        found = {name.decode(): value.decode("latin-1") for name, value in event.headers}
        return Answer(event.status_code, found, link.pieces())

    async def close(self) -> None:
        while self._idle:
            await trio.aclose_forcefully(self._idle.pop().stream)


async def _send(
    link: _Link, request: h11.Request, body: bytes | AsyncIterator[bytes] | None
) -> None:
    machine, stream = link.machine, link.stream
    data = machine.send(request) or b""
    if isinstance(body, bytes):
        data += machine.send(h11.Data(data=body)) or b""
    elif body is not None:
        await stream.send_all(data)
        data = b""
        async for piece in body:
            await stream.send_all(machine.send(h11.Data(data=piece)) or b"")
    await stream.send_all(data + (machine.send(h11.EndOfMessage()) or b""))
