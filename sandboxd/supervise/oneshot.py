"""One program and its result, without holding a Runner: `sandboxd.run` and `sandboxd.run_sync`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import trio

from sandboxd.errors import SandboxError, WorkloadFailed
from sandboxd.job import Input, Job, Names, Pattern, Text
from sandboxd.policy import Limits, Policy
from sandboxd.result import Result
from sandboxd.supervise.runner import open_runner


async def run(
    argv: Sequence[Text],
    *,
    policy: str | Policy = "base",
    stdin: bytes | Path = b"",
    env: Names[str | bytes] | None = None,
    cwd: str | bytes | None = None,
    files: Names[Input] | None = None,
    collect: Sequence[str | bytes | Pattern] = (),
    collect_to: Path | Literal["memory"] = "memory",
    limits: Limits | None = None,
    check: bool = False,
) -> Result:
    """Run one program in a sandbox of its own, like trio.run_process.

    A program that fails is a Result, unless `check` is true: then WorkloadFailed carries it.
    """
    job = Job(argv=argv, policy=policy, stdin=stdin, env=env or {}, cwd=cwd, files=files or {},
              collect=collect, collect_to=collect_to, limits=limits)  # fmt: skip
    async with open_runner(slots=1) as runner:
        result = await runner.run(job)
    if check and not result.ok:
        raise WorkloadFailed(f"{result.status}: {result.message}", result)
    return result


def run_sync(argv: Sequence[Text], **options: Any) -> Result:
    """The same for code that is not async, like subprocess.run; also in a thread or a REPL."""
    if trio.lowlevel.in_trio_run():
        raise SandboxError("run_sync was called inside trio", hint="await sandboxd.run(...)")

    async def main() -> Result:
        return await run(argv, **options)

    return trio.run(main)
