"""`syscalls.oci` in policy files: read from beside them, in place of all the lists."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from sandboxd.compile.explain import explain
from sandboxd.compile.load import digest, load
from sandboxd.compile.render import render
from sandboxd.errors import PolicyErrors
from sandboxd.policy import Attached
from sandboxd.supervise.policies import LONGEST_PROFILE, find
from tests.compile.profiles import DIALECT, PROFILES

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "p.json").write_text(json.dumps(DIALECT))
    return tmp_path


def write(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.toml").write_text(text)
    return str(folder / f"{name}.toml")


def errors(file: str) -> list[str]:
    with pytest.raises(PolicyErrors) as caught:
        find(file)
    return [str(one) for one in caught.value.errors]


OCI = 'extends = "base"\nsyscalls.oci = "profiles/p.json"\n'


def test_a_profile_lies_beside_the_file_that_names_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, "one", OCI)
    monkeypatch.chdir(folder / "profiles")
    found = find("../one.toml")
    assert isinstance(found.syscalls, Attached)
    assert json.loads(found.syscalls.profile) == DIALECT
    assert found.syscalls.oci == str(folder / "profiles" / "p.json")
    assert found.origin("syscalls.oci") == "../one.toml: syscalls.oci"


def test_it_is_inherited_from_where_it_was_named(folder: Path, tmp_path: Path) -> None:
    write(folder, "one", OCI)
    below = tmp_path / "below"
    below.mkdir()
    child = find(write(below, "two", 'extends = "../one.toml"\nlimits.processes = 3\n'))
    assert child.syscalls.oci == str(folder / "profiles" / "p.json")
    assert child.limits.processes == 3


def test_lists_of_parents_no_longer_count(folder: Path) -> None:
    """The same policy whatever its parent says on system calls; and a child may go back to them."""
    one = find(write(folder, "one", OCI))
    write(folder, "lists", 'extends = "base"\nsyscalls.kill = ["ptrace"]\n')
    two = find(write(folder, "two", 'extends = "lists"\nsyscalls.oci = "profiles/p.json"\n'))
    assert one.syscalls == two.syscalls
    back = find(write(folder, "back", 'extends = "one.toml"\nsyscalls = {oci = "", deny = []}\n'))
    assert type(back.syscalls) is not Attached
    assert "@base" in back.syscalls.allow


def test_lists_beside_a_profile_are_errors(folder: Path) -> None:
    file = write(folder, "one", 'syscalls.oci = "profiles/p.json"\nsyscalls.kill = ["ptrace"]\n')
    found = errors(file)
    assert found == [
        f"{file}:2: syscalls.kill: a profile decides on system calls, not this"
        ' (leave it out, or write oci = "" in [syscalls])'
    ]
    write(folder, "two", OCI)
    child = write(folder, "three", 'extends = "two.toml"\nsyscalls.abi32 = "allow"\n')
    assert "syscalls.abi32: a profile decides" in errors(child)[0]


def test_errors_name_the_policy_or_the_profile_and_the_place(folder: Path) -> None:
    profile = folder / "profiles" / "p.json"
    file = write(folder, "one", OCI)
    profile.write_text('{"defaultAction": "SCMP_ACT_NOTIFY"}')
    assert errors(file)[0].startswith(f"{profile}: defaultAction: there is nobody to be asked")
    profile.write_text("{")
    assert errors(file)[0].startswith(f"{profile}:1:2: not JSON: ")
    profile.write_bytes(b"\xff")
    assert errors(file)[0].startswith(f"{file}:2: syscalls.oci: {profile}:1: not UTF-8")
    profile.write_bytes(b" " * (LONGEST_PROFILE + 1))
    assert "more than 1048576 bytes: this is no profile" in errors(file)[0]
    profile.unlink()
    assert "cannot be read: No such file or directory" in errors(file)[0]


def test_a_reader_of_policies_alone_says_so() -> None:
    with pytest.raises(PolicyErrors, match=r"^p.toml:1: syscalls.oci: no profile can be read here"):
        load("p", lambda _: ("p.toml", 'syscalls.oci = "p.json"'))


def test_it_is_shown_and_explained(folder: Path) -> None:
    policy = find(write(folder, "one", OCI))
    text = render(policy)
    assert f'oci = "{folder}/profiles/p.json"' in text
    assert "allow =" not in text.partition("[syscalls]")[2].partition("[identity]")[0]
    (folder / "again").mkdir()
    assert digest(find(write(folder / "again", "one", text))) == digest(policy)
    rows = {row.key: row for row in explain(policy)}
    assert [key for key in rows if key.startswith("syscalls.")] == ["syscalls.oci"]
    assert "@guards" in rows["syscalls.oci"].meaning


def test_what_the_profile_says_counts_in_the_digest(folder: Path) -> None:
    before = digest(find(write(folder, "one", OCI)))
    (folder / "profiles" / "p.json").write_text(json.dumps(PROFILES["denying"]))
    assert digest(find(str(folder / "one.toml"))) != before


def test_whatever_a_profile_is_it_is_parsed_or_refused() -> None:
    runpy.run_path(str(ROOT / "fuzz" / "oci.py"))["fuzz"](200)
