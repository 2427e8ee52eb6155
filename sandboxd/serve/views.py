"""What a look at the daemon shows, as types. Pure."""

from __future__ import annotations

import msgspec


class RunningView(msgspec.Struct, frozen=True, kw_only=True):
    """A job, or a program of another protocol's, with what it has used up to now."""

    id: str
    caller: str
    argv: tuple[str, ...]
    policy: str
    created_at: str
    started_at: str | None = None
    wall_time: float | None = None
    cpu_time: float | None = None
    memory: int | None = None
    """Bytes at this moment."""
    memory_peak: int | None = None
    processes: int | None = None


class FailureView(msgspec.Struct, frozen=True, kw_only=True):
    """A job that did not end with `ok`."""

    id: str
    caller: str
    argv: tuple[str, ...]
    status: str
    message: str
    ended_at: str


class CallerView(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    running: int
    queued: int


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the daemon."""

    at: str
    version: str
    caller: str
    """Who looks."""
    everybody: bool
    """Whether it is everybody's jobs, or the own ones only."""
    slots: int
    spares: int
    running: int
    queued: int
    draining: bool
    callers: tuple[CallerView, ...]
    jobs: tuple[RunningView, ...]
    """Those that run, the oldest first."""
    waiting: tuple[RunningView, ...]
    """The first of those that wait."""
    statuses: dict[str, int]
    """How jobs have ended since the daemon was started."""
    failures: tuple[FailureView, ...]
    """The newest first."""
