"""Carries files into sandboxes and out of them, through a process in the tenant's user namespace.

launch/porter.py says what that process is for and how one talks to it. Here: what is asked of it,
and that there is one: it is started when it is first needed, and again after it was lost. It has
one request at a time; who has waited PATIENCE for his turn gets one more process, up to PROCESSES,
so that a gigabyte on its way to a slow disk is not in the way of a small file. A request that is
given up half-way costs the process, so that an answer is never taken for that of another request.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from sandboxd.errors import InternalError, JobError, LaunchError, SandboxError
from sandboxd.job import Copied, Names, Pattern
from sandboxd.linux import packets
from sandboxd.linux.packets import Entry, Packet
from sandboxd.policy import Artifacts, Policy
from sandboxd.result import Artifact, ArtifactError
from sandboxd.script.command import porter_command
from sandboxd.supervise.archives import Room
from sandboxd.supervise.artifacts import Memory, Sink
from sandboxd.supervise.processes import reap
from sandboxd.supervise.sources import Sources, shown

_ROOT = str(Path(__file__).resolve().parents[2])

# As in launch/porter.py, from which nothing can be imported here.
_COPY_IN = struct.Struct("<cII")
_COLLECT = struct.Struct("<c5Q")
_ASK, _DONE, _MORE, _FAILED = b"A", b"d", b"m", b"f"

# The steps of a LaunchError.
_START, _REQUEST = 0, 1

PROCESSES = 4
PATIENCE = 0.02
"""Seconds; to start one takes as long."""
_MISTAKES = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.EIO)
"""Names in each other's way, a hard link to what is not there, a file that got shorter."""
_AHEAD = 2
"""Packets that are sent before the answer to the first is there: both sides are busy then."""
_MOST_PATTERNS = 256
_UNLIMITED = (1 << 63) - 1
_REQUIRED, _OPTIONAL, _LITERAL = 1, 2, 4  # as in launch/collect.py
DEFAULT = Policy().artifacts
Opened = dict[bytes, tuple[Entry, int | None]]


@dataclass(slots=True, eq=False)
class _Process:
    """A running porter, our end of its socket, and how many answers it owes us."""

    process: subprocess.Popen[bytes]
    link: socket.socket
    owes: int = 0

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
        self.owes += 1
        content = packet.content()
        while True:
            try:
                packets.send(self.link, content, packet.descriptors)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.link)
            except (BrokenPipeError, ConnectionResetError):
                return  # one that is gone has perhaps said why: receive() finds out
            else:
                return

    async def answer(self) -> tuple[bytes, list[int]]:
        """A packet of an answer; LaunchError or InternalError if it is none."""
        try:
            content, descriptors = await self.receive()
        except OSError as error:
            what = "read what the porter, which carries files in and out, says"
            raise LaunchError("porter", _REQUEST, error.errno or 0, what) from error
        if not content:
            raise await _lost(self)
        if content[:1] == _FAILED:  # it still owes one, and is not asked again
            raise _failed(content)
        if content[:1] != _MORE:
            self.owes -= 1
        return content, descriptors

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
        self._processes: list[_Process] = []
        self._idle: list[_Process] = []
        self._turns = trio.Semaphore(0)
        """As many as are idle."""
        self._closed = False

    def start(self) -> None:
        """Start it now, so that the first request need not wait for it: 20 ms."""
        if self._closed:
            raise LaunchError("porter", _START, 0, "the porter's tenant is gone")
        if not self._processes:
            self._give_back(self._new())

    async def copy_in(
        self,
        box: int,
        files: Names[Copied],
        owner: tuple[int, int],
        attached: Collection[bytes] = (),
    ) -> None:
        """Make these files below the directory `box`, belonging to `owner`: uid and gid as numbers
        of the user namespace. A Path may be a directory: all of it is copied, links as links; a Tar
        is unpacked. `attached` are the names where something is by reference.

        JobError for what is the caller's to mend; some of the files may be there after it.
        """
        if not files:
            await trio.lowlevel.checkpoint()
            return
        head = _COPY_IN.pack(b"I", *owner)
        with closing(Sources(files, Room.of(box), attached)) as sources:
            if sources.waits:  # for who writes to a pipe: others have the porter meanwhile
                while await sources.wait_next(head, box):
                    async with self._request() as porter:
                        await porter.send(sources.packet)
                        await _made(porter)
                return
            async with self._request() as porter:
                try:
                    while await sources.wait_next(head, box):
                        await porter.send(sources.packet)
                        while porter.owes > _AHEAD:
                            await _made(porter)
                    while porter.owes:
                        await _made(porter)
                except JobError:
                    while porter.owes:
                        await porter.answer()
                    raise

    async def collect(
        self,
        box: int,
        patterns: Iterable[str | bytes | Pattern],
        caps: Artifacts = DEFAULT,
        sink: Sink | None = None,
    ) -> tuple[list[Artifact], list[ArtifactError]]:
        """The files below `box` that match, in the order of their names, and what was wrong.

        Only for a sandbox whose processes are dead. `*`, `?` and `[...]` stand for what they do in
        a shell (also at the beginning of a name with a dot), `**` for any directories. JobError if
        `sink` cannot take a file.
        """
        request = _collection(box, patterns, caps)
        found: list[Artifact] = []
        errors: list[ArtifactError] = []
        if request.empty:
            await trio.lowlevel.checkpoint()
            return found, errors
        to: Sink = Memory() if sink is None else sink
        async with self._request() as porter:
            await porter.send(request)
            while porter.owes:
                content, descriptors = await porter.answer()
                taking = partial(_take, content, iter(descriptors), to, found, errors)
                try:
                    if descriptors or to.blocks:
                        await trio.to_thread.run_sync(taking)
                    else:
                        taking()
                finally:
                    packets.close(descriptors)
        return sorted(found, key=lambda one: os.fsencode(one.path)), errors

    async def reopen(self, box: int, names: Iterable[bytes]) -> Opened:
        """Files that were collected, once more: their content, or for a large one a descriptor,
        which is the caller's to close. At most as many as packets.DESCRIPTORS.
        """
        caps = Artifacts()
        request = _collection(box, [Pattern(name, literal=True) for name in names], caps)
        opened: Opened = {}
        refused: list[Entry] = []
        try:
            async with self._request() as porter:
                await porter.send(request)
                while porter.owes:
                    content, descriptors = await porter.answer()
                    remaining = iter(descriptors)
                    for entry in packets.entries(content, 1):
                        if entry.kind == packets.REFUSED:
                            refused.append(entry)
                            continue
                        is_large = entry.kind == packets.SOURCE
                        opened[entry.name] = entry, next(remaining) if is_large else None
            if refused:
                what = f"open {os.fsdecode(refused[0].name)} again: {refused[0].content.decode()}"
                raise LaunchError("porter", _REQUEST, 0, what)
        except BaseException:
            packets.close(number for _, number in opened.values() if number is not None)
            raise
        return opened

    async def ask(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """What launch/porter.py answers to one of its words ("measure", "empty", ...)."""
        packet = Packet(_ASK + json.dumps(request).encode(), descriptors)
        async with self._request() as porter:
            await porter.send(packet)
            content, _ = await porter.answer()
        answer: dict[str, Any] = json.loads(content[1:])
        return answer

    @asynccontextmanager
    async def _request(self) -> AsyncIterator[_Process]:
        porter = await self._take()
        try:
            yield porter
        finally:
            if self._closed or porter.owes or porter.process.poll() is not None:
                await self._end(porter)
            else:
                self._give_back(porter)

    async def _take(self) -> _Process:
        """One that has nothing to do: now, in a while, or a new one."""
        while True:
            self.start()
            may_grow = len(self._processes) < PROCESSES
            with trio.move_on_after(PATIENCE if may_grow else math.inf) as waiting:
                await self._turns.acquire()
            if waiting.cancelled_caught:
                if len(self._processes) < PROCESSES:
                    return self._new()
                continue
            if self._closed:
                self._turns.release()  # for the next who waits
                continue
            if not self._idle:  # one has ended: there is room for another
                continue
            porter = self._idle.pop()
            if porter.process.poll() is None:
                return porter
            await self._end(porter)

    def _new(self) -> _Process:
        porter = _Process.start(self._namespace)
        self._processes.append(porter)
        return porter

    def _give_back(self, porter: _Process) -> None:
        self._idle.append(porter)
        self._turns.release()

    async def _end(self, porter: _Process) -> None:
        self._processes.remove(porter)
        if self._turns.statistics().tasks_waiting:  # there may be no other that he waits for
            self._turns.release()
        await porter.stop()

    async def _stop(self) -> None:
        """All that are idle; one that is not yet ends with its request."""
        while self._idle:
            await self._end(self._idle.pop())


async def _made(porter: _Process) -> None:
    content, _ = await porter.answer()
    for entry in packets.entries(content, 1):
        raise _refused(entry)


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
    if entry.mode in _MISTAKES:
        return JobError(f"{shown(entry.name)}: {os.strerror(entry.mode)}")
    return LaunchError("porter", _REQUEST, entry.mode, f"make {shown(entry.name)}")


def _collection(box: int, patterns: Iterable[str | bytes | Pattern], caps: Artifacts) -> Packet:
    limits = (caps.files, caps.bytes, caps.depth, caps.path, caps.entries)
    numbers = [_UNLIMITED if one is None else one for one in limits]
    packet = Packet(_COLLECT.pack(b"O", *numbers), [box])
    for number, pattern in enumerate(patterns):
        one = pattern if isinstance(pattern, Pattern) else Pattern(pattern)
        entry = Entry(packets.PATTERN, os.fsencode(one.name), _meaning(one))
        if number >= _MOST_PATTERNS or not packet.has_room(entry):
            raise JobError("collect: too many patterns", hint="use fewer, with wildcards")
        packet.add(entry)
    return packet


def _meaning(pattern: Pattern) -> int:
    required = {None: 0, True: _REQUIRED, False: _OPTIONAL}[pattern.required]
    return required | (_LITERAL if pattern.literal else 0)


def _take(
    content: bytes,
    descriptors: Iterator[int],
    sink: Sink,
    found: list[Artifact],
    errors: list[ArtifactError],
) -> None:
    """Takes what a packet says, and what its descriptors stand for."""
    for entry in packets.entries(content, 1):
        if entry.kind == packets.REFUSED:
            reason = entry.content.decode(errors="replace")
            errors.append(ArtifactError(path=os.fsdecode(entry.name), reason=reason))
        else:
            source = next(descriptors) if entry.kind == packets.SOURCE else None
            found.append(sink.take(entry, source))
