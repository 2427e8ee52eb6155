"""A WebSocket (RFC 6455), the server's side: wsproto knows it, here are bytes and clocks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio
from wsproto import ConnectionType, WSConnection
from wsproto import events as ws
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from sandboxd.serve.http import Gone, Request
from sandboxd.serve.wire import Refusal
from sandboxd.serve.wires import BROKEN

PING_EVERY = 50.0
SILENCE = 120.0
"""Seconds without a word, not even a pong, after which the other side is taken for dead."""
NORMAL, TOO_LARGE, WRONG = 1000, 1009, 1008


class WebSocket:
    """Made by `accepted`. One task may receive; any may send."""

    def __init__(self, request: Request, most: int) -> None:
        self._wire = request.conversation.wire
        self._machine = WSConnection(ConnectionType.SERVER)
        self._most = most
        self._sending = trio.Lock()
        self._pieces: list[bytes | str] = []
        self._size = 0
        self._events: list[ws.Event] = []
        self._over = False

    async def receive(self) -> bytes | str:
        """The next message; Gone when there will be none."""
        while True:
            while self._events:
                found = await self._take(self._events.pop(0))
                if found is not None:
                    return found
            with trio.move_on_after(SILENCE) as silence:
                await self._read()
            if silence.cancelled_caught:
                raise Gone

    async def _read(self) -> None:
        data = await self._wire.receive()
        if not data:
            raise Gone
        self.feed(data)

    def feed(self, data: bytes) -> None:
        """What has come; Gone if it is no WebSocket."""
        try:
            self._machine.receive_data(data)
            self._events += self._machine.events()
        except (RemoteProtocolError, LocalProtocolError):
            raise Gone from None

    async def _take(self, event: ws.Event) -> bytes | str | None:
        """The message that this completes."""
        if isinstance(event, ws.Ping):
            await self._send(event.response())
        elif isinstance(event, ws.CloseConnection):
            if not self._over:
                self._over = True
                with suppress(Gone):
                    await self._send(event.response())
            raise Gone
        elif isinstance(event, ws.TextMessage | ws.BytesMessage):
            return await self._gather(event)
        return None

    async def _gather(self, event: ws.TextMessage | ws.BytesMessage) -> bytes | str | None:
        piece: bytes | str = event.data if isinstance(event.data, str) else bytes(event.data)
        self._size += len(piece)
        if self._size > self._most:
            await self.close(TOO_LARGE, f"more than {self._most} bytes")
            raise Gone
        self._pieces.append(piece)
        if not event.message_finished:
            return None
        pieces, self._pieces, self._size = self._pieces, [], 0
        if isinstance(piece, str):
            return "".join(one for one in pieces if isinstance(one, str))
        return b"".join(one for one in pieces if isinstance(one, bytes))

    async def send(self, data: bytes | str) -> None:
        """Gone if the other side is, or takes nothing for wires.STALL_TIME."""
        if isinstance(data, str):
            await self._send(ws.TextMessage(data=data))
        else:
            await self._send(ws.BytesMessage(data=data))

    async def _send(self, event: ws.Event) -> None:
        async with self._sending:
            try:
                await self._wire.send(self._machine.send(event))
            except (*BROKEN, LocalProtocolError):
                raise Gone from None

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Say goodbye, once; nothing happens if nobody hears it."""
        if self._over:
            return
        self._over = True
        with suppress(Gone):
            await self._send(ws.CloseConnection(code=code, reason=reason[:100]))

    async def keep_alive(self) -> None:
        """Ping, so that both sides, and whoever is between them, know of each other."""
        while True:
            await trio.sleep(PING_EVERY)
            await self._send(ws.Ping())


@asynccontextmanager
async def accepted(request: Request, most: int) -> AsyncIterator[WebSocket]:
    """The WebSocket that this request asks for; Refusal 400 if it asks for none.

    Messages are of `most` bytes. Afterwards the connection is of no use to anybody else.
    """
    socket = WebSocket(request, most)
    machine = socket._machine
    headers = [(name.encode(), value.encode("latin-1")) for name, value in request.headers.items()]
    try:
        machine.initiate_upgrade_connection(headers, "/" + "/".join(request.path))
        wanted = next(machine.events())
        if not isinstance(wanted, ws.Request):
            raise RemoteProtocolError("no request")
    except (RemoteProtocolError, LocalProtocolError) as error:
        raise Refusal(400, "request", f"no WebSocket: {error}") from None
    await socket._send(ws.AcceptConnection())
    if ahead := request.conversation.ahead():
        socket.feed(ahead)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(socket.keep_alive)
            yield socket
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:  # of those who were sending when it went
        if group.split(Gone)[1] is None:
            raise Gone from None
        raise
    finally:
        with trio.move_on_after(1.0, shield=True):
            await socket.close()
