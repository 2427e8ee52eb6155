"""Judging with a scripted Runner: order, jobs, words. test_examples.py has the real runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from sandboxd.errors import HostError, LaunchError
from sandboxd.job import File
from sandboxd.judge import judge as module
from sandboxd.judge.judge import judge
from sandboxd.judge.judgement import CaseJudgement, Judgement, judgement_json
from sandboxd.judge.problem import Problem, load
from sandboxd.judge.submission import Submission
from sandboxd.policy import Policy
from sandboxd.result import Artifact, ArtifactError, Result, Status
from tests.judge.scripted import Answer, ScriptedRunner, binary, result

MIB = 1 << 20
NAMES = ("a", "b", "c", "d")
RIGHT = result(stdout=b"1 2\n")
WRONG = result(stdout=b"1 3\n")
BROKEN = LaunchError("mount", 7, 2, "bind /opt")
PYTHON = Submission(name="a.py", files={"a.py": b"print(1, 2)"})
NATIVE = Submission(name="a.c", files={"a.c": b"int main(void) { return 0; }"})
COMPILED = result(artifacts=(binary(),))


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    """Four cases whose answer is `1 2`."""
    (tmp_path / "problem.yaml").write_text("limits: {time_limit: 3, memory: 64, output: 2}")
    (tmp_path / "data/secret").mkdir(parents=True)
    for name in NAMES:
        (tmp_path / f"data/secret/{name}.in").write_text("?")
        (tmp_path / f"data/secret/{name}.ans").write_text("1 2\n")
    return load(tmp_path)


@pytest.fixture(autouse=True)
def every_compiler_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "check_available", lambda *_: None)


def script(*cases: tuple[float, Answer], compilation: Answer = COMPILED) -> ScriptedRunner:
    return ScriptedRunner(compilation, dict(zip(NAMES, cases, strict=False)))


def verdicts(judgement: Judgement) -> str:
    return " ".join(case.verdict for case in judgement.cases)


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [1, 2, 3, 9])
async def test_all_right(problem: Problem, parallel: int) -> None:
    runner = script(*[(1, RIGHT)] * 4)
    told: list[CaseJudgement] = []
    judgement = await judge(runner, problem, PYTHON, parallel=parallel, on_case=told.append)
    assert (judgement.verdict, judgement.message) == ("AC", "")
    assert [case.name for case in judgement.cases] == [f"secret/{name}" for name in NAMES]
    assert tuple(told) == judgement.cases
    assert runner.most_running == min(parallel, 4)
    assert judgement.cases_total == 4


@pytest.mark.parametrize("parallel", [1, 2, 3, 4])
@pytest.mark.parametrize("slow", [0.1, 1, 10])
async def test_the_first_failing_case_in_order_decides(
    problem: Problem, parallel: int, slow: float
) -> None:
    """Whatever comes in first: b fails, so c (which fails otherwise) and d do not count."""
    runner = script((slow, RIGHT), (1, WRONG), (0.5, result("memory_limit")), (0.1, RIGHT))
    told: list[CaseJudgement] = []
    judgement = await judge(runner, problem, PYTHON, parallel=parallel, on_case=told.append)
    assert verdicts(judgement) == "AC WA"
    assert judgement.verdict == "WA"
    assert judgement.message == "secret/b: line 1, token 2: expected 2, got 3"
    assert tuple(told) == judgement.cases


async def test_what_runs_behind_a_failing_case_is_stopped(problem: Problem) -> None:
    runner = script((25, RIGHT), (1, WRONG), (3000, RIGHT), (3000, RIGHT))
    judgement = await judge(runner, problem, PYTHON, parallel=3)
    assert verdicts(judgement) == "AC WA"
    assert runner.cancelled == ["c"]
    assert len(runner.jobs) == 1 + 3  # d never started


async def test_an_earlier_failure_replaces_a_later_one(problem: Problem) -> None:
    runner = script((5, WRONG), (1, result("memory_limit")), (9, RIGHT), (9, RIGHT))
    judgement = await judge(runner, problem, PYTHON, parallel=4)
    assert verdicts(judgement) == "WA"


@pytest.mark.parametrize("parallel", [1, 4])
async def test_everything(problem: Problem, parallel: int) -> None:
    runner = script((4, RIGHT), (3, WRONG), (2, result("memory_limit")), (1, RIGHT))
    judgement = await judge(runner, problem, PYTHON, everything=True, parallel=parallel)
    assert verdicts(judgement) == "AC WA MLE AC"
    assert judgement.verdict == "WA"


@pytest.mark.parametrize("everything", [False, True])
async def test_our_own_failure_ends_the_judging(problem: Problem, everything: bool) -> None:
    runner = script((1, RIGHT), (1, BROKEN), (9, RIGHT), (9, RIGHT))
    judgement = await judge(runner, problem, PYTHON, everything=everything, parallel=2)
    assert verdicts(judgement) == "AC JE"
    assert judgement.verdict == "JE"
    assert judgement.cases[1].reason == "LaunchError"
    assert judgement.message == "secret/b: mount: step 7 bind /opt: No such file or directory"
    assert judgement.cases[1].result is None


# --- compiling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "verdict", "message"),
    [
        (
            result("nonzero_exit", exit_code=1, message="exit code 1"),
            "CE",
            "compiler ended badly: exit code 1",
        ),
        (result("cpu_time_limit", message="60 s used"), "CE", "compiler ended badly: 60 s used"),
        (result("memory_limit"), "CE", "compiler ended badly"),
        (result("disk_limit", message="disk full"), "CE", "compiler ended badly: disk full"),
        (result("output_limit"), "CE", "compiler ended badly"),
        (result("signaled"), "CE", "compiler ended badly"),
        (result("syscall_denied"), "CE", "compiler ended badly"),
        (result(), "CE", "no program"),
        (
            result("start_failed", message="g++: not found"),
            "JE",
            "compiler did not start: g++: not found",
        ),
        (result("cancelled"), "JE", "ended by the caller"),
        (BROKEN, "JE", "mount: step 7 bind /opt: No such file or directory"),
    ],
)
async def test_compilations_that_fail(
    problem: Problem, answer: Answer, verdict: str, message: str
) -> None:
    runner = script(compilation=answer)
    judgement = await judge(runner, problem, NATIVE)
    assert (judgement.verdict, judgement.message) == (verdict, message)
    assert (judgement.cases, judgement.cases_total) == ((), 4)
    assert judgement.compilation == (answer if isinstance(answer, Result) else None)
    assert len(runner.jobs) == 1


async def test_a_failed_compilation_is_not_blamed_on_what_it_did_not_leave(
    problem: Problem,
) -> None:
    answer = msgspec.structs.replace(
        result("cpu_time_limit", message="stopped: cpu time 60 s"),
        artifact_errors=(ArtifactError(path="program", reason="missing"),),
    )
    judgement = await judge(script(compilation=answer), problem, NATIVE)
    assert judgement.message == "compiler ended badly: stopped: cpu time 60 s"


async def test_an_executable_that_is_too_large(problem: Problem) -> None:
    lost = (ArtifactError(path="program", reason="larger than 64 MiB"),)
    answer = msgspec.structs.replace(result("artifact_error"), artifact_errors=lost)
    judgement = await judge(script(compilation=answer), problem, NATIVE)
    assert (judgement.verdict, judgement.message) == (
        "CE",
        "unusable program: program: larger than 64 MiB",
    )


async def test_a_program_that_fits_into_no_sandbox(problem: Problem) -> None:
    huge = Artifact(path="program", bytes=65 * MIB, sha256="", mode=0o755)
    judgement = await judge(script(compilation=result(artifacts=(huge,))), problem, NATIVE)
    assert judgement.verdict == "CE"
    assert judgement.message.startswith(f"the program is {65 * MIB + 4096} bytes, more than the ")


async def test_what_the_compiler_says(problem: Problem) -> None:
    answer = result("nonzero_exit", b"out", stderr=b"a.c:1: \x1b[31mno\n", exit_code=1)
    judgement = await judge(script(compilation=answer), problem, NATIVE)
    assert judgement.compiler_output == b"a.c:1: \x1b[31mno\nout"


@pytest.mark.parametrize(
    ("submission", "message"),
    [
        (Submission(name="x", files={"a.c": bytes(200_000)}), "the sources are 200000 bytes"),
        (Submission(name="x", files={"a.txt": b""}), "no source file of a known language"),
        (Submission(name="x", files={"a.c": b""}, language="cobol"), "no such language: cobol"),
        (Submission(name="x", files={"a.c": b"", "b.h": b""}, language="go"),
         "no Go source file (*.go)"),
        (Submission(name="x", files={"A.java": b""}), "no class has a main method"),
        (Submission(name="x", files={"../a.c": b""}), "'../a.c' cannot be a file name"),
    ],
)  # fmt: skip
async def test_submissions_that_need_no_compiler(
    problem: Problem, submission: Submission, message: str
) -> None:
    runner = script()
    judgement = await judge(runner, problem, submission)
    assert judgement.verdict == "CE"
    assert judgement.message.startswith(message)
    assert runner.jobs == []


async def test_a_language_that_the_problem_does_not_allow(problem: Problem) -> None:
    limited = dataclasses.replace(problem, languages=frozenset({"cpp", "java"}))
    judgement = await judge(script(), limited, NATIVE)
    assert judgement.verdict == "CE"
    assert judgement.message == "C is not allowed for this problem, only: cpp, java"


async def test_a_compiler_that_is_not_there(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise HostError("gcc", "C is not available on this machine", hint="apt-get install gcc")

    monkeypatch.setattr(module, "check_available", missing)
    judgement = await judge(script(), problem, NATIVE)
    assert judgement.verdict == "JE"
    assert judgement.message == "C is not available on this machine (apt-get install gcc)"


# --- jobs -----------------------------------------------------------------------------------------


async def test_the_jobs(problem: Problem) -> None:
    runner = script(*[(0, RIGHT)] * 4)
    await judge(runner, problem, NATIVE)
    compiling, first, *_ = runner.jobs
    assert isinstance(compiling.policy, Policy)
    assert compiling.policy.name == "compile"
    assert compiling.files == NATIVE.files
    assert compiling.collect == ["program"]
    assert compiling.policy.limits.cpu_time == 60
    assert compiling.policy.limits.memory == 2048 * MIB
    assert isinstance(first.policy, Policy)
    assert first.policy.name == "judge-native"
    assert first.argv == ["./program"]
    assert first.files == {"program": File(data=b"\x7fELF", mode=0o755)}
    assert first.stdin == problem.cases[0].input
    limits = first.policy.limits
    assert (limits.cpu_time, limits.wall_time) == (3, 8)
    assert (limits.memory, limits.output) == (64 * MIB, 2 * MIB)
    assert first.keep == 2 * MIB
    assert first.limits is None


async def test_an_interpreted_program_is_its_own_source(problem: Problem) -> None:
    runner = script(*[(0, RIGHT)] * 4, compilation=result())
    assert (await judge(runner, problem, PYTHON)).verdict == "AC"
    compiling, first, *_ = runner.jobs
    assert compiling.collect == []
    assert first.argv == ["python3", "./a.py"]
    assert first.files == PYTHON.files


async def test_set_id_bits_do_not_survive(problem: Problem) -> None:
    runner = script(*[(0, RIGHT)] * 4, compilation=result(artifacts=(binary(mode=0o6777),)))
    await judge(runner, problem, NATIVE)
    assert runner.jobs[1].files == {"program": File(data=b"\x7fELF", mode=0o755)}


async def test_included_files_arguments_and_files_of_a_case(tmp_path: Path) -> None:
    files = {
        "problem.yaml": "problem_format_version: 2025-09\nname: x",
        "data/secret/a.in": "",
        "data/secret/a.ans": "1 2",
        "data/secret/a.yaml": "args: [-v, '3']",
        "data/secret/a.files/extra.txt": "",
        "include/default/lib.py": "default",
        "include/python3/lib.py": "python",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    runner = script((0, RIGHT), compilation=result())
    own = Submission(name="x", files={"main.py": b"", "lib.py": b"mine"})
    await judge(runner, load(tmp_path), own)
    compiling, run = runner.jobs
    assert compiling.files == {"main.py": b"", "lib.py": b"python"}
    assert run.argv == ["python3", "./main.py", "-v", "3"]
    extra = tmp_path / "data/secret/a.files/extra.txt"
    assert run.files == {"main.py": b"", "lib.py": b"python", "extra.txt": extra}


@pytest.mark.parametrize("name", ["lib.py/x", "lib.py/x/y"])
async def test_a_submission_cannot_stand_in_the_way_of_included_files(
    tmp_path: Path, problem: Problem, name: str
) -> None:
    with_library = dataclasses.replace(problem, include={"python3": {"lib.py": b"ours"}})
    runner = script(*[(0, RIGHT)] * 4, compilation=result())
    own = Submission(name="x", files={"main.py": b"", name: b"mine"})
    assert (await judge(runner, with_library, own)).verdict == "AC"
    assert runner.jobs[0].files == {"main.py": b"", "lib.py": b"ours"}


async def test_java_gets_room_beside_its_heap(problem: Problem) -> None:
    main = b"public class A { public static void main(String[] a) { } }"
    out_of_heap = result("nonzero_exit", exit_code=3, message="exit code 3")
    runner = script((0, out_of_heap))
    judgement = await judge(runner, problem, Submission(name="A", files={"x.java": main}))
    assert judgement.verdict == "MLE"
    assert judgement.message == "secret/a: heap used up: exit code 3"
    policy = runner.jobs[1].policy
    assert isinstance(policy, Policy)
    assert policy.limits.memory == (64 + 192) * MIB
    assert "-Xmx64m" in runner.jobs[1].argv


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        ("cpu_time_limit", "TLE"),
        ("idle_limit", "TLE"),
        ("memory_limit", "MLE"),
        ("output_limit", "OLE"),
        ("syscall_denied", "SV"),
        ("signaled", "RTE"),
        ("cancelled", "JE"),
    ],
)
async def test_statuses_beat_a_right_output(problem: Problem, status: Status, verdict: str) -> None:
    runner = script((0, result(status, b"1 2\n", message="why")))
    judgement = await judge(runner, problem, NATIVE)
    assert (judgement.verdict, judgement.message) == (verdict, "secret/a: why")


@pytest.mark.parametrize(
    ("submission", "verdict"), [(NATIVE, "RTE"), (PYTHON, "JE")], ids=["own", "interpreter"]
)
async def test_who_is_to_blame_for_what_cannot_start(
    problem: Problem, submission: Submission, verdict: str
) -> None:
    runner = script((0, result("start_failed", error="ENOENT", exit_code=127)))
    assert (await judge(runner, problem, submission)).verdict == verdict


async def test_an_output_that_is_not_whole_is_not_compared(problem: Problem) -> None:
    cut = {"stdout": msgspec.structs.replace(RIGHT.streams["stdout"], truncated=True)}
    runner = script((0, msgspec.structs.replace(RIGHT, streams=cut)))
    assert (await judge(runner, problem, NATIVE)).verdict == "OLE"


async def test_an_answer_that_cannot_be_read_is_our_failure(problem: Problem) -> None:
    problem.cases[0].answer.unlink()
    judgement = await judge(script((0, RIGHT)), problem, NATIVE)
    assert judgement.verdict == "JE"
    assert "the answer cannot be read: No such file" in judgement.message


async def test_the_record(problem: Problem) -> None:
    flood = result(stdout=b"1 2\n" + b" " * 100_000)
    judgement = await judge(script((0, flood), (0, WRONG)), problem, NATIVE)
    first = judgement.cases[0].result
    assert first is not None
    stdout = first.streams["stdout"]
    assert (stdout.bytes, stdout.kept, stdout.truncated) == (100_004, 4096, True)
    record: Mapping[str, object] = json.loads(json.dumps(judgement_json(judgement)))
    assert record["schema"] == "sandboxd.judgement/1"
    assert record["verdict"] == "WA"
    assert record["degraded"] == [{"what": "memory", "why": "no controller"}]
    assert record["cases_total"] == 4
    assert judgement.compilation is not None
    assert judgement.compilation.artifacts == ()  # the program itself is not kept
