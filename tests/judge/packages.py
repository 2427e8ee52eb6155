"""Small problem packages, written to a directory, and what becomes of submissions to them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sandboxd.judge.judge import judge
from sandboxd.judge.judgement import CaseJudgement, Judgement, Validation
from sandboxd.judge.problem import Problem, load
from sandboxd.judge.submission import Submission
from sandboxd.result import Result
from sandboxd.supervise.runner import open_runner

SLOW = max(1.0, float(os.environ.get("SANDBOXD_TEST_SLOW", "1")) / 4)
LIMITS = (
    "limits: {time_limit: %g, memory: 256, output: 1,"
    " validation_time: %g, validation_memory: 256}\n"
)


def write(root: Path, files: Mapping[str, str]) -> None:
    """Texts, below a directory; what is called build or run is executable."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.name in ("build", "run"):
            path.chmod(0o755)


def package(
    root: Path,
    files: Mapping[str, str] | None = None,
    *,
    kind: str = "pass-fail",
    time: float = 1,
    validation: float = 5,
    **named: str,
) -> Problem:
    """A package of the version 2025-09 with one case, input `7` and answer `8`.

    `files` are those of its validator; as keywords `_` stands for a dot.
    """
    files = {**(files or {}), **{name.replace("_", ".", 1): text for name, text in named.items()}}
    write(root, {
        "problem.yaml": f"problem_format_version: 2025-09\nname: Small\ntype: {kind}\n"
        + LIMITS % (time * SLOW, validation * SLOW),
        "data/secret/1.in": "7\n",
        "data/secret/1.ans": "8\n",
        **{f"output_validator/{name}": text for name, text in files.items()},
    })  # fmt: skip
    return load(root)


def python(text: str) -> Submission:
    return Submission(name="a.py", files={"a.py": text.encode()})


async def judged(problem: Problem, submission: Submission) -> Judgement:
    """In real sandboxes."""
    async with open_runner(slots=2) as runner:
        return await judge(runner, problem, submission)


async def one(problem: Problem, submission: Submission) -> CaseJudgement:
    """What became of the only case."""
    judgement = await judged(problem, submission)
    assert len(judgement.cases) == 1, judgement
    return judgement.cases[0]


def said(case: CaseJudgement) -> Validation:
    assert case.validation is not None, case
    return case.validation


def run_of(case: CaseJudgement) -> Result:
    assert case.result is not None, case
    return case.result
