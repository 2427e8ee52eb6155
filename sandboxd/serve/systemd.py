"""What systemd and a service of its own say to one another: sockets in, notes out. No library."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping

from sandboxd.errors import HostError

FIRST = 3
"""SD_LISTEN_FDS_START, sd_listen_fds(3)."""


def activated(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """The listening sockets we were started with; the variables go, lest a child believes them.

    HostError if one of them is none (sd_listen_fds(3); SO_ACCEPTCONN of socket(7)).
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    return [_taken(number) for number in range(FIRST, FIRST + int(count))]


def _taken(number: int) -> socket.socket:
    with contextlib.suppress(OSError):
        os.set_inheritable(number, False)
        found = socket.socket(fileno=number)
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return found
        found.close()
    raise HostError(
        "address",
        f"LISTEN_FDS: descriptor {number} is no socket that listens",
        hint="a socket unit has Accept=no and ListenStream=",
    )


def notify(text: str) -> None:
    """sd_notify(3): nothing happens where nobody asked for it, or nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(text.encode(), address)
