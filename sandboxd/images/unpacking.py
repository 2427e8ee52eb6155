"""The unpacker's other end: launch/unpacker.py says what it is for and how one talks to it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandboxd.errors import HostError, ImageError, LaunchError
from sandboxd.linux import packets
from sandboxd.plan import IdMap
from sandboxd.script.command import unpacker_command

_ROOT = str(Path(__file__).resolve().parents[2])
_MAPS, _GO = b"maps", b"go"  # as in launch/unpacker.py
_PIPE = 1 << 20
_HINTS = {
    28: "make room, or put the store elsewhere: SANDBOXD_IMAGES=DIR",  # ENOSPC
    122: "raise the quota, or put the store elsewhere: SANDBOXD_IMAGES=DIR",  # EDQUOT
    95: "the store's file system has no user attributes: SANDBOXD_IMAGES=DIR",  # EOPNOTSUPP
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one layer may be; what is beyond is refused."""

    bytes: int = 16 << 30
    """When unpacked, holes included."""
    entries: int = 1 << 19


class Unpacker:
    """A running unpacker. Made by open_unpacker()."""

    def __init__(self, link: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self._link = link
        self._process = process

    def unpack(self, stream: Iterable[bytes], root: int, limits: Limits) -> dict[str, Any]:
        """Make the tree of a tar stream below the directory `root`; what was made, counted."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        asked = answered = False
        try:
            with suppress(OSError):  # a user may have used up his share of pipe memory (pipe(7))
                fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE)
            self._send({"do": "unpack", "bytes": limits.bytes, "entries": limits.entries},
                       [reading, root])  # fmt: skip
            asked = True
            os.close(reading)
            reading = -1
            with suppress(BrokenPipeError):  # it says why
                for piece in stream:
                    view = memoryview(piece)
                    while view:
                        view = view[os.write(writing, view) :]
            answered = True
        finally:
            for descriptor in (reading, writing):
                if descriptor >= 0:
                    os.close(descriptor)
            if asked and not answered:  # so that the next answer is that of the next request
                with suppress(ImageError, LaunchError):
                    self._receive()
        return self._receive()

    def digest(self, root: int) -> str:
        """What launch/unpacker.py makes of the tree below the directory `root`."""
        self._send({"do": "digest"}, [root])
        return str(self._receive()["digest"])

    def empty(self, root: int) -> None:
        """Remove all that is in the directory `root`."""
        self._send({"do": "empty"}, [root])
        self._receive()

    def _send(self, request: dict[str, Any], descriptors: list[int]) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # _receive() finds out
            packets.send(self._link, json.dumps(request).encode(), descriptors)

    def _receive(self) -> dict[str, Any]:
        try:
            content, _ = packets.receive(self._link)
        except ConnectionResetError:
            content = b""
        if not content:
            raise LaunchError(
                "unpacker", 0, 0, "the unpacker, which makes the trees of layers, ended"
            )
        answer: dict[str, Any] = json.loads(content)
        if "refused" in answer:
            raise ImageError(answer["refused"])
        if "errno" in answer:
            number = answer["errno"] or 0
            raise LaunchError("unpacker", 0, 0, answer["what"], hint=_HINTS.get(number, ""))
        return answer


@contextmanager
def open_unpacker(ids: IdMap) -> Iterator[Unpacker]:
    """An unpacker in a user namespace with this map; leaving ends it and waits for that."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            count = min(sum(row[2] for row in rows) for rows in (ids.uids, ids.gids))
            process = subprocess.Popen(
                unpacker_command(_ROOT, theirs.fileno(), 1 if ids.writer == "self" else count),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),), cwd="/", start_new_session=True,
            )  # fmt: skip
        try:
            if ids.writer != "self":
                _write_maps(ids, process.pid, ours)
            yield Unpacker(ours, process)
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()


def _write_maps(ids: IdMap, pid: int, link: socket.socket) -> None:
    if link.recv(len(_MAPS)) != _MAPS:
        raise HostError("user_namespaces", "no user namespace can be made here to unpack in",
                        hint="run `sandboxd doctor`")  # fmt: skip
    for name, rows in (("uid", ids.uids), ("gid", ids.gids)):
        if ids.writer == "direct":
            text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in rows)
            Path(f"/proc/{pid}/{name}_map").write_text(text)
            continue
        words = [str(number) for row in rows for number in row]
        done = subprocess.run(
            [f"new{name}map", str(pid), *words], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise HostError(f"new{name}map", f"new{name}map refused the map: {done.stderr.strip()}",
                            hint=f"check the caller's line in /etc/sub{name}")  # fmt: skip
    link.send(_GO)
