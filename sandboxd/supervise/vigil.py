"""Waiting awake for what will come in less than a millisecond.

Theory of operation. A short run is over in about half a millisecond. A supervisor that sleeps for
that time has its CPU put to sleep as well, and both are woken, on another CPU, with cold caches: a
tenth of a millisecond or more. So a supervisor that has nothing else to do, on a machine with
another CPU for the run, looks out for the report instead, for as long as such a run takes. Other
tasks of the program get their turn after every WATCH. With a second run under way nobody does that:
there the CPU time is worth more than the delay.
"""

from __future__ import annotations

import select
import socket

import trio

WATCH = 0.0001
"""Seconds for which no other task gets its turn."""
VIGIL = 0.001
"""Seconds after which a run is no short one, and is waited for asleep."""


async def look_out(sock: socket.socket, due: float) -> None:
    """Until there is something to read, VIGIL is over, or it is `due`; whichever comes first."""
    now = trio.current_time()
    end = min(now + VIGIL, due)
    if now >= end:
        return
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    while now < end:
        turn = now + WATCH
        while now < turn:
            if poll.poll(0):
                return
            now = trio.current_time()
        await trio.lowlevel.checkpoint()
