"""`sandboxd build`, `sandboxd cache` and --built: what is printed, and what is there afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sandboxd.cli.main import main

pytestmark = pytest.mark.needs("userns")
BUILD = ["build", "--collect", "out/*", "--", "sh", "-c"]
MAKE = "echo said; mkdir out; echo made >out/a"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SANDBOXD_BUILDS", str(tmp_path / "builds"))
    return tmp_path / "builds"


def test_from_a_build_to_a_run(capfd: pytest.CaptureFixture[str], place: Path) -> None:
    assert main([*BUILD, MAKE]) == 0
    first = capfd.readouterr()
    assert "  1 file, 0.0 MiB, built in " in first.out
    assert first.err == "said\n"
    assert main([*BUILD, MAKE]) == 0
    second = capfd.readouterr()
    key = first.out.split()[0]
    assert second.out == f"{key}  1 file, 0.0 MiB, from the store\n"
    assert second.err == "said\n"
    assert main(["build", "-q", *BUILD[1:], MAKE]) == 0
    quiet = capfd.readouterr()
    assert (len(quiet.out), quiet.out[:12], quiet.err) == (65, key, "")

    for flag, path in ((f"{key}/out/a:x", "x"), (f"{key}/out:y", "y/a"), (key, "out/a")):
        assert main(["run", "-q", "--built", flag, "--", "cat", path]) == 0
        assert capfd.readouterr().out == "made\n"
    assert main(["run", "--built", f"{key}/none", "--", "true"]) == 125
    assert "nothing in it is called 'none'" in capfd.readouterr().err

    assert main(["cache", "ls"]) == 0
    assert f"{key}     1 file" in capfd.readouterr().out
    assert main(["cache", "ls", "--json"]) == 0
    (listed,) = json.loads(capfd.readouterr().out)["builds"]
    assert (listed["key"], listed["argv"]) == (quiet.out.strip(), ["sh", "-c", MAKE])
    assert main(["cache", "verify"]) == 0
    assert f"{key}  ok" in capfd.readouterr().out
    file = place / "objects" / listed["key"] / "tree/out/a"
    file.chmod(0o600)
    file.write_text("other")
    assert main(["cache", "verify", key]) == 1
    assert "out/a is not what was kept" in capfd.readouterr().out
    assert main(["cache", "rm", key]) == 0
    assert main(["cache", "rm", key]) == 1
    assert f"no build '{key}'" in capfd.readouterr().err


def test_several_things_of_one_name(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """None takes the place of another unsaid."""
    assert main(["build", "-q", *BUILD[1:], MAKE]) == 0
    one = capfd.readouterr().out.strip()
    optional = ("--collect-required", "x*", "--collect-optional", "no")
    assert main(["build", "-q", *optional, "--", "touch", "xy"]) == 0
    two = capfd.readouterr().out.strip()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    folders = ("--file", f"{tmp_path}/a:.", "--file", f"{tmp_path}/b:.")
    assert main(["run", "-q", *folders, "--built", one, "--built", two, "--", "ls"]) == 0
    assert capfd.readouterr().out.split() == ["a", "b", "out", "xy"]
    assert main(["run", "--file", f"{tmp_path}/a/a:x", "--built", f"{two}:x", "--", "true"]) == 125
    assert "'x' is in its way" in capfd.readouterr().err


def test_a_build_that_is_none(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["build", "--", "true"]) == 125
    assert "a build that collects nothing" in capfd.readouterr().err
    assert main(["build", "--bundle", str(tmp_path), "--collect", "a"]) == 125
    assert "config.json" in capfd.readouterr().err


def test_a_build_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*BUILD, "echo no >&2; exit 3"]) == 3
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("no\nsandboxd: nothing is kept: nonzero_exit (exit code 3)\n")
    assert main([*BUILD, "true"]) == 1
    assert "nothing that was left matches" in capfd.readouterr().err
    assert main(["build", "--json", *BUILD[1:], "exit 3"]) == 3
    said_json = json.loads(capfd.readouterr().out)
    assert (said_json["kept"], said_json["result"]["status"]) == (False, "nonzero_exit")
    assert main(["cache", "ls"]) == 0
    assert capfd.readouterr().out == ""


def test_salt_and_gc(capfd: pytest.CaptureFixture[str]) -> None:
    for salt in ("1", "2", "1"):
        assert main(["build", "--salt", salt, *BUILD[1:], MAKE]) == 0
    assert capfd.readouterr().out.count("built in") == 2
    assert main(["cache", "gc", "--age", "1h"]) == 0
    assert capfd.readouterr().out == "0 builds removed, 0.0 MiB\n"
    assert main(["cache", "gc", "--size", "4K"]) == 0
    assert capfd.readouterr().out == "1 build removed, 0.0 MiB\n"
    assert main(["cache", "gc"]) == 0
