"""The table of languages: which one it is, what is compiled and run, what this machine has."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from sandboxd.errors import HostError
from sandboxd.judge.languages import (
    BINARY,
    Language,
    Program,
    check_available,
    detect,
    make_program,
    renamed,
    table,
)
from sandboxd.judge.submission import SourceError
from sandboxd.policy import Environment, Mount, Policy, Root

MIB = 1 << 20


def program(code: str, files: dict[str, str]) -> Program:
    named = {name: text.encode() for name, text in files.items()}
    return make_program(table()[code], named, compile_memory=1024 * MIB, run_memory=256 * MIB)


def test_the_table_is_whole() -> None:
    assert list(table()) == ["c", "cpp", "python3", "java", "rust", "go"]
    for language in table().values():
        words = " ".join((*language.compile, *language.run, *language.collect))
        for known in ("sources", "binary", "memory", "main", "class"):
            words = words.replace("{" + known + "}", "")
        assert "{" not in words
        assert language.sources
        assert language.install


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["a.c"], "c"),
        (["a.c", "a.h", "README"], "c"),
        (["a.cpp"], "cpp"),
        (["a.cc", "b.cxx"], "cpp"),
        (["a.C"], "cpp"),
        (["sub/a.py", "data.txt"], "python3"),
        (["Main.java"], "java"),
        (["main.rs"], "rust"),
        (["main.go"], "go"),
    ],
)
def test_detect(names: list[str], code: str) -> None:
    assert detect(dict.fromkeys(names, b"")).code == code


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no source file of a known language"),
        (["a.h"], "no source file of a known language"),
        (["a.py.txt", "py"], "no source file of a known language"),
        (["a.c", "b.cpp"], r"source files of several languages: C, C\+\+"),
    ],
)
def test_not_detected(names: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        detect(dict.fromkeys(names, b""))


def test_sources_are_never_options() -> None:
    files = {"-o.c": b"", "sub/@x.c": b"", "a.h": b""}
    made = make_program(table()["c"], files, compile_memory=MIB, run_memory=MIB)
    assert made.compile[-3:] == ["./-o.c", "./sub/@x.c", "-lm"]
    assert made.compile[made.compile.index("-o") + 1] == BINARY
    assert made.run == [f"./{BINARY}"]
    assert made.files == files


@pytest.mark.parametrize(
    ("names", "main"),
    [
        (["a.py"], "./a.py"),
        (["a.py", "main.py"], "./main.py"),
        (["__main__.py", "main.py"], "./__main__.py"),
    ],
)
def test_python(names: list[str], main: str) -> None:
    made = program("python3", dict.fromkeys(names, ""))
    assert made.run == ["python3", main]
    assert made.compile[-len(names) :] == [f"./{name}" for name in names]


def test_which_file_is_first_must_be_known() -> None:
    with pytest.raises(SourceError, match=r"2 source files and none is called __main__\.py or"):
        program("python3", {"a.py": "", "b.py": ""})
    with pytest.raises(SourceError, match=r"none is called main\.rs"):
        program("rust", {"a.rs": "", "b.rs": ""})


@pytest.mark.parametrize(
    ("code", "names", "after"),
    [
        ("cpp", ["a.c"], ["a.cpp"]),
        ("cpp", ["a.cc"], ["a.cc"]),
        ("c", ["submission"], ["submission.c"]),
        ("java", ["x.y.txt"], ["x.y.java"]),
        ("c", ["a.x", "b.x"], ["a.x", "b.x"]),
    ],
)
def test_a_lone_file_is_of_the_language_that_was_named(
    code: str, names: list[str], after: list[str]
) -> None:
    found = renamed(table()[code], dict.fromkeys(names, b"text"))
    assert (list(found), set(found.values())) == (after, {b"text"})


def test_a_language_that_was_named_needs_its_sources() -> None:
    with pytest.raises(SourceError, match=r"no Rust source file \(\*\.rs\)"):
        program("rust", {"a.c": ""})


MAIN = "public static void main(String[] args) { }"


@pytest.mark.parametrize(
    ("files", "names", "start"),
    [
        ({"Main.java": f"public class Main {{ {MAIN} }}"}, ["Main.java"], "Main"),
        ({"x.java": f"public class Main {{ {MAIN} }}"}, ["Main.java"], "Main"),
        ({"x.java": f"public final class Y {{ {MAIN} }}"}, ["Y.java"], "Y"),
        ({"x.java": f"class Node {{ }} class Main {{ {MAIN} }}"}, ["x.java"], "Main"),
        ({"x.java": f"class First {{ {MAIN} }} class Second {{ }}"}, ["x.java"], "First"),
        ({"x.java": f"// public class No\npublic class Y {{ {MAIN} }}"}, ["Y.java"], "Y"),
        ({"x.java": f'public class Y {{ String s = "class Main"; {MAIN} }}'}, ["Y.java"], "Y"),
        ({"x.java": f"package a.b;\npublic class Y {{ {MAIN} }}"}, ["Y.java"], "a.b.Y"),
        ({"x.java": f"/* package no; */ public enum Y {{ A; {MAIN} }}"}, ["Y.java"], "Y"),
        (
            {"A.java": "public class A { }", "B.java": f"public class B {{ {MAIN} }}"},
            ["A.java", "B.java"],
            "B",
        ),
        (
            {"A.java": f"public class A {{ {MAIN} }}", "Main.java": f"class Main {{ {MAIN} }}"},
            ["A.java", "Main.java"],
            "Main",
        ),
    ],
)
def test_java(files: dict[str, str], names: list[str], start: str) -> None:
    made = program("java", files)
    assert sorted(made.files) == names
    assert made.compile[-len(names) :] == [f"./{name}" for name in names]
    assert made.run[-1] == start
    assert "-Xmx256m" in made.run
    assert "-J-Xmx1024m" in made.compile


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"A.java": "class A { }"}, "no class has a main method"),
        (
            {"A.java": f"class A {{ {MAIN} }}", "B.java": f"class B {{ {MAIN} }}"},
            "several classes have a main method",
        ),
    ],
)
def test_java_without_a_start(files: dict[str, str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        program("java", files)


@pytest.mark.parametrize(
    "piece",
    ["/*", '"', '\\"', "//", "\n", " ", "public ", "public final ", "class ", "package ", "a.",
     "void ", "void\n", "public class", "package a."],
)  # fmt: skip
def test_hostile_java_is_read_in_linear_time(piece: str) -> None:
    source = (piece * (1_000_000 // len(piece))).encode()
    start = time.process_time()
    with pytest.raises(SourceError):
        make_program(table()["java"], {"A.java": source}, compile_memory=MIB, run_memory=MIB)
    assert time.process_time() - start < 5  # below 0.2 s here; quadratic: minutes


# --- what this machine has ------------------------------------------------------------------------


def made_of(tool: str) -> Language:
    return msgspec.structs.replace(
        table()["rust"], compile=(tool,), run=("./program",), install="rustc gcc"
    )


def test_a_tool_of_usr_is_there() -> None:
    check_available(made_of("env"), Policy(), Policy())


def test_a_missing_tool_names_the_line_that_installs_it() -> None:
    with pytest.raises(HostError, match="Rust is not available on this machine") as raised:
        check_available(made_of("no-such-compiler"), Policy(), Policy())
    assert raised.value.missing == "no-such-compiler"
    assert raised.value.hint == "apt-get install rustc gcc"


def tool_in(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tool = folder / "mycc"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    return tool


def with_path(path: str, **fields: object) -> Policy:
    return msgspec.structs.replace(Policy(environment=Environment(set={"PATH": path})), **fields)


def test_what_the_sandbox_does_not_see_is_missing(tmp_path: Path) -> None:
    tool_in(tmp_path)
    policy = with_path(str(tmp_path))
    with pytest.raises(HostError):
        check_available(made_of("mycc"), policy, policy)


def test_a_mount_is_seen(tmp_path: Path) -> None:
    tool_in(tmp_path / "bin")
    mounts = (Mount(target="/opt/my", source=str(tmp_path)),)
    check_available(made_of("mycc"), with_path("/opt/my/bin", mounts=mounts), Policy())


def test_a_link_out_of_what_is_mounted_is_not(tmp_path: Path) -> None:
    tool = tool_in(tmp_path / "home")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mycc").symlink_to(tool)
    mounts = (Mount(target="/opt", source=str(tmp_path / "bin")),)
    with pytest.raises(HostError):
        check_available(made_of("mycc"), with_path("/opt", mounts=mounts), Policy())


def test_a_root_of_its_own(tmp_path: Path) -> None:
    tool_in(tmp_path / "usr" / "bin")
    root = Root(source=str(tmp_path))
    check_available(made_of("mycc"), with_path("/bin:/usr/bin", root=root), Policy())
    with pytest.raises(HostError):
        check_available(made_of("gcc"), with_path("/usr/bin", root=root), Policy())


def test_a_tmpfs_hides(tmp_path: Path) -> None:
    mounts = (Mount(target="/usr/bin", type="tmpfs"),)
    with pytest.raises(HostError):
        check_available(made_of("env"), with_path("/usr/bin", mounts=mounts), Policy())
