"""Every status has an exit code, and it is the one docs/reference/cli.md promises."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest

from sandboxd.cli import exitcodes
from sandboxd.result import Result, Signal, Status

TABLE: list[tuple[Status, dict[str, Any], int]] = [
    ("ok", {"exit_code": 0}, 0),
    ("nonzero_exit", {"exit_code": 1}, 1),
    ("nonzero_exit", {"exit_code": 124}, 124),
    ("nonzero_exit", {"exit_code": 255}, 255),
    ("signaled", {"signal": 11}, 139),
    ("signaled", {"signal": 15}, 143),
    ("signaled", {"signal": 64}, 192),
    ("signaled", {}, 137),
    ("cpu_time_limit", {"signal": 9}, 124),
    ("cpu_time_limit", {"signal": 24}, 124),
    ("wall_time_limit", {"signal": 9}, 124),
    ("wall_time_limit", {"exit_code": 0}, 124),
    ("idle_limit", {"signal": 9}, 124),
    ("memory_limit", {"signal": 9}, 137),
    ("memory_limit", {"exit_code": 1}, 137),
    ("output_limit", {"signal": 9}, 153),
    ("output_limit", {"exit_code": 0}, 153),
    ("disk_limit", {"exit_code": 3}, 3),
    ("disk_limit", {"exit_code": 0}, 1),
    ("disk_limit", {"signal": 25}, 153),
    ("process_limit", {"exit_code": 2}, 2),
    ("process_limit", {"signal": 6}, 134),
    ("syscall_denied", {"signal": 31}, 159),
    ("start_failed", {"error": "ENOENT", "exit_code": 127}, 127),
    ("start_failed", {"error": "ENOTDIR"}, 127),
    ("start_failed", {"error": "EACCES", "exit_code": 127}, 126),
    ("start_failed", {"error": "ENOEXEC"}, 126),
    ("start_failed", {"error": "E2BIG"}, 126),
    ("start_failed", {}, 126),
    ("artifact_error", {"exit_code": 0}, 1),
    ("cancelled", {"signal": 9}, 137),
    ("cancelled", {}, 137),
]


def record(status: Status, facts: dict[str, Any]) -> Result:
    number = facts.get("signal")
    signal = None if number is None else Signal(number=number, name=f"SIG{number}")
    code, error = facts.get("exit_code"), facts.get("error")
    return cast(Result, SimpleNamespace(status=status, exit_code=code, signal=signal, error=error))


@pytest.mark.parametrize(("status", "facts", "wanted"), TABLE)
def test_table(status: Status, facts: dict[str, Any], wanted: int) -> None:
    assert exitcodes.exit_code(record(status, facts)) == wanted


def test_every_status_is_in_the_table() -> None:
    assert {row[0] for row in TABLE} == set(get_args(Status))


def test_only_ok_is_success() -> None:
    """A shell must notice whatever else happened."""
    for status, facts, _ in TABLE:
        assert (exitcodes.exit_code(record(status, facts)) == 0) == (status == "ok")
