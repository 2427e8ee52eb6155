"""A problem package of the ICPC/Kattis format: limits, test cases in order, how outputs are held.

Read are the versions "legacy" (with legacy-icpc) and 2023-07 to 2025-09, as far as a pass-fail
problem needs them, with the default output comparison, validators of its own or interactive; what
would judge differently and is not supported (several passes, scores) is refused by name, not
ignored. A package belongs to the operator: its limits replace the policy's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sandboxd.judge import files, metadata, programs
from sandboxd.judge.compare import Options, parse_flags
from sandboxd.judge.files import NAME
from sandboxd.judge.metadata import ProblemError
from sandboxd.judge.programs import Sources
from sandboxd.judge.verdict import EXPECTED, Verdict

LEGACY = ("legacy", "legacy-icpc")
VERSIONS = (*LEGACY, "2023-07-draft", "2023-07", "2025-09-draft", "2025-09", "draft")
MIB = 1 << 20
MOST_DEPTH = 20

Mebibytes = Annotated[int, Meta(ge=1, le=1 << 30)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A YAML file of the format; keys that do not matter here are Any."""


class _LimitsMap(_File, frozen=True):
    time_limit: Seconds | None = None
    time_resolution: Any = None
    time_multipliers: Any = None
    time_multiplier: Any = None
    time_safety_margin: Any = None
    memory: Mebibytes = 2048
    output: Mebibytes = 8
    code: Mebibytes = 128  # KiB
    compilation_time: Seconds = 60
    compilation_memory: Mebibytes = 2048
    validation_time: Seconds = 60
    validation_memory: Mebibytes = 2048
    validation_output: Mebibytes = 8
    validation_passes: Any = None


class _ProblemYaml(_File, frozen=True):
    problem_format_version: str = "legacy"
    type: str | list[str] = "pass-fail"
    name: str | dict[str, str] = ""
    limits: _LimitsMap = _LimitsMap()
    validation: str = "default"
    validator_flags: str = ""
    languages: str | list[str] = "all"
    uuid: Any = None
    version: Any = None
    author: Any = None
    credits: Any = None
    source: Any = None
    source_url: Any = None
    license: Any = None
    rights_owner: Any = None
    embargo_until: Any = None
    grading: Any = None
    keywords: Any = None
    allow_file_writing: Any = None
    constants: Any = None


class _GroupYaml(_File, frozen=True):
    """testdata.yaml, test_group.yaml or the .yaml of one case."""

    args: list[str] | None = None
    output_validator_args: list[str] | None = None
    output_validator_flags: str | dict[str, str] | None = None
    on_reject: Any = None
    grading: Any = None
    grader_flags: Any = None
    input_validator_flags: Any = None
    input_validator_args: Any = None
    accept_score: Any = None
    reject_score: Any = None
    range: Any = None
    max_score: Any = None
    score_aggregation: Any = None
    static_validation_score: Any = None
    static_validator_args: Any = None
    require_pass: Any = None
    input_visualizer_args: Any = None
    output_visualizer_args: Any = None
    full_feedback: Any = None
    hint: Any = None
    description: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a submission of this problem may use: seconds and bytes."""

    time: float
    memory: int
    output: int
    code: int
    compile_time: float
    compile_memory: int
    validation_time: float = 60
    """CPU time of a validator of the package's own, for one case."""
    validation_memory: int = 2048 * MIB
    validation_output: int = 8 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One test: `name` is its path below data/ without .in; `files` go to the working directory."""

    name: str
    input: Path
    answer: Path
    options: Options = field(default_factory=Options)
    """Of the default comparison."""
    validator_args: tuple[str, ...] = ()
    """Of the package's own validators."""
    args: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A package, read and checked."""

    path: Path
    name: str
    version: str
    limits: Limits
    time_limit_from: str
    """The file and key that set the time limit; "default" if none did."""
    cases: tuple[Case, ...]
    languages: frozenset[str] | None = None
    """Codes of the languages that are allowed; None: all."""
    include: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    """Language code, or "default" -> files put over every submission's."""
    validators: tuple[Sources, ...] = ()
    """Output validators of its own; none: the default comparison."""
    interactive: bool = False
    """The validator, of which there is one, runs beside the submission and talks to it."""

    def expected(self, submission: Path) -> frozenset[Verdict]:
        """The verdicts that this file must get: as its directory in submissions/ says, else AC."""
        where = submission.resolve().parent
        if where.parent == self.path.resolve() / "submissions":
            return EXPECTED.get(where.name, EXPECTED["accepted"])
        return EXPECTED["accepted"]

    def with_limits(self, *, time: float | None = None, memory: int | None = None) -> Problem:
        """The same problem with another limit; None leaves it."""
        changed = self
        if time is not None:
            limits = replace(changed.limits, time=time)
            changed = replace(changed, limits=limits, time_limit_from="the caller")
        if memory is not None:
            changed = replace(changed, limits=replace(changed.limits, memory=memory))
        return changed


def load(path: Path) -> Problem:
    """Reads the package in the directory `path`; ProblemError names file and key."""
    if not path.is_dir():
        hint = "unpack it first" if path.suffix in (".zip", ".kpp") else "name a package directory"
        raise ProblemError(str(path), "not a directory", hint=hint)
    meta = metadata.read("problem.yaml", files.read(path / "problem.yaml", path), _ProblemYaml)
    _check_supported(meta)
    validators, interactive = _validation(meta, path)
    time, source = _time_limit(meta, path)
    limits = Limits(
        time=time,
        memory=meta.limits.memory * MIB,
        output=meta.limits.output * MIB,
        code=meta.limits.code << 10,
        compile_time=meta.limits.compilation_time,
        compile_memory=meta.limits.compilation_memory * MIB,
        validation_time=meta.limits.validation_time,
        validation_memory=meta.limits.validation_memory * MIB,
        validation_output=meta.limits.validation_output * MIB,
    )
    settings = _Settings(
        flags=tuple(meta.validator_flags.split()) if _is_legacy(meta) else (),
        validators=tuple(one.name.rpartition("/")[2] for one in validators),
    )
    return Problem(
        path=path,
        name=_title(meta, path),
        version=meta.problem_format_version,
        limits=limits,
        time_limit_from=source,
        cases=_cases(path, settings),
        languages=_languages(meta),
        include=_include(path / "include", path),
        validators=validators,
        interactive=interactive,
    )


def _title(meta: _ProblemYaml, path: Path) -> str:
    if isinstance(meta.name, str):
        return meta.name or path.resolve().name
    return meta.name.get("en") or next(iter(meta.name.values()), path.resolve().name)


def _is_legacy(meta: _ProblemYaml) -> bool:
    return meta.problem_format_version in LEGACY


def _types(meta: _ProblemYaml) -> set[str]:
    return {meta.type} if isinstance(meta.type, str) else set(meta.type)


def _check_supported(meta: _ProblemYaml) -> None:
    version = meta.problem_format_version
    if version not in VERSIONS:
        known = ", ".join(VERSIONS)
        raise ProblemError(
            "problem.yaml: problem_format_version", f"{version[:40]!r} is not one of {known}"
        )
    supported = {"pass-fail"} if _is_legacy(meta) else {"pass-fail", "interactive"}
    if others := _types(meta) - supported:
        shown = ", ".join(sorted(others))[:80]
        hint = "the words of legacy are in validation" if "interactive" in others else ""
        raise ProblemError("problem.yaml: type", f"{shown!r} is not supported", hint=hint)


def _validation(meta: _ProblemYaml, path: Path) -> tuple[tuple[Sources, ...], bool]:
    """The validators of its own, and whether the problem is interactive."""
    if _is_legacy(meta):
        return _legacy_validation(meta.validation.split(), path)
    if meta.validation != "default":
        raise ProblemError("problem.yaml: validation", "a key of the version legacy",
                           hint="here output_validator/ and type say it")  # fmt: skip
    for name in ("output_validators", "static_validator"):
        if (path / name).is_dir():
            hint = "this version has output_validator/" if name == "output_validators" else ""
            raise ProblemError(f"{name}/", "is not supported", hint=hint)
    validators, interactive = programs.of_folder(path), "interactive" in _types(meta)
    if interactive and not validators:
        raise ProblemError("problem.yaml: type", "an interactive problem without a validator",
                           hint="put the program into output_validator/")  # fmt: skip
    return validators, interactive


def _legacy_validation(words: list[str], path: Path) -> tuple[tuple[Sources, ...], bool]:
    key = "problem.yaml: validation"
    if words == ["default"]:
        return (), False
    kind, *more = words or [""]
    if kind != "custom":
        raise ProblemError(key, f"{kind[:40]!r} is neither default nor custom")
    if others := set(more) - {"interactive"}:
        raise ProblemError(key, f"{', '.join(sorted(others))[:80]!r} is not supported")
    validators = programs.of_legacy(path)
    if more and len(validators) > 1:
        names = ", ".join(one.name for one in validators)
        raise ProblemError(key, f"only one validator can be interactive, not {names[:200]}")
    return validators, bool(more)


def _languages(meta: _ProblemYaml) -> frozenset[str] | None:
    if isinstance(meta.languages, list):
        return frozenset(meta.languages)
    return None if meta.languages == "all" else frozenset(meta.languages.split())


# --- the time limit -------------------------------------------------------------------------------

DEFAULT_TIME = 5.0


def _time_limit(meta: _ProblemYaml, path: Path) -> tuple[float, str]:
    """The key of newer versions, else the files that other judges read, else a default."""
    if meta.limits.time_limit is not None:
        return meta.limits.time_limit, "problem.yaml: limits.time_limit"
    if (path / ".timelimit").exists():
        text = files.read(path / ".timelimit", path).decode("utf-8", "replace").strip()
        return _seconds(".timelimit", text), ".timelimit"
    if (path / "domjudge-problem.ini").exists():
        text = files.read(path / "domjudge-problem.ini", path).decode("utf-8", "replace")
        found = re.search(r"^[ \t]*timelimit[ \t]*=[ \t]*([^\n]*)", text, re.MULTILINE)
        if found:
            name = "domjudge-problem.ini: timelimit"
            return _seconds(name, found[1].strip().strip("'\"")), name
    return DEFAULT_TIME, "default"


def _seconds(where: str, text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?", text) or not 0 < float(text) <= 86400:
        raise ProblemError(where, f"{text[:40]!r} is not a number of seconds")
    return float(text)


# --- test cases -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What a group hands down to its cases and groups."""

    flags: tuple[str, ...]
    """Of problem.yaml; a group's own come behind."""
    group_flags: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    where: str = "problem.yaml: validator_flags"
    validators: tuple[str, ...] = ()
    """Names of the package's own; none: the flags are those of the default comparison."""

    def under(self, file: _GroupYaml, name: str) -> _Settings:
        changed = self
        flags = file.output_validator_args
        if file.output_validator_flags is not None:
            flags = self._flags(file.output_validator_flags, name)
        if flags is not None:
            key = "args" if file.output_validator_flags is None else "flags"
            where = f"{name}: output_validator_{key}"
            changed = replace(changed, group_flags=tuple(flags), where=where)
        if file.args is not None:
            changed = replace(changed, args=tuple(file.args))
        return changed

    def _flags(self, given: str | dict[str, str], file: str) -> list[str]:
        """The words; a map has them beside the name of the validator that is meant."""
        if isinstance(given, str):
            return given.split()
        name = given.get("name")
        only = self.validators[0] if len(self.validators) == 1 else ""
        if self.validators and name is not None and name not in (only, only.rpartition(".")[0]):
            known = ", ".join(self.validators)
            raise ProblemError(f"{file}: output_validator_flags", f"{name[:80]!r} alone is not"
                               f" supported: all validators are run ({known[:200]})")  # fmt: skip
        return given.get("flags", "").split()

    def options(self) -> Options:
        if self.validators:
            return Options()
        try:
            return parse_flags((*self.flags, *self.group_flags))
        except ValueError as error:
            raise ProblemError(self.where, str(error)) from None


def _cases(path: Path, settings: _Settings) -> tuple[Case, ...]:
    data = path / "data"
    if not (data / "secret").is_dir():
        raise ProblemError("data/secret/", "there is no such directory")
    settings = _group_settings(data, path, settings)
    cases = [
        case
        for group in ("sample", "secret")
        if (data / group).is_dir()
        for case in _group(data / group, path, settings, 0)
    ]
    if not any(case.name.startswith("secret/") for case in cases):
        raise ProblemError("data/secret/", "there is no test case (NAME.in and NAME.ans)")
    return tuple(cases)


def _group(folder: Path, root: Path, settings: _Settings, depth: int) -> Iterator[Case]:
    """The cases of a directory and, where their names sort in between, of those below it."""
    if depth > MOST_DEPTH:
        raise ProblemError(files.relative(folder, root), "directories are nested too deeply")
    settings = _group_settings(folder, root, settings)
    entries = [entry for entry in folder.iterdir() if NAME.fullmatch(entry.name)]
    inputs = {entry.name[:-3] for entry in entries if entry.suffix == ".in"}
    groups = {
        entry.name
        for entry in entries
        if entry.is_dir() and not (entry.suffix == ".files" and entry.stem in inputs)
    }
    for entry in entries:
        if entry.suffix == ".ans" and entry.stem not in inputs:
            raise ProblemError(files.relative(entry, root), f"there is no {entry.stem}.in")
    for name in sorted(inputs | groups):
        if name in inputs:
            yield _case(folder, name, root, settings)
        if name in groups:
            yield from _group(folder / name, root, settings, depth + 1)


def _group_settings(folder: Path, root: Path, settings: _Settings) -> _Settings:
    found = [name for name in ("testdata.yaml", "test_group.yaml") if (folder / name).exists()]
    if len(found) > 1:
        raise ProblemError(files.relative(folder, root), f"both {found[0]} and {found[1]}")
    if not found:
        return settings
    name = files.relative(folder / found[0], root)
    return settings.under(
        metadata.read(name, files.read(folder / found[0], root), _GroupYaml), name
    )


def _case(folder: Path, name: str, root: Path, settings: _Settings) -> Case:
    if (folder / f"{name}.yaml").exists() and name not in ("testdata", "test_group"):
        own = files.relative(folder / f"{name}.yaml", root)
        settings = settings.under(
            metadata.read(own, files.read(folder / f"{name}.yaml", root), _GroupYaml), own
        )
    extra = folder / f"{name}.files"
    return Case(
        name=files.relative(folder / name, root / "data"),
        input=files.inside(folder / f"{name}.in", root),
        answer=files.inside(folder / f"{name}.ans", root),
        options=settings.options(),
        validator_args=(*settings.flags, *settings.group_flags) if settings.validators else (),
        args=settings.args,
        files=dict(files.tree(extra, root)) if extra.is_dir() else {},
    )


def _include(folder: Path, root: Path) -> dict[str, dict[str, bytes]]:
    if not folder.is_dir():
        return {}
    return {
        language.name: {name: file.read_bytes() for name, file in files.tree(language, root)}
        for language in sorted(folder.iterdir())
        if language.is_dir()
    }
