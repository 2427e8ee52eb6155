"""The table of languages: what a submission is written in, how it is compiled and run."""

from __future__ import annotations

import functools
import os
import re
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import msgspec

from sandboxd.errors import HostError
from sandboxd.job import File
from sandboxd.judge.submission import SourceError
from sandboxd.policy import Policy

TABLE = Path(__file__).with_name("languages.toml")
BINARY = "program"
PATH = "/usr/local/bin:/usr/bin:/bin"


class Language(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of languages.toml; placeholders in argv are explained there."""

    code: str
    name: str
    sources: tuple[str, ...]
    """Patterns of file names (without directories) that are compiled and tell the language."""
    main: tuple[str, ...] = ()
    """Names of the file to start with, best first, where there are several."""
    compile: tuple[str, ...]
    run: tuple[str, ...]
    collect: tuple[str, ...] = ()
    """What the compiler leaves and the runs need; nothing: the source files themselves."""
    compile_policy: str = "compile"
    run_policy: str
    install: str
    """Debian packages that hold the compiler and what runs its programs."""
    env: dict[str, str] = {}
    """For the compiler."""
    time_factor: float = 1.0
    """Times the problem's time limit."""
    memory_extra: int = 0
    """MiB beside the problem's memory limit, for a runtime of its own."""
    out_of_memory_exit: int | None = None
    """Exit code by which the runtime says that the memory it was given is used up."""

    def is_source(self, name: str) -> bool:
        base = name.rpartition("/")[2]
        return any(fnmatchcase(base, pattern) for pattern in self.sources)


class Program(NamedTuple):
    """A program made ready: `compile` these files, `collect` what comes of it, `run` that."""

    files: Mapping[str, bytes | File]
    compile: list[str]
    collect: list[str]
    run: list[str]


@functools.cache
def table() -> Mapping[str, Language]:
    """languages.toml, in its order."""
    raw = tomllib.loads(TABLE.read_text("utf-8"))
    return {
        code: msgspec.convert({"code": code, **fields}, Language) for code, fields in raw.items()
    }


def detect(files: Mapping[str, bytes]) -> Language:
    """The one language whose patterns some file name matches."""
    found = [lang for lang in table().values() if any(map(lang.is_source, files))]
    if not found:
        known = ", ".join(pattern for lang in table().values() for pattern in lang.sources)
        raise SourceError(f"no source file of a known language ({known})")
    if len(found) > 1:
        names = ", ".join(lang.name for lang in found)
        raise SourceError(f"source files of several languages: {names}")
    return found[0]


def renamed(language: Language, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Files of a language that was named: a lone one is a source of it, whatever it is called."""
    if len(files) != 1 or any(map(language.is_source, files)):
        return files
    ((name, content),) = files.items()
    stem = name.rpartition(".")[0] or name
    return {stem + language.sources[0].removeprefix("*"): content}


def make_program(
    language: Language, files: Mapping[str, bytes], *, compile_memory: int, run_memory: int
) -> Program:
    """Fills the language's argv for these files; SourceError if there is no file to start with."""
    sources = sorted(filter(language.is_source, files))
    if not sources:
        raise SourceError(f"no {language.name} source file ({', '.join(language.sources)})")
    named = dict(files)
    words = {"binary": BINARY}
    if language.code == "java":
        named, sources, words["class"] = _java(named, sources)
    elif "{main}" in language.run or "{main}" in language.compile:
        words["main"] = "./" + _main(language, sources)
    # "./": no file name is taken for an option
    paths = ["./" + source for source in sources]
    mib = 1 << 20
    return Program(
        named,
        _fill(language.compile, {**words, "memory": str(max(1, compile_memory // mib))}, paths),
        _fill(language.collect, words, []),
        _fill(language.run, {**words, "memory": str(max(1, run_memory // mib))}, paths),
    )


def _fill(argv: tuple[str, ...], words: Mapping[str, str], sources: list[str]) -> list[str]:
    filled: list[str] = []
    for word in argv:
        if word == "{sources}":
            filled += sources
        else:
            for key, value in words.items():
                word = word.replace("{" + key + "}", value)
            filled.append(word)
    return filled


def _main(language: Language, sources: list[str]) -> str:
    if len(sources) == 1:
        return sources[0]
    for name in language.main:
        if name in sources:
            return name
    wanted = " or ".join(language.main)
    raise SourceError(f"{len(sources)} source files and none is called {wanted}")


# --- Java: the class to start, and the file name that javac insists on ---------------------------

# Every alternative takes what it began to the end of the text at the latest, so that no source
# makes the search quadratic.
_JAVA_NOISE = re.compile(r'/\*.*?(?:\*/|\Z)|//[^\n]*|"(?:\\.|[^"\\\n])*"?', re.DOTALL)
_JAVA_PACKAGE = re.compile(r"^[ \t]*package[ \t]+(\w+(?:\.\w+)*)[ \t]*;", re.MULTILINE)
_JAVA_CLASS = re.compile(r"\b(?:class|enum|record|interface)[ \t\n]+(\w+)")
_JAVA_PUBLIC = re.compile(
    r"\bpublic\s+(?:(?:final|abstract|sealed|strictfp)\s+){0,3}(?:class|enum|record|interface)\s+(\w+)"
)
_JAVA_START = re.compile(r"\bvoid\s{1,99}main\b")


def _java(files: dict[str, bytes], sources: list[str]) -> tuple[dict[str, bytes], list[str], str]:
    """The files (a lone one named after its public class), the sources and the class to start."""
    texts = {name: _java_code(files[name]) for name in sources}
    if len(sources) == 1:
        old = sources[0]
        public = _JAVA_PUBLIC.search(texts[old])
        if public:
            new = f"{public[1]}.java"
            files[new], texts = files.pop(old), {new: texts[old]}
            sources = [new]
    starts = [name for name, text in texts.items() if _JAVA_START.search(text)]
    best = [name for name in starts if name.rpartition("/")[2] == "Main.java"] or starts
    if len(best) != 1:
        problem = "several classes have" if best else "no class has"
        raise SourceError(f"{problem} a main method: put it into Main.java")
    return files, sources, _java_class(texts[best[0]], best[0])


def _java_class(text: str, name: str) -> str:
    """The class that holds main: Main, else the public one, else the file's first."""
    classes = _JAVA_CLASS.findall(text)
    public = _JAVA_PUBLIC.search(text)
    if "Main" in classes:
        chosen = "Main"
    elif public:
        chosen = public[1]
    else:
        chosen = classes[0] if classes else PurePosixPath(name).stem
    package = _JAVA_PACKAGE.search(text)
    return f"{package[1]}.{chosen}" if package else chosen


def _java_code(source: bytes) -> str:
    return _JAVA_NOISE.sub(" ", source.decode("utf-8", "replace"))


# --- what this machine has ------------------------------------------------------------------------


def check_available(language: Language, compiling: Policy, running: Policy) -> None:
    """HostError, with the line that installs it, if a sandbox would not find a tool."""
    for tool, policy in ((language.compile[0], compiling), (language.run[0], running)):
        if not tool.startswith("./") and not _visible(tool, policy):
            raise HostError(
                tool,
                f"{language.name} is not available on this machine: no {tool} in the sandbox",
                hint=f"apt-get install {language.install}",
            )


def _visible(tool: str, policy: Policy) -> bool:
    if policy.root.image:
        return True  # whether it is in there execve(2) says
    path = policy.environment.set.get("PATH", PATH)
    for folder in path.split(":"):
        found = _on_host(PurePosixPath(folder) / tool, policy)
        if found is None:
            continue
        if policy.root.source != "host":
            if os.path.lexists(found):  # links in there lead elsewhere in there
                return True
        elif os.access(found, os.X_OK) and _shown(os.path.realpath(found), policy):
            return True
    return False


def _on_host(inside: PurePosixPath, policy: Policy) -> str | None:
    """Where a path of the sandbox lies on this machine; None if a tmpfs is there."""
    mounts = sorted(policy.mounts, key=lambda mount: len(mount.target), reverse=True)
    for mount in mounts:
        if inside.is_relative_to(mount.target):
            if mount.type != "bind":
                return None
            return str((mount.source or mount.target) / inside.relative_to(mount.target))
    if policy.root.source == "host":
        return str(inside)
    return str(policy.root.source / inside.relative_to("/"))


def _shown(path: str, policy: Policy) -> bool:
    """Whether a sandbox whose root is the host's sees the file that lies here on the host."""
    places = ["/usr", "/bin", "/sbin", "/lib", "/lib64"]
    places += [mount.source or mount.target for mount in policy.mounts if mount.type == "bind"]
    return any(PurePosixPath(path).is_relative_to(place) for place in places)
