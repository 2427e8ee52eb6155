"""What goes on at this moment: the queue, what runs with what it uses, how jobs ended, who failed.

For `sandboxd top` and the page of /ui. A caller sees its own; an overseer sees everybody's.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING

import trio

import sandboxd
from sandboxd.errors import SandboxError
from sandboxd.result import Usage
from sandboxd.serve.callers import Caller
from sandboxd.serve.guests import Guest
from sandboxd.serve.live import About, Live
from sandboxd.serve.views import CallerView, FailureView, Overview, RunningView
from sandboxd.serve.wire import encode
from sandboxd.supervise.record import moment
from sandboxd.supervise.run import Hands

if TYPE_CHECKING:
    from sandboxd.serve.book import Book

MOST_RUNNING, MOST_QUEUED = 500, 100
"""Jobs that are listed; all are counted."""
MOST_FAILURES = 50
LONGEST = 300
"""Characters of a message."""
FRESH = 0.2
"""Seconds for which what was seen serves all who look."""


class Endings:
    """How the last jobs ended; a new daemon knows none."""

    def __init__(self) -> None:
        self._failures: deque[FailureView] = deque(maxlen=20 * MOST_FAILURES)
        self._statuses: dict[str, Counter[str]] = {}

    def note(self, caller: str, job: str, about: About, why: tuple[str, str]) -> None:
        """A job is over; `why` is the status and the message."""
        status, message = why
        if caller not in self._statuses:
            self._statuses[caller] = Counter()
        self._statuses[caller][status] += 1
        if status == "ok":
            return
        self._failures.append(
            FailureView(
                id=job,
                caller=caller,
                argv=about.argv,
                status=status,
                message=message[:LONGEST],
                ended_at=moment(time.time()),
            )
        )

    def statuses(self, caller: str | None) -> dict[str, int]:
        """Status -> how often, of one caller's or of all."""
        found: Counter[str] = Counter()
        for name, counts in self._statuses.items():
            if caller in (None, name):
                found.update(counts)
        return dict(sorted(found.items()))

    def failures(self, caller: str | None) -> tuple[FailureView, ...]:
        mine = [one for one in reversed(self._failures) if caller in (None, one.caller)]
        return tuple(mine[:MOST_FAILURES])


class Looks:
    """Looks at a daemon, shared by those who look at the same time."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._at = -1.0
        self._running: list[RunningView] = []
        self._waiting: list[RunningView] = []

    def look(self, caller: Caller) -> Overview:
        now = trio.current_time()
        if now >= self._at + FRESH:
            guests = (one for one in self._book.guests.values() if not one.lives)
            every: list[Live | Guest] = [*self._book.live.values(), *guests]
            every.sort(key=lambda one: one.created)
            self._running = [view for one in every if one.started for view in _views(one)]
            self._waiting = [view for one in every if not one.started for view in _views(one)]
            self._at = now
        return self._of(caller, None if caller.oversees else caller.name)

    def _of(self, caller: Caller, name: str | None) -> Overview:
        book, share = self._book, self._book.share
        running = [one for one in self._running if name in (None, one.caller)]
        waiting = [one for one in self._waiting if name in (None, one.caller)]
        counts: dict[str, list[int]] = {}
        for place, views in enumerate((running, waiting)):
            for one in views:
                counts.setdefault(one.caller, [0, 0])[place] += 1
        return Overview(
            at=moment(time.time()),
            version=sandboxd.__version__,
            caller=caller.name,
            everybody=name is None,
            slots=book.runner.slots,
            spares=book.runner.statistics().spares,
            running=share.running if name is None else share.running_of(name),
            queued=share.queued if name is None else share.queued_of(name),
            draining=book.draining,
            callers=tuple(
                CallerView(name=one, running=running, queued=queued)
                for one, (running, queued) in sorted(counts.items())
            ),
            jobs=tuple(running[:MOST_RUNNING]),
            waiting=tuple(waiting[:MOST_QUEUED]),
            statuses=book.endings.statuses(name),
            failures=book.endings.failures(name),
        )

    async def stream(
        self, caller: Caller, every: float, *, events: bool
    ) -> AsyncGenerator[bytes, None]:
        """One look after the other, as server-sent events or as lines."""
        while True:
            data = encode(self.look(caller))
            last = self._book.draining and not self._book.share.running
            yield b"data: %s\n\n" % data if events else data + b"\n"
            if last:
                return
            await trio.sleep(every)


def _views(one: Live | Guest) -> Iterator[RunningView]:
    """One for each of its programs."""
    runs: tuple[Hands | None, ...] = (one.run,) if isinstance(one, Live) else one.runs
    for run in runs or (None,):
        used = _usage(run)
        yield RunningView(
            id=one.id,
            caller=one.caller.name,
            argv=one.about.argv,
            policy=one.about.policy,
            created_at=moment(one.created),
            started_at=None if one.started is None else moment(one.started),
            wall_time=used.wall_time,
            cpu_time=used.cpu_time,
            memory=used.memory_current,
            memory_peak=used.memory_peak,
            processes=used.processes_current,
        )


def _usage(run: Hands | None) -> Usage:
    try:
        return Usage() if run is None else run.usage()
    except (SandboxError, OSError):  # it has not begun, or is over
        return Usage()
