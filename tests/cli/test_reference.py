"""docs/reference/cli.md names every command, flag and exit code, and no flag that is not there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.cli import exitcodes, main

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs/reference/cli.md").read_text()
SECTIONS = {part.split("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)}
COMMON = {"-h", "--help"}
FLAG = re.compile(r"`(--?[a-z][a-z-]*(?:=stream)?)")


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of the commands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


def flags(name: str) -> set[str]:
    _, commands = main.command_parser(name)
    every = (action for one in parsers(commands.choices[name]) for action in one._actions)
    return {word for action in every for word in action.option_strings} - COMMON


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_flag_is_there(name: str) -> None:
    section = SECTIONS[f"sandboxd {name}"]
    if name in ("plan", "build"):  # they take those of run
        section += SECTIONS["sandboxd run"]
    named = {*FLAG.findall(section), *re.findall(r"(?<=[`/ ,])-\w\b", section)}
    assert flags(name) - named == set()


@pytest.mark.parametrize("name", main.COMMANDS)
def test_no_flag_is_made_up(name: str) -> None:
    rows = [line for line in SECTIONS[f"sandboxd {name}"].splitlines() if line.startswith("| `-")]
    named = {flag for line in rows for flag in FLAG.findall(line.split("|")[1])}
    assert named - flags(name) == set()


def test_every_exit_code_is_there() -> None:
    names = [name for name in vars(exitcodes) if re.fullmatch("[A-Z][A-Z_]*", name)]
    codes = {getattr(exitcodes, name) for name in names if name != "TYPE_CHECKING"}
    rows = re.findall(r"^\| (\d+) ", SECTIONS["sandboxd run"], flags=re.MULTILINE)
    assert codes - {0, exitcodes.SIGNAL} <= set(map(int, rows))
