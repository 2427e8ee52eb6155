"""docs/reference/go-judge.md has every field, status and path, and none that is not there."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import msgspec
import pytest

from sandboxd.policy import Policy, Resources
from sandboxd.serve.gojudge import answers, wire
from sandboxd.serve.gojudge.orders import Sources, orders
from sandboxd.serve.wire import Refusal
from sandboxd.supervise import policies

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


def test_a_request_may_not_leave_the_policys_cpus() -> None:
    policy = policies.find("go-judge")
    pinned = msgspec.structs.replace(policy, resources=Resources(cpuset="0-3,8"))
    sources = Sources(local=Path, stored=Path)
    for cpus, taken in (("0-3", True), ("8,1", True), ("4", False), ("0-8", False)):
        asked = wire.Request(cmd=[wire.Cmd(args=["true"], cpu_set_limit=cpus)])
        try:
            (order,) = orders(asked, pinned, sources).orders
        except Refusal as refusal:
            found = str(refusal)
        else:
            assert isinstance(order.job.policy, Policy)
            found = order.job.policy.resources.cpuset or ""
        assert found == (cpus if taken else "cmd[0]: cpuSetLimit: the policy allows 0-3,8")
