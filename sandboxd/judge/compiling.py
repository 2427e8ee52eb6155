"""Compiling: a submission or a validator made ready in a sandbox, once.

Where the runner keeps builds, the same sources are compiled once for good: what each case gets is
then attached to its sandbox, and not copied (supervise/builds.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import msgspec

from sandboxd.errors import HostError
from sandboxd.job import File, Input, Job, Pipe
from sandboxd.judge import problem
from sandboxd.judge.languages import Language, Program
from sandboxd.judge.submission import SourceError
from sandboxd.judge.verdict import COMPILE, Facts, decide
from sandboxd.policy import Limits, Policy
from sandboxd.result import Result
from sandboxd.supervise.builds import Build
from sandboxd.supervise.pipeline import Pipeline

MIB = 1 << 20
COMPILER_OUTPUT = 64 << 10
"""Bytes of the compiler's words that are kept."""
PAGE = 4096
MOST_ATTACHED = 64
"""Names in the working directory; a mount each costs as much as copying a small file."""
COMPILER_FLOOD = 16 << 20
"""Bytes after which a compiler is stopped, where its policy names none."""

Files = dict[str | bytes, Input]


class Runs(Protocol):
    """Whatever carries a job out: the Runner of this process, or a client of another's."""

    async def run(self, job: Job) -> Result: ...


@runtime_checkable
class Builds(Runs, Protocol):
    """Who also keeps what was compiled, for those who judge the same submission again."""

    async def build(self, job: Job) -> Build: ...


@runtime_checkable
class Joins(Runs, Protocol):
    """Who also runs jobs that are joined by pipes, as interactive problems need it."""

    def start_pipeline(
        self, jobs: Sequence[Job], pipes: Sequence[Pipe]
    ) -> AbstractAsyncContextManager[Pipeline]: ...


class Afresh:
    """A runner of which nothing is asked but to run: everything is compiled anew."""

    def __init__(self, runner: Joins) -> None:
        self._runner = runner

    async def run(self, job: Job) -> Result:
        return await self._runner.run(job)

    def start_pipeline(
        self, jobs: Sequence[Job], pipes: Sequence[Pipe]
    ) -> AbstractAsyncContextManager[Pipeline]:
        return self._runner.start_pipeline(jobs, pipes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """With their limits as the package has them."""

    compiling: Policy
    running: Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A program that compiled: what the job of each case has in common."""

    language: Language
    argv: tuple[str, ...]
    files: Files
    policy: Policy
    compilation: Result
    compiled_before: bool
    not_kept: str


class CompileFailed(Exception):
    """The compilation ended, but not with a program."""

    def __init__(self, result: Result) -> None:
        facts = Facts(
            status=result.status,
            host_fault=result.fault == "host",
            produced=bool(result.artifacts),
        )
        row = decide(COMPILE, facts)
        super().__init__(row.name)
        self.verdict = row.verdict
        self.result = result
        why = result.message
        if result.status in ("ok", "artifact_error") and result.artifact_errors:
            why = "; ".join(f"{error.path}: {error.reason}" for error in result.artifact_errors)
        self.why = f"{row.name}: {why}" if why else row.name


async def compile_program(
    runner: Runs, language: Language, program: Program, policies: Policies
) -> Ready:
    """The program ready to run. CompileFailed; SourceError if it fits into no sandbox."""
    job = Job(
        argv=program.compile,
        policy=policies.compiling,
        env=over({}, language.env),
        files=over({}, program.files),
        collect=program.collect,
        keep=COMPILER_OUTPUT,
    )
    made, not_kept = await _built(runner, job) if program.collect else (None, "")
    result = await runner.run(job) if made is None else made.result
    if result.status != "ok" or (program.collect and not result.artifacts):
        raise CompileFailed(result)
    _check_fits(result, policies.running.limits)
    return Ready(
        language=language,
        argv=tuple(program.run),
        files=_files(program, made, result),
        policy=policies.running,
        compilation=msgspec.structs.replace(result, artifacts=()),
        compiled_before=made is not None and made.cached,
        not_kept=not_kept,
    )


async def _built(runner: Runs, job: Job) -> tuple[Build | None, str]:
    """The compilation where the runner keeps such; None where it does not, or cannot, and why."""
    if not isinstance(runner, Builds):
        return None, ""
    try:
        return await runner.build(job), ""
    except HostError as error:
        if error.missing not in ("builds", "home"):
            raise
        return None, str(error)  # no place, or no room: a contestant must not suffer from it


def _files(program: Program, made: Build | None, result: Result) -> Files:
    """What each case is given: attached, or copied where these are too many names for that."""
    if not program.collect:
        return over({}, program.files)
    if made is None or made.reference is None:
        return _program_files(result)
    entries = made.reference.entries()
    if len(entries) > MOST_ATTACHED:
        return over({}, made.paths())
    return {one.path: one for one in entries}


def over(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """Both, `above` winning: also where a name of one would be a directory of the other."""
    kept = {
        name: value
        for name, value in below.items()
        if not any(name.startswith(f"{other}/") or other.startswith(f"{name}/") for other in above)
    }
    return kept | dict(above)


def _program_files(result: Result) -> Files:
    return {
        artifact.path: File(data=artifact.data, mode=artifact.mode & 0o755)
        for artifact in result.artifacts
    }


def _check_fits(result: Result, limits: Limits) -> None:
    """What the compiler made has to fit into a sandbox's directory, which is memory, too."""
    size = sum(artifact.bytes + PAGE for artifact in result.artifacts)
    most = min(each for each in (limits.disk, limits.memory, size) if each is not None)
    if size > most:
        raise SourceError(f"the program is {size} bytes, more than the {most} it has to fit into")


def compile_policy(policy: Policy, language: Language, time: float, memory: int) -> Policy:
    """The compiler's policy with the package's limits, which a job alone may not raise."""
    return with_limits(
        policy,
        cpu_time=time,
        wall_time=2 * time + 2,
        memory=memory + language.memory_extra * MIB,
        output=policy.limits.output or COMPILER_FLOOD,
    )


def run_policy(policy: Policy, language: Language, limits: problem.Limits) -> Policy:
    """The policy of the submission's runs, with the package's limits."""
    time = limits.time * language.time_factor
    return with_limits(
        policy,
        cpu_time=time,
        wall_time=2 * time + 2,  # who sleeps is too slow, who waits for a busy machine is not
        memory=limits.memory + language.memory_extra * MIB,
        output=limits.output,
    )


def with_limits(policy: Policy, **limits: float) -> Policy:
    """The policy with these limits instead of its own."""
    changed: Limits = msgspec.structs.replace(policy.limits, **limits)
    return msgspec.structs.replace(policy, limits=changed)
