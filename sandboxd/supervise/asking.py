"""What is asked of a runner: a job, with all that its caller has for it; and how it is doing."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AsyncExitStack

import msgspec

from sandboxd.job import Job
from sandboxd.supervise import record
from sandboxd.supervise.pipes import Pipes
from sandboxd.supervise.run import Hands


class Asking(msgspec.Struct, frozen=True):
    """A job, without its references, and what its caller has for it."""

    job: Job
    run: Hands | None
    pipes: Pipes
    attached: Collection[str]
    """Where references are attached."""
    lent: AsyncExitStack | None
    """What it holds of others for its time, if anything."""


def name_of(job: Job, run: Hands | None) -> str:
    return run.id if run is not None else job.id or record.new_id()


class RunnerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the runner was opened; `running` and `spares` are of this moment."""

    slots: int
    running: int
    waiting: int
    finished: int
    tenants: int
    spares: int
