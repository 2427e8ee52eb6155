"""What a client says when a daemon is not there, is not to be believed, or says no."""

from __future__ import annotations

import json
import os
import socket
import struct

from sandboxd.errors import Busy, HostError, SandboxError
from sandboxd.serve.address import Tcp, Unix


def check_peer(handle: int, address: Unix) -> None:
    """In a directory of everybody's anybody may listen: only ourselves and root are believed."""
    with socket.socket(fileno=os.dup(handle)) as copy:
        found = copy.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid = struct.unpack("3i", found)[1]
    if uid not in (0, os.getuid()) and str(address.path).startswith("/tmp/"):
        raise HostError(
            "daemon",
            f"{address}: uid {uid} listens there",
            hint="set SANDBOXD_HOST to the daemon that you mean",
        )


def no_daemon(address: Unix | Tcp, error: OSError) -> HostError:
    """Nobody listens there."""
    reason = error.strerror or str(error)
    return HostError(
        "daemon",
        f"no daemon at {address}: {reason}",
        hint="start one with `sandboxd serve`, or set SANDBOXD_HOST",
    )


def not_believed(address: Unix | Tcp, error: BaseException) -> HostError:
    """It is not whom it says to be, or does not let us in."""
    return HostError(
        "daemon",
        f"{address}: {getattr(error, 'verify_message', '') or error}",
        hint="$SANDBOXD_TLS_CA names its authority, $SANDBOXD_TLS_CERT and _KEY are what you show",
    )


def lost(address: Unix | Tcp, error: BaseException) -> HostError:
    """It listened, and has gone."""
    return HostError(
        "daemon",
        f"the daemon at {address} broke off: {error}",
        hint="its log says why; an accepted job goes on when it is back",
    )


def refused(status: int, body: bytes) -> SandboxError:
    """The exception for a problem."""
    from sandboxd.serve.wire import error_of  # loads more than most commands ever need

    try:
        problem = json.loads(body)
    except ValueError:
        problem = {"detail": f"status {status}"}
    if status in (429, 503):
        return Busy(str(problem.get("detail")), hint=str(problem.get("hint", "")))
    return error_of(problem)


def is_closed(error: SandboxError) -> bool:
    """Whether what was to be fed or signalled is over."""
    return getattr(error, "kind", "") == "closed"
