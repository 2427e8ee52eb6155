"""Judging one submission: compiled once in a sandbox, then every case in a fresh one.

Theory of operation. Cases start in order, up to `parallel` at once. The first failing case in that
order decides: nothing behind it starts any more, what runs behind it is killed, and its outcome
does not count even if it came in earlier. So the judgement is the same for every `parallel`.

What the submission does, while it is compiled or run, becomes a verdict; what sandboxd could not do
(a SandboxError) becomes JE with its text, and so does a validator that is no good. judge() raises
neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import trio

from sandboxd.errors import SandboxError
from sandboxd.judge.cases import Bench, run_case
from sandboxd.judge.compiling import (
    CompileFailed,
    Policies,
    Ready,
    Runs,
    compile_policy,
    compile_program,
    over,
    run_policy,
)
from sandboxd.judge.judgement import CaseJudgement, Judgement, shortened
from sandboxd.judge.languages import (
    Language,
    check_available,
    detect,
    make_program,
    renamed,
    table,
)
from sandboxd.judge.problem import Case, Problem
from sandboxd.judge.submission import SourceError, Submission, check_names
from sandboxd.judge.validators import Validator, ValidatorFailed, compile_all
from sandboxd.result import Result
from sandboxd.supervise import policies


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A problem whose validators are compiled, for judging several submissions of it."""

    problem: Problem
    validators: tuple[Validator, ...] = ()
    failure: str = ""
    """Why a validator is no good: every judgement is JE then."""
    compilation: Result | None = None
    """That validator's."""


async def prepare(runner: Runs, problem: Problem) -> Prepared:
    """Compiles the package's validators, if it has any."""
    try:
        return Prepared(problem=problem, validators=await compile_all(runner, problem))
    except ValidatorFailed as failed:
        return Prepared(problem=problem, failure=str(failed), compilation=failed.result)


async def judge(
    runner: Runs,
    problem: Problem | Prepared,
    submission: Submission,
    *,
    everything: bool = False,
    parallel: int = 1,
    on_case: Callable[[CaseJudgement], None] | None = None,
) -> Judgement:
    """Compiles and runs; `on_case` hears of every case that counts, in order, as it is known."""
    prepared = problem if isinstance(problem, Prepared) else await prepare(runner, problem)
    problem = prepared.problem
    if prepared.failure:
        return _no_validator(prepared, submission)
    ready = await _prepare(runner, problem, submission)
    if isinstance(ready, Judgement):
        return ready
    bench = Bench(runner=runner, problem=problem, ready=ready, validators=prepared.validators)
    board = _Board(problem.cases, everything, on_case)
    async with trio.open_nursery() as workers:
        for _ in range(max(1, min(parallel, len(problem.cases)))):
            workers.start_soon(_work, bench, board)
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
        cases_total=len(problem.cases),
    )


def _no_validator(prepared: Prepared, submission: Submission) -> Judgement:
    return Judgement(
        submission=submission.name,
        language=submission.language,
        verdict="JE",
        message=prepared.failure,
        validator_compilation=prepared.compilation,
        cases_total=len(prepared.problem.cases),
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


async def _prepare(runner: Runs, problem: Problem, submission: Submission) -> Ready | Judgement:
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
    except CompileFailed as failed:
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


async def _compile(
    runner: Runs, problem: Problem, submission: Submission, language: Language
) -> Ready:
    compiling, running = policies.find(language.compile_policy), policies.find(language.run_policy)
    check_available(language, compiling, running)
    limits = problem.limits
    include = problem.include
    sources = over(
        over(renamed(language, submission.files), include.get("default", {})),
        include.get(language.code, {}),
    )
    program = make_program(
        language, sources, compile_memory=limits.compile_memory, run_memory=limits.memory
    )
    with_limits = Policies(
        compiling=compile_policy(compiling, language, limits.compile_time, limits.compile_memory),
        running=run_policy(running, language, limits),
    )
    return await compile_program(runner, language, program, with_limits)


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


async def _work(bench: Bench, board: _Board) -> None:
    while (number := board.take()) is not None:
        with trio.CancelScope() as scope:
            board.running[number] = scope
            board.put(number, await run_case(bench, board.cases[number]))
        del board.running[number]
