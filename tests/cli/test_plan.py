"""`sandboxd plan`: every step with its reason, and the system calls; and that nothing is done."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PLAN = [sys.executable, "-P", "-m", "sandboxd", "plan"]

pytestmark = [pytest.mark.needs("userns"), pytest.mark.root_ok]


def plan(*words: str | bytes) -> str:
    done = subprocess.run([*PLAN, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def record(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan("--json", *words))
    return found


def test_steps_and_reasons() -> None:
    text = plan("-p", "base", "--", "python3", "-c", "print(1)")
    assert text.startswith("policy base on Linux ")
    for heading in ("tenant: ", "setup: ", "exec: ", "enforcement:"):
        assert f"\n{heading}" in text
    assert re.search(r"^ +0  user_namespace .*  # ", text, flags=re.MULTILINE)
    assert re.search(r"^ +1  exec +python3 -c print\(1\) .*# argv$", text, flags=re.MULTILINE)
    assert re.search(r"set_limit +NOFILE 1024\b.* +# base.toml.*limits.open_files", text)


def test_flags_are_their_own_reason() -> None:
    text = plan("--open-files", "77", "-v", "/usr:/x:ro", "--", "true")
    assert text.startswith("policy base+flags on ")
    assert re.search(r"set_limit +NOFILE 77\b.* +# command line: --open-files", text)
    assert re.search(r"attach +/usr -> .*/x .* +# command line: the mount on /x", text)


def test_json() -> None:
    found = record("-m", "64M", "--", "true")
    assert found["schema"] == "sandboxd.plan/1"
    assert found["policy"] == "base+flags"
    for part in ("tenant", "setup", "exec"):
        assert [step["step"] for step in found[part]] == list(range(len(found[part])))
        assert all(step["stage"] and step["why"] for step in found[part])
    assert found["enforcement"]["wall_time"] == "supervisor"
    assert all(one.keys() == {"what", "why"} for one in found["degraded"])
    assert "script" not in found


def test_script() -> None:
    text = plan("--script", "--", "printf", "%s", "x y")
    assert re.search(r'mount\("tmpfs", "/tmp", "tmpfs", MS_NOSUID\|MS_NODEV, "mode=', text)
    assert re.search(r'execve\("[a-z/]*/printf", \["printf", "%s", "x y"\], \[', text)
    assert "(the frame of the script)" in text


def test_script_as_json() -> None:
    """Every step stands in the script, but those that are only a value for others."""
    found = record("--script", "--", "true")
    for part in ("tenant", "setup", "exec"):
        named = {row["step"] for row in found["script"][part]}
        assert named - {None} <= {step["step"] for step in found[part]}
        assert len(named) > 1
    assert not re.search(r"syscall_\d", json.dumps(found["script"]))


@pytest.mark.parametrize("name", sorted(
    path.stem for path in (Path(__file__).resolve().parents[2] / "policies").glob("*.toml")
))  # fmt: skip
def test_every_policy_has_a_plan(name: str) -> None:
    assert plan("-p", name, "--script", "--", "true").startswith(f"policy {name} on ")


def test_nothing_is_run_or_checked_inside(tmp_path: Path) -> None:
    assert "no-such-program" in plan("--", "no-such-program", b"\xff\x1b[2J")
    assert "\x1b" not in plan("--script", "--", "no-such-program", b"\xff\x1b[2J")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-p", "bsae", "true"], "sandboxd: no policy 'bsae'\nsandboxd:   did you mean base?"),
        (["-v", "/nowhere:/x", "true"], "sandboxd: cannot show /nowhere on /x"),
    ],
)
def test_what_cannot_be_planned(words: list[str], said: str) -> None:
    done = subprocess.run([*PLAN, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(said)
