"""`sandboxd judge`: its arguments, its lines, its JSON and its exit status, with a scripted Runner.

The last test is the whole thing; tests/judge/test_examples.py judges for real as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sandboxd.cli import judge as command
from sandboxd.cli.main import main
from sandboxd.errors import HostError, LaunchError
from sandboxd.judge import judge as judging
from sandboxd.supervise import runner as running
from tests.judge.scripted import Answer, ScriptedRunner, binary, result

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "different"
RIGHT = result(stdout=b"1 2\n")
WRONG = result(stdout=b"1 3\n")
COMPILED = result(artifacts=(binary(),))

Script = Callable[..., ScriptedRunner]


def sandboxd(*words: str | Path) -> int:
    parser = argparse.ArgumentParser(prog="sandboxd")
    command.register(parser.add_subparsers())
    args = parser.parse_args(["judge", *map(str, words)])
    status = args.func(args)
    assert isinstance(status, int)
    return status


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Two cases whose answer is `1 2`, and a submission of each kind."""
    root = tmp_path / "small"
    files = {
        "problem.yaml": "name: Small\nlimits: {time_limit: 3, memory: 64}",
        **{f"data/secret/{name}.in": "?" for name in "ab"},
        **{f"data/secret/{name}.ans": "1 2\n" for name in "ab"},
        "submissions/accepted/right.c": "",
        "submissions/wrong_answer/wrong.c": "",
        "submissions/wrong_answer/empty/readme.txt": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Makes every Runner that is opened answer so."""

    def install(
        a: Answer = RIGHT, b: Answer = RIGHT, compiled: Answer = COMPILED
    ) -> ScriptedRunner:
        runner = ScriptedRunner(compiled, {"a": (0, a), "b": (0, b)})

        @asynccontextmanager
        async def open_runner(
            *, slots: int | None = None, cgroup: str | None = None
        ) -> AsyncIterator[ScriptedRunner]:
            assert slots is not None
            yield runner

        monkeypatch.setattr(running, "open_runner", open_runner)
        monkeypatch.setattr(judging, "check_available", lambda *_: None)
        return runner

    return install


def test_accepted(package: Path, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script()
    assert sandboxd(package, package / "submissions/accepted/right.c") == 0
    figures = "  0.250 s cpu  0.500 s wall   3.0 MiB"
    assert capsys.readouterr().out.splitlines() == [
        "Small: 2 cases, 3 s, 64.0 MiB",
        str(package / "submissions/accepted/right.c"),
        f"  secret/a AC {figures}",
        f"  secret/b AC {figures}",
        "  AC: accepted",
        "not enforced: memory (no controller)",
    ]


def test_wrong(package: Path, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script(WRONG)
    assert sandboxd(package, package / "submissions/accepted/right.c") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("3.0 MiB  line 1, token 2: expected 2, got 3")
    assert lines[3] == "  WA: wrong answer, 1 of 2 cases (must get AC)"


def test_wrong_as_it_must_be(package: Path, script: Script) -> None:
    script(WRONG)
    assert sandboxd(package, package / "submissions/wrong_answer/wrong.c") == 0
    script(RIGHT)
    assert sandboxd(package, package / "submissions/wrong_answer/wrong.c") == 1


def test_one_of_several_fails(
    package: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script(RIGHT, WRONG)
    every = sorted((package / "submissions").rglob("*.c"))
    assert sandboxd("--all", package, *every) == 1
    out = capsys.readouterr().out
    assert "WA: wrong answer (must get AC)" in out
    assert "WA: wrong answer (as it must)" in out


def test_compile_errors_are_shown_safely(
    package: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    said = b"a.c:1: \x1b]0;owned\x07error\n" + b"x" * 200_000
    script(compiled=result("nonzero_exit", stderr=said, exit_code=1, message="exit code 1"))
    assert sandboxd(package, package / "submissions/accepted/right.c") == 1
    out = capsys.readouterr().out
    assert "  CE: compile error (must get AC)\n    compiler ended badly: exit code 1\n" in out
    assert r"    | a.c:1: \x1b]0;owned\x07error" in out
    assert len(out) < 10_000
    assert all(char.isprintable() or char == "\n" for char in out)


def test_hostile_output_is_shown_safely(
    package: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script(result(stdout=b"\x1b[2J\xff\0"), result("signaled", message="\x1b[31m"))
    assert sandboxd("--all", package, package / "submissions/accepted/right.c") == 1
    out = capsys.readouterr().out
    assert r"expected 1, got \x1b[2J\xff\x00" in out
    assert all(char.isprintable() or char == "\n" for char in out)


def test_sources_that_cannot_be_taken(
    package: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    (package / "submissions/accepted/right.c").write_text("x" * 200_000)
    runner = script()
    assert sandboxd(package, package / "submissions/accepted/right.c") == 1
    assert "    the sources are larger than 131072 bytes" in capsys.readouterr().out
    assert sandboxd(package, package / "submissions/wrong_answer/empty") == 1
    assert "no source file of a known language" in capsys.readouterr().out
    assert runner.jobs == []


def test_our_failure_in_a_case(
    package: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script(RIGHT, LaunchError("mount", 7, 2, "bind /opt"))
    assert sandboxd(package, package / "submissions/accepted/right.c") == 125
    out = capsys.readouterr().out
    assert "JE         - cpu        - wall         -  mount: step 7 bind /opt: No such" in out
    assert "  JE: judge error: not the submission's fault (must get AC)" in out


def test_our_failure_before_any_case(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @asynccontextmanager
    async def open_runner(
        *, slots: int | None = None, cgroup: str | None = None
    ) -> AsyncIterator[ScriptedRunner]:
        raise HostError("userns", "no user namespaces", hint="sysctl x=1")
        yield

    monkeypatch.setattr(running, "open_runner", open_runner)
    words = ["judge", str(package), str(package / "submissions/accepted/right.c")]
    assert main(words) == 125
    assert capsys.readouterr().err == "sandboxd: no user namespaces\nsandboxd:   sysctl x=1\n"


def test_json(package: Path, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script(result(stdout=b"\x1b[2J\xff"))
    right, wrong = (
        package / f"submissions/{name}.c" for name in ("accepted/right", "wrong_answer/wrong")
    )
    assert sandboxd("--json", package, right, wrong) == 1
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x1b" not in out
    record: dict[str, Any] = json.loads(out)
    assert record["schema"] == "sandboxd.judge/1"
    assert record["problem"]["time_limit"] == 3
    first, second = record["submissions"]
    assert (first["verdict"], first["expected"], first["as_expected"]) == ("WA", ["AC"], False)
    assert (second["verdict"], second["expected"]) == ("WA", ["PE", "WA"])
    assert second["as_expected"]
    case = first["cases"][0]
    assert case["result"]["usage"]["cpu_time"] == 0.25
    assert case["message"].startswith("line 1, token 1: expected 1, got")
    assert first["degraded"] == [{"what": "memory", "why": "no controller"}]


def test_limits_and_jobs_of_the_command_line(package: Path, script: Script) -> None:
    runner = script()
    words = ["--time-limit", "500ms", "--memory", "256M", "--jobs", "2", "--language", "cpp"]
    (package / "submissions/accepted/right.cpp").touch()
    assert sandboxd(*words, package, package / "submissions/accepted/right.cpp") == 0
    policy = runner.jobs[1].policy
    assert not isinstance(policy, str)
    assert (policy.limits.cpu_time, policy.limits.memory) == (0.5, 256 << 20)
    assert runner.most_running == 2


def test_a_package_without_a_time_limit_says_so(
    package: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    (package / "problem.yaml").write_text("name: Small")
    script()
    assert sandboxd(package, package / "submissions/accepted/right.c") == 0
    assert "the package names no time limit: 5 s it is (--time-limit T)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{package}", "/none"], "/none: No such file or directory"),
        (["/none", "{package}"], "/none: not a directory\nsandboxd:   name a package directory\n"),
        (
            ["--language", "cobol", "{package}", "{package}"],
            "no such language: cobol (there are c, cpp, ",
        ),
        (["{package}/data", "{package}"], "problem.yaml: there is no such file"),
    ],
)
def test_wrong_usage(
    package: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sandboxd(*[word.format(package=package) for word in words]) == 2
    assert capsys.readouterr().err.startswith(f"sandboxd: judge: {message}")


@pytest.mark.parametrize(
    "words",
    [
        ["--jobs", "0"],
        ["--jobs", "x"],
        ["--time-limit", "fast"],
        ["--time-limit", "0"],
        ["--time-limit", "-1"],
        ["--memory", "0"],
        ["--memory", "2X"],
        ["--memory", "9" * 30],
    ],
)
def test_wrong_arguments(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sandboxd(*words, "p", "s")
    assert ended.value.code == 2
    assert f"argument {words[0]}" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sandboxd("--help")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "sandboxd judge examples/different" in out
    assert "125 sandboxd itself or the package's validator failed" in out


@pytest.mark.needs("userns", "gcc", "g++")
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    folder = EXAMPLE / "submissions"
    every = (folder / "accepted/different.cpp", folder / "wrong_answer/narrow.c")
    status = sandboxd(EXAMPLE, *every)
    out = capsys.readouterr().out
    assert status == 0, out
    assert "  secret/05-long      AC" in out
    assert "  WA: wrong answer" in out
