"""Output validators of a package's own: compiled once, run for every case in a fresh sandbox.

They are the operator's programs, but what they read is a stranger's output; so a validator gets a
sandbox of its own as a submission does, with the limits that the package has for it. In its working
directory are its program, the case's input and answer, and the feedback directory; of that, files
of certain names are taken out, in limits, and nothing that a link leads to.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Literal

import msgspec

from sandboxd.errors import SandboxError
from sandboxd.job import Job, Pattern, Tar
from sandboxd.judge.compiling import (
    MIB,
    PAGE,
    CompileFailed,
    Files,
    Policies,
    Ready,
    Runs,
    compile_policy,
    compile_program,
    over,
    with_limits,
)
from sandboxd.judge.judgement import SHOWN, Validation, shortened
from sandboxd.judge.languages import Language, Program, check_available, detect, make_program
from sandboxd.judge.metadata import ProblemError
from sandboxd.judge.problem import Case, Problem
from sandboxd.judge.programs import Sources
from sandboxd.judge.submission import SourceError
from sandboxd.judge.text import one_line
from sandboxd.policy import Artifacts, Policy
from sandboxd.result import Artifact, Result
from sandboxd.supervise import policies

ACCEPTED, WRONG = 42, 43
"""Exit codes; every other one is the validator's failure."""
BOX = "/box"
JUDGE_MESSAGE, TEAM_MESSAGE, JUDGE_ERROR = "judgemessage.txt", "teammessage.txt", "judgeerror.txt"
FEEDBACK = Artifacts(files=3, bytes=256 << 10)
"""How much is taken out of the feedback directory."""
STDERR_SHOWN = 500
MESSAGE_SHOWN = 300

SCRIPTED = Language(
    code="scripts",
    name="scripts build and run",
    sources=("build", "run"),
    compile=("./build",),
    run=("./run",),
    collect=("**",),
    run_policy="judge-python",  # what run starts may be an interpreter
    install="",
)


@dataclass(frozen=True, slots=True)
class Validator:
    """One that compiled. `name` is its path in the package."""

    name: str
    ready: Ready


class ValidatorFailed(Exception):
    """A validator that will never run, and why; `result` is its compilation, if there was one."""

    def __init__(self, name: str, why: str, result: Result | None = None) -> None:
        super().__init__(f"{name}: {why}")
        self.result = result


# --- compiling ------------------------------------------------------------------------------------


async def compile_all(runner: Runs, problem: Problem) -> tuple[Validator, ...]:
    """All validators of the package, or ValidatorFailed for the first that does not compile."""
    made = []
    for sources in problem.validators:
        try:
            made.append(Validator(sources.name, await _compile(runner, problem, sources)))
        except CompileFailed as failed:
            raise ValidatorFailed(sources.name, failed.why, failed.result) from None
        except (SourceError, SandboxError) as error:
            raise ValidatorFailed(sources.name, str(error)) from None
    return tuple(made)


async def _compile(runner: Runs, problem: Problem, sources: Sources) -> Ready:
    limits = problem.limits
    if sources.scripted:
        language, program = SCRIPTED, _scripted(sources)
    else:
        language = detect(dict.fromkeys(sources.files, b""))
        program = make_program(
            language,
            {name: _content(sources, name) for name in sources.files},
            compile_memory=limits.compile_memory,
            run_memory=limits.validation_memory,
        )
    compiling, running = policies.find(language.compile_policy), policies.find(language.run_policy)
    if not sources.scripted:
        check_available(language, compiling, running)
    with_time, with_memory = limits.compile_time, limits.compile_memory
    ready = await compile_program(
        runner,
        language,
        program,
        Policies(
            compiling=compile_policy(compiling, language, with_time, with_memory),
            running=_policy(running, problem, language),
        ),
    )
    if sources.scripted:
        _check_run(ready, sources)
    return ready


def _content(sources: Sources, name: str) -> bytes:
    data = sources.files[name].data
    return data if isinstance(data, bytes) else data.read_bytes()


def _scripted(sources: Sources) -> Program:
    if "build" in sources.files:
        return Program(sources.files, ["./build"], ["**"], ["./run"])
    return Program(sources.files, ["test", "-x", "./run"], [], ["./run"])


def _check_run(ready: Ready, sources: Sources) -> None:
    if "build" in sources.files and "run" not in ready.files:
        raise SourceError("build left no file called run")


def _policy(policy: Policy, problem: Problem, language: Language) -> Policy:
    """With the package's limits, and room for what the cases bring along."""
    limits = problem.limits
    room = max(map(_size, problem.cases))
    time = limits.validation_time * language.time_factor
    changed = with_limits(
        policy,
        cpu_time=time,
        wall_time=2 * time + 2,
        memory=limits.validation_memory + language.memory_extra * MIB + room,
        output=limits.validation_output,
    )
    if changed.limits.disk is not None:
        changed = with_limits(changed, disk=changed.limits.disk + room)
    return changed


def _size(case: Case) -> int:
    """Bytes that input and answer take in a directory that lies in memory."""
    try:
        return sum(path.stat().st_size + 2 * PAGE for path in (case.input, case.answer))
    except OSError as error:
        raise ProblemError(case.name, f"a file cannot be read: {error.strerror}") from None


# --- running --------------------------------------------------------------------------------------


async def validate(
    runner: Runs, validators: Iterable[Validator], case: Case, output: bytes
) -> Validation | None:
    """Asks one after the other; what the first says that does not accept, or else the last."""
    said = None
    for validator in validators:
        job = make_job(validator, case, stdin=output)
        said = read(validator, await runner.run(job))
        if said.verdict != "accepted":
            break
    return said


def make_job(
    validator: Validator, case: Case, *, stdin: bytes = b"", policy: Policy | None = None
) -> Job:
    """`validator input answer feedback/ [arguments]` in the validator's sandbox."""
    ready = validator.ready
    data, feedback = _free_names(ready.files)
    files: Files = {
        f"{data}/{case.input.name}": case.input,
        f"{data}/{case.answer.name}": case.answer,
        feedback: Tar(_empty_directory()),
    }
    places = [f"{BOX}/{data}/{case.input.name}", f"{BOX}/{data}/{case.answer.name}"]
    names = (JUDGE_MESSAGE, TEAM_MESSAGE, JUDGE_ERROR)
    return Job(
        argv=[*ready.argv, *places, f"{BOX}/{feedback}/", *case.validator_args],
        policy=policy or ready.policy,
        stdin=stdin,
        files=over(ready.files, files),
        collect=[Pattern(f"{feedback}/{name}", required=False) for name in names],
        artifacts=FEEDBACK,
        keep=SHOWN,
    )


def _free_names(files: Files) -> tuple[str, str]:
    """Directories for the case's files and for feedback that no file of the program is called."""
    taken = {str(name).partition("/")[0] for name in files}
    for number in count():
        names = tuple(name + "_" * number for name in ("data", "feedback"))
        if not taken & {*names}:
            return names[0], names[1]
    raise AssertionError("count() has no end")


def _empty_directory() -> bytes:
    """An archive of a directory with nothing in it."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        top = tarfile.TarInfo(".")
        top.type, top.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(top)
    return archive.getvalue()


def read(validator: Validator, result: Result) -> Validation:
    """What the validator says, by the way in which its run ended."""
    left = {artifact.path.rpartition("/")[2]: artifact for artifact in result.artifacts}
    validation = Validation(
        validator=validator.name,
        verdict=verdict_of(result),
        judge_message=_text(left.get(JUDGE_MESSAGE)),
        team_message=_text(left.get(TEAM_MESSAGE)),
        judge_error=_text(left.get(JUDGE_ERROR)),
        lost=result.artifact_errors,
        result=msgspec.structs.replace(shortened(result), artifacts=()),
    )
    if validation.verdict != "failed":
        return validation
    return msgspec.structs.replace(validation, why=_why(result, validation.judge_error))


def verdict_of(result: Result) -> Literal["accepted", "wrong", "failed"]:
    """Only an exit code of its own says anything; over a limit, there is none."""
    if result.status == "nonzero_exit" and result.exit_code == ACCEPTED:
        return "accepted"
    if result.status == "nonzero_exit" and result.exit_code == WRONG:
        return "wrong"
    return "failed"


def _why(result: Result, told: bytes) -> str:
    if result.status in ("ok", "nonzero_exit"):
        why = f"exit code {result.exit_code}, neither {ACCEPTED} nor {WRONG}"
    else:
        why = result.message or result.status
    said = one_line((told or result.stderr).strip(), STDERR_SHOWN)
    return f"{why}: {said}" if said else why


def message(validation: Validation) -> str:
    """One line for who judges."""
    if validation.verdict == "failed":
        return f"{validation.validator}: {validation.why}"
    if validation.verdict == "accepted":
        return ""
    first, _, rest = validation.judge_message.strip().partition(b"\n")
    return one_line(first, MESSAGE_SHOWN) + (" ..." if rest.strip() else "")


def _text(artifact: Artifact | None) -> bytes:
    return b"" if artifact is None else artifact.data
