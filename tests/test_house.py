"""The rules of the house, asked of the source: who may import whom, what is pure, how long is long.

The picture they keep true is in docs/explanation/architecture.md.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sandboxd"

VALUES = frozenset(
    {
        *("errors", "units", "kernel", "policy", "reference", "job", "group", "host", "image"),
        *("plan", "messages", "result"),
    }
)

# Room or value -> what of ours it may import, apart from itself.
INSIDE: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "units": frozenset(),
    "kernel": frozenset(),
    "plan": frozenset({"kernel", "errors"}),
    "messages": frozenset({"errors", "plan"}),
    "policy": frozenset({"errors"}),
    "reference": frozenset({"errors"}),
    "job": frozenset({"errors", "policy", "reference"}),
    "group": frozenset({"errors", "job"}),
    "image": frozenset(),
    "host": frozenset({"errors", "image", "policy", "reference"}),
    "result": frozenset({"errors", "policy"}),
    "linux": frozenset({"errors"}),
    "cgroup": frozenset({"errors", "host", "linux"}),
    "compile": VALUES,
    "script": frozenset({"errors", "plan", "messages"}),
    "launch": frozenset({"script.record", "images.tar", "linux"}),
    "stores": VALUES,
    "images": VALUES | {"script.command", "linux", "stores.folders"},
    "probe": VALUES | {"cgroup", "compile", "script.numbers", "linux"},
    "supervise": VALUES | {"cgroup", "compile", "probe", "script", "stores", "images", "linux"},
    "judge": VALUES | {"supervise"},
    "serve": VALUES | {"supervise"},
    "cli": VALUES | {"compile", "probe", "stores", "images", "supervise", "judge", "serve"},
    "__main__": frozenset({"cli"}),
    "__init__": VALUES | {"compile", "supervise", "judge", "serve"},
}

# Room or value -> the libraries it may import on top of the standard one.
OUTSIDE: dict[str, frozenset[str]] = {
    **dict.fromkeys(VALUES, frozenset({"msgspec"})),
    "errors": frozenset(),
    "compile": frozenset({"msgspec", "pyseccomp", "seccomp"}),
    "script": frozenset({"msgspec"}),
    "stores": frozenset({"msgspec"}),
    "images": frozenset({"msgspec"}),  # and zstd where it is installed, by name
    "cgroup": frozenset({"jeepney", "msgspec", "trio"}),
    "probe": frozenset({"msgspec"}),
    "supervise": frozenset({"msgspec", "trio"}),
    "judge": frozenset({"msgspec", "trio", "yaml"}),
    "serve": frozenset({"h11", "msgspec", "trio", "wsproto"}),
    "cli": frozenset({"msgspec", "trio"}),
}

# Only inside of a function or for the type checker: starting up must not cost what is not used.
LATE: dict[str, frozenset[str]] = {
    "cli": frozenset({"probe", "stores", "images", "supervise", "judge", "serve", "trio"}),
    "__init__": VALUES | {"compile", "supervise", "judge", "serve"},
}

ONLY_IN: dict[str, frozenset[str]] = {"ctypes": frozenset({"linux"})}
NOWHERE = frozenset({"asyncio", "atexit", "marshal", "multiprocessing", "pickle", "shelve"})

# What a room without I/O, clock or chance has no use for.
IMPURE = frozenset(
    {
        *("asyncio", "fcntl", "fileinput", "ftplib", "glob", "http", "importlib", "io", "logging"),
        *("mmap", "multiprocessing", "os", "pathlib", "pty", "resource", "select", "selectors"),
        *("shutil", "signal", "socket", "sqlite3", "subprocess", "sys", "tempfile", "termios"),
        *("threading", "urllib"),
        *("datetime", "platform", "random", "secrets", "time", "uuid"),
    }
)
IMPURE_CALLS = frozenset({"open", "print", "input", "breakpoint", "exec", "eval"})
PURE_ROOMS = VALUES | {"compile", "script"}
PURE_FILES = {
    f"serve/{one}.py"
    for one in (
        *("api", "ensemble", "manifold", "metrics", "share", "swift", "views", "wire"),
        "gojudge/wire",
    )
}
ALLOWED = {
    "errors.py": {"os"},  # os.strerror
    "job.py": {"os", "pathlib"},  # types: what a caller may hand over
    "policy.py": {"pathlib"},
    "script/command.py": {"sys"},  # sys.executable: with which interpreter
    "serve/swift.py": {"http"},  # names of statuses
    "serve/wire.py": {"http", "os", "pathlib"},  # names of statuses, os.fsencode, types
    "compile/build.py": {"os"},  # os.fsencode: text of callers is bytes to the kernel
    "compile/seccomp.py": {"os"},  # libseccomp exports a filter only into a descriptor: a memfd
}

MOST_LINES = 500
MOST_LINES_OF_A_FUNCTION = 60
MOST_PARAMETERS = 6
MANY_PARAMETERS = {
    *("run", "run_sync"),  # the public entrances, as in trio and subprocess
    *("emit", "write_file"),  # the fields of a record, by keyword
}

NOT_NAMES = frozenset(
    {
        *("container", "jail", "context", "manager", "profile", "grandchild"),
        *("helper", "helpers", "util", "utils"),
    }
)
LATER = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")


@dataclass(frozen=True)
class Import:
    """One imported module; `late` if it is loaded in a function or never."""

    module: str
    line: int
    late: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def ours(self) -> str | None:
        """The path below sandboxd, e.g. `script.record`; None for other people's modules."""
        return self.module.partition(".")[2] if self.top == "sandboxd" else None


def sources(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if not path.relative_to(ROOT).parts[1].startswith("."))


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(path: Path) -> str:
    """The folder of sandboxd, or for a file at the top its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk_imports(node: ast.AST, late: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, late)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            if module == "sandboxd":
                for alias in child.names:
                    yield Import(f"sandboxd.{alias.name}", child.lineno, late)
            else:
                yield Import(module, child.lineno, late)
        inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from walk_imports(child, late or inner or is_for_types(child))


def imports(path: Path) -> list[Import]:
    return list(walk_imports(parsed(path)))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def at(path: Path, line: int, text: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {text}"


def is_within(module: str, allowed: frozenset[str]) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in allowed)


def check(wrong: list[str]) -> None:
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def test_every_file_is_in_a_known_room() -> None:
    check([at(path, 1, "no such room") for path in sources("sandboxd") if room(path) not in INSIDE])


def test_imports_go_down() -> None:
    check(
        [
            at(path, found.line, f"{room(path)} must not import {found.module}")
            for path in sources("sandboxd")
            for found in imports(path)
            if found.ours is not None
            and found.ours  # the package itself: its version
            and not is_within(found.ours, INSIDE[room(path)] | {room(path)})
        ]
    )


def test_imports_are_absolute() -> None:
    check(
        [
            at(path, found.line, f"relative import {found.module}")
            for path in sources("sandboxd", "tests", "fuzz")
            for found in imports(path)
            if found.module.startswith(".")
        ]
    )


def test_libraries_stay_in_their_rooms() -> None:
    check(
        [
            at(path, found.line, f"{room(path)} must not import {found.module}")
            for path in sources("sandboxd")
            for found in imports(path)
            if found.ours is None
            and found.top not in sys.stdlib_module_names
            and found.top not in OUTSIDE.get(room(path), frozenset())
        ]
    )


def test_what_is_slow_to_import_is_imported_late() -> None:
    check(
        [
            at(path, found.line, f"import {found.module} inside of the function that needs it")
            for path in sources("sandboxd")
            for found in imports(path)
            if not found.late
            and is_within(found.ours or found.top, LATE.get(room(path), frozenset()))
        ]
    )


def test_some_modules_have_one_room_and_some_none() -> None:
    check(
        [
            at(path, found.line, f"{found.module} has no place in {room(path)}")
            for path in sources("sandboxd")
            for found in imports(path)
            if found.top in NOWHERE or room(path) not in ONLY_IN.get(found.top, {room(path)})
        ]
    )


def test_compile_script_and_values_do_no_io() -> None:
    pure = [
        path for path in sources("sandboxd") if room(path) in PURE_ROOMS or name(path) in PURE_FILES
    ]
    check(
        [
            at(path, found.line, f"{found.module} in a room without I/O")
            for path in pure
            for found in imports(path)
            if found.top in IMPURE - ALLOWED.get(name(path), set())
        ]
        + [
            at(path, node.lineno, f"{ast.unparse(node.func)}() in a room without I/O")
            for path in pure
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in IMPURE_CALLS
        ]
    )


def loaded_by(modules: list[str]) -> set[str]:
    """What a fresh interpreter has in sys.modules after importing these."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True\n"
        f"site = {[path for path in sys.path if 'site-packages' in path]!r}\n"
        "sys.path += [path for path in site if path not in sys.path]\n"
        "before = set(sys.modules)\n"
        f"for module in {modules!r}: __import__(module)\n"
        "print(*(set(sys.modules) - before))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def modules_of(*files: str) -> list[str]:
    found = (path for pattern in files for path in PACKAGE.glob(pattern))
    dotted = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(found))
    return [one.removesuffix(".__init__") for one in dotted]


@pytest.mark.parametrize("folder", ["launch", "linux"])
def test_these_rooms_load_only_the_standard_library(folder: str) -> None:
    tops = {one.partition(".")[0] for one in loaded_by(modules_of(f"{folder}/*.py"))}
    assert tops <= sys.stdlib_module_names | {"sandboxd"}


def test_the_package_itself_loads_nothing() -> None:
    ours = {one for one in loaded_by(["sandboxd"]) if is_within(one, frozenset({"sandboxd"}))}
    assert ours == {"sandboxd"}


def test_the_command_line_starts_without_what_it_may_not_need() -> None:
    heavy = {
        "asyncio",
        "h11",
        "pyroute2",
        "trio",
        "sandboxd.images",
        "sandboxd.judge",
        "sandboxd.stores",
        "sandboxd.supervise",
        "sandboxd.serve",
    }
    assert not heavy & loaded_by(modules_of("cli/main.py"))


def test_the_daemon_has_loaded_what_runs_may_need() -> None:
    """Else its first group waits, and files replaced under it become half of what it is."""
    rooms = {"cgroup", "compile", "images", "linux", "probe", "script", "stores", "supervise"}
    names = {
        one
        for path in sources("sandboxd")
        if room(path) in rooms
        for function in functions(path)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and node.module
        for one in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    }
    wanted = names & set(modules_of("*/*.py"))
    assert "sandboxd.supervise.groups" in wanted
    assert not wanted - loaded_by(["sandboxd.serve.server"])


def test_files_are_short() -> None:
    check(
        [
            at(path, lines, f"{lines} lines, more than {MOST_LINES}")
            for path in sources("sandboxd", "tests", "fuzz")
            if (lines := len(path.read_text().splitlines())) > MOST_LINES
        ]
    )


def test_functions_are_short() -> None:
    check(
        [
            at(
                path,
                node.lineno,
                f"{node.name} has {lines} lines, more than {MOST_LINES_OF_A_FUNCTION}",
            )
            for path in sources("sandboxd", "tests", "fuzz")
            for node in functions(path)
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
        ]
    )


def test_functions_take_few_parameters() -> None:
    wrong = []
    for path in sources("sandboxd"):
        for node in functions(path):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([one for one in every if one.arg not in {"self", "cls"}])
            if count > MOST_PARAMETERS and node.name not in MANY_PARAMETERS:
                wrong.append(at(path, node.lineno, f"{node.name} takes {count} parameters"))
    check(wrong)


def test_names_are_those_of_the_glossary() -> None:
    wrong = []
    for path in sources("sandboxd"):
        names = [(1, path.stem)] + [
            (node.lineno, node.name)
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        wrong += [
            at(path, line, f"{one}: see the glossary")
            for line, one in names
            if NOT_NAMES & {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", one)}
        ]
    check(wrong)


def test_ownership_is_explicit() -> None:
    wrong = []
    for path in sources("sandboxd"):
        wrong += [
            at(path, node.lineno, "no __del__: one owner, one `with`")
            for node in functions(path)
            if node.name == "__del__"
        ]
        wrong += [
            at(path, node.lineno, "no module-level mutable state")
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Global)
        ]
    check(wrong)


def test_every_file_says_what_it_is_for() -> None:
    check(
        [
            at(path, 1, "no docstring")
            for path in sources("sandboxd", "tests", "fuzz")
            if parsed(path).body and not ast.get_docstring(parsed(path))
        ]
    )


def test_fuzz_files_state_their_invariant_in_line_one() -> None:
    check(
        [
            at(path, 1, "the invariant belongs here")
            for path in sources("fuzz")
            if not path.read_text().startswith(('"""', "# "))
        ]
    )


def test_nothing_is_left_for_later() -> None:
    files = sources("sandboxd", "tests", "fuzz")
    for pattern in ("*.md", "*.toml", "do", ".ci/*", "docs/**/*.md", "policies/*.toml"):
        files += ROOT.glob(pattern)
    check(
        [
            at(path, number, line.strip())
            for path in files
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if LATER.search(line)
        ]
    )
