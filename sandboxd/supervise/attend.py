"""Waiting for init's report, with the pipes and the limits in view."""

from __future__ import annotations

import select
import socket

import trio

from sandboxd.messages import ENDED, Ended, Failure
from sandboxd.supervise import stream
from sandboxd.supervise.sandboxes import Sandbox
from sandboxd.supervise.stops import Stops
from sandboxd.supervise.tenants import MESSAGE
from sandboxd.supervise.vigil import Vigil
from sandboxd.supervise.watch import Watcher

REPORT_SIZES = frozenset({Ended.FORM.size, Ended.FORM.size + Failure.FORM.size})
GRACE = 0.002
"""Seconds in which a run may end without anybody having listened to its pipes."""

NO_VIGIL = Vigil(kept=False)


async def attend(
    box: Sandbox,
    stops: Stops,
    watcher: Watcher,
    pumps: list[stream.Pump],
    vigil: Vigil = NO_VIGIL,
    begun: bytes = b"",
) -> bytes:
    """Wait for init's report, reading the pipes and looking at the limits meanwhile.

    One task for all of that, and for a short run one wait: the pipes are listened to only after
    GRACE, because what fits into them can as well be read at the end.
    """
    ears = None
    report = begun
    hears = bool(pumps) or box.is_served
    try:
        if await vigil.keep([box.socket.fileno()], watcher.due):
            report = received(box.socket) or b""
        while not is_complete(report):
            due = min(watcher.due, stops.insist_at)
            if ears is None and hears:
                due = min(due, watcher.started + GRACE)
            with trio.CancelScope(deadline=due) as stops.waiting:
                await trio.lowlevel.wait_readable(box.socket if ears is None else ears)
            if not stops.waiting.cancelled_caught:
                if ears is None or hear(ears, pumps, box):
                    part = received(box.socket)
                    report += part or b""
                    if part == b"":
                        break
                continue
            now = trio.current_time()
            if ears is None:
                await box.wait_known()
                ears = listen(box, pumps)
            watcher.look(now)
            stops.insist(now)
    finally:
        stops.waiting = None
        if ears is not None:
            ears.close()
    return report


def received(sock: socket.socket) -> bytes | None:
    """What is there, b"" at the end; None where the wakeup was for what had its number before."""
    try:
        return sock.recv(MESSAGE)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return b""


def listen(box: Sandbox, pumps: list[stream.Pump]) -> select.epoll:
    """One descriptor that is readable when any of these is."""
    ears = select.epoll()
    ears.register(box.socket.fileno(), select.EPOLLIN)
    if box.area is not None and box.is_served:
        ears.register(box.area.link.fileno(), select.EPOLLIN)
    for pump in pumps:
        ears.register(pump.fd, select.EPOLLIN)
    return ears


def hear(ears: select.epoll, pumps: list[stream.Pump], box: Sandbox) -> bool:
    """Read what can be read, once each; whether the report can be."""
    ready = {fd for fd, _ in ears.poll(0)}
    if box.area is not None and box.area.link.fileno() in ready and box.area.is_lost():
        ears.unregister(box.area.link.fileno())
        box.kill()  # there will be no report, but the end of the socket
    for pump in pumps:
        if pump.fd in ready:
            pump.read()
            if pump.over:
                ears.unregister(pump.fd)
    return box.socket.fileno() in ready


def is_complete(data: bytes) -> bool:
    """Whether init has said all it will say."""
    return len(data) in REPORT_SIZES and data.startswith(ENDED, len(data) - Ended.FORM.size)
