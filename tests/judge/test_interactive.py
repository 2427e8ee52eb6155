"""Submissions and validators that talk, in real sandboxes: who ends how, and what comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandboxd.job import Job
from sandboxd.judge.judge import judge, prepare
from sandboxd.judge.judgement import CaseJudgement
from sandboxd.judge.problem import load
from sandboxd.judge.verdict import Verdict
from sandboxd.result import Result
from sandboxd.supervise.runner import Runner, open_runner
from tests.judge.packages import LIMITS, SLOW, judged, one, package, python, run_of, said, write

pytestmark = pytest.mark.needs("userns")

START = """\
import os, sys, time
given, answer, feedback, *flags = sys.argv[1:]
def say(what): print(what, flush=True)
def hear(): return sys.stdin.readline().strip()
def end(code, why=""):
    open(feedback + "judgemessage.txt", "w").write(why)
    os._exit(code)
"""
ASKS = 'say("7")\nend(42 if hear() == "8" else 43, "not 8")'
"""The validator: one question, one answer, and it waits for nothing more."""
LISTENS = 'say("7")\nright = hear() == "8"\nend(42 if right and hear() == "" else 43, "no")'
"""As ASKS, but it waits for the end of the output as well."""
ANSWERS = "print(int(input()) + 1, flush=True)"
HANGS = "while True: pass"


async def play(
    root: Path, validator: str, submission: str, *, time: float = 1, validation: float = 5
) -> CaseJudgement:
    problem = package(
        root, kind="interactive", time=time, validation=validation, check_py=START + validator
    )
    return await one(problem, python(submission))


# --- who ended first, and how ---------------------------------------------------------------------

BOTH = pytest.mark.parametrize("validator", [ASKS, LISTENS], ids=["first", "last"])


@BOTH
async def test_accepted(tmp_path: Path, validator: str) -> None:
    case = await play(tmp_path, validator, ANSWERS)
    assert (case.verdict, case.reason, case.message) == ("AC", "accepted by the validator", "")
    assert run_of(case).stdout == b"8\n"
    assert said(case).result.stdout == b"7\n"


@pytest.mark.parametrize(
    "afterwards",
    [
        "",
        "input()\ninput()",  # the end of the input, which is an exception
        "import time; time.sleep(1000)",
        HANGS,
        "while True: print(9)",  # would be SIGPIPE
        "raise SystemExit(1)",
        "import os; os.kill(os.getpid(), 11)",
        "import signal; signal.signal(13, signal.SIG_IGN)\nwhile True: print(9, flush=True)",
    ],
)
async def test_who_was_wrong_is_wrong_whatever_comes_of_it(tmp_path: Path, afterwards: str) -> None:
    case = await play(tmp_path, ASKS, f"print(9, flush=True)\n{afterwards}")
    assert (case.verdict, case.message) == ("WA", "not 8"), case
    ends_well = afterwards == ""
    assert case.reason == "rejected in the middle" or ends_well


@pytest.mark.parametrize(
    ("afterwards", "verdict"),
    [
        ("import sys; sys.stdin.read()", "AC"),
        ("for _ in range(100_000): print(9)", "AC"),  # nobody reads it, and nobody dies of that
        ("input()", "RTE"),
        ("raise SystemExit(1)", "RTE"),
        (HANGS, "TLE"),
        ("import time; time.sleep(1000)", "TLE"),
        ("while True: print('x' * 1000)", "OLE"),
        ("x = b'x' * (600 << 20)\n" + HANGS, "MLE"),
    ],
)
async def test_who_was_right_has_to_end_well_too(
    tmp_path: Path, afterwards: str, verdict: Verdict
) -> None:
    case = await play(tmp_path, ASKS, f"{ANSWERS}\n{afterwards}")
    assert case.verdict == verdict, case
    assert said(case).verdict == "accepted"


@pytest.mark.parametrize(
    ("submission", "verdict", "reason"),
    [
        ("raise SystemExit(1)", "RTE", "failing exit code"),
        ("input(); raise SystemExit(1)", "RTE", "failing exit code"),
        ("import os; os.kill(os.getpid(), 11)", "RTE", "killed by a signal"),
        (HANGS, "TLE", "CPU time used up"),
        ("input()\n" + HANGS, "TLE", "CPU time used up"),
        ("print('x' * 3_000_000)", "OLE", "too much output"),
    ],
)
async def test_who_ends_badly_before_the_validator_decides(
    tmp_path: Path, submission: str, verdict: Verdict, reason: str
) -> None:
    case = await play(tmp_path, 'say("7")\nsys.stdin.read()\nend(43, "the end")', submission)
    assert (case.verdict, case.reason) == (verdict, reason), case
    assert said(case).verdict == "wrong"
    assert said(case).judge_message == b"the end"


async def test_who_ends_early_and_well_is_judged_by_the_validator(tmp_path: Path) -> None:
    case = await play(tmp_path, LISTENS, "")
    assert (case.verdict, case.reason, case.message) == ("WA", "rejected by the validator", "no")
    case = await play(tmp_path / "2", 'end(42 if hear() == "" else 43)', "")
    assert case.verdict == "AC"


async def test_a_closed_stdout_is_its_end_while_the_submission_goes_on(tmp_path: Path) -> None:
    closes = "import os\nos.close(1)\ninput()\ninput()"
    case = await play(tmp_path, 'end(43 if hear() == "" else 1, "nothing said")', closes)
    assert (case.verdict, case.message) == ("WA", "nothing said")


async def test_a_validator_may_close_its_stdout(tmp_path: Path) -> None:
    closes = 'say("7")\nos.close(1)\nend(42 if hear() == "8" else 43)'
    reads = "import sys; text = sys.stdin.read(); print(int(text) + 1)"
    assert (await play(tmp_path, closes, reads)).verdict == "AC"


# --- time -----------------------------------------------------------------------------------------


async def test_when_both_wait_the_submission_was_too_slow(tmp_path: Path) -> None:
    case = await play(tmp_path, LISTENS, "input(); input()", time=0.2)
    assert (case.verdict, case.reason) == ("TLE", "the conversation took too long")
    assert "it and the validator waited" in case.message
    case = await play(tmp_path / "2", LISTENS, "import time; time.sleep(1000)", time=0.2)
    assert (case.verdict, case.reason) == ("TLE", "the conversation took too long")


async def test_a_slow_validator_is_not_the_submission_s_fault(tmp_path: Path) -> None:
    """It thinks for longer than the submission's wall time, which stands still meanwhile."""
    wall = 2 * 0.2 * SLOW + 2
    thinks = f"stop = time.process_time() + {wall + 1}\nwhile time.process_time() < stop: pass\n"
    case = await play(tmp_path, thinks + ASKS, ANSWERS, time=0.2, validation=wall + 5)
    its_usage = said(case).result.usage
    if case.verdict != "AC" and its_usage.pressure is None:
        pytest.skip("needs cpu.pressure in the run's cgroup, on a machine that is busy")
    assert case.verdict == "AC", case
    cpu, its = run_of(case).usage.cpu_time, its_usage.cpu_time
    assert cpu is not None
    assert its is not None
    assert cpu < 0.2 * SLOW < wall + 1 <= its


@pytest.mark.parametrize("submission", [ANSWERS, "input()\ninput()"])
async def test_a_validator_without_end_is_our_failure(tmp_path: Path, submission: str) -> None:
    case = await play(tmp_path, 'say("7")\n' + HANGS, submission, validation=0.5)
    assert (case.verdict, said(case).result.status) == ("JE", "cpu_time_limit")


async def test_a_validator_that_sleeps_after_the_submission_s_end(tmp_path: Path) -> None:
    case = await play(tmp_path, 'say("7")\ntime.sleep(1000)', ANSWERS, validation=0.2)
    assert (case.verdict, case.reason) == ("JE", "the validator failed")
    assert "no decision 2." in case.message


# --- validators that are no good ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("validator", "submission", "message"),
    [
        ("raise ValueError('not my day')", ANSWERS, "exit code 1, neither 42 nor 43: Traceback"),
        ("end(0)", ANSWERS, "exit code 0, neither 42 nor 43"),
        ("end(0)", "import time; time.sleep(1000)", "exit code 0, neither 42 nor 43"),
        ("end(0)", "input()", "exit code 0, neither 42 nor 43"),
        ("os.kill(os.getpid(), 11)", "input()", "ended by SIGSEGV"),
        ("while True: print('x' * 9999)", "while True: input()", "stopped: output 8388608 bytes"),
    ],
)
async def test_a_validator_that_fails_is_our_failure(
    tmp_path: Path, validator: str, submission: str, message: str
) -> None:
    case = await play(tmp_path, validator, submission, time=20)
    assert (case.verdict, case.message[: len(message) + 18]) == (
        "JE",
        f"output_validator: {message}",
    ), case


async def test_a_validator_that_fails_at_the_end_of_a_crash_is_nobody_s_excuse(
    tmp_path: Path,
) -> None:
    """It was told of the end, and cannot cope with that: the submission crashed all the same."""
    case = await play(tmp_path, 'say("7")\nassert hear() == "8"', "raise SystemExit(1)")
    assert (case.verdict, case.reason) == ("RTE", "failing exit code")
    assert said(case).verdict == "failed"


async def test_a_validator_that_writes_to_who_has_gone_does_not_die_of_it(tmp_path: Path) -> None:
    writes = 'for _ in range(100_000): say("7")\nend(42 if hear() == "8" else 43)'
    assert (await play(tmp_path, writes, ANSWERS)).verdict == "AC"


@pytest.mark.needs("g++")
async def test_one_that_does_not_compile(tmp_path: Path) -> None:
    judgement = await judged(package(tmp_path, kind="interactive", check_cpp="?"), python(ANSWERS))
    assert (judgement.verdict, judgement.cases) == ("JE", ())


async def test_a_legacy_package(tmp_path: Path) -> None:
    flags = "assert flags == ['-x', '1'], flags\n"
    write(tmp_path, {
        "problem.yaml": "validation: custom interactive\nvalidator_flags: -x 1\n" + LIMITS % (2, 5),
        "data/secret/1.in": "7",
        "data/secret/1.ans": "",
        "output_validators/check/main.py": START + flags + ASKS,
    })  # fmt: skip
    assert (await one(load(tmp_path), python(ANSWERS))).verdict == "AC"
    case = await one(load(tmp_path), python("print(9); raise SystemExit(1)"))
    assert (case.verdict, said(case).validator) == ("WA", "output_validators/check")


# --- the submission's side ------------------------------------------------------------------------


async def test_a_submission_that_floods_is_ended(tmp_path: Path) -> None:
    case = await play(tmp_path, 'say("7")\nsys.stdin.read()\nend(43)', "while True: print('xxxxx')")
    assert (case.verdict, case.reason) == ("OLE", "too much output")
    assert run_of(case).status == "output_limit"
    assert run_of(case).streams["stdout"].kept <= 4096


async def test_a_validator_that_does_not_read_stalls_who_floods(tmp_path: Path) -> None:
    case = await play(tmp_path, "time.sleep(1000)", "while True: print('xxxxx')", time=0.2)
    assert (case.verdict, case.reason) == ("TLE", "the conversation took too long")


async def test_input_and_answer_are_not_in_the_submission_s_sandbox(tmp_path: Path) -> None:
    looks = "import os\nprint(*sorted(os.listdir('/box')), flush=True)"
    case = await play(tmp_path, "end(43, hear())", looks)
    assert (case.verdict, case.message) == ("WA", "a.py")


async def test_one_slot_is_enough_and_all_are_given_back(tmp_path: Path) -> None:
    problem = package(tmp_path, kind="interactive", check_py=START + ASKS)
    async with open_runner(slots=1) as runner:
        found = [await judge(runner, problem, python(ANSWERS), parallel=3) for _ in range(2)]
        assert runner.statistics().running == 0
    assert [each.verdict for each in found] == ["AC", "AC"]


async def test_what_is_played_behind_a_failing_case_is_ended(tmp_path: Path) -> None:
    hangs = f"if flags: exec('{HANGS}')\n"
    problem = package(tmp_path, kind="interactive", validation=50, check_py=START + hangs + ASKS)
    write(tmp_path, {f"data/secret/{name}.{end}": "" for name in "23" for end in ("in", "ans")})
    write(tmp_path, {f"data/secret/{name}.yaml": "output_validator_args: [x]" for name in "23"})
    async with open_runner(slots=6) as runner:
        judgement = await judge(runner, load(problem.path), python("print(9)"), parallel=3)
        assert [case.name for case in judgement.cases] == ["secret/1"]
        assert judgement.verdict == "WA"
        assert runner.statistics().running == 0


async def test_what_cannot_be_started_is_our_failure(tmp_path: Path) -> None:
    problem = package(tmp_path, kind="interactive", check_py=START + ASKS)
    async with open_runner(slots=2) as runner:
        prepared = await prepare(runner, problem)
        problem.cases[0].input.unlink()
        judgement = await judge(runner, prepared, python(ANSWERS))
        assert runner.statistics().running == 0
    assert (judgement.verdict, judgement.cases[0].reason) == ("JE", "JobError")


async def test_a_runner_that_joins_nothing_is_told_of(tmp_path: Path) -> None:
    class Alone:
        def __init__(self, runner: Runner) -> None:
            self.runner = runner

        async def run(self, job: Job) -> Result:
            return await self.runner.run(job)

    problem = package(tmp_path, kind="interactive", check_py=START + ASKS)
    async with open_runner() as runner:
        judgement = await judge(Alone(runner), problem, python(ANSWERS))
    assert judgement.verdict == "JE"
    assert "an interactive problem needs programs that are joined" in judgement.message
