"""Judging one submission: compiled once in a sandbox, then every case in a fresh one.

Where the runner keeps builds, the same submission is compiled once for good: what each case gets is
then attached to its sandbox, and not copied (supervise/builds.py).

Theory of operation. Cases start in order, up to `parallel` at once. The first failing case in that
order decides: nothing behind it starts any more, what runs behind it is killed, and its outcome
does not count even if it came in earlier. So the judgement is the same for every `parallel`.

What the submission does, while it is compiled or run, becomes a verdict; what sandboxd could not do
(a SandboxError) becomes JE with its text. judge() raises neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import msgspec
import trio

from sandboxd.errors import HostError, SandboxError
from sandboxd.job import File, Input, Job
from sandboxd.judge.compare import Comparison, compare
from sandboxd.judge.judgement import CaseJudgement, Judgement, shortened
from sandboxd.judge.languages import Language, Program, check_available, detect, make_program, table
from sandboxd.judge.metadata import ProblemError
from sandboxd.judge.problem import Case, Problem
from sandboxd.judge.submission import SourceError, Submission, check_names
from sandboxd.judge.verdict import COMPILE, RUN, Facts, decide
from sandboxd.policy import Limits, Policy
from sandboxd.result import Result
from sandboxd.supervise import policies
from sandboxd.supervise.builds import Build

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


class Afresh:
    """A runner of which nothing is asked but to run: every submission is compiled anew."""

    def __init__(self, runner: Runs) -> None:
        self._runner = runner

    async def run(self, job: Job) -> Result:
        return await self._runner.run(job)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """A submission that compiled: what each case's job has in common."""

    language: Language
    argv: tuple[str, ...]
    files: Files
    policy: Policy
    compilation: Result
    compiled_before: bool
    not_kept: str


async def judge(
    runner: Runs,
    problem: Problem,
    submission: Submission,
    *,
    everything: bool = False,
    parallel: int = 1,
    on_case: Callable[[CaseJudgement], None] | None = None,
) -> Judgement:
    """Compiles and runs; `on_case` hears of every case that counts, in order, as it is known."""
    total = len(problem.cases)
    ready = await _prepare(runner, problem, submission)
    if isinstance(ready, Judgement):
        return ready
    board = _Board(problem.cases, everything, on_case)
    async with trio.open_nursery() as workers:
        for _ in range(max(1, min(parallel, total))):
            workers.start_soon(_work, runner, ready, board)
    cases = board.judged()
    decisive = next((case for case in cases if case.verdict != "AC"), None)
    return Judgement(
        submission=submission.name,
        language=ready.language.code,
        verdict=decisive.verdict if decisive else "AC",
        message=f"{decisive.name}: {decisive.message}" if decisive else "",
        compilation=shortened(ready.compilation),
        compiled_before=ready.compiled_before,
        not_kept=ready.not_kept,
        cases=cases,
        cases_total=total,
    )


def refused(problem: Problem, name: str, reason: str) -> Judgement:
    """A compile error that needed no compiler."""
    return Judgement(
        submission=name,
        language=None,
        verdict="CE",
        message=reason,
        cases_total=len(problem.cases),
    )


# --- compiling ------------------------------------------------------------------------------------


async def _prepare(runner: Runs, problem: Problem, submission: Submission) -> _Ready | Judgement:
    """The submission ready to run, or the judgement if it never will be."""
    try:
        language = _language(problem, submission)
    except SourceError as error:
        return refused(problem, submission.name, str(error))
    verdict = Judgement(
        submission=submission.name,
        language=language.code,
        verdict="CE",
        cases_total=len(problem.cases),
    )
    try:
        return await _compile(runner, problem, submission, language)
    except SourceError as error:
        return msgspec.structs.replace(verdict, message=str(error))
    except _CompileFailed as failed:
        return msgspec.structs.replace(
            verdict, verdict=failed.verdict, message=failed.why, compilation=failed.result
        )
    except SandboxError as error:
        return msgspec.structs.replace(verdict, verdict="JE", message=str(error))


def _language(problem: Problem, submission: Submission) -> Language:
    check_names(submission.files)
    if submission.size > problem.limits.code:
        raise SourceError(
            f"the sources are {submission.size} bytes, more than {problem.limits.code}"
        )
    if submission.language is None:
        language = detect(submission.files)
    elif submission.language in table():
        language = table()[submission.language]
    else:
        raise SourceError(f"no such language: {submission.language}")
    if problem.languages is not None and language.code not in problem.languages:
        allowed = ", ".join(sorted(problem.languages))
        raise SourceError(f"{language.name} is not allowed for this problem, only: {allowed}")
    return language


class _CompileFailed(Exception):
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


async def _compile(
    runner: Runs, problem: Problem, submission: Submission, language: Language
) -> _Ready:
    compiling, running = policies.find(language.compile_policy), policies.find(language.run_policy)
    check_available(language, compiling, running)
    limits = problem.limits
    include = problem.include
    sources = _over(
        _over(submission.files, include.get("default", {})), include.get(language.code, {})
    )
    program = make_program(
        language, sources, compile_memory=limits.compile_memory, run_memory=limits.memory
    )
    job = Job(
        argv=program.compile,
        policy=_compile_policy(compiling, problem, language),
        env=_over({}, language.env),
        files=_over({}, program.files),
        collect=program.collect,
        keep=COMPILER_OUTPUT,
    )
    made, not_kept = await _built(runner, job) if program.collect else (None, "")
    result = await runner.run(job) if made is None else made.result
    if result.status != "ok" or (program.collect and not result.artifacts):
        raise _CompileFailed(result)
    running = _run_policy(running, problem, language)
    _check_fits(result, running.limits)
    return _Ready(
        language=language,
        argv=tuple(program.run),
        files=_files(program, made, result),
        policy=running,
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
        return _over({}, program.files)
    if made is None or made.reference is None:
        return _program_files(result)
    entries = made.reference.entries()
    if len(entries) > MOST_ATTACHED:
        return _over({}, made.paths())
    return {one.path: one for one in entries}


def _over(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
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


def _compile_policy(policy: Policy, problem: Problem, language: Language) -> Policy:
    """The compiler's policy with the package's limits, which a job alone may not raise."""
    limits = problem.limits
    return _with_limits(
        policy,
        cpu_time=limits.compile_time,
        wall_time=2 * limits.compile_time + 2,
        memory=limits.compile_memory + language.memory_extra * MIB,
        output=policy.limits.output or COMPILER_FLOOD,
    )


def _run_policy(policy: Policy, problem: Problem, language: Language) -> Policy:
    limits = problem.limits
    time = limits.time * language.time_factor
    return _with_limits(
        policy,
        cpu_time=time,
        wall_time=2 * time + 2,  # who sleeps is too slow, who waits for a busy machine is not
        memory=limits.memory + language.memory_extra * MIB,
        output=limits.output,
    )


def _with_limits(
    policy: Policy, *, cpu_time: float, wall_time: float, memory: int, output: int
) -> Policy:
    limits: Limits = msgspec.structs.replace(
        policy.limits, cpu_time=cpu_time, wall_time=wall_time, memory=memory, output=output
    )
    return msgspec.structs.replace(policy, limits=limits)


# --- running --------------------------------------------------------------------------------------


class _Board:
    """Which cases run and have run, and up to which one they count."""

    def __init__(
        self,
        cases: tuple[Case, ...],
        everything: bool,
        on_case: Callable[[CaseJudgement], None] | None,
    ) -> None:
        self.cases = cases
        self.everything = everything
        self.on_case = on_case
        self.end = len(cases)  # cases from here on do not count
        self.started = 0
        self.told = 0
        self.done: dict[int, CaseJudgement] = {}
        self.running: dict[int, trio.CancelScope] = {}

    def take(self) -> int | None:
        """The number of the next case to run."""
        if self.started >= self.end:
            return None
        self.started += 1
        return self.started - 1

    def put(self, number: int, case: CaseJudgement) -> None:
        """Notes an outcome; a failing one ends what lies behind it."""
        if number >= self.end:
            return
        self.done[number] = case
        if case.verdict == "JE" or (case.verdict != "AC" and not self.everything):
            self.end = number + 1
            for later, scope in self.running.items():
                if later > number:
                    scope.cancel()
        while self.told < self.end and self.told in self.done:
            self.told += 1
            if self.on_case is not None:
                self.on_case(self.done[self.told - 1])

    def judged(self) -> tuple[CaseJudgement, ...]:
        return tuple(self.done[number] for number in range(self.end))


async def _work(runner: Runs, ready: _Ready, board: _Board) -> None:
    while (number := board.take()) is not None:
        with trio.CancelScope() as scope:
            board.running[number] = scope
            board.put(number, await _run_case(runner, ready, board.cases[number]))
        del board.running[number]


async def _run_case(runner: Runs, ready: _Ready, case: Case) -> CaseJudgement:
    output = ready.policy.limits.output or 0
    try:
        result = await runner.run(
            Job(
                argv=[*ready.argv, *case.args],
                policy=ready.policy,
                stdin=case.input,
                files=_over(ready.files, case.files),
                keep=output,  # all that the limit lets through
            )
        )
        return await _judge_case(case, result, ready.language)
    except SandboxError as error:
        return CaseJudgement(
            name=case.name, verdict="JE", reason=type(error).__name__, message=str(error)
        )


async def _judge_case(case: Case, result: Result, language: Language) -> CaseJudgement:
    stdout = result.streams.get("stdout")
    truncated = stdout is not None and stdout.truncated
    found: Comparison | None = None
    if result.status == "ok" and not truncated:
        found = await trio.to_thread.run_sync(_compare_case, case, result.stdout)
    row = decide(
        RUN,
        Facts(
            status=result.status,
            host_fault=result.fault == "host",
            start_error=result.error,
            own_program=language.run[0].startswith("./"),
            exit_code=result.exit_code,
            out_of_memory_exit=language.out_of_memory_exit,
            truncated=truncated,
            output=found.kind if found else None,
        ),
    )
    why = found.where if found else result.message or row.name
    if row.verdict == "MLE" and result.status == "nonzero_exit":
        why = f"{row.name}: {why}"  # an exit code alone says nothing of memory
    return CaseJudgement(
        name=case.name,
        verdict=row.verdict,
        reason=row.name,
        message=why,
        result=shortened(result),
    )


def _compare_case(case: Case, output: bytes) -> Comparison:
    try:
        answer = case.answer.read_bytes()
    except OSError as error:
        raise ProblemError(case.name, f"the answer cannot be read: {error.strerror}") from None
    return compare(answer, output, case.options)
