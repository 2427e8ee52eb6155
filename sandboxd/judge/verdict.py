"""The judge's words, and the tables that choose them: the first row that holds wins.

A status (why a run ended) is the sandbox's word, a verdict is the judge's; only here does one
become the other. docs/howto/judge-a-problem.md explains the words to people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from sandboxd.result import Status

Verdict = Literal["AC", "WA", "PE", "RTE", "TLE", "MLE", "OLE", "SV", "CE", "JE"]

MEANING: Mapping[Verdict, str] = {
    "AC": "accepted",
    "WA": "wrong answer",
    "PE": "presentation error: only the white space is wrong",
    "RTE": "run-time error",
    "TLE": "time limit exceeded",
    "MLE": "memory limit exceeded",
    "OLE": "output limit exceeded",
    "SV": "security violation: a forbidden system call",
    "CE": "compile error",
    "JE": "judge error: not the submission's fault",
}

CRASHES: frozenset[Verdict] = frozenset({"RTE", "MLE", "OLE", "SV"})
WRONG: frozenset[Verdict] = frozenset({"WA", "PE"})
FAILURES: frozenset[Verdict] = CRASHES | WRONG | {"TLE", "CE"}

EXPECTED: Mapping[str, frozenset[Verdict]] = {
    "accepted": frozenset({"AC"}),
    "rejected": FAILURES,
    "wrong_answer": WRONG,
    "time_limit_exceeded": frozenset({"TLE"}),
    "run_time_error": CRASHES,
    "brute_force": CRASHES | {"TLE"},
    # beyond the format, as other judges name them
    "memory_limit_exceeded": frozenset({"MLE"}),
    "output_limit_exceeded": frozenset({"OLE"}),
    "presentation_error": frozenset({"PE"}),
    "compile_error": frozenset({"CE"}),
    "compiler_error": frozenset({"CE"}),
}
"""Directory below submissions/ -> the verdicts that its submissions must get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known when a verdict is due. `output` is None where nothing was compared."""

    status: Status
    start_error: str | None = None
    """For start_failed the errno's name."""
    host_fault: bool = False
    """Whether it ended because of the machine: that had no memory left."""
    own_program: bool = False
    """Whether the submission itself was to be started, not an interpreter of ours."""
    exit_code: int | None = None
    out_of_memory_exit: int | None = None
    """The exit code with which the language's runtime says that its memory is used up."""
    truncated: bool = False
    """Part of stdout is lost, so that it cannot be compared."""
    output: Literal["same", "space", "different"] | None = None
    produced: bool = True
    """For a compilation: whether it left what it had to."""
    validator: Literal["accepted", "wrong", "failed"] | None = None
    """What a validator of the package's own said; None: there is none, or it was not asked."""
    unprompted: bool = False
    """Interactive: it ended before it could know that the submission had."""
    late: bool = False
    """Interactive: the submission was ended because the conversation took too long."""


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    verdict: Verdict
    holds: Callable[[Facts], bool]
    by_validator: bool = False
    """Whether a validator of the package's own decided, and says why."""


def _status(*statuses: Status) -> Callable[[Facts], bool]:
    return lambda facts: facts.status in statuses


def _own_start(facts: Facts) -> bool:
    """A program that names a loader which is not there, say: no stranger's source makes a JE."""
    return facts.status == "start_failed" and facts.own_program


_OWN: tuple[Row, ...] = (
    Row("ended by the caller", "JE", _status("cancelled")),
    Row("the machine had no memory", "JE", lambda f: f.host_fault),
    Row("collecting failed", "JE", _status("artifact_error")),
    Row("too large to start", "MLE", lambda f: _own_start(f) and f.start_error == "ENOMEM"),
    Row("broken program", "RTE", lambda f: _own_start(f)),
    Row("not started", "JE", _status("start_failed")),
    Row("memory used up", "MLE", _status("memory_limit")),
    Row("CPU time used up", "TLE", _status("cpu_time_limit")),
    Row("time used up", "TLE", _status("wall_time_limit", "idle_limit")),
    Row("too much output", "OLE", _status("output_limit")),
    Row("forbidden call", "SV", _status("syscall_denied")),
    Row("space or processes used up", "RTE", _status("disk_limit", "process_limit")),
    Row("killed by a signal", "RTE", _status("signaled")),
    Row(
        "heap used up",
        "MLE",
        lambda f: (
            f.status == "nonzero_exit"
            and f.exit_code is not None
            and f.exit_code == f.out_of_memory_exit
        ),
    ),
    Row("failing exit code", "RTE", _status("nonzero_exit")),
    Row("output not kept whole", "OLE", lambda f: f.truncated),
)
"""What a submission does by itself, whatever its output is."""

RUN: tuple[Row, ...] = (
    *_OWN,
    Row("right", "AC", lambda f: f.output == "same"),
    Row("right but for white space", "PE", lambda f: f.output == "space"),
    Row("wrong", "WA", lambda f: f.output == "different"),
    Row("not compared", "JE", lambda _: True),
)

VALIDATED: tuple[Row, ...] = (
    *_OWN,
    Row("the validator failed", "JE", lambda f: f.validator == "failed", by_validator=True),
    Row("accepted by the validator", "AC", lambda f: f.validator == "accepted", by_validator=True),
    Row("rejected by the validator", "WA", lambda f: f.validator == "wrong", by_validator=True),
    Row("not validated", "JE", lambda _: True),
)


def _in_the_middle(word: str) -> Callable[[Facts], bool]:
    return lambda facts: facts.unprompted and facts.validator == word


INTERACTIVE: tuple[Row, ...] = (
    Row("the validator failed in the middle", "JE", _in_the_middle("failed"), by_validator=True),
    Row("rejected in the middle", "WA", _in_the_middle("wrong"), by_validator=True),
    Row("the conversation took too long", "TLE", lambda f: f.late),
    *VALIDATED,
)
"""As VALIDATED, but for what the validator decided while it could not know how the submission ends:
then that end does not count, for it may be what the validator's end made of it."""

COMPILE: tuple[Row, ...] = (
    Row("ended by the caller", "JE", _status("cancelled")),
    Row("the machine had no memory", "JE", lambda f: f.host_fault),
    Row("compiler did not start", "JE", _status("start_failed")),
    Row("compiler ended badly", "CE", lambda f: f.status not in ("ok", "artifact_error")),
    Row("unusable program", "CE", _status("artifact_error")),
    Row("no program", "CE", lambda f: not f.produced),
    Row("compiled", "AC", lambda _: True),
)


def decide(table: tuple[Row, ...], facts: Facts) -> Row:
    """The first row that holds; every table ends with one that always does."""
    return next(row for row in table if row.holds(facts))
