"""`sandboxd doctor` as a user sees it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandboxd.cli import doctor
from sandboxd.supervise.doctor import Check, Guarantee, Report

pytestmark = pytest.mark.root_ok

REPORT = Report(
    checks=(
        Check(what="one", state="ok", found="fine"),
        Check(what="another one", state="warn", found="gone", fix="sudo bring it back"),
        Check(what="a third", state="warn", found="gone, too", fix="sudo bring it back"),
        Check(what="four", state="FAIL", found="", fix="give up"),
    ),
    guarantees=(Guarantee(what="memory limit", level="partly", how="somehow"),),
)
TABLE = """\
ok      one           fine
warn    another one   gone
                      fix: sudo bring it back
warn    a third       gone, too
                      fix: the same
FAIL    four
                      fix: give up

What follows for every run:
partly  memory limit  somehow"""

# The command line with only this command in it, so that these tests are about it alone.
MAIN = """\
import argparse, sys
from sandboxd.cli import doctor
parser = argparse.ArgumentParser(prog="sandboxd")
doctor.register(parser.add_subparsers())
args = parser.parse_args()
sys.exit(args.func(args))
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*args: str, wrapper: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*wrapper, sys.executable, "-c", MAIN, "doctor", *args],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )


def test_table() -> None:
    assert doctor.render(REPORT) == TABLE


def test_json_has_it_all() -> None:
    said = doctor.to_json(REPORT)
    assert said["ok"] is False
    assert said["checks"][1] == {
        "what": "another one",
        "state": "warn",
        "found": "gone",
        "fix": "sudo bring it back",
    }
    assert said["guarantees"] == [{"what": "memory limit", "level": "partly", "how": "somehow"}]


def test_both_forms_say_the_same() -> None:
    table, said = run(), run("--json")
    report = json.loads(said.stdout)
    assert report["schema"] == "sandboxd.doctor/1"
    assert table.returncode == said.returncode == (0 if report["ok"] else 1)
    assert table.stderr == said.stderr == ""
    for row in report["checks"]:
        assert f"{row['state']:<6}  {row['what']}" in table.stdout
        assert row["found"] in table.stdout
    for row in report["guarantees"]:
        assert row["how"] in table.stdout


@pytest.mark.needs("userns")
def test_without_user_namespaces_it_fails() -> None:
    done = run(
        wrapper=(
            *("unshare", "--user", "--map-root-user", "sh", "-c"),
            'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"',
            "sh",
        )
    )
    assert done.returncode == 1
    assert "FAIL    user namespace" in done.stdout
    assert "fix: sysctl -w user.max_user_namespaces=15000" in done.stdout
    assert "none    everything" in done.stdout


def test_help_has_an_example() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "sandboxd doctor --json" in done.stdout


def test_registering_imports_nothing_heavy() -> None:
    script = (
        "import argparse, sys\n"
        "from sandboxd.cli import doctor\n"
        "doctor.register(argparse.ArgumentParser().add_subparsers())\n"
        "heavy = ('trio', 'sandboxd.supervise', 'msgspec')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_it_registers_a_function() -> None:
    parser = argparse.ArgumentParser()
    doctor.register(parser.add_subparsers())
    args = parser.parse_args(["doctor", "--json"])
    assert args.func is doctor.doctor
    assert args.json is True
