"""A client without trio, for programs that do one thing and end: it must start in no time."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import h11

from sandboxd.serve.address import Tcp, Unix
from sandboxd.serve.problems import check_peer, lost, no_daemon, not_believed, refused
from sandboxd.serve.tls import Trust, of_client

CHUNK = 64 << 10


@dataclass(slots=True)
class Answer:
    """The head of an answer; `pieces` is its body, to be read once."""

    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes]

    def body(self) -> bytes:
        return b"".join(self.pieces)

    def json(self) -> Any:
        return json.loads(self.body())

    def lines(self) -> Iterator[bytes]:
        rest = b""
        for piece in self.pieces:
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines


@dataclass(frozen=True, slots=True)
class Plain:
    """A daemon; each request has a connection of its own."""

    address: Unix | Tcp
    token: str | None = None
    trust: Trust | None = None
    """None: as the environment says."""
    traceparent: str | None = None
    """W3C Trace Context, of whoever asks."""

    @contextmanager
    def asking(
        self,
        method: str,
        target: str,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Iterator[Answer]:
        """An answer. Problems are exceptions."""
        broken: tuple[type[Exception], ...] = (ConnectionError, h11.ProtocolError)
        with self._connected() as sock:
            broken += _of_tls(self.address)
            try:
                answer = self._ask(sock, (method, target, headers), body)
                if answer.status >= 400:
                    raise refused(answer.status, answer.body())
                yield answer
            except broken as error:
                raise lost(self.address, error) from error

    def ask(self, method: str, target: str, body: object = None) -> Any:
        """The JSON of an answer."""
        data = None if body is None else json.dumps(body).encode()
        with self.asking(method, target, data) as answer:
            return answer.json()

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        try:
            if isinstance(self.address, Unix):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.connect(os.fspath(self.address.path))
            else:
                sock = socket.create_connection((self.address.host, self.address.port))
        except OSError as error:
            raise no_daemon(self.address, error) from None
        with sock:
            if isinstance(self.address, Tcp) and self.address.tls:
                with self._secret(sock, self.address) as secret:
                    yield secret
                return
            if isinstance(self.address, Unix):
                check_peer(sock.fileno(), self.address)
            yield sock

    def _secret(self, sock: socket.socket, address: Tcp) -> socket.socket:
        believed = of_client(self.trust or Trust.named(os.environ))
        try:
            return believed.wrap_socket(sock, server_hostname=address.host)
        except OSError as error:
            raise not_believed(address, error) from None

    def _ask(
        self,
        sock: socket.socket,
        what: tuple[str, str, Mapping[str, str]],
        body: bytes | Iterable[bytes] | None,
    ) -> Answer:
        method, target, more = what
        host = "localhost" if isinstance(self.address, Unix) else self.address.place
        headers = {"Host": host, **more}
        if self.traceparent is not None:
            headers["traceparent"] = self.traceparent
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        if isinstance(body, bytes):
            headers["Content-Length"] = str(len(body))
            body = [body]
        elif body is not None:
            headers["Transfer-Encoding"] = "chunked"
        machine = h11.Connection(h11.CLIENT)
        head = h11.Request(method=method, target=target, headers=list(headers.items()))
        with suppress(ConnectionError):  # it may have said why before it hung up
            sock.sendall(machine.send(head) or b"")
            for piece in body or ():
                sock.sendall(machine.send(h11.Data(data=piece)) or b"")
            sock.sendall(machine.send(h11.EndOfMessage()) or b"")
        event = _next(sock, machine)
        while isinstance(event, h11.InformationalResponse):
            event = _next(sock, machine)
        if not isinstance(event, h11.Response):
            raise h11.RemoteProtocolError("no answer")
        found = {name.decode(): value.decode("latin-1") for name, value in event.headers}
        return Answer(event.status_code, found, _pieces(sock, machine))


def _of_tls(address: Unix | Tcp) -> tuple[type[Exception], ...]:
    """What goes wrong on a connection in secret."""
    if isinstance(address, Unix) or not address.tls:
        return ()
    import ssl

    return (ssl.SSLError,)


def _next(sock: socket.socket, machine: h11.Connection) -> Any:
    while (event := machine.next_event()) is h11.NEED_DATA:
        machine.receive_data(sock.recv(CHUNK))
    return event


def _pieces(sock: socket.socket, machine: h11.Connection) -> Iterator[bytes]:
    while isinstance(event := _next(sock, machine), h11.Data):
        yield bytes(event.data)
