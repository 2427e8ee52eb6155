"""Waiting awake for what will come in less than a millisecond.

Theory of operation. A short run is over in about half a millisecond. A supervisor that sleeps for
that time has its CPU put to sleep as well, and both are woken, on another CPU, with cold caches: a
tenth of a millisecond or more. So a supervisor that has nothing else to do, on a machine with
another CPU for the run, looks out for the report instead, for as long as such a run takes; or, for
a caller who reads along, for the first output.

Whoever else wants to run does: other processes at each look, other tasks of the program after every
TURN. With a second run under way nobody stays awake, for there the CPU time is worth more than the
delay; nor for a policy whose last runs were no short ones, or came in vain on a busy machine: after
each vigil in vain twice as many runs are waited for asleep.
"""

from __future__ import annotations

import math
import os
import select
from collections.abc import Iterable

import trio

TURN = 0.0001
"""Seconds for which no other task gets its turn."""
LENGTH = 0.001
"""Seconds after which a run is no short one, and is waited for asleep."""
MOST_ASLEEP = 256


class Vigil:
    """Whether, and how, the runs of one policy are waited for awake."""

    def __init__(self, *, kept: bool = True) -> None:
        self._asleep: float = 0 if kept else math.inf
        """Runs that are still to be waited for asleep."""
        self._in_vain = 0

    async def keep(self, fds: Iterable[int], due: float) -> bool:
        """Until one of them can be read, LENGTH is over, or it is `due`; whether one can."""
        if self._asleep:
            self._asleep -= 1
            return False
        now = trio.current_time()
        end = min(now + LENGTH, due)
        if now < end:
            await trio.lowlevel.checkpoint()  # others get their turn, however short the run
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        while now < end:
            turn = now + TURN
            while now < turn:
                if poll.poll(0):
                    self._in_vain = 0
                    return True
                os.sched_yield()
                now = trio.current_time()
            await trio.lowlevel.checkpoint()
        self._in_vain += 1
        self._asleep = min(MOST_ASLEEP, 1 << self._in_vain)
        return False
