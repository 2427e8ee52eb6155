"""`sandboxd serve`: from a directory and addresses to a daemon that answers, until told to end.

It ends in this order: no new jobs; those that run may end; then what is left is killed, which the
journal has as running, so the next daemon reports them lost or starts them again; then the sockets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import errno
import functools
import logging
import os
import resource
import signal
import socket
import ssl
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from sandboxd.errors import HostError
from sandboxd.serve import http, systemd
from sandboxd.serve.address import Tcp, Unix
from sandboxd.serve.book import Book, Settings, open_book
from sandboxd.serve.callers import Callers, is_loopback
from sandboxd.serve.gojudge.runs import Runs
from sandboxd.serve.gojudge.server import GoJudge
from sandboxd.serve.gojudge.store import Store
from sandboxd.serve.http import HEAD_TIME, Conversation, converse, peer_of
from sandboxd.serve.journal import open_journal
from sandboxd.serve.metrics import Gauge
from sandboxd.serve.quotas import Budget
from sandboxd.serve.routes import Bounds, Routes
from sandboxd.serve.tls import Shown, name_of, of_daemon
from sandboxd.serve.wires import SocketWire, Wire
from sandboxd.supervise import everything as everything  # loaded now, not with a job
from sandboxd.supervise.one_error import one_error
from sandboxd.supervise.runner import open_runner

BACKLOG = 1024
MOST_CONNECTIONS = 8192
RESERVED = 256
"""Descriptors that are not for connections; and on top for each slot PER_SLOT."""
PER_SLOT = 16
LAST_REPLIES = 2.0
"""Seconds in which replies that are on their way are still sent, at the end."""
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

logger = logging.getLogger("sandboxd.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """All there is to decide."""

    settings: Settings
    addresses: Sequence[Unix | Tcp]
    callers: Callers
    tls: Shown | None = None
    """Of https:// addresses, and of TCP sockets from systemd."""
    bounds: Bounds = field(default_factory=Bounds)
    slots: int | None = None
    spares: int = 0
    cgroup: str | None = None
    gojudge: GoJudgeOptions | None = None
    drain: float = 30.0
    """Seconds that running jobs get when the daemon is told to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoJudgeOptions:
    """A listener for go-judge's protocol."""

    address: Unix | Tcp
    local: Sequence[Path] = ()
    """Directories whose files requests may name by path."""


class Connections:
    """The connections there are, and how many of them wait for a reply."""

    def __init__(self, routes: Routes | GoJudge, most: int) -> None:
        self._routes = routes
        self._most = most
        self.count = 0
        self._open: set[Conversation] = set()
        self._date = (0, "")

    async def serve(self, stream: trio.SocketStream, shown: ssl.SSLContext | None = None) -> None:
        """One of them, to its end; what goes wrong here is nobody else's."""
        self.count += 1
        try:
            if self.count > self._most:
                with trio.move_on_after(1.0), contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(_FULL)
                return
            if shown is not None:
                await self._in_secret(stream, shown)
                return
            await self._converse(Conversation(SocketWire(stream), peer_of(stream)))
        except Exception:
            logger.exception("connection failed")
        finally:
            self.count -= 1
            await trio.aclose_forcefully(stream)

    async def _in_secret(self, stream: trio.SocketStream, shown: ssl.SSLContext) -> None:
        inner = trio.SSLStream(stream, shown, server_side=True, https_compatible=True)
        try:
            with trio.fail_after(HEAD_TIME):
                await inner.do_handshake()
        except (trio.BrokenResourceError, trio.TooSlowError) as error:
            why = str(error.__cause__ or "too slow")
            logger.info("no handshake", extra={"address": peer_of(stream).address, "why": why})
            return
        peer = peer_of(stream)
        if shown.verify_mode == ssl.CERT_REQUIRED:
            name = name_of(inner.getpeercert(), inner.getpeercert(binary_form=True))
            peer = dataclasses.replace(peer, certificate=name)
        wire = Wire(inner, stream.socket.fileno())
        await self._converse(Conversation(wire, peer))

    async def _converse(self, conversation: Conversation) -> None:
        self._open.add(conversation)
        try:
            await converse(conversation, self._routes.handle, self._now)
        finally:
            self._open.remove(conversation)

    async def sweep(self) -> None:
        """End the idle ones: a deadline for each would cost every request something."""
        while True:
            await trio.sleep(min(1.0, http.IDLE_TIME / 4))
            now = trio.current_time()
            for one in self._open:
                one.end_idle(now)

    def _now(self) -> str:
        """The Date of replies; made once a second."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = now, email.utils.formatdate(now, usegmt=True)
        return self._date[1]


async def serve(options: Options, *, ready: Callable[[Book], None] = lambda _: None) -> None:
    """Serve until SIGTERM or SIGINT, or until cancelled. HostError if it cannot begin."""
    with one_error(), trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with (
            open_journal(options.settings.state) as journal,
            open_runner(
                slots=options.slots, spares=options.spares, cgroup=options.cgroup
            ) as runner,
            open_book(runner, journal, options.settings) as book,
        ):
            routes = Routes(book, options.callers, options.bounds)
            await routes.batches.recover()
            connections = Connections(routes, most_connections(runner.slots))
            _gauges(book, connections)
            async with (
                _listening(options) as listeners,
                _gojudge(book, options) as more,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(connections.sweep)
                for listener, shown in listeners:
                    handle = functools.partial(connections.serve, shown=shown)
                    nursery.start_soon(trio.serve_listeners, handle, [listener])
                for accepting, where in more:
                    nursery.start_soon(accepting.sweep)
                    nursery.start_soon(trio.serve_listeners, accepting.serve, where)
                systemd.notify("READY=1")
                logger.info("ready")
                ready(book)
                await anext(aiter(signals))
                await _end(book, signals, options.drain)
                nursery.cancel_scope.cancel()


async def _end(book: Book, signals: AsyncIterator[int], seconds: float) -> None:
    """A second signal does not wait for anything."""
    systemd.notify("STOPPING=1")
    logger.info("draining")
    async with trio.open_nursery() as nursery:

        async def impatient() -> None:
            await anext(signals)
            nursery.cancel_scope.cancel()

        nursery.start_soon(impatient)
        drained = await book.drain(seconds)
        if not drained:
            logger.warning("jobs are left that had not ended in time")
        with trio.move_on_after(LAST_REPLIES):
            await book.replied()
        nursery.cancel_scope.cancel()


def most_connections(slots: int) -> int:
    """As many as there are descriptors for; the soft limit is raised to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(16, min(MOST_CONNECTIONS, soft - RESERVED - slots * PER_SLOT))


def _gauges(book: Book, connections: Connections) -> None:
    metrics, share, runner = book.metrics, book.share, book.runner
    for one in (
        Gauge("sandboxd_jobs_running", "jobs that have a slot", lambda: share.running,
              share.running_of),
        Gauge("sandboxd_jobs_queued", "jobs that wait for one", lambda: share.queued,
              share.queued_of),
        Gauge("sandboxd_stored_bytes", "files that are stored", book.stored, book.stored_of),
        Gauge("sandboxd_slots", "jobs that may run at once", lambda: runner.slots, told=True),
        Gauge("sandboxd_spares", "sandboxes made ahead", lambda: runner.statistics().spares),
        Gauge("sandboxd_connections", "connections", lambda: connections.count),
    ):  # fmt: skip
        metrics.gauge(one)


@contextlib.asynccontextmanager
async def _gojudge(
    book: Book, options: Options
) -> AsyncIterator[list[tuple[Connections, list[trio.SocketListener]]]]:
    """What listens for go-judge's protocol, if anything does."""
    if options.gojudge is None:
        yield []
        return
    settings, bounds = options.settings, options.bounds
    store = Store(settings.state / "go-judge", settings.quotas.stored)
    await trio.to_thread.run_sync(store.open)
    book.stores.append(store)
    runs = Runs(book, store, options.gojudge.local)
    handler = GoJudge(runs, options.callers, bounds.body, Budget(bounds.bodies))
    connections = Connections(handler, most_connections(book.runner.slots))
    async with contextlib.AsyncExitStack() as stack:
        sockets = await _bound(options.gojudge.address, options, stack)
        listeners = [await _listener(one, stack) for one in sockets]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.keep_small, settings.age)
            yield [(connections, listeners)]
            nursery.cancel_scope.cancel()


# -- listening -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _listening(
    options: Options,
) -> AsyncIterator[list[tuple[trio.SocketListener, ssl.SSLContext | None]]]:
    shown = of_daemon(options.tls) if options.tls is not None else None
    async with contextlib.AsyncExitStack() as stack:
        sockets = [(one, one.family != socket.AF_UNIX) for one in systemd.activated(os.environ)]
        if not sockets:
            for address in options.addresses:
                tls = isinstance(address, Tcp) and address.tls
                sockets += [(one, tls) for one in await _bound(address, options, stack)]
        listeners = []
        for one, tls in sockets:
            _check_open(one, options, tls=tls)
            listeners.append((await _listener(one, stack), shown if tls else None))
        yield listeners


async def _listener(one: socket.socket, stack: contextlib.AsyncExitStack) -> trio.SocketListener:
    one.setblocking(False)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(one))
    return await stack.enter_async_context(listener)


def _check_open(listening: socket.socket, options: Options, *, tls: bool) -> None:
    """A socket that other machines reach needs callers we know, wherever it came from."""
    if listening.family != socket.AF_UNIX:
        host, port = listening.getsockname()[:2]
        _check_reached(Tcp(host, port, tls), options)


def _check_reached(address: Tcp, options: Options) -> None:
    asks = address.tls and options.tls is not None and options.tls.client_ca is not None
    if not (options.callers.tokens or asks or is_loopback(address.host)):
        raise HostError(
            "tokens",
            f"{address.place} can be reached from elsewhere",
            hint="--token-file FILE, https:// with --tls-client-ca FILE, or a loopback address",
        )


async def _bound(
    address: Unix | Tcp, options: Options, stack: contextlib.AsyncExitStack
) -> list[socket.socket]:
    if isinstance(address, Unix):
        others = options.callers.uids - {os.getuid()}
        return [stack.enter_context(_unix(address.path, 0o666 if others else 0o600))]
    _check_reached(address, options)
    if address.tls and options.tls is None:
        raise HostError("tls", f"{address}: no certificate to show",
                        hint="--tls-cert FILE --tls-key FILE")  # fmt: skip
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=BACKLOG)
    except OSError as error:
        where = f"{address.host}:{address.port}"
        raise HostError("address", f"cannot listen on {where}: {error.strerror or error}") from None
    return [socket.socket(fileno=one.socket.detach()) for one in listeners]


@contextlib.contextmanager
def _unix(path: Path, mode: int) -> Iterator[socket.socket]:
    """A socket at this path; one that nobody listens on any more is replaced."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            _make_place(path)
            mask = os.umask(0o777 & ~mode)
            try:
                listening.bind(os.fspath(path))
            finally:
                os.umask(mask)
            listening.listen(BACKLOG)
        except OSError as error:
            reason = error.strerror or str(error)
            raise HostError(
                "address",
                f"cannot listen on {path}: {reason}",
                hint="name another: --listen unix:///path",
            ) from None
        made = os.stat(path)
        yield listening
        with contextlib.suppress(OSError):
            found = os.stat(path)
            if (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino):
                os.unlink(path)
    finally:
        listening.close()


def _make_place(path: Path) -> None:
    """Its directory, which must be ours alone if it is made here; and nothing dead in it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = os.stat(path.parent)
    if owner.st_uid not in (0, os.getuid()) and not owner.st_mode & stat.S_ISVTX:
        raise HostError(
            "address",
            f"{path.parent} belongs to uid {owner.st_uid}",
            hint="name another: --listen unix:///path",
        )
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise HostError("address", f"{path} is there, and no socket", hint="name another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        trial.settimeout(1.0)
        try:
            trial.connect(os.fspath(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                os.unlink(path)
                return
        raise HostError(
            "address",
            f"{path}: somebody listens there already",
            hint="stop that daemon, or name another: --listen unix:///path",
        )
