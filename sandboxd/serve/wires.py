"""The bytes of a connection, in and out: of a socket as directly as can be, or of any stream."""

from __future__ import annotations

import contextlib
import os
import socket

import trio

CHUNK = 64 << 10
STALL_TIME = 300.0
"""Seconds in which a reader takes something of a reply, at least."""
BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)


class Wire:
    """A stream of trio's."""

    def __init__(self, stream: trio.abc.Stream, handle: int | None = None) -> None:
        self._stream = stream
        self.handle = handle
        """The socket's, where its end can be looked out for."""

    async def receive(self) -> bytes:
        """What came; nothing at the end, or where it broke off."""
        try:
            return bytes(await self._stream.receive_some(CHUNK))
        except BROKEN:
            return b""

    async def send(self, data: bytes) -> None:
        """One of BROKEN if the peer has gone, or takes nothing for STALL_TIME."""
        await self._send(memoryview(data))

    async def _send(self, rest: memoryview) -> None:
        while rest:
            with trio.fail_after(STALL_TIME):
                await self._stream.send_all(rest[:CHUNK])
            rest = rest[CHUNK:]

    async def end(self) -> None:
        """Nothing more is sent; what comes may still be received."""
        if isinstance(self._stream, trio.abc.HalfCloseableStream):
            with contextlib.suppress(*BROKEN):
                await self._stream.send_eof()


class SocketWire(Wire):
    """A socket, by read(2) and write(2): most requests come, and most replies go, in one piece."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream, stream.socket.fileno())
        self._socket = stream.socket
        self._handle = stream.socket.fileno()

    async def receive(self) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._handle)
            try:
                return os.read(self._handle, CHUNK)
            except BlockingIOError:  # it was taken back
                continue
            except OSError:
                return b""

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        with contextlib.suppress(BlockingIOError):
            rest = rest[os.write(self._handle, rest) :]
        await self._send(rest)

    async def end(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
