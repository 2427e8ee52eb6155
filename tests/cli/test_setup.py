"""`sandboxd setup` as a user sees it; what it does to a machine is tested in a guest."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sandboxd.cli import setup
from sandboxd.probe.setup import Step

pytestmark = pytest.mark.root_ok

BEFORE = [
    Step(what="linger", state="missing", found="no systemd", commands=("loginctl x",)),
    Step(what="a long name", state="missing", found="no ids", commands=("usermod", "x")),
    Step(what="swap", state="by hand", found="reboot"),
    Step(what="other", state="ok", found="fine"),
]
AFTER = [Step(what="linger", state="ok", found="systemd runs"), *BEFORE[1:]]
SHOWN = """\
done      linger       systemd runs
missing   a long name  no ids
                       failed: usermod: no
                       run: usermod
                       run: x
by hand   swap         reboot
ok        other        fine"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandboxd", "setup", *args],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_table() -> None:
    lines = list(setup.render(AFTER, BEFORE, {"a long name": "usermod: no"}))
    assert "\n".join(lines) == SHOWN


def test_json() -> None:
    said = setup.to_json("me", AFTER, {"a long name": "usermod: no"})
    assert said["ok"] is False
    assert said["steps"][1] == {
        "what": "a long name", "state": "missing", "found": "no ids",
        "commands": ["usermod", "x"], "failure": "usermod: no",
    }  # fmt: skip


def test_both_forms_say_the_same() -> None:
    table, said = run(), run("--json")
    report = json.loads(said.stdout)
    assert report["schema"] == "sandboxd.setup/1"
    assert table.returncode == said.returncode == (0 if report["ok"] else 1)
    assert table.stderr == said.stderr == ""
    for step in report["steps"]:
        assert step["found"] in table.stdout
        assert all(f"run: {command}" in table.stdout for command in step["commands"])


def test_a_user_that_is_none() -> None:
    done = run("--user", "nobody-of-this-name")
    assert done.returncode == 2
    assert done.stderr == "sandboxd: setup: there is no user nobody-of-this-name\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="needs an ordinary user: root may")
def test_only_root_changes_the_machine() -> None:
    done = run("--user", "judge", "--apply")
    assert done.returncode == 2
    assert "sudo sandboxd setup --user judge --apply" in done.stderr
    assert done.stdout == ""
