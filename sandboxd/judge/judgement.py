"""What judging a submission found: a verdict, and for every case why (`sandboxd.judgement/1`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from sandboxd.judge.verdict import Verdict
from sandboxd.result import Degraded, Output, Record, Result, to_json

SCHEMA = "sandboxd.judgement/1"
SHOWN = 4096
"""Bytes of a stream that a judged case still holds: a hundred whole outputs would be a lot."""


class CaseJudgement(Record, frozen=True):
    """One case. `message` may quote the submission: print it through judge.text only."""

    name: str
    verdict: Verdict
    reason: str
    """The row of judge.verdict that chose the verdict."""
    message: str = ""
    result: Result | None = None
    """The run, its streams cut to SHOWN bytes; None if there was none."""


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

    @property
    def compiler_output(self) -> bytes:
        """What the compiler said; a stranger's bytes."""
        if self.compilation is None:
            return b""
        return self.compilation.stderr + self.compilation.stdout

    @property
    def degraded(self) -> tuple[Degraded, ...]:
        """What was not enforced in some run, each thing once."""
        return tuple(dict.fromkeys(each for result in self._results() for each in result.degraded))

    def _results(self) -> Iterator[Result]:
        if self.compilation is not None:
            yield self.compilation
        yield from (case.result for case in self.cases if case.result is not None)


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
    compilation = judgement.compilation
    return {
        "schema": SCHEMA,
        "submission": judgement.submission,
        "language": judgement.language,
        "verdict": judgement.verdict,
        "message": judgement.message,
        "compilation": None if compilation is None else to_json(compilation),
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
    }
