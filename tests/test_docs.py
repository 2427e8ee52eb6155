"""What the documentation says is so: blocks run, reference pages are complete, links lead on.

How README.md and docs/tutorial.md are run. Each page has a directory of its own, in which its
blocks are carried out in their order; `./do`, `sandboxd` and `python3` are this interpreter's.

- A block ```python NAME or ```toml NAME is saved under that name.
- A block ```python is a program. It must end well, and what a comment behind a print() announces
  must be a line of its output.
- In a block ```console, lines that begin with "$ " are given to one sh. What follows a command is
  what it prints, stdout and stderr together; a command without that must end well.

What is printed is compared as follows. "..." is any text within a line, and on a line of its own
any number of lines. Runs of blanks are equal. A number with a decimal point is equal to every
other one; all other numbers, so exit codes, counts and limits, are what they are. Two things differ
from machine to machine and are left out: lines "not enforced: ...", and where a peak of memory was
read.

All other kinds of blocks (```sh, ```) are for reading.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import sandboxd
from sandboxd import result
from sandboxd.cli import main
from sandboxd.compile.build import compile_policy
from sandboxd.errors import SandboxError
from sandboxd.host import CgroupSubtree, Host, IdRange
from sandboxd.job import File, Job, Pattern, Pipe, Tar, Terminal
from sandboxd.policy import Artifacts, Limits, Policy, Root
from sandboxd.script import machine

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PAGES = ("README.md", "docs/tutorial.md")
MARKDOWN = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")])

BLOCK = re.compile(r"^```(\w*)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "-- end of command --"


# -- the blocks run --------------------------------------------------------------------------------


def shims(place: Path) -> dict[str, str]:
    """The environment in which `./do` and the commands of a page are this checkout's."""
    example = re.search(r"^EXAMPLE='(.*)'$", (ROOT / "do").read_text(), re.MULTILINE)
    assert example is not None
    python = f"exec {sys.executable} -P"
    scripts = {
        "do": f"""\
            verb=$1
            shift
            case $verb in
            run) [ $# = 0 ] && set -- {example[1]} || set -- run "$@" ;;
            sandboxd) ;;
            python) {python} "$@" ;;
            *) echo "the shim has no $verb" >&2; exit 99 ;;
            esac
            {python} -m sandboxd "$@"
            """,
        "bin/sandboxd": f'{python} -m sandboxd "$@"\n',
        "bin/python3": f'exec {sys.executable} "$@"\n',
    }
    (place / "bin").mkdir()
    for name, script in scripts.items():
        (place / name).write_text("#!/bin/sh\n" + script)
        (place / name).chmod(0o755)
    (place / "examples").symlink_to(ROOT / "examples")
    found = f"{place}/bin:{os.environ['PATH']}"
    return {**os.environ, "PATH": found, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8",
            "SANDBOXD_BUILDS": f"{place}/builds"}  # fmt: skip


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block with the lines it should print."""
    command, printed = "", list[str]()
    for line in block.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, printed
            command, printed = line[2:], []
        else:
            printed.append(line)
    assert command, f"a console block without a command:\n{block}"
    yield command, printed


def comparable(lines: list[str]) -> list[str]:
    """Without what differs from machine to machine."""
    kept = [line for line in lines if not re.match(r"(sandboxd: )?not enforced: ", line)]
    return [re.sub(r"(MiB) \([^)]*\)", r"\1 (SOURCE)", line).rstrip() for line in kept]


def pattern(printed: list[str]) -> str:
    """A regular expression for what should be printed."""
    found = ""
    for line in comparable(printed):
        if line.strip() == "...":
            found += r"(?:.*\n)*?"
            continue
        pieces = re.split(r"(\.\.\.|\d+\.\d+|[ \t]+)", line)
        for piece in pieces:
            if piece == "...":
                found += ".*"
            elif re.fullmatch(r"\d+\.\d+", piece):
                found += r"\d+\.\d+"
            else:
                found += r"[ \t]+" if piece.isspace() else re.escape(piece)
        found += r"\n"
    return found


def run_console(block: str, place: Path, environment: dict[str, str]) -> None:
    wanted = list(commands(block))
    end = f"status=$?; printf '\\n%s %s\\n' '{MARK}' $status; (exit $status)\n"
    script = "exec 2>&1\n" + "".join(f"{command}\n{end}" for command, _ in wanted)
    done = subprocess.run(
        ["sh", "-c", script], cwd=place, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, text=True, errors="replace", timeout=55, check=False,
    )  # fmt: skip
    *pieces, rest = re.split(rf"\n{MARK} (\d+)\n", done.stdout)
    assert len(pieces) == 2 * len(wanted), f"it did not come to its end:\n{done.stdout}"
    assert not rest
    for (command, printed), output, status in zip(wanted, pieces[::2], pieces[1::2], strict=True):
        got = "".join(f"{line}\n" for line in comparable(output.splitlines()))
        if not (re.fullmatch(pattern(printed), got) if printed else status == "0"):
            shown = "\n".join(printed) or "(exit status 0)"
            pytest.fail(f"$ {command}\nshould print\n{shown}\nprinted\n{got}exit status {status}")


def run_python(block: str, place: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", block], cwd=place, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=55, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{block}\n{done.stderr}"
    announced = re.findall(r"^ *print\(.*\)  # (.+)$", block, re.MULTILINE)
    assert set(announced) <= set(done.stdout.splitlines()), f"{block}\n{done.stdout}"


@pytest.mark.needs("userns", "gcc", "g++")
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, tmp_path: Path) -> None:
    environment = shims(tmp_path)
    for kind, name, content in BLOCK.findall((ROOT / page).read_text()):
        if kind == "console":
            run_console(content, tmp_path, environment)
        elif name:
            (tmp_path / name).write_text(content)
        elif kind == "python":
            run_python(content, tmp_path, environment)


# -- the reference is complete ---------------------------------------------------------------------


def words(page: str) -> set[str]:
    """Everything in backticks, as it is and word by word."""
    found = set(re.findall(r"`([^`\n]+)`", (REFERENCE / page).read_text()))
    return found | {word for one in found for word in re.findall(r"\w+", one)}


def rows(page: str) -> set[str]:
    """What stands in backticks first in a row of a table."""
    return set(re.findall(r"^\| `([^`]+)` \|", (REFERENCE / page).read_text(), re.MULTILINE))


def missing(wanted: set[str], found: set[str]) -> list[str]:
    return sorted(wanted - found)


RECORDS = [
    one
    for _, one in inspect.getmembers(result, inspect.isclass)
    if issubclass(one, result.Record) and one is not result.Record
]


def test_every_status_is_in_the_reference() -> None:
    assert not missing({*typing.get_args(result.Status), "error"}, rows("result.md"))
    assert not missing({*typing.get_args(result.Fault)}, words("result.md"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_field_of_the_result_is_in_the_reference(record: type[msgspec.Struct]) -> None:
    assert not missing(set(record.__struct_fields__), words("result.md"))


def test_every_word_of_a_field_is_in_the_reference() -> None:
    choices = {
        word
        for record in RECORDS
        for kind in typing.get_type_hints(record).values()
        if typing.get_origin(kind) is typing.Literal
        for word in typing.get_args(kind)
    }
    assert not missing(choices, words("result.md"))


BARE = Host(
    arch="x86_64", kernel="0", uid=1000, gid=1000, cpus=2, seccomp=False, other_groups=True
)  # fmt: skip
RANGE = IdRange(start=100000, count=65536)
CONTROLLERS = frozenset({"memory", "pids", "cpu"})
FULL = Host(
    arch="x86_64", kernel="0", uid=1000, gid=1000, cpus=2, subuid=RANGE, subgid=RANGE,
    overlay=True, fuse_overlayfs="/usr/bin/fuse-overlayfs", landlock=6,
    cgroup=CgroupSubtree(path="/sys/fs/cgroup/x", controllers=CONTROLLERS),
)  # fmt: skip


def claims() -> Iterator[tuple[dict[str, str], tuple[tuple[str, str], ...]]]:
    """What is said to be in force, and what not, under all sorts of policies on two hosts."""
    every = msgspec.convert(dict.fromkeys(Limits.__struct_fields__, 4096), Limits)
    roots = [Root(), Root(writable=True), Root(writable=True, driver="tmpfs")]
    hidden = msgspec.structs.replace(BARE, hides_processes=True)
    for host in (BARE, hidden, FULL, msgspec.structs.replace(FULL, overlay=False)):
        for root in roots:
            for limits in (Limits(), Limits(memory=1), every):
                compiled = compile_policy(Policy(root=root, limits=limits), host)
                yield compiled.enforcement, compiled.degraded


def test_every_word_about_enforcement_is_in_the_reference() -> None:
    found = words("result.md")
    for enforcement, degraded in claims():
        said = {re.sub(r"^abi \d+$", "abi N", word) for word in enforcement.values()}
        assert not missing({*enforcement, *said, *(what for what, _ in degraded)}, found)


def errors() -> set[type[SandboxError]]:
    """Every error class of sandboxd, in whichever room."""
    for module in pkgutil.walk_packages(sandboxd.__path__, "sandboxd."):
        if not module.name.startswith(("sandboxd.__main__", "sandboxd.launch")):
            importlib.import_module(module.name)
    found, new = {SandboxError}, {SandboxError}
    while new:
        new = {below for one in new for below in one.__subclasses__()}
        found |= new
    return found


def test_every_error_is_in_the_reference() -> None:
    headings = set(re.findall(r"^## `(\w+)`", (REFERENCE / "errors.md").read_text(), re.MULTILINE))
    assert headings == {one.__name__ for one in errors()}


def test_every_public_name_is_in_the_reference() -> None:
    headings = set(re.findall(r"^##+ .*$", (REFERENCE / "api.md").read_text(), re.MULTILINE))
    named = {word for line in headings for word in re.findall(r"`(\w+)", line)}
    assert not missing(set(sandboxd.__all__), named)


def members(kind: type) -> set[str]:
    fields = getattr(kind, "__struct_fields__", ()) or getattr(kind, "__dataclass_fields__", ())
    return {name for name in (*vars(kind), *fields) if not name.startswith("_")}


@pytest.mark.parametrize(
    "kind",
    [
        *(Job, File, Tar, Pattern, Pipe, Artifacts, Terminal, sandboxd.OpenArtifact),
        *(sandboxd.Run, sandboxd.Pipeline, sandboxd.Runner, sandboxd.RunnerStatistics),
        *(sandboxd.Group, sandboxd.Member, sandboxd.GroupRun),
        *(sandboxd.Client, sandboxd.ClientRun, sandboxd.ClientGroup, sandboxd.ClientPipeline),
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_member_is_in_the_reference(kind: type) -> None:
    assert not missing(members(kind), words("api.md"))


def test_every_parameter_is_in_the_reference() -> None:
    found = words("api.md")
    for function in (
        sandboxd.run,
        sandboxd.run_sync,
        sandboxd.open_runner,
        sandboxd.find_policy,
        sandboxd.connect,
    ):
        assert not missing(set(inspect.signature(function).parameters), found)


def test_every_subcommand_is_in_the_reference() -> None:
    page = (REFERENCE / "cli.md").read_text()
    for name in main.COMMANDS:
        assert f"\n## sandboxd {name}\n" in page
    _, below = main.command_parser("policy")
    for action in below.choices["policy"]._actions:
        for name in action.choices or () if action.dest.startswith("command") else ():
            assert re.search(rf"sandboxd policy .*\b{name}\b", page), name


def test_the_size_of_the_machine_is_the_one_in_the_text() -> None:
    size = f"{len(machine.code('x86_64'))} bytes"
    assert size in (DOCS / "explanation/architecture.md").read_text()
    assert size in (DOCS / "explanation/security.md").read_text()


# -- links -----------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "code", BLOCK.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """The names of its headings, as GitHub and others make them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^()\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def test_every_page_is_found_from_the_readme() -> None:
    linked = re.findall(r"\]\((docs/[^()\s#]+)", prose(ROOT / "README.md"))
    pages = {page.relative_to(ROOT).as_posix() for page in DOCS.rglob("*.md")}
    assert not missing(pages, set(linked))
