"""The unpacker: makes, reads and removes the trees of layers, as root of a user namespace.

Theory of operation. The files of a layer belong to many ids, and only who has them mapped can make
or remove such files. So this program is root of a user namespace with the same map as a tenant's,
with four capabilities over files there, and touches nothing but the directories it is handed:

    supervisor                                   unpacker
      | <- MAPS --------------------------------|   (only with subordinate ids)
      | - GO, the maps being written ---------->|
      | - {"do": "unpack"}; tar stream, root -->|
      | - {"do": "digest"}; root -------------->|   any number of these
      | - {"do": "empty"}; root --------------->|
      | <- {...} | {"refused"} | {"errno"} -----|   one for each

It has one thread, and ends with its socket or with its supervisor.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat

from sandboxd.images.tar import CHUNK, Reader, TarError
from sandboxd.launch.removal import empty
from sandboxd.launch.rights import keep_rights_over_files
from sandboxd.launch.tree import Tree
from sandboxd.linux.namespaces import CLONE_NEWUSER, unshare
from sandboxd.linux.packets import close, receive, send
from sandboxd.linux.paths import open_beneath

TYPE_CHECKING = False  # as typing's, which is not imported for it
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

MAPS, GO = b"maps", b"go"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_HEADERS = 1 << 30
"""Bytes that headers and padding may add to the content of a layer."""


def main(number: int, ids: int) -> NoReturn:
    """Serve the socket `number`; there will be `ids` ids in our user namespace."""
    link = socket.socket(fileno=number)
    try:
        _become(link, ids)
        while _serve(link, ids):
            pass
    except (BrokenPipeError, ConnectionResetError):
        pass  # the supervisor is gone
    except OSError as error:
        _answer(link, {"errno": error.errno, "what": f"become root of a user namespace: {error}"})
    os._exit(0)


def _become(link: socket.socket, ids: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    if ids == 1:
        for name, row in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(row)
    else:
        link.send(MAPS)
        if link.recv(len(GO)) != GO:
            os._exit(0)
        os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    keep_rights_over_files()


def _serve(link: socket.socket, ids: int) -> bool:
    request, descriptors = receive(link)
    if not request:
        return False
    try:
        answer = _carry_out(json.loads(request), descriptors, ids)
    except TarError as error:
        answer = {"refused": str(error)}
    except OSError as error:
        answer = {"errno": error.errno, "what": str(error)}
    finally:
        close(descriptors)
    _answer(link, answer)
    return True


def _answer(link: socket.socket, answer: dict[str, Any]) -> None:
    send(link, json.dumps(answer).encode(), [])


def _carry_out(request: dict[str, Any], descriptors: list[int], ids: int) -> dict[str, Any]:
    if request["do"] == "unpack":
        stream, root = descriptors
        return _unpack(stream, root, ids, request)
    if request["do"] == "digest":
        return {"digest": digest(descriptors[0])}
    empty(descriptors[0])
    return {}


# -- unpack ----------------------------------------------------------------------------------


class _Stream:
    """Bytes from a pipe, as many as asked for while there are, and not without end."""

    def __init__(self, descriptor: int, most: int) -> None:
        self._descriptor = descriptor
        self._left = most
        self._buffer = b""

    def read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = os.read(self._descriptor, max(CHUNK, count - len(self._buffer)))
            if not data:
                break
            self._left -= len(data)
            if self._left < 0:
                raise TarError("more bytes than a layer may have")
            self._buffer += data
        found, self._buffer = self._buffer[:count], self._buffer[count:]
        return found


def _unpack(stream: int, root: int, ids: int, limits: dict[str, int]) -> dict[str, Any]:
    source = _Stream(stream, limits["bytes"] + _HEADERS)
    reader = Reader(source.read)
    tree = Tree(root, ids, limits["entries"])
    left = limits["bytes"]
    try:
        for entry in reader:
            left -= entry.size
            if left < 0:
                raise TarError(f"more than {limits['bytes']} bytes when unpacked")
            tree.add(entry, reader.content(entry))
        tree.finish()
    finally:
        tree.close()
    while data := source.read(CHUNK):
        if data.strip(b"\0"):
            raise TarError("something comes after the end of the archive")
    return {**tree.report.counts(), "ended": reader.ended, "digest": digest(root)}


# -- digest ----------------------------------------------------------------------------------


def digest(root: int) -> str:
    """sha256 over all that a tree is: names, kinds, modes, owners, times, attributes, contents."""
    total = hashlib.sha256()
    for path in _walk(root):
        folder, _, name = path.rpartition(b"/")
        above = open_beneath(root, folder, _FOLDER)
        try:
            total.update(_fingerprint(above, name or b"."))
        finally:
            os.close(above)
        total.update(b"%d %b" % (len(path), path))
    return total.hexdigest()


def _walk(root: int) -> Iterator[bytes]:
    pending = [b""]
    while pending:
        path = pending.pop()
        yield path
        folder = open_beneath(root, path, os.O_PATH | os.O_NOFOLLOW)
        try:
            if not stat.S_ISDIR(os.fstat(folder).st_mode):
                continue
        finally:
            os.close(folder)
        folder = open_beneath(root, path, _FOLDER)
        try:
            names = sorted(map(os.fsencode, os.listdir(folder)), reverse=True)
        finally:
            os.close(folder)
        pending += [path + b"/" + name if path else name for name in names]


def _fingerprint(above: int, name: bytes) -> bytes:
    there = os.stat(name, dir_fd=above, follow_symlinks=False)
    kind = stat.S_IFMT(there.st_mode)
    size = there.st_size if kind == stat.S_IFREG else 0
    words: list[object] = [
        *(there.st_mode, there.st_uid, there.st_gid, there.st_rdev, size, there.st_mtime_ns)
    ]
    if kind == stat.S_IFLNK:
        words.append(os.readlink(name, dir_fd=above))
    if kind in (stat.S_IFREG, stat.S_IFDIR):
        opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        try:
            words += [
                (one, os.getxattr(opened, one))
                for one in sorted(os.listxattr(opened))
                if one.startswith("user.")
            ]
            if kind == stat.S_IFREG:
                words.append(_content(opened))
        finally:
            os.close(opened)
    return repr(words).encode(errors="surrogateescape")


def _content(opened: int) -> bytes:
    found = hashlib.sha256()
    while data := os.read(opened, CHUNK):
        found.update(data)
    return found.digest()
