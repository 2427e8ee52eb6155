"""The output validators of a problem package: which there are, and what they are made of.

Nothing is compiled here; judge/validators.py does that. A program is one source file, or a
directory with sources of one language, or one with the scripts `build` and `run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandboxd.job import File
from sandboxd.judge import files
from sandboxd.judge.languages import detect
from sandboxd.judge.metadata import ProblemError
from sandboxd.judge.submission import MOST_FILES, SourceError, check_names

LARGEST = 16 << 20
"""Bytes of one validator's files together."""
SCRIPTS = ("build", "run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """A program of the package. `name` is its path there; `files` relative name -> content."""

    name: str
    files: Mapping[str, File]

    @property
    def scripted(self) -> bool:
        """Whether scripts of its own say how it is built and run."""
        return any(script in self.files for script in SCRIPTS)


def of_legacy(root: Path) -> tuple[Sources, ...]:
    """output_validators/: every file or directory in it is a program, and all have to accept."""
    folder = root / "output_validators"
    entries = _entries(folder)
    if not entries:
        raise ProblemError("output_validators/", "there is no program in it",
                           hint="put one there, or leave out validation: custom")  # fmt: skip
    return tuple(_read(entry, root) for entry in entries)


def of_folder(root: Path) -> tuple[Sources, ...]:
    """output_validator/: one program, whose directory it is; () if there is no such directory."""
    folder = root / "output_validator"
    if not folder.is_dir():
        return ()
    entries = _entries(folder)
    if not entries:
        raise ProblemError("output_validator/", "there is no program in it",
                           hint="remove the directory for the default comparison")  # fmt: skip
    if len(entries) == 1 and entries[0].is_dir():
        folder = entries[0]
    return (_read(folder, root),)


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if files.NAME.fullmatch(entry.name))


def _read(path: Path, root: Path) -> Sources:
    name = files.relative(path, root)
    found: dict[str, File] = {}
    left = LARGEST
    for inner, file in files.tree(path, root) if path.is_dir() else [(path.name, path)]:
        with files.inside(file, root).open("rb") as opened:
            data = opened.read(left + 1)
        left -= len(data)
        if left < 0 or len(found) >= MOST_FILES:
            raise ProblemError(name, f"more than {LARGEST} bytes, or {MOST_FILES} files")
        found[inner] = File(data=data, mode=file.stat().st_mode & 0o755)
    sources = Sources(name=name, files=found)
    _check(sources, root)
    return sources


def _check(sources: Sources, root: Path) -> None:
    """ProblemError now for what could never be compiled."""
    try:
        check_names(dict.fromkeys(sources.files, b""))
        if not sources.scripted:
            detect(dict.fromkeys(sources.files, b""))
    except SourceError as error:
        hint = "scripts named build and run may be beside its files"
        if not (root / sources.name).is_dir():
            hint = "put a program of several files into a directory of its own"
        raise ProblemError(sources.name, str(error), hint=hint) from None
    for script in SCRIPTS:
        if script in sources.files and not sources.files[script].mode & 0o100:
            raise ProblemError(f"{sources.name}/{script}", "a script that is not executable",
                               hint=f"chmod +x {script}")  # fmt: skip
