"""The porter: carries files into sandboxes and out of them, as root of the tenant that they are in.

Theory of operation. The working directory of a sandbox belongs to the job's own uid, on a tmpfs of
the tenant's user namespace. The supervisor is nobody there; whoever has joined the namespace may
do anything to its files and nothing to the host's. So this program joins it and serves requests,
one after the other, over a SEQPACKET socket (the packets are those of linux/packets.py):

    supervisor                                      porter
      | - COPY_IN, uid, gid, entries; box, sources -->|   any number of times
      | <- DONE | DONE with one REFUSED --------------|
      | - COLLECT, caps, patterns; box -------------->|
      | <- MORE, entries; descriptors ----------------|   any number of times
      | <- DONE, entries; descriptors ----------------|
      | - ASK, {"do": ...}; descriptors ------------->|   measure, empty, pack
      | <- DONE, {...} -------------------------------|
      | <- FAILED with one REFUSED -------------------|   instead of any of these: no request

It has one thread (setns(2) wants that), four capabilities, between requests nothing open but the
socket and nothing to remember, and ends with that socket or with its supervisor.
"""

from __future__ import annotations

import json
import os
import socket
import struct

from sandboxd.launch.collect import Caps, Pattern, Walk
from sandboxd.launch.copy_in import Destination
from sandboxd.launch.measure import measure
from sandboxd.launch.removal import empty
from sandboxd.launch.rights import keep_rights_over_files
from sandboxd.linux.namespaces import CLONE_NEWUSER, join
from sandboxd.linux.packets import INLINE, REFUSED, Entry, Packet, close, entries, receive, send

TYPE_CHECKING = False  # as typing's, which is not imported for it
if TYPE_CHECKING:
    from typing import Any, NoReturn

_COPY_IN_HEAD = struct.Struct("<cII")
_COLLECT_HEAD = struct.Struct("<c5Q")
_COPY_IN, _COLLECT, _ASK, _DONE, _MORE, _FAILED = b"I", b"O", b"A", b"d", b"m", b"f"


def main(number: int, namespace: int) -> NoReturn:
    """Serve the socket `number`; `namespace` is a descriptor, or -1 to stay where we are."""
    link = socket.socket(fileno=number)
    try:
        try:
            _become(number, namespace)
        except OSError as error:
            _fail(link, error, b"join the user namespace of the tenant")
            os._exit(1)
        while _serve(link):
            pass
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the supervisor is gone
    os._exit(0)


def _become(number: int, namespace: int) -> None:
    if namespace >= 0:
        _join(namespace)
    keep_rights_over_files()
    os.closerange(3, number)
    os.closerange(number + 1, os.sysconf("SC_OPEN_MAX"))


def _join(namespace: int) -> None:
    """Root of the namespace: who is nobody in it cannot make files there (EOVERFLOW)."""
    there, here = os.fstat(namespace), os.stat("/proc/self/ns/user")
    if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
        return
    join(namespace, CLONE_NEWUSER)
    try:  # noqa: SIM105  contextlib would be loaded for this alone
        os.setgroups([])
    except PermissionError:
        pass  # denied for good where an ordinary user wrote the map (user_namespaces(7))
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _serve(link: socket.socket) -> bool:
    """One request; False at the end of them. Whoever has our answer knows that all is closed."""
    request, descriptors = receive(link)
    if not request:
        return False
    answer = _Answer(link)
    try:
        try:
            _carry_out(request, descriptors, answer)
        finally:
            close(descriptors)
        answer.flush(_DONE)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        _fail(link, error)
    finally:
        answer.close()
    return True


def _carry_out(request: bytes, descriptors: list[int], answer: _Answer) -> None:
    if request[:1] == _ASK:
        answer.say(_asked(json.loads(request[1:]), descriptors))
        return
    box, *sources = descriptors
    if request[:1] == _COPY_IN:
        _, uid, gid = _COPY_IN_HEAD.unpack_from(request)
        destination = Destination(box, uid, gid)
        try:
            refused = destination.copy_in(entries(request, _COPY_IN_HEAD.size), sources)
        finally:
            destination.close()
        if refused:
            answer.add(refused, None)
    elif request[:1] == _COLLECT:
        _, *numbers = _COLLECT_HEAD.unpack_from(request)
        patterns = [
            Pattern(entry.name, entry.mode) for entry in entries(request, _COLLECT_HEAD.size)
        ]
        Walk(patterns, Caps(*numbers), answer.add).run(box)
    else:
        raise ValueError(request[:1])


def _asked(request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
    if request["do"] == "measure":
        found = measure(descriptors[0], request["entries"])
        return {"bytes": found.bytes, "entries": found.entries, "whole": found.whole}
    if request["do"] == "empty":
        empty(descriptors[0])
        return {}
    if request["do"] == "pack":
        from sandboxd.launch.changes import pack  # tarfile takes long to load

        return pack(request, *descriptors)
    raise ValueError(request["do"])


class _Answer:
    """Fills packets; keeps what they carry open until they are sent."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._packet = Packet(_MORE)
        self._words = b""

    def add(self, entry: Entry, descriptor: int | None) -> None:
        if not self._packet.has_room(entry, descriptor):
            self.flush(_MORE)
        self._packet.add(entry, None if descriptor is None else os.dup(descriptor))

    def say(self, words: dict[str, Any]) -> None:
        """What was asked for, instead of entries."""
        self._words = json.dumps(words).encode()

    def flush(self, head: bytes) -> None:
        content = self._words + self._packet.content()[1:]
        send(self._link, head + content, self._packet.descriptors)
        self.close()
        self._packet = Packet(_MORE)

    def close(self) -> None:
        close(self._packet.descriptors)
        self._packet.descriptors.clear()


def _fail(link: socket.socket, error: Exception, what: bytes = b"carry out a request") -> None:
    number = error.errno if isinstance(error, OSError) and error.errno else 0
    said = f"{type(error).__name__}: {error}".encode(errors="backslashreplace")
    packet = Packet(_FAILED)
    packet.add(Entry(REFUSED, what, number, said[:INLINE]))
    send(link, packet.content(), [])
