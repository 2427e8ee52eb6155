"""On a machine whose /proc hides processes (hidepid): what can be limited still is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.needs import hidden_processes

pytestmark = pytest.mark.needs("userns")

BUSY = """
import time
while time.process_time() < 1.5:
    pass
"""


def run(*words: str, how: str = "invisible") -> dict[str, Any]:
    command = [sys.executable, "-m", "sandboxd", "run", "--json", "-p", "base", *words]
    done = subprocess.run(
        [*hidden_processes(how), *command],
        env={**os.environ, "SANDBOXD_CGROUP": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("how", ["noaccess", "invisible", "ptraceable"])
def test_wall_time(how: str) -> None:
    result = run("--wall-time", "200ms", "--", "sleep", "1000", how=how)
    assert result["status"] == "wall_time_limit"
    assert result["usage"]["wall_time"] >= 0.1  # from before the program's own start


def test_a_busy_program_is_not_idle() -> None:
    result = run("--idle-time", "500ms", "--", "/usr/bin/python3", "-c", BUSY)
    assert result["status"] == "ok"
    assert result["usage"]["idle_longest"] is None
    assert "idle_time" in {one["what"] for one in result["degraded"]}


def test_what_is_not_sampled_is_not_claimed() -> None:
    found = run("--cpu-time", "5s", "--", "true")
    assert found["enforcement"]["memory"] == "none"
    assert found["limits"]["memory"]["action"] == "not enforced"
    assert found["enforcement"]["cpu_time"] == "RLIMIT_CPU per process"
    assert "hidepid=invisible" in {one["what"]: one["why"] for one in found["degraded"]}["memory"]
