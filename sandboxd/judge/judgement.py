"""What judging a submission found: a verdict, and for every case why (`sandboxd.judgement/1`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from sandboxd.judge.verdict import Verdict
from sandboxd.result import (
    ArtifactError,
    Degraded,
    Output,
    Record,
    Result,
    carried,
    text,
    to_json,
)

SCHEMA = "sandboxd.judgement/1"
SHOWN = 4096
"""Bytes of a stream that a judged case still holds: a hundred whole outputs would be a lot."""


class Validation(Record, frozen=True, kw_only=True):
    """What a validator of the package's own said of one case, and left in the feedback directory.

    `judge_message` may tell what the right answer is; `team_message` is for who submitted. Both may
    quote the submission: they are anybody's bytes.
    """

    validator: str
    """Its path in the package."""
    verdict: Literal["accepted", "wrong", "failed"]
    why: str = ""
    """For "failed": how it ended, and the beginning of its stderr."""
    judge_message: bytes = b""
    team_message: bytes = b""
    judge_error: bytes = b""
    lost: tuple[ArtifactError, ...] = ()
    """What it left and was not taken: links, and files that are too large."""
    result: Result
    """Its own run, streams cut to SHOWN bytes."""


class CaseJudgement(Record, frozen=True):
    """One case. `message` may quote the submission: print it through judge.text only."""

    name: str
    verdict: Verdict
    reason: str
    """The row of judge.verdict that chose the verdict."""
    message: str = ""
    result: Result | None = None
    """The submission's run, its streams cut to SHOWN bytes; None if there was none."""
    validation: Validation | None = None
    """None: compared by default, or not validated because the submission did not end well."""


class Judgement(Record, frozen=True, kw_only=True):
    """One submission. `cases` ends with the first failing one unless all were asked for."""

    submission: str
    language: str | None
    verdict: Verdict
    message: str = ""
    compilation: Result | None = None
    compiled_before: bool = False
    """The compilation is an earlier one's, of the same files by the same compiler."""
    not_kept: str = ""
    """Why it cannot be kept for the next time, if it cannot."""
    cases: tuple[CaseJudgement, ...] = ()
    cases_total: int
    validator_compilation: Result | None = None
    """Only of a validator that does not compile, which is JE before any case."""

    @property
    def compiler_output(self) -> bytes:
        """What the compiler said; a stranger's bytes."""
        result = self.compilation or self.validator_compilation
        return b"" if result is None else result.stderr + result.stdout

    @property
    def degraded(self) -> tuple[Degraded, ...]:
        """What was not enforced in some run, each thing once."""
        return tuple(dict.fromkeys(each for result in self._results() for each in result.degraded))

    def _results(self) -> Iterator[Result]:
        if self.compilation is not None:
            yield self.compilation
        for case in self.cases:
            if case.result is not None:
                yield case.result
            if case.validation is not None:
                yield case.validation.result


def shortened(result: Result) -> Result:
    """The same record with streams of at most SHOWN bytes, marked as truncated."""
    streams = {name: _shortened(stream) for name, stream in result.streams.items()}
    return msgspec.structs.replace(result, streams=streams)


def _shortened(stream: Output) -> Output:
    if stream.kept <= SHOWN:
        return stream
    data = stream.data[:SHOWN]
    return msgspec.structs.replace(stream, data=data, tail=b"", kept=len(data), truncated=True)


def judgement_json(judgement: Judgement) -> dict[str, Any]:
    """The judgement as JSON types."""
    compilation, validators = judgement.compilation, judgement.validator_compilation
    return {
        "schema": SCHEMA,
        "submission": judgement.submission,
        "language": judgement.language,
        "verdict": judgement.verdict,
        "message": judgement.message,
        "compilation": None if compilation is None else to_json(compilation),
        "validator_compilation": None if validators is None else to_json(validators),
        "compiled_before": judgement.compiled_before,
        "not_kept": judgement.not_kept,
        "cases_total": judgement.cases_total,
        "cases": [_case_json(case) for case in judgement.cases],
        "degraded": msgspec.to_builtins(judgement.degraded),
    }


def _case_json(case: CaseJudgement) -> dict[str, Any]:
    return {
        "name": case.name,
        "verdict": case.verdict,
        "reason": case.reason,
        "message": case.message,
        "result": None if case.result is None else to_json(case.result),
        "validation": None if case.validation is None else _validation_json(case.validation),
    }


def _validation_json(validation: Validation) -> dict[str, Any]:
    return {
        "validator": validation.validator,
        "verdict": validation.verdict,
        "why": validation.why,
        **text("judge_message", validation.judge_message),
        **text("team_message", validation.team_message),
        **text("judge_error", validation.judge_error),
        "lost": carried([msgspec.to_builtins(one) for one in validation.lost]),
        "result": to_json(validation.result),
    }
