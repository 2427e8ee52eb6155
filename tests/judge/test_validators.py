"""Validators of a package's own in real sandboxes: what they say, and what they may not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sandboxd.cli.main import main
from sandboxd.judge.compiling import Afresh
from sandboxd.judge.judge import judge, prepare
from sandboxd.judge.judgement import judgement_json
from sandboxd.judge.problem import load
from sandboxd.supervise.runner import open_runner
from tests.judge.packages import LIMITS, judged, one, package, python, run_of, said, write

pytestmark = pytest.mark.needs("userns")

START = "import os, sys, time\ngiven, answer, feedback, *flags = sys.argv[1:]\n"
ECHO = python("print(int(input()) + 1)")


def validator(text: str) -> str:
    return START + text


# --- what it is given, and says -------------------------------------------------------------------


async def test_what_it_is_given(tmp_path: Path) -> None:
    problem = package(
        tmp_path,
        check_py=validator(
            "assert open(given).read() == '7\\n' and given.endswith('/1.in')\n"
            "assert open(answer).read() == '8\\n' and answer.endswith('/1.ans')\n"
            "assert feedback.endswith('/') and os.listdir(feedback) == []\n"
            "assert flags == ['one', 'two words'], flags\n"
            "assert sys.stdin.read() == '8\\n'\n"
            "print('ignored')\n"
            "sys.exit(42)"
        ),
    )
    write(tmp_path, {"data/secret/1.yaml": "output_validator_args: [one, two words]"})
    case = await one(load(problem.path), ECHO)
    assert (case.verdict, case.reason, case.message) == ("AC", "accepted by the validator", "")
    assert (said(case).verdict, said(case).validator) == ("accepted", "output_validator")


async def test_what_it_says_is_taken_out(tmp_path: Path) -> None:
    problem = package(
        tmp_path,
        check_py=validator(
            "open(feedback + 'judgemessage.txt', 'w').write('expected 8\\nnot 9\\n')\n"
            "open(feedback + 'teammessage.txt', 'wb').write(b'no \\xff\\x1b[31m')\n"
            "open(feedback + 'other.txt', 'w').write('x')\n"
            "sys.exit(43)"
        ),
    )
    judgement = await judged(problem, python("print(9)"))
    case = judgement.cases[0]
    assert (judgement.verdict, judgement.message) == ("WA", "secret/1: expected 8 ...")
    assert (case.reason, case.message) == ("rejected by the validator", "expected 8 ...")
    assert said(case).judge_message == b"expected 8\nnot 9\n"
    assert said(case).team_message == b"no \xff\x1b[31m"
    record = json.loads(json.dumps(judgement_json(judgement)))["cases"][0]["validation"]
    assert record["judge_message"] == "expected 8\nnot 9\n"
    assert record["team_message_b64"] == "bm8g/xtbMzFt"
    assert record["judge_error"] == ""
    assert record["verdict"] == "wrong"
    assert record["result"]["exit_code"] == 43
    assert record["result"]["artifacts"] == []


async def test_what_the_submission_does_by_itself_comes_first(tmp_path: Path) -> None:
    problem = package(tmp_path, check_py=validator("sys.exit(42)"))
    case = await one(problem, python("print(8); raise SystemExit(3)"))
    assert (case.verdict, case.reason, case.validation) == ("RTE", "failing exit code", None)
    case = await one(problem, python("print('x' * 3_000_000)"))
    assert (case.verdict, case.validation) == ("OLE", None)


async def test_what_is_told_of_time_and_memory_is_the_submission_s(tmp_path: Path) -> None:
    hungry = "x = bytearray(100 << 20)\nend = time.process_time() + 0.5\n"
    problem = package(
        tmp_path,
        check_py=validator(hungry + "while time.process_time() < end: pass\nsys.exit(42)"),
    )
    case = await one(problem, ECHO)
    assert case.verdict == "AC"
    mine, its = run_of(case).usage, said(case).result.usage
    assert mine.cpu_time is not None
    assert its.cpu_time is not None
    assert its.cpu_time >= 0.5 > mine.cpu_time
    if mine.memory_peak is not None and its.memory_peak is not None:
        assert mine.memory_peak < 100 << 20 < its.memory_peak


async def test_all_validators_of_a_legacy_package_have_to_accept(tmp_path: Path) -> None:
    write(tmp_path, {
        "problem.yaml": "validation: custom\nvalidator_flags: -x\n" + LIMITS % (2, 5),
        "data/testdata.yaml": "output_validator_flags: -y",
        "data/secret/1.in": "7\n",
        "data/secret/1.ans": "8\n",
        "output_validators/a.py": validator("sys.exit(42 if flags == ['-x', '-y'] else 1)"),
        "output_validators/b.py": validator("sys.exit(43 if sys.stdin.read() == '9\\n' else 42)"),
        "output_validators/c.py": validator("sys.exit(42)"),
    })  # fmt: skip
    problem = load(tmp_path)
    case = await one(problem, python("print(9)"))
    assert (case.verdict, said(case).validator) == ("WA", "output_validators/b.py")
    assert case.message == "rejected by the validator"
    assert (await one(problem, ECHO)).verdict == "AC"


# --- how it is built ------------------------------------------------------------------------------

HEADER = "#pragma once\ninline int verdict(bool right) { return right ? 42 : 43; }\n"
CHECK = """\
#include "verdict.h"
#include <iostream>
int main() { int got; return verdict(std::cin >> got && got == 8); }
"""


@pytest.mark.needs("g++")
async def test_several_files_are_compiled_together(tmp_path: Path) -> None:
    problem = package(tmp_path, verdict_h=HEADER, check_cpp=CHECK)
    assert (await one(problem, ECHO)).verdict == "AC"
    assert (await one(problem, python("print(9)"))).verdict == "WA"


@pytest.mark.needs("g++")
@pytest.mark.parametrize("keeps", [True, False])
async def test_scripts_of_its_own(tmp_path: Path, keeps: bool) -> None:
    scripts = {
        "build": "#!/bin/sh\nset -e\nc++ -o checker check.txt.cpp\n"
        "printf '#!/bin/sh\\nexec ./checker \"$@\"\\n' > run\nchmod +x run\n",
        "check.txt.cpp": CHECK,
        "verdict.h": HEADER,
    }
    problem = package(tmp_path, scripts)
    async with open_runner(slots=2) as runner:
        how = runner if keeps else Afresh(runner)
        assert (await judge(how, problem, ECHO)).verdict == "AC"
        assert (await judge(how, problem, python("print(9)"))).verdict == "WA"


async def test_a_run_script_alone(tmp_path: Path) -> None:
    script = (
        "#!/bin/sh\n[ $(cat) = $(cat $2) ] && exit 42\necho no > $3/judgemessage.txt; exit 43\n"
    )
    problem = package(tmp_path, run=script)
    assert (await one(problem, ECHO)).verdict == "AC"
    case = await one(problem, python("print(9)"))
    assert (case.verdict, case.message) == ("WA", "no")


@pytest.mark.needs("g++")
@pytest.mark.parametrize(
    ("files", "message", "compiler"),
    [
        ({"check.cpp": "int main() { return 42 }"}, "compiler ended badly: exit code 1", b"error:"),
        ({"check.py": "def"}, "compiler ended badly: exit code 1", b"SyntaxError"),
        ({"build": "#!/bin/sh\necho no luck >&2; exit 3\n"}, "exit code 3", b"no luck"),
        ({"build": "#!/bin/sh\n:\n"}, "build left no file called run", b""),
    ],
)
async def test_one_that_does_not_compile_is_our_failure_before_any_case(
    tmp_path: Path, files: dict[str, str], message: str, compiler: bytes
) -> None:
    judgement = await judged(package(tmp_path, files), ECHO)
    assert judgement.verdict == "JE"
    assert judgement.message.startswith("output_validator: ")
    assert message in judgement.message
    assert compiler in judgement.compiler_output
    assert (judgement.cases, judgement.cases_total, judgement.compilation) == ((), 1, None)
    record = judgement_json(judgement)
    assert (record["validator_compilation"] is not None) == bool(compiler)


@pytest.mark.needs("g++")
async def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOXD_BUILDS", str(tmp_path / "builds"))
    problem = package(tmp_path / "small", verdict_h=HEADER, check_cpp=CHECK)
    async with open_runner(slots=2) as runner:
        first = await prepare(runner, problem)
        again = await prepare(runner, problem)
        found = [await judge(runner, first, ECHO), await judge(runner, again, python("print(9)"))]
    assert [one.verdict for one in found] == ["AC", "WA"]
    made = [prepared.validators[0].ready.compiled_before for prepared in (first, again)]
    assert made == [False, True]


async def test_files_of_a_case_that_are_gone_are_our_failure(tmp_path: Path) -> None:
    problem = package(tmp_path, check_py=validator("sys.exit(42)"))
    async with open_runner(slots=2) as runner:
        prepared = await prepare(runner, problem)
        problem.cases[0].answer.unlink()
        early = await judge(runner, problem, ECHO)
        late = await judge(runner, prepared, ECHO)
    assert (early.verdict, early.cases) == ("JE", ())
    assert "secret/1: a file cannot be read: No such file" in early.message
    assert (late.verdict, late.cases[0].reason) == ("JE", "JobError")


# --- unhappy ways ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sys.exit(0)", "exit code 0, neither 42 nor 43"),
        ("sys.exit('cannot \\x1b[31m read')", "exit code 1, neither 42 nor 43: cannot \\x1b[31m"),
        ("os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("while True: pass", "stopped: cpu time"),
        ("while True: os.write(1, b'x' * 65536)", "stopped: output 8388608 bytes"),
        ("while True: os.write(2, b'x' * 65536)", "stopped: output 8388608 bytes"),
        (
            "open(feedback + 'judgeerror.txt', 'w').write('no such case'); sys.exit(9)",
            "exit code 9, neither 42 nor 43: no such case",
        ),
    ],
)
async def test_one_that_fails_is_our_failure(tmp_path: Path, text: str, message: str) -> None:
    problem = package(tmp_path, validation=1, check_py=validator(text))
    case = await one(problem, ECHO)
    assert (case.verdict, case.reason) == ("JE", "the validator failed")
    assert case.message.startswith(f"output_validator: {message}"), case.message
    assert run_of(case).ok


async def test_one_that_sleeps_is_ended(tmp_path: Path) -> None:
    problem = package(tmp_path, validation=0.2, check_py=validator("time.sleep(1000)"))
    case = await one(problem, ECHO)
    assert (case.verdict, said(case).result.status) == ("JE", "wall_time_limit")


async def test_huge_feedback_is_not_taken(tmp_path: Path) -> None:
    text = (
        "open(feedback + 'judgemessage.txt', 'wb').write(b'x' * (1 << 20))\n"
        "open(feedback + 'teammessage.txt', 'w').write('small')\nsys.exit(43)"
    )
    case = await one(package(tmp_path, check_py=validator(text)), ECHO)
    assert case.verdict == "WA"
    assert (said(case).judge_message, said(case).team_message) == (b"", b"small")
    (lost,) = said(case).lost
    assert lost.path == "feedback/judgemessage.txt"


async def test_feedback_without_end_is_ended(tmp_path: Path) -> None:
    text = "with open(feedback + 'judgemessage.txt', 'wb') as file:\n"
    text += "    while True: file.write(b'x' * 65536)"
    case = await one(package(tmp_path, check_py=validator(text)), ECHO)
    assert case.verdict == "JE"
    assert said(case).judge_message == b""
    assert said(case).result.status in ("disk_limit", "memory_limit"), said(case).result.message


@pytest.mark.parametrize(
    "text",
    [
        "os.symlink('/etc/passwd', feedback + 'judgemessage.txt')",
        "os.symlink(given, feedback + 'judgemessage.txt')",
        "os.mkfifo(feedback + 'judgemessage.txt')",
        "os.mkdir(feedback + 'judgemessage.txt')",
        "os.rmdir(feedback); os.symlink('/etc', feedback[:-1])",
    ],
)
async def test_no_link_is_followed_out_of_the_feedback_directory(tmp_path: Path, text: str) -> None:
    case = await one(package(tmp_path, check_py=validator(text + "\nsys.exit(43)")), ECHO)
    assert case.verdict == "WA"
    assert said(case).judge_message == b""
    assert len(said(case).lost) == 1


async def test_it_sees_neither_the_host_nor_the_other_sandbox(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    text = (
        f"assert not os.path.exists({str(secret)!r})\n"
        f"assert not os.path.exists({str(tmp_path / 'small')!r})\n"
        "assert not os.path.exists('a.py')\n"
        "assert 'a.py' not in os.listdir('.'), os.listdir('.')\n"
        "sys.exit(42)"
    )
    case = await one(package(tmp_path / "small", check_py=validator(text)), ECHO)
    assert case.verdict == "AC", case


async def test_files_of_its_own_are_in_nobody_s_way(tmp_path: Path) -> None:
    problem = package(
        tmp_path,
        check_py=validator("import data.x, feedback as own\nsys.exit(own.code)"),
        feedback_py="code = 42",
    )
    write(tmp_path / "output_validator/data", {"x.py": ""})
    (tmp_path / "output_validator/check.py").rename(tmp_path / "output_validator/main.py")
    case = await one(load(problem.path), ECHO)
    assert case.verdict == "AC", case


# --- the command ----------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package(
        tmp_path / "small",
        check_py=validator(
            "open(feedback + 'judgemessage.txt', 'w').write('no\\x1b[31m')\n"
            "open(feedback + 'teammessage.txt', 'w').write('try\\nagain')\n"
            "sys.exit(42 if sys.stdin.read() == '8\\n' else 43)"
        ),
    )
    (tmp_path / "wrong.py").write_text("print(9)")
    assert main(["judge", str(tmp_path / "small"), str(tmp_path / "wrong.py")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Small: 1 cases, 1 s, 256.0 MiB, validated by output_validator"
    assert lines[2].endswith("  no\\x1b[31m")
    assert lines[3:5] == ["    | teammessage: try", "    | teammessage: again"]
    assert main(["judge", "--json", str(tmp_path / "small"), str(tmp_path / "wrong.py")]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["problem"]["validators"] == ["output_validator"]
    assert record["problem"]["interactive"] is False
    (case,) = record["submissions"][0]["cases"]
    assert case["validation"]["team_message"] == "try\nagain"
    write(tmp_path, {"small/output_validator/check.py": "def"})
    assert main(["judge", str(tmp_path / "small"), str(tmp_path / "wrong.py")]) == 125
    out = capsys.readouterr().out
    assert "JE: judge error" in out
    assert "output_validator: compiler ended badly: exit code 1" in out
    assert "SyntaxError" in out
