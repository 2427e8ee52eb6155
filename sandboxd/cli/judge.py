"""`sandboxd judge`: submissions held against a problem package, one line a case."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd.cli import exitcodes, quantities, subtree
from sandboxd.cli.lacking import not_enforced
from sandboxd.cli.main import say, say_json

if TYPE_CHECKING:
    from sandboxd.judge.judgement import CaseJudgement, Judgement
    from sandboxd.judge.problem import Problem
    from sandboxd.judge.submission import Submission
    from sandboxd.judge.verdict import Verdict

SCHEMA = "sandboxd.judge/1"
COMPILER_LINES = 40
FEEDBACK_LINES = 20

EPILOG = """\
PROBLEM is a package in the ICPC/Kattis problem format, SUBMISSION a source file or a directory of
source files. What lies in PROBLEM/submissions/wrong_answer must get that verdict, and so on;
everything else must be accepted.

example:
  sandboxd judge examples/different examples/different/submissions/accepted/different.cpp

exit status: 0 every submission got the verdict it must get, 1 one did not, 2 wrong usage or a
package that cannot be read, 125 sandboxd itself or the package's validator failed (verdict JE)
"""


def register(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = sub.add_parser(
        "judge",
        help="judge submissions against a problem package",
        description="Compiles each submission once and runs every test case in a fresh sandbox.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("problem", metavar="PROBLEM", type=Path)
    parser.add_argument("submissions", metavar="SUBMISSION", type=Path, nargs="+")
    parser.add_argument("--all", action="store_true", help="go on after the first failing case")
    parser.add_argument(
        "--jobs",
        type=quantities.count,
        metavar="N",
        help="cases at once (default: all CPUs but one)",
    )
    subtree.add(parser)
    parser.add_argument("--language", metavar="L", help="c, cpp, python3, java, rust or go")
    parser.add_argument(
        "--no-cache", action="store_true", help="compile also what was compiled before"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object when done")
    parser.add_argument(
        "--time-limit",
        type=quantities.time,
        metavar="T",
        help="CPU time, e.g. 1.5s (not the package's)",
    )
    parser.add_argument(
        "--memory", type=quantities.size, metavar="M", help="memory, e.g. 256M (not the package's)"
    )
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Judges; returns the exit status."""
    from sandboxd.judge import languages, problem
    from sandboxd.judge.metadata import ProblemError

    if args.language is not None and args.language not in languages.table():
        known = ", ".join(languages.table())
        say(f"judge: no such language: {args.language} (there are {known})")
        return exitcodes.USAGE
    try:
        package = problem.load(args.problem)
        package = package.with_limits(time=args.time_limit, memory=args.memory)
    except ProblemError as error:
        return _unreadable(args, str(error.args[0]), error.hint)
    except OSError as error:
        return _unreadable(args, f"{error.filename}: {error.strerror}", "")
    try:
        submissions = [_read(path, package, args.language) for path in args.submissions]
    except OSError as error:
        hint = "a submission is a source file, or a directory of them"
        return _unreadable(args, f"{error.filename}: {error.strerror}", hint)
    return _judge_all(args, package, submissions)


def _unreadable(args: argparse.Namespace, message: str, hint: str) -> int:
    say(f"judge: {message}")
    if hint:
        say(f"  {hint}")
    if args.json:
        say_json({"kind": "problem", "message": message, "hint": hint})
    return exitcodes.USAGE


def _read(path: Path, problem: Problem, language: str | None) -> Submission | str:
    """The submission, or why it cannot be taken."""
    from sandboxd.judge.submission import SourceError, load

    try:
        return load(path, problem.limits.code, language)
    except SourceError as error:
        return str(error)


def _judge_all(
    args: argparse.Namespace, problem: Problem, submissions: list[Submission | str]
) -> int:
    import trio

    from sandboxd.judge.compiling import Afresh, Runs
    from sandboxd.judge.judge import judge, prepare, refused
    from sandboxd.supervise.runner import open_runner

    report = _Report(problem, quiet=args.json)
    jobs = args.jobs or max(1, len(os.sched_getaffinity(0)) - 1)

    async def every() -> None:
        async with open_runner(slots=jobs, cgroup=args.cgroup) as opened:
            runner: Runs = Afresh(opened) if args.no_cache else opened
            prepared = await prepare(runner, problem)
            for path, submission in zip(args.submissions, submissions, strict=True):
                report.begin(path)
                if isinstance(submission, str):
                    judgement = refused(problem, path.name, submission)
                else:
                    judgement = await judge(
                        runner, prepared, submission, everything=args.all, parallel=jobs,
                        on_case=report.case,
                    )  # fmt: skip
                report.end(path, judgement)

    trio.run(every)
    report.finish()
    return report.status()


# --- what is printed ------------------------------------------------------------------------------


class _Report:
    """The lines, or the one JSON object, and what came out in the end."""

    def __init__(self, problem: Problem, *, quiet: bool) -> None:
        self.problem = problem
        self.quiet = quiet
        self.judged: list[tuple[Path, Judgement]] = []
        self.width = min(40, max(len(case.name) for case in problem.cases))
        limits = problem.limits
        kind = ", interactive" if problem.interactive else ""
        own = ", validated by " + ", ".join(one.name for one in problem.validators)
        self._say(
            f"{problem.name}: {len(problem.cases)} cases, {limits.time:g} s, {_mib(limits.memory)}"
            f"{kind}{own if problem.validators else ''}"
        )
        if problem.time_limit_from == "default":
            self._say(f"the package names no time limit: {limits.time:g} s it is (--time-limit T)")

    def begin(self, path: Path) -> None:
        self._say(str(path))

    def case(self, case: CaseJudgement) -> None:
        self._say(f"  {case.name:{self.width}} {_case_line(case)}".rstrip())
        for line in _feedback_lines(case):
            self._say(f"    | {line}")

    def end(self, path: Path, judgement: Judgement) -> None:
        from sandboxd.judge.verdict import MEANING

        self.judged.append((path, judgement))
        wanted = self.problem.expected(path)
        verdict = judgement.verdict
        run, total = len(judgement.cases), judgement.cases_total
        early = f", {run} of {total} cases" if 0 < run < total else ""
        before = ", compiled before" if judgement.compiled_before else ""
        self._say(f"  {verdict}: {MEANING[verdict]}{early}{_unexpected(verdict, wanted)}{before}")
        if not judgement.cases and judgement.message:
            self._say(f"    {judgement.message}")
        if not judgement.cases:
            for line in _compiler_lines(judgement):
                self._say(f"    | {line}")

    def finish(self) -> None:
        if self.quiet:
            print(json.dumps(self._json()))
            return
        every = (each for _, judgement in self.judged for each in judgement.degraded)
        lost = dict.fromkeys((each.what, each.why) for each in every)
        for why in dict.fromkeys(each.not_kept for _, each in self.judged if each.not_kept):
            self._say(f"compilations are not kept: {why}")
        if lost:
            self._say(f"not enforced: {not_enforced(lost)}")

    def status(self) -> int:
        if any(judgement.verdict == "JE" for _, judgement in self.judged):
            return exitcodes.SANDBOXD_FAILED
        right = all(self._as_expected(*one) for one in self.judged)
        return exitcodes.OK if right else exitcodes.FAILED

    def _as_expected(self, path: Path, judgement: Judgement) -> bool:
        return judgement.verdict in self.problem.expected(path)

    def _json(self) -> dict[str, Any]:
        from sandboxd.judge.judgement import judgement_json

        limits = self.problem.limits
        return {
            "schema": SCHEMA,
            "problem": {
                "name": self.problem.name,
                "path": str(self.problem.path),
                "time_limit": limits.time,
                "time_limit_from": self.problem.time_limit_from,
                "memory": limits.memory,
                "output": limits.output,
                "interactive": self.problem.interactive,
                "validators": [one.name for one in self.problem.validators],
            },
            "submissions": [
                {
                    "path": str(path),
                    "expected": sorted(self.problem.expected(path)),
                    "as_expected": self._as_expected(path, judgement),
                    **judgement_json(judgement),
                }
                for path, judgement in self.judged
            ],
        }

    def _say(self, line: str) -> None:
        """One line for a terminal, whoever wrote it."""
        from sandboxd.judge.text import one_line

        if not self.quiet:
            print(one_line(line, 1000), flush=True)


def _case_line(case: CaseJudgement) -> str:
    usage = case.result.usage if case.result else None
    cpu = "-" if usage is None or usage.cpu_time is None else f"{usage.cpu_time:.3f} s"
    wall = "-" if usage is None or usage.wall_time is None else f"{usage.wall_time:.3f} s"
    memory = "-" if usage is None or usage.memory_peak is None else _mib(usage.memory_peak)
    line = f"{case.verdict:3} {cpu:>8} cpu {wall:>8} wall {memory:>9}  {case.message}"
    if case.verdict == "TLE" and case.result and case.result.quality.grade == "noisy":
        line += f" (the machine was busy: {', '.join(case.result.quality.reasons)})"
    return line


def _feedback_lines(case: CaseJudgement) -> Sequence[str]:
    """What the validator wrote for judges and for who submitted, of a case that is not accepted."""
    from sandboxd.judge.text import printable

    said = case.validation
    if said is None or case.verdict == "AC":
        return []
    judge = said.judge_message.strip()
    if case.verdict == "WA" and b"\n" not in judge:
        judge = b""  # it is in the line above
    files = {"judgemessage": judge, "teammessage": said.team_message.strip()}
    files["judgeerror"] = said.judge_error.strip()
    lines = [
        f"{name}: {line}" for name, data in files.items() for line in printable(data).splitlines()
    ]
    lines += [f"not taken: {one.path}: {one.reason}" for one in said.lost]
    return lines if len(lines) <= FEEDBACK_LINES else [*lines[:FEEDBACK_LINES], "..."]


def _unexpected(verdict: Verdict, wanted: frozenset[Verdict]) -> str:
    if verdict in wanted:
        return "" if wanted == {"AC"} else " (as it must)"
    return f" (must get {' or '.join(sorted(wanted))})"


def _compiler_lines(judgement: Judgement) -> Sequence[str]:
    from sandboxd.judge.text import printable

    lines = printable(judgement.compiler_output).splitlines()
    if len(lines) > COMPILER_LINES:
        lines = [*lines[:COMPILER_LINES], "..."]
    return lines


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
