"""One case: run, and its output held against the answer by comparing, or by a validator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from sandboxd.errors import HostError, SandboxError
from sandboxd.job import Job
from sandboxd.judge import validators
from sandboxd.judge.compare import Comparison, compare
from sandboxd.judge.compiling import Joins, Ready, Runs, over
from sandboxd.judge.interactive import play
from sandboxd.judge.judgement import CaseJudgement, Validation, shortened
from sandboxd.judge.metadata import ProblemError
from sandboxd.judge.problem import Case, Problem
from sandboxd.judge.validators import Validator
from sandboxd.judge.verdict import INTERACTIVE, RUN, VALIDATED, Facts, Row, decide
from sandboxd.result import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """All that each case of one submission needs."""

    runner: Runs
    problem: Problem
    ready: Ready
    validators: tuple[Validator, ...] = ()


async def run_case(bench: Bench, case: Case) -> CaseJudgement:
    """What comes of this case; what sandboxd could not do is JE."""
    try:
        if bench.problem.interactive:
            return await _play(bench, case)
        return await _run(bench, case)
    except SandboxError as error:
        return CaseJudgement(
            name=case.name, verdict="JE", reason=type(error).__name__, message=str(error)
        )


async def _run(bench: Bench, case: Case) -> CaseJudgement:
    ready = bench.ready
    result = await bench.runner.run(
        Job(
            argv=[*ready.argv, *case.args],
            policy=ready.policy,
            stdin=case.input,
            files=over(ready.files, case.files),
            keep=ready.policy.limits.output or 0,  # all that the limit lets through
        )
    )
    stdout = result.streams.get("stdout")
    truncated = stdout is not None and stdout.truncated
    whole = result.status == "ok" and not truncated
    if bench.validators:
        said = None
        if whole:
            said = await validators.validate(bench.runner, bench.validators, case, result.stdout)
        row = decide(VALIDATED, _facts(ready, result, truncated=truncated, validator=_word(said)))
        return _judged(case, row, result, said)
    found: Comparison | None = None
    if whole:
        found = await trio.to_thread.run_sync(_compare_case, case, result.stdout)
    output = found.kind if found else None
    row = decide(RUN, _facts(ready, result, truncated=truncated, output=output))
    return _judgement(case, row, result, found.where if found else None)


async def _play(bench: Bench, case: Case) -> CaseJudgement:
    if not isinstance(bench.runner, Joins):
        raise HostError("pipelines", "an interactive problem needs programs that are joined",
                        hint="judge with a Runner, not through a daemon")  # fmt: skip
    (validator,) = bench.validators
    played = await play(bench.runner, bench.ready, validator, case, bench.problem.limits)
    said, result = validators.read(validator, played.validator), played.submission
    late = bool(played.late) and result.status == "cancelled"
    row = decide(
        INTERACTIVE,
        _facts(
            bench.ready, result, validator=said.verdict, unprompted=played.unprompted, late=late
        ),
    )
    return _judged(case, row, result, said)


def _facts(ready: Ready, result: Result, **more: Any) -> Facts:
    return Facts(
        status=result.status,
        host_fault=result.fault == "host",
        start_error=result.error,
        own_program=ready.language.run[0].startswith("./"),
        exit_code=result.exit_code,
        out_of_memory_exit=ready.language.out_of_memory_exit,
        **more,
    )


def _word(said: Validation | None) -> str | None:
    return None if said is None else said.verdict


def _judged(case: Case, row: Row, result: Result, said: Validation | None) -> CaseJudgement:
    """With the validator's words, where it was the validator that decided."""
    why = None
    if said is not None and row.by_validator:
        why = validators.message(said) or ("" if row.verdict == "AC" else row.name)
    return msgspec.structs.replace(_judgement(case, row, result, why), validation=said)


def _judgement(case: Case, row: Row, result: Result, why: str | None) -> CaseJudgement:
    """`why` instead of what the run itself says."""
    if why is None:
        why = result.message or row.name
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
