"""A Runner that answers from a script, for what depends on order and words, not on a kernel."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import trio

from sandboxd.job import Job
from sandboxd.result import (
    Artifact,
    Degraded,
    HostRef,
    Output,
    PolicyRef,
    Quality,
    Result,
    Status,
    Timing,
    Usage,
)


def stream(data: bytes) -> Output:
    digest = hashlib.sha256(data).hexdigest()
    return Output(bytes=len(data), kept=len(data), truncated=False, sha256=digest, data=data)


def result(
    status: Status = "ok",
    stdout: bytes = b"",
    *,
    stderr: bytes = b"",
    message: str = "",
    exit_code: int | None = 0,
    error: str | None = None,
    artifacts: tuple[Artifact, ...] = (),
) -> Result:
    return Result(
        job="1",
        policy=PolicyRef(name="test", sha256=""),
        status=status,
        causes=() if status == "ok" else (status,),
        fault=None,
        message=message,
        exit_code=exit_code,
        signal=None,
        core_dumped=False,
        error=error,
        usage=Usage(cpu_time=0.25, wall_time=0.5, memory_peak=3 << 20),
        streams={"stdout": stream(stdout), "stderr": stream(stderr)},
        limits={},
        violations=(),
        artifacts=artifacts,
        artifact_errors=(),
        enforcement={},
        degraded=(Degraded(what="memory", why="no controller"),),
        quality=Quality(),
        timing=Timing(queued=0, setup=0, teardown=0, started_at="", ended_at=""),
        host=HostRef(id="h", kernel="k", sandboxd="0"),
    )


def binary(data: bytes = b"\x7fELF", mode: int = 0o755) -> Artifact:
    return Artifact(path="program", bytes=len(data), sha256="", mode=mode, data=data)


Answer = Result | Exception
TICK = 0.02  # seconds: outputs are compared in threads, of which a virtual clock knows nothing


class ScriptedRunner:
    """`cases`: name of the input file -> (ticks it takes, what comes out)."""

    def __init__(self, compilation: Answer, cases: Mapping[str, tuple[float, Answer]]) -> None:
        self.compilation = compilation
        self.cases = cases
        self.jobs: list[Job] = []
        self.running = 0
        self.most_running = 0
        self.cancelled: list[str] = []

    async def run(self, job: Job) -> Result:
        self.jobs.append(job)
        if not isinstance(job.stdin, Path):
            return await self._answer(0, self.compilation)
        name = job.stdin.stem
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._answer(*self.cases[name])
        except trio.Cancelled:
            self.cancelled.append(name)
            raise
        finally:
            self.running -= 1

    async def _answer(self, ticks: float, answer: Answer) -> Result:
        await trio.sleep(ticks * TICK)
        if isinstance(answer, Exception):
            raise answer
        return answer
