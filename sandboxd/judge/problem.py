"""A problem package of the ICPC/Kattis format: limits, test cases in order, how outputs are held.

Read are the versions "legacy" (with legacy-icpc) and 2023-07 to 2025-09, as far as a pass-fail
problem with the default output comparison needs them; what would judge differently and is not
supported (own validators, interaction, scores) is refused by name, not ignored. A package belongs
to the operator: its limits replace the policy's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sandboxd.judge import metadata
from sandboxd.judge.compare import Options, parse_flags
from sandboxd.judge.metadata import ProblemError
from sandboxd.judge.verdict import EXPECTED, Verdict

LEGACY = ("legacy", "legacy-icpc")
VERSIONS = (*LEGACY, "2023-07-draft", "2023-07", "2025-09-draft", "2025-09", "draft")
MIB = 1 << 20
MOST_DEPTH = 20
_NAME = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,254}")

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
    validation_time: Any = None
    validation_memory: Any = None
    validation_output: Any = None
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One test: `name` is its path below data/ without .in; `files` go to the working directory."""

    name: str
    input: Path
    answer: Path
    options: Options = field(default_factory=Options)
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
    meta = metadata.read("problem.yaml", _bytes(path / "problem.yaml", path), _ProblemYaml)
    _check_supported(meta, path)
    time, source = _time_limit(meta, path)
    limits = Limits(
        time=time,
        memory=meta.limits.memory * MIB,
        output=meta.limits.output * MIB,
        code=meta.limits.code << 10,
        compile_time=meta.limits.compilation_time,
        compile_memory=meta.limits.compilation_memory * MIB,
    )
    legacy = meta.problem_format_version in LEGACY
    settings = _Settings(flags=tuple(meta.validator_flags.split()) if legacy else ())
    return Problem(
        path=path,
        name=_title(meta, path),
        version=meta.problem_format_version,
        limits=limits,
        time_limit_from=source,
        cases=_cases(path, settings),
        languages=_languages(meta),
        include=_include(path / "include", path),
    )


def _title(meta: _ProblemYaml, path: Path) -> str:
    if isinstance(meta.name, str):
        return meta.name or path.resolve().name
    return meta.name.get("en") or next(iter(meta.name.values()), path.resolve().name)


def _check_supported(meta: _ProblemYaml, path: Path) -> None:
    version = meta.problem_format_version
    if version not in VERSIONS:
        known = ", ".join(VERSIONS)
        raise ProblemError(
            "problem.yaml: problem_format_version", f"{version[:40]!r} is not one of {known}"
        )
    types = {meta.type} if isinstance(meta.type, str) else set(meta.type)
    if types - {"pass-fail"}:
        other = ", ".join(sorted(types - {"pass-fail"}))
        raise ProblemError("problem.yaml: type", f"{other[:80]!r} is not supported yet")
    if meta.validation.split() != ["default"]:
        raise ProblemError(
            "problem.yaml: validation",
            f"{meta.validation[:80]!r} is not supported yet: only the default comparison is",
        )
    if version not in LEGACY:
        for name in ("output_validator", "output_validators", "static_validator"):
            if (path / name).is_dir():
                raise ProblemError(f"{name}/", "a validator of its own is not supported yet")


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
        text = _bytes(path / ".timelimit", path).decode("utf-8", "replace").strip()
        return _seconds(".timelimit", text), ".timelimit"
    if (path / "domjudge-problem.ini").exists():
        text = _bytes(path / "domjudge-problem.ini", path).decode("utf-8", "replace")
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

    def under(self, file: _GroupYaml, name: str) -> _Settings:
        changed = self
        flags = file.output_validator_args
        if file.output_validator_flags is not None:
            given = file.output_validator_flags
            flags = (given if isinstance(given, str) else given.get("flags", "")).split()
        if flags is not None:
            key = "args" if file.output_validator_flags is None else "flags"
            where = f"{name}: output_validator_{key}"
            changed = replace(changed, group_flags=tuple(flags), where=where)
        if file.args is not None:
            changed = replace(changed, args=tuple(file.args))
        return changed

    def options(self) -> Options:
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
        raise ProblemError(_relative(folder, root), "directories are nested too deeply")
    settings = _group_settings(folder, root, settings)
    entries = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)]
    inputs = {entry.name[:-3] for entry in entries if entry.suffix == ".in"}
    groups = {
        entry.name
        for entry in entries
        if entry.is_dir() and not (entry.suffix == ".files" and entry.stem in inputs)
    }
    for entry in entries:
        if entry.suffix == ".ans" and entry.stem not in inputs:
            raise ProblemError(_relative(entry, root), f"there is no {entry.stem}.in")
    for name in sorted(inputs | groups):
        if name in inputs:
            yield _case(folder, name, root, settings)
        if name in groups:
            yield from _group(folder / name, root, settings, depth + 1)


def _group_settings(folder: Path, root: Path, settings: _Settings) -> _Settings:
    found = [name for name in ("testdata.yaml", "test_group.yaml") if (folder / name).exists()]
    if len(found) > 1:
        raise ProblemError(_relative(folder, root), f"both {found[0]} and {found[1]}")
    if not found:
        return settings
    name = _relative(folder / found[0], root)
    return settings.under(metadata.read(name, _bytes(folder / found[0], root), _GroupYaml), name)


def _case(folder: Path, name: str, root: Path, settings: _Settings) -> Case:
    if (folder / f"{name}.yaml").exists() and name not in ("testdata", "test_group"):
        own = _relative(folder / f"{name}.yaml", root)
        settings = settings.under(
            metadata.read(own, _bytes(folder / f"{name}.yaml", root), _GroupYaml), own
        )
    files = folder / f"{name}.files"
    return Case(
        name=_relative(folder / name, root / "data"),
        input=_inside(folder / f"{name}.in", root),
        answer=_inside(folder / f"{name}.ans", root),
        options=settings.options(),
        args=settings.args,
        files=dict(_tree(files, root)) if files.is_dir() else {},
    )


def _include(folder: Path, root: Path) -> dict[str, dict[str, bytes]]:
    if not folder.is_dir():
        return {}
    return {
        language.name: {name: file.read_bytes() for name, file in _tree(language, root)}
        for language in sorted(folder.iterdir())
        if language.is_dir()
    }


def _tree(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """The files below a directory by their relative names."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and all(map(_NAME.fullmatch, path.relative_to(folder).parts)):
            yield path.relative_to(folder).as_posix(), _inside(path, root)


# --- files ----------------------------------------------------------------------------------------


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _inside(path: Path, root: Path) -> Path:
    """The path, if it is an ordinary file of the package (links inside the package are)."""
    name = _relative(path, root)
    if not path.is_file():
        raise ProblemError(name, "there is no such file")
    if not path.resolve().is_relative_to(root.resolve()):
        raise ProblemError(name, "a link that leads out of the package")
    return path


def _bytes(path: Path, root: Path) -> bytes:
    with _inside(path, root).open("rb") as file:
        return file.read(metadata.LARGEST + 1)
