"""The command line as a whole: what it says when misused or broken, and what starting costs."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from sandboxd.cli import main
from sandboxd.errors import (
    HostError,
    InternalError,
    JobError,
    LaunchError,
    PolicyError,
    PolicyErrors,
)

SANDBOXD = [sys.executable, "-P", "-m", "sandboxd"]
MEANT = "sandboxd: did you mean --memory?"


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SANDBOXD, *words], capture_output=True, text=True, check=False)


def test_help_names_every_command() -> None:
    done = command("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for name, line in main.COMMANDS.items():
        assert name in done.stdout
        assert line in done.stdout


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_command_repeats_its_line_and_has_an_example(name: str) -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    importlib.import_module(f"sandboxd.cli.{name}").register(commands)
    assert list(commands.choices) == [name]
    assert main.COMMANDS[name] in parser.format_help()
    assert f"sandboxd {name}" in (commands.choices[name].epilog or "")


def test_version() -> None:
    done = command("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[0] == "sandboxd"
    assert done.stdout.split()[1][0].isdigit()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "sandboxd: no such command: rnu\nsandboxd: did you mean run?\n"),
        (["/bin/true"], "sandboxd: no such command: /bin/true\nsandboxd: `sandboxd --help` lists"),
        (["run", "--memroy", "1G", "true"], f"--memroy\n{MEANT}"),
        (["run", "--memroy=1G", "true"], f"--memroy\n{MEANT}"),
        (["run", "-X", "true"], "run: no such flag: -X"),
        (["doctor", "now"], "doctor: unexpected now\nsandboxd: `sandboxd doctor --help` lists"),
        (["run", "-m", "x", "true"], "argument -m/--memory: 'x' is not a size"),
        (["--nonsense"], "no such flag: --nonsense\nsandboxd: `sandboxd --help` lists"),
        (["--versoin"], "no such flag: --versoin\nsandboxd: did you mean --version?"),
        (["policy", "lst"], "invalid choice: 'lst' (choose from"),
        (["policy", "lst"], "; did you mean list?"),
        (["policy", "list", "--jsn"], "policy list: no such flag: --jsn\nsandboxd: `sandboxd pol"),
        (["policy", "check", "--verfy", "x"], "--verfy\nsandboxd: did you mean --verify?"),
        (["judge", "--al", "x", "y"], "--al\nsandboxd: did you mean --all?"),
        ([], "the following arguments are required: COMMAND"),
        (["r\x1b[1m"], "no such command: r\\x1b[1m"),
        (["\udcff"], "no such command: \\xff"),
    ],
)  # fmt: skip
def test_wrong_usage(words: list[str], said: str) -> None:
    done = command(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.parametrize(
    ("words", "status"), [(["run"], 125), (["run", "--"], 125), (["plan"], 1), (["plan", "--"], 1)]
)
def test_no_program(words: list[str], status: int) -> None:
    done = command(*words)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("sandboxd: no program to run\nsandboxd:   name one: sandboxd run")


# -- what went wrong -------------------------------------------------------------------------

TWO = PolicyErrors((PolicyError("a", "one", hint="do this"), PolicyError("b", "two")))


@pytest.mark.parametrize(
    ("error", "status", "elsewhere", "said"),
    [
        (JobError("bad", hint="better"), 125, 1, "sandboxd: bad\nsandboxd:   better\n"),
        (PolicyError("a.toml: x", "bad"), 125, 1, "sandboxd: a.toml: x: bad\n"),
        (TWO, 125, 1, "sandboxd: a: one\nsandboxd:   do this\nsandboxd: b: two\n"),
        (HostError("x", "lacks x"), 125, 125, "sandboxd: lacks x\n"),
        (LaunchError("bind", 7, 2, "/a"), 125, 125, "sandboxd: bind: step 7 /a: No such file"),
        (InternalError("oh"), 125, 125, "sandboxd: oh\n"),
        (JobError("a\x1b[2J\rb"), 125, 1, "sandboxd: a\\x1b[2J\\x0db\n"),
        (ExceptionGroup("g", [ExceptionGroup("h", [JobError("in")])]), 125, 1, "sandboxd: in\n"),
        (ExceptionGroup("g", [OSError("x"), JobError("in")]), 125, 1, "sandboxd: in\n"),
        (ZeroDivisionError("x"), 125, 125, "this is a bug in sandboxd: please report it"),
        (KeyboardInterrupt(), 130, 130, ""),
        (BaseExceptionGroup("g", [KeyboardInterrupt()]), 130, 130, ""),
        (BrokenPipeError(), 141, 141, ""),
    ],
)
def test_errors(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    elsewhere: int,
    said: str,
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise error

    for name, wanted in (("run", status), ("plan", elsewhere)):
        monkeypatch.setitem(sys.modules, f"sandboxd.cli.{name}", pretended(name, fail))
        assert main.main([name]) == wanted
        assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (JobError("bad", hint="better"), "job", "bad"),
        (PolicyError("a.toml: x", "bad"), "policy", "a.toml: x: bad"),
        (ExceptionGroup("g", [HostError("x", "lacks x")]), "host", "lacks x"),
        (ZeroDivisionError("x"), "internal", "ZeroDivisionError: x"),
    ],
)
def test_errors_as_json(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    kind: str,
    said: str,
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setitem(sys.modules, "sandboxd.cli.plan", pretended("plan", fail))
    assert main.main(["plan", "--json"]) != 0
    record = json.loads(capfd.readouterr().out)
    assert (record["schema"], record["status"]) == ("sandboxd.error/1", "error")
    assert (record["error"]["kind"], record["error"]["message"]) == (kind, said)
    main.main(["plan"])
    assert capfd.readouterr().out == ""


def pretended(name: str, func: Callable[[argparse.Namespace], int]) -> ModuleType:
    """A module of a command that does this."""
    module = ModuleType(name)

    def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        parser = commands.add_parser(name)
        parser.add_argument("--json", action="store_true")
        parser.set_defaults(func=func)

    module.register = register  # type: ignore[attr-defined]
    return module


def test_a_reader_who_went_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*SANDBOXD, "--help"], stdout=writer, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writer)
    assert done.stderr == b""


@pytest.mark.parametrize("words", [["list"], ["explain", "base"], ["schema"]])
def test_a_full_disk(words: list[str]) -> None:
    """What fits into a buffer, and what does not."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*SANDBOXD, "policy", *words], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 125
    assert done.stderr == b"sandboxd: output cannot be written: No space left on device\n"


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    script = 'cd "$0"; rmdir "$0"; exec "$@" run -v ./x:/x true'
    done = subprocess.run(
        ["/bin/sh", "-c", script, str(tmp_path / "here"), *SANDBOXD],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 125
    assert done.stderr.endswith(
        "sandboxd: the directory that this is typed in is gone\nsandboxd:   cd to another\n"
    )


def test_descriptors_that_are_closed() -> None:
    """What opened first would be number 0, 1 or 2, and be taken for ours."""
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" <&- >&- 2>&-', "sh", *SANDBOXD, "--version"], check=False
    )
    assert done.returncode == 0


def test_a_locale_that_knows_no_other_characters() -> None:
    env = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*SANDBOXD, "caf\u00e9"], capture_output=True, env=env, check=False)
    assert done.returncode == 2
    assert b"no such command: caf" in done.stderr


# -- what starting costs ---------------------------------------------------------------------

HEAVY = ("trio", "asyncio", "msgspec", "ctypes", "sandboxd.supervise", "sandboxd.judge.judge")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["nonsense"]])
def test_what_is_not_needed_is_not_loaded(words: list[str]) -> None:
    script = (
        "import sys; from sandboxd.cli.main import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: pass\n"
        f"print(*(one for one in {HEAVY!r} if one in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == ""


NOT_FOR_ONE_RUN = {
    *("asyncio", "dataclasses", "difflib", "email", "h11", "importlib.metadata", "pyseccomp"),
    *("secrets", "sqlite3", "unittest", "wsproto", "yaml"),
    *("sandboxd.images", "sandboxd.judge", "sandboxd.serve", "sandboxd.stores.builds"),
    *(f"sandboxd.compile.{one}" for one in ("dns", "nftables", "oci", "places", "explain")),
    *(f"sandboxd.supervise.{one}" for one in ("builds", "groups", "keeping", "netkeeper")),
    *(f"sandboxd.supervise.{one}" for one in ("pipeline", "planning", "porter", "resolver")),
}


@pytest.mark.needs("userns")
def test_one_run_loads_only_what_it_uses() -> None:
    command = [sys.executable, "-P", "-X", "importtime", "-m", "sandboxd", "run", "-q"]
    subprocess.run(
        [*command, "--", "true"], capture_output=True, check=True
    )  # looks at the machine
    done = subprocess.run([*command, "--", "true"], capture_output=True, text=True, check=True)
    loaded = set(re.findall(r"\| +(\S+)$", done.stderr, re.MULTILINE))
    assert "sandboxd.supervise.tenants" in loaded
    assert NOT_FOR_ONE_RUN & loaded == set()


def test_starting_is_quick() -> None:
    """In processor time, so that a busy machine does not matter, and next to what trio takes."""

    def cost(*argv: str) -> float:
        before = os.times()
        subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        return (
            after.children_user
            + after.children_system
            - (before.children_user + before.children_system)
        )

    bare = min(cost(sys.executable, "-c", "pass") for _ in range(5))
    ours = min(cost(*SANDBOXD, "--help") for _ in range(5))
    heavy = min(cost(sys.executable, "-c", "import trio, msgspec") for _ in range(5))
    assert ours - bare < (heavy - bare) / 2
