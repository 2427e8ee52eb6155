"""The tables of verdicts: every row is chosen by something, and rows win in their order."""

from __future__ import annotations

from typing import get_args

import pytest

from sandboxd.judge.verdict import (
    COMPILE,
    EXPECTED,
    INTERACTIVE,
    MEANING,
    RUN,
    VALIDATED,
    Facts,
    Row,
    Verdict,
    decide,
)
from sandboxd.result import Status

RUNS: list[tuple[str, Verdict, Facts]] = [
    ("ended by the caller", "JE", Facts(status="cancelled")),
    ("the machine had no memory", "JE", Facts(status="signaled", host_fault=True)),
    ("collecting failed", "JE", Facts(status="artifact_error")),
    (
        "too large to start",
        "MLE",
        Facts(status="start_failed", start_error="ENOMEM", own_program=True),
    ),
    ("broken program", "RTE", Facts(status="start_failed", start_error="ENOENT", own_program=True)),
    ("not started", "JE", Facts(status="start_failed", start_error="ENOENT")),
    ("memory used up", "MLE", Facts(status="memory_limit")),
    ("CPU time used up", "TLE", Facts(status="cpu_time_limit")),
    ("time used up", "TLE", Facts(status="wall_time_limit")),
    ("time used up", "TLE", Facts(status="idle_limit")),
    ("too much output", "OLE", Facts(status="output_limit", truncated=True)),
    ("forbidden call", "SV", Facts(status="syscall_denied")),
    ("space or processes used up", "RTE", Facts(status="disk_limit")),
    ("space or processes used up", "RTE", Facts(status="process_limit")),
    ("killed by a signal", "RTE", Facts(status="signaled", output="same")),
    ("heap used up", "MLE", Facts(status="nonzero_exit", exit_code=3, out_of_memory_exit=3)),
    ("failing exit code", "RTE", Facts(status="nonzero_exit", exit_code=1, out_of_memory_exit=3)),
    ("failing exit code", "RTE", Facts(status="nonzero_exit", exit_code=3)),
    ("failing exit code", "RTE", Facts(status="nonzero_exit", output="same")),
    ("failing exit code", "RTE", Facts(status="nonzero_exit")),
    ("output not kept whole", "OLE", Facts(status="ok", truncated=True, output="same")),
    ("right", "AC", Facts(status="ok", output="same")),
    ("right but for white space", "PE", Facts(status="ok", output="space")),
    ("wrong", "WA", Facts(status="ok", output="different")),
    ("not compared", "JE", Facts(status="ok")),
]

OWN = RUNS[: next(number for number, (name, _, _) in enumerate(RUNS) if name == "right")]

VALIDATIONS: list[tuple[str, Verdict, Facts]] = [
    *OWN,
    ("killed by a signal", "RTE", Facts(status="signaled", validator="wrong")),
    ("the validator failed", "JE", Facts(status="ok", validator="failed")),
    ("accepted by the validator", "AC", Facts(status="ok", validator="accepted")),
    ("rejected by the validator", "WA", Facts(status="ok", validator="wrong")),
    ("not validated", "JE", Facts(status="ok")),
]

CONVERSATIONS: list[tuple[str, Verdict, Facts]] = [
    (
        "the validator failed in the middle",
        "JE",
        Facts(status="signaled", validator="failed", unprompted=True),
    ),
    (
        "rejected in the middle",
        "WA",
        Facts(status="cancelled", validator="wrong", unprompted=True, late=True),
    ),
    ("rejected in the middle", "WA", Facts(status="ok", validator="wrong", unprompted=True)),
    (
        "the conversation took too long",
        "TLE",
        Facts(status="cancelled", validator="wrong", late=True),
    ),
    *OWN,
    ("failing exit code", "RTE", Facts(status="nonzero_exit", validator="wrong")),
    ("failing exit code", "RTE", Facts(status="nonzero_exit", validator="failed")),
    (
        "failing exit code",
        "RTE",
        Facts(status="nonzero_exit", validator="accepted", unprompted=True),
    ),
    ("the validator failed", "JE", Facts(status="ok", validator="failed")),
    ("accepted by the validator", "AC", Facts(status="ok", validator="accepted", unprompted=True)),
    ("accepted by the validator", "AC", Facts(status="ok", validator="accepted")),
    ("rejected by the validator", "WA", Facts(status="ok", validator="wrong")),
    ("not validated", "JE", Facts(status="ok")),
]

COMPILATIONS: list[tuple[str, Verdict, Facts]] = [
    ("ended by the caller", "JE", Facts(status="cancelled")),
    ("the machine had no memory", "JE", Facts(status="signaled", host_fault=True)),
    ("compiler did not start", "JE", Facts(status="start_failed")),
    ("compiler ended badly", "CE", Facts(status="nonzero_exit", exit_code=1)),
    ("compiler ended badly", "CE", Facts(status="memory_limit")),
    ("compiler ended badly", "CE", Facts(status="wall_time_limit")),
    ("compiler ended badly", "CE", Facts(status="syscall_denied")),
    ("unusable program", "CE", Facts(status="artifact_error")),
    ("no program", "CE", Facts(status="ok", produced=False)),
    ("compiled", "AC", Facts(status="ok")),
]


TABLES = [
    (RUN, RUNS),
    (VALIDATED, VALIDATIONS),
    (INTERACTIVE, CONVERSATIONS),
    (COMPILE, COMPILATIONS),
]


@pytest.mark.parametrize(
    ("table", "name", "verdict", "facts"),
    [(table, *one) for table, chosen in TABLES for one in chosen],
)
def test_each_row(table: tuple[Row, ...], name: str, verdict: Verdict, facts: Facts) -> None:
    row = decide(table, facts)
    assert (row.name, row.verdict) == (name, verdict)


@pytest.mark.parametrize(("table", "chosen"), TABLES)
def test_every_row_is_tested(
    table: tuple[Row, ...], chosen: list[tuple[str, Verdict, Facts]]
) -> None:
    assert [row.name for row in table] == list(dict.fromkeys(name for name, _, _ in chosen))


@pytest.mark.parametrize("status", get_args(Status))
def test_every_status_has_a_verdict_and_only_ok_is_accepted(status: Status) -> None:
    right = Facts(status=status, output="same")
    assert (decide(RUN, right).verdict == "AC") == (status == "ok")
    assert (decide(COMPILE, right).verdict == "AC") == (status == "ok")
    for table in (VALIDATED, INTERACTIVE):
        accepted = Facts(status=status, validator="accepted", unprompted=True)
        assert (decide(table, accepted).verdict == "AC") == (status == "ok")


def test_every_verdict_has_a_meaning() -> None:
    assert set(MEANING) == set(get_args(Verdict))


def test_expectations_are_verdicts_and_never_our_own_failure() -> None:
    for verdicts in EXPECTED.values():
        assert verdicts <= set(get_args(Verdict))
        assert "JE" not in verdicts
    assert [name for name, verdicts in EXPECTED.items() if "AC" in verdicts] == ["accepted"]
