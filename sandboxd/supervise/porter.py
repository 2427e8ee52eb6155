"""Carries files into sandboxes and out of them, through a process in the tenant's user namespace.

launch/porter.py says what that process is for and how one talks to it. Here: what is asked of it,
one request at a time, and that there is one: it is started when it is first needed, and again
after it was lost. A request that is given up half-way costs the process, so that an answer is
never taken for that of another request.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from sandboxd.errors import InternalError, JobError, LaunchError, SandboxError
from sandboxd.job import File, Names
from sandboxd.linux import packets
from sandboxd.linux.packets import Entry, Packet
from sandboxd.result import Artifact, ArtifactError
from sandboxd.script.command import porter_command
from sandboxd.supervise.processes import reap
from sandboxd.supervise.sources import Sources, shown

_ROOT = str(Path(__file__).resolve().parents[2])

# As in launch/porter.py, from which nothing can be imported here.
_COPY_IN = struct.Struct("<cII")
_COLLECT = struct.Struct("<cQQIIQ")
_ASK, _DONE, _MORE, _FAILED = b"A", b"d", b"m", b"f"

# The steps of a LaunchError.
_START, _REQUEST = 0, 1

_MOST_PATTERNS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """How much is collected of what a program left; what is beyond is an ArtifactError."""

    files: int = 1000
    bytes: int = 64 << 20
    """Of all files together, as long as they say they are: holes count."""
    depth: int = 64
    path: int = 4096
    """Bytes of the name of one file, directories included."""
    entries: int = 1_000_000
    """Names looked at, whether collected or not."""


@dataclass(frozen=True, slots=True)
class _Process:
    """A running porter and our end of its socket."""

    process: subprocess.Popen[bytes]
    link: socket.socket

    @classmethod
    def start(cls, namespace: int) -> _Process:
        """On the thread of trio, as the porter ends with the thread that started it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            ours.setblocking(False)
            keep = (theirs.fileno(), *([namespace] if namespace >= 0 else []))
            process = subprocess.Popen(
                porter_command(_ROOT, theirs.fileno(), namespace),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=keep,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            what = "start the porter, which carries files in and out"
            raise LaunchError("porter", _START, error.errno or 0, what) from error
        finally:
            theirs.close()
        return cls(process, ours)

    async def stop(self) -> None:
        """Gone, at the latest when this returns."""
        self.link.close()
        with trio.CancelScope(shield=True):
            await reap(self.process, patience=0)

    async def send(self, packet: Packet) -> None:
        content = packet.content()
        while True:
            try:
                packets.send(self.link, content, packet.descriptors)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.link)
            else:
                return

    async def receive(self) -> tuple[bytes, list[int]]:
        """What is empty is the end."""
        while True:
            await trio.lowlevel.wait_readable(self.link)
            # It may be reset because a request was left unread, and still there is an answer.
            with suppress(BlockingIOError, ConnectionResetError):
                return packets.receive(self.link)


@asynccontextmanager
async def open_porter(user_namespace: int | None) -> AsyncIterator[Porter]:
    """A porter for the sandboxes of one tenant.

    `user_namespace` is a descriptor of the tenant's user namespace (it may be closed afterwards).
    Without one the porter has our own rights, which is enough where files belong to us, or for
    root; owners are then ids of the host.
    """
    namespace = -1 if user_namespace is None else os.dup(user_namespace)
    porter = Porter(namespace)
    try:
        yield porter
    finally:
        porter._closed = True
        await porter._stop()
        if namespace >= 0:
            os.close(namespace)


class Porter:
    """Made by open_porter()."""

    def __init__(self, namespace: int) -> None:
        self._namespace = namespace
        self._lock = trio.Lock()
        self._running: _Process | None = None
        self._closed = False

    def start(self) -> None:
        """Start it now, so that the first request need not wait for it: 20 ms."""
        if self._closed:
            raise LaunchError("porter", _START, 0, "the porter's tenant is gone")
        if self._running is None:
            self._running = _Process.start(self._namespace)

    async def copy_in(
        self,
        box: int,
        files: Names[bytes | Path | File],
        owner: tuple[int, int],
    ) -> None:
        """Make these files below the directory `box`, belonging to `owner`: uid and gid as numbers
        of the user namespace. A Path may be a directory: all of it is copied, links as links.

        JobError for what is the caller's to mend; some of the files may be there after it.
        """
        if not files:
            await trio.lowlevel.checkpoint()
            return
        head = _COPY_IN.pack(b"I", *owner)
        with closing(Sources(files)) as sources:
            while await sources.wait_next(head, box):
                async with self._request() as porter:
                    await self._send(porter, sources.packet)
                    content, _ = await self._receive(porter)
                for entry in packets.entries(content, 1):
                    raise _refused(entry)

    async def collect(
        self, box: int, patterns: Iterable[str | bytes], caps: Caps | None = None
    ) -> tuple[list[Artifact], list[ArtifactError]]:
        """The files below `box` that match, in the order of their names, and what was wrong.

        Only for a sandbox whose processes are dead. `*`, `?` and `[...]` stand for what they do in
        a shell (also at the beginning of a name with a dot), `**` for any directories.
        """
        request = _collection(box, patterns, caps or Caps())
        found: list[Artifact] = []
        errors: list[ArtifactError] = []
        if request.empty:
            await trio.lowlevel.checkpoint()
            return found, errors
        async with self._request() as porter:
            await self._send(porter, request)
            more = True
            while more:
                content, descriptors = await self._receive(porter)
                more = content[:1] == _MORE
                await _unpack(content, descriptors, found, errors)
        return sorted(found, key=lambda one: os.fsencode(one.path)), errors

    async def ask(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """What launch/porter.py answers to one of its words ("measure", "empty", ...)."""
        packet = Packet(_ASK + json.dumps(request).encode(), descriptors)
        async with self._request() as porter:
            await self._send(porter, packet)
            content, _ = await self._receive(porter)
        answer: dict[str, Any] = json.loads(content[1:])
        return answer

    @asynccontextmanager
    async def _request(self) -> AsyncIterator[_Process]:
        async with self._lock:
            if self._running is not None and self._running.process.poll() is not None:
                await self._stop()
            self.start()
            assert self._running is not None
            try:
                yield self._running
            except BaseException:
                await self._stop()
                raise

    async def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            await running.stop()

    async def _send(self, porter: _Process, packet: Packet) -> None:
        # One that is gone has perhaps said why: _receive() finds out.
        with suppress(BrokenPipeError, ConnectionResetError):
            await porter.send(packet)

    async def _receive(self, porter: _Process) -> tuple[bytes, list[int]]:
        try:
            content, descriptors = await porter.receive()
        except OSError as error:
            what = "read what the porter, which carries files in and out, says"
            raise LaunchError("porter", _REQUEST, error.errno or 0, what) from error
        if not content:
            raise await _lost(porter)
        if content[:1] == _FAILED:
            raise _failed(content)
        return content, descriptors


async def _lost(porter: _Process) -> LaunchError:
    await porter.stop()
    status = porter.process.returncode
    how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
    what = f"the porter, which carries files in and out, ended ({how})"
    return LaunchError("porter", _REQUEST, 0, what, hint="the next request gets a new one")


def _failed(content: bytes) -> SandboxError:
    entry = next(packets.entries(content, 1))
    what = entry.name.decode()
    if entry.mode:
        return LaunchError("porter", _REQUEST, entry.mode, what)
    return InternalError(f"the porter could not {what}: {entry.content.decode(errors='replace')}")


def _refused(entry: Entry) -> SandboxError:
    """The caller's mistake: too much, or names that are in each other's way; else it is ours."""
    if entry.content:
        limit = entry.content.decode()
        return JobError(
            f"{shown(entry.name)}: the files do not fit into the sandbox",
            hint=f"raise {limit}, or give it less",
        )
    if entry.mode in (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG):
        return JobError(f"{shown(entry.name)}: {os.strerror(entry.mode)}")
    return LaunchError("porter", _REQUEST, entry.mode, f"make {shown(entry.name)}")


def _collection(box: int, patterns: Iterable[str | bytes], caps: Caps) -> Packet:
    head = _COLLECT.pack(b"O", caps.files, caps.bytes, caps.depth, caps.path, caps.entries)
    packet = Packet(head, [box])
    for number, pattern in enumerate(patterns):
        name = os.fsencode(pattern)
        parts = name.split(b"/")
        if name.startswith(b"/") or b"\0" in name or b".." in parts or not {*parts} - {b"", b"."}:
            raise JobError(
                f"collect: {pattern!r} names nothing below the working directory",
                hint="use a relative pattern without ..",
            )
        entry = Entry(packets.PATTERN, name)
        if number >= _MOST_PATTERNS or not packet.has_room(entry):
            raise JobError("collect: too many patterns", hint="use fewer, with wildcards")
        packet.add(entry)
    return packet


async def _unpack(
    content: bytes, descriptors: list[int], found: list[Artifact], errors: list[ArtifactError]
) -> None:
    """Takes what a packet says, and what its descriptors stand for, which end here."""
    with closing(_Descriptors(descriptors)) as remaining:
        for entry in packets.entries(content, 1):
            path = os.fsdecode(entry.name)
            if entry.kind == packets.REFUSED:
                reason = entry.content.decode(errors="replace")
                errors.append(ArtifactError(path=path, reason=reason))
                continue
            if entry.kind == packets.SOURCE:
                (size,) = packets.SIZE.unpack(entry.content)
                data, digest = await trio.to_thread.run_sync(_read, remaining.next(), size)
            else:
                data, digest = entry.content, hashlib.sha256(entry.content).hexdigest()
            found.append(
                Artifact(path=path, bytes=len(data), sha256=digest, mode=entry.mode, data=data)
            )


class _Descriptors:
    """Descriptors to be used in their order; closed together."""

    def __init__(self, numbers: list[int]) -> None:
        self._numbers = numbers
        self._used = 0

    def next(self) -> int:
        self._used += 1
        return self._numbers[self._used - 1]

    def close(self) -> None:
        packets.close(self._numbers)


def _read(descriptor: int, size: int) -> tuple[bytes, str]:
    """The content of a file, and no more than it had when it was found."""
    data = os.pread(descriptor, size, 0)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), len(data))):
        data += more  # above 2 GB the kernel stops early
    return data, hashlib.sha256(data).hexdigest()
