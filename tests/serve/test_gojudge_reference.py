"""docs/reference/go-judge.md has every field, status and path, and none that is not there."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import msgspec
import pytest

from sandboxd.serve.gojudge import answers, wire

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs/reference/go-judge.md").read_text()
CELLS = {
    word
    for row in re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE)
    for word in re.findall(r"`([^`]+)`", row)
}
KINDS = (wire.Cmd, wire.CmdFile, wire.PipeMap, wire.Request, wire.CmdResult)
IGNORED = {"copyOutDir", "disableZeroCopy", "type"}


def fields(kind: type[msgspec.Struct]) -> set[str]:
    return {one.encode_name for one in msgspec.structs.fields(kind)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_row(kind: type[msgspec.Struct]) -> None:
    assert fields(kind) <= CELLS


def test_every_row_is_of_something() -> None:
    every = {name for kind in KINDS for name in fields(kind)}
    words = {*typing.get_args(wire.Word), *typing.get_args(wire.Fault)}
    paths = {cell for cell in CELLS if re.fullmatch(r"[A-Z]+ /\S+", cell)}
    assert paths == {
        *("POST /run", "GET /file", "POST /file", "GET /file/{id}", "DELETE /file/{id}"),
        *("GET /version", "GET /config", "GET /ws", "GET /stream"),
    }
    assert CELLS - paths == every | words | IGNORED


def test_every_status_of_ours_has_a_word_of_theirs() -> None:
    assert set(answers.WORDS.values()) | {"File Error"} == set(typing.get_args(wire.Word))
