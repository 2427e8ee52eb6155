"""How much one caller may have, and how much all of them: beyond that, 429 and when again."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from sandboxd.serve.share import Share
from sandboxd.serve.wire import Refusal

HOUR = 3600.0
MINUTE = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """Of one caller, but for `queue`; None is no bound."""

    queue: int = 10_000
    """Jobs of all callers that wait."""
    queued: int = 5_000
    running: int | None = None
    cpu: float | None = None
    """CPU seconds an hour."""
    stored: int = 1 << 30
    """Bytes of files; and, counted apart, of the requests of jobs that are not over."""


class Spending:
    """What each caller has used in the last hour, by the minute; a new daemon counts anew."""

    def __init__(self, quotas: Quotas) -> None:
        self.quotas = quotas
        self._minutes: dict[str, deque[tuple[float, float]]] = {}

    def check(self, caller: str, share: Share, jobs: int = 1) -> None:
        """Refusal 429 if with so many jobs more the caller, or the queue, has too many."""
        if share.queued + jobs > self.quotas.queue:
            raise _later("the queue is full", 1.0)
        if share.queued_of(caller) + jobs > self.quotas.queued:
            raise _later(f"{self.quotas.queued} jobs of yours are waiting already", 1.0)
        if self.quotas.cpu is not None:
            minutes = self._recent(caller)
            if sum(cpu for _, cpu in minutes) >= self.quotas.cpu:
                wait = minutes[0][0] + MINUTE + HOUR - time.monotonic()
                raise _later(f"{self.quotas.cpu:g} CPU seconds in an hour are used up", wait)

    def check_bodies(self, size: int) -> None:
        """Refusal 429 if the requests of a caller's jobs take up as much as its files may."""
        if size > self.quotas.stored:
            raise _later("the requests of your jobs take up too much", 1.0)

    def spent(self, caller: str, cpu: float) -> None:
        if self.quotas.cpu is None:
            return
        minutes = self._recent(caller)
        now = time.monotonic()
        if minutes and minutes[-1][0] > now - MINUTE:
            minutes[-1] = (minutes[-1][0], minutes[-1][1] + cpu)
        else:
            minutes.append((now, cpu))
        self._minutes[caller] = minutes

    def _recent(self, caller: str) -> deque[tuple[float, float]]:
        minutes = self._minutes.get(caller, deque())
        while minutes and minutes[0][0] + MINUTE + HOUR < time.monotonic():
            minutes.popleft()
        if not minutes:
            self._minutes.pop(caller, None)
        return minutes


class Budget:
    """Bytes of bodies that are in memory at once, of all callers together."""

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, size: int) -> None:
        """Refusal 503 if there are too many; what was taken is to be given back."""
        if size > self._left:
            raise Refusal(
                503, "busy", "too many large requests at once", hint="ask again in a moment"
            ).with_header("Retry-After", "1")
        self._left -= size

    def give_back(self, size: int) -> None:
        self._left += size

    def keep(self, size: int, body: bytes) -> int:
        """Of what was taken for a body what it has turned out to need; the rest is given back."""
        self.give_back(size - len(body))
        return len(body)

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        self.take(size)
        try:
            yield
        finally:
            self.give_back(size)


def _later(why: str, seconds: float) -> Refusal:
    after = str(max(1, round(seconds)))
    refusal = Refusal(429, "busy", why, hint=f"ask again in {after} seconds")
    return refusal.with_header("Retry-After", after)
