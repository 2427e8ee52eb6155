"""The example submissions, harmful ones among them, compiled and run in real sandboxes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.errors import HostError
from sandboxd.judge.compiling import Afresh
from sandboxd.judge.judge import judge
from sandboxd.judge.judgement import Judgement
from sandboxd.judge.languages import check_available, detect
from sandboxd.judge.problem import Problem, load
from sandboxd.judge.submission import load as read
from sandboxd.supervise import policies
from sandboxd.supervise.runner import open_runner

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SUBMISSIONS = EXAMPLES / "different" / "submissions"
SLOW = max(1.0, float(os.environ.get("SANDBOXD_TEST_SLOW", "1")) / 4)
NEEDS = {"c": ["gcc"], "cpp": ["g++"]}

# examples/hostile/README.md says what each tries
HOSTILE = {
    "compile/endless_include.c": {"CE"},
    "compile/escapes.c": {"CE"},
    "compile/host_include.c": {"CE"},
    "compile/huge_executable.c": {"CE"},
    "compile/macros.c": {"CE"},
    "compile/random_include.c": {"CE"},
    "compile/templates.cpp": {"CE"},
    "run/escapes.py": {"WA"},
    "run/fills_disk.c": {"RTE"},
    "run/fork_bomb.c": {"WA", "RTE", "TLE"},
    "run/ignores_signals.c": {"TLE"},
    "run/kills_all.c": {"RTE"},
    "run/leaves_orphans.c": {"WA", "TLE"},
    "run/one_word.c": {"OLE"},
    "run/reads_answers.py": {"WA"},
    "run/stderr_flood.c": {"OLE"},
}


@pytest.fixture(scope="module")
def problem() -> Problem:
    """The example package, less patient with compilers, and more so on an emulated machine."""
    package = load(EXAMPLES / "different")
    own = package.limits
    limits = dataclasses.replace(own, compile_time=8 * SLOW, time=own.time * SLOW)
    return dataclasses.replace(package, limits=limits)


def every_submission() -> Iterator[object]:
    for path in sorted(SUBMISSIONS.glob("*/*")):
        code = detect(read(path, 1 << 20).files).code
        needs = ["userns", *NEEDS.get(code, [])]
        if path.parent.name == "memory_limit_exceeded" and code != "java":
            needs.append("memory")
        name = path.relative_to(SUBMISSIONS).as_posix()
        yield pytest.param(path, marks=pytest.mark.needs(*needs), id=name)


def every_other_submission() -> Iterator[object]:
    for path in sorted(EXAMPLES.glob("*/submissions/*/*")):
        package = path.parents[2].name
        if package != "different":
            code = detect(read(path, 1 << 20).files).code
            needs = pytest.mark.needs("userns", "g++", *NEEDS.get(code, []))
            yield pytest.param(package, path, marks=needs, id=path.relative_to(EXAMPLES).as_posix())


def skip_without_compiler(path: Path) -> None:
    """Skips where sandboxes have no compiler: one in somebody's home directory does not help."""
    language = detect(read(path, 1 << 20).files)
    try:
        check_available(
            language, policies.find(language.compile_policy), policies.find(language.run_policy)
        )
    except HostError as error:
        pytest.skip(str(error))


async def judged(problem: Problem, path: Path) -> Judgement:
    async with open_runner(slots=2) as runner:
        return await judge(runner, problem, read(path, problem.limits.code), parallel=2)


@pytest.mark.parametrize("path", [*every_submission()])
async def test_the_example_submissions_get_what_they_must(problem: Problem, path: Path) -> None:
    skip_without_compiler(path)
    judgement = await judged(problem, path)
    assert judgement.verdict in problem.expected(path), judgement
    if judgement.verdict == "AC":
        assert len(judgement.cases) == len(problem.cases)


@pytest.mark.parametrize(("package", "path"), [*every_other_submission()])
async def test_submissions_to_packages_with_validators(package: str, path: Path) -> None:
    problem = load(EXAMPLES / package)
    own = problem.limits
    limits = dataclasses.replace(
        own, time=own.time * SLOW, validation_time=own.validation_time * SLOW
    )
    problem = dataclasses.replace(problem, limits=limits)
    judgement = await judged(problem, path)
    assert judgement.verdict in problem.expected(path), judgement
    assert judgement.message or judgement.verdict == "AC"


@pytest.mark.needs("userns", "gcc", "g++")
@pytest.mark.parametrize("name", HOSTILE)
async def test_the_hostile_submissions(problem: Problem, name: str) -> None:
    judgement = await judged(problem, EXAMPLES / "hostile" / name)
    assert judgement.verdict in HOSTILE[name], judgement
    assert judgement.message


def test_every_hostile_submission_is_listed() -> None:
    there = {
        path.relative_to(EXAMPLES / "hostile").as_posix()
        for path in (EXAMPLES / "hostile").glob("*/*")
    }
    assert there == set(HOSTILE)
    readme = (EXAMPLES / "hostile" / "README.md").read_text()
    assert all(f"`{Path(name).name}`" in readme for name in HOSTILE)


@pytest.mark.needs("userns", "gcc")
async def test_the_compiler_reads_no_file_of_the_host(problem: Problem) -> None:
    judgement = await judged(problem, EXAMPLES / "hostile/compile/host_include.c")
    assert b"No such file or directory" in judgement.compiler_output
    assert b"root:" not in judgement.compiler_output


@pytest.mark.needs("userns")
async def test_neither_answers_nor_their_names_are_in_the_sandbox(problem: Problem) -> None:
    judgement = await judged(problem, EXAMPLES / "hostile/run/reads_answers.py")
    result = judgement.cases[0].result
    assert result is not None
    assert result.stdout  # it got as far as its standard input
    assert b".ans" not in result.stdout
    assert b"sample" not in result.stdout


@pytest.mark.needs("userns", "gcc")
async def test_the_same_judgement_for_every_number_at_once(problem: Problem) -> None:
    source = read(SUBMISSIONS / "wrong_answer/narrow.c", problem.limits.code)
    async with open_runner(slots=4) as runner:
        found = [await judge(runner, problem, source, parallel=count) for count in (1, 2, 4)]
    assert (
        len(
            {
                tuple((case.name, case.verdict, case.message) for case in each.cases)
                for each in found
            }
        )
        == 1
    )


@pytest.mark.needs("gcc")
async def test_the_same_submission_is_compiled_once(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOXD_BUILDS", str(tmp_path / "builds"))
    submission = read(SUBMISSIONS / "accepted/different.c", 1 << 20)
    other = dataclasses.replace(submission, files={"a.c": submission.files["different.c"] + b"\n"})
    seen = []
    async with open_runner() as runner:
        for what, how in ((submission, runner), (submission, runner), (submission, Afresh(runner)),
                          (other, runner)):  # fmt: skip
            seen.append(await judge(how, problem, what))
        (tmp_path / "builds/objects").chmod(0o500)
        (tmp_path / "builds").chmod(0o500)
        third = dataclasses.replace(other, files={"b.c": b"int main(){return 1;}"})
        seen.append(await judge(runner, problem, third))  # no place to keep it is no reason
        (tmp_path / "builds").chmod(0o700)
        (tmp_path / "builds/objects").chmod(0o700)
    assert [one.verdict for one in seen] == ["AC", "AC", "AC", "AC", "RTE"]
    assert [one.compiled_before for one in seen] == [False, True, False, False, False]
    assert [bool(one.not_kept) for one in seen] == [False, False, False, False, True]
    assert "the build cannot be kept: Permission denied" in seen[-1].not_kept
    cases = [[(case.name, case.verdict) for case in one.cases] for one in seen[:3]]
    assert cases[0] == cases[1] == cases[2]
