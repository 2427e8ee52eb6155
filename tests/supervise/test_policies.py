"""Which file a name stands for, and what the policies that come with sandboxd must say."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandboxd.compile.load import tighten
from sandboxd.compile.syscalls import members
from sandboxd.errors import PolicyError, PolicyErrors
from sandboxd.policy import Limits, Policy
from sandboxd.supervise import policies
from sandboxd.supervise.policies import available, find

pytestmark = pytest.mark.root_ok

NAMES = [
    *(
        "agent",
        "base",
        "bundle",
        "ci",
        "compile",
        "go-judge",
        "judge-java",
        "judge-native",
        "judge-python",
        "shell",
    )
]


@pytest.fixture(autouse=True)
def no_policies_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nothing"))
    monkeypatch.delenv("SANDBOXD_POLICY_PATH", raising=False)
    monkeypatch.setattr(policies, "SYSTEM", tmp_path / "nothing")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """One directory of each kind, the first first."""
    found = {name: tmp_path / name for name in ("first", "second", "config", "system")}
    found["own"] = found["config"] / "sandboxd" / "policies"
    for one in found.values():
        one.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("SANDBOXD_POLICY_PATH", f"{found['first']}:{found['second']}:")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(found["config"]))
    monkeypatch.setattr(policies, "SYSTEM", found["system"])
    return found


def write(place: Path, text: str, name: str = "mine") -> Path:
    file = place / f"{name}.toml"
    file.write_text(text)
    return file


# -- the search


def test_places_are_searched_in_order(places: dict[str, Path]) -> None:
    for number, one in enumerate(("system", "own", "second", "first")):
        write(places[one], f"limits.processes = {number + 1}")
        assert find("mine").limits.processes == number + 1


def test_a_packaged_policy_can_be_replaced(places: dict[str, Path]) -> None:
    write(places["own"], "limits.processes = 1", "base")
    assert find("base").limits.processes == 1
    assert find("judge-native").origin("limits.processes") == "judge-native.toml: limits.processes"
    assert find("judge-native").root.etc == ()


def test_where_a_whole_section_is_from() -> None:
    """Every file that wrote something that counts in it, in the order of keys; else the policy."""
    assert find("base").origin("root") == "base.toml: root"
    assert find("compile").origin("limits") == "compile.toml, base.toml: limits"
    assert find("judge-python").origin("syscalls") == "base.toml, judge-native.toml: syscalls"
    assert find("base").origin("clock") == "base: clock"


def test_a_policy_can_extend_the_one_it_hides(places: dict[str, Path]) -> None:
    packaged = find("base")
    write(places["system"], 'extends = "base"\nlimits.processes = 7', "base")
    write(places["first"], 'extends = "base"\nlimits.memory = 7', "base")
    found = find("base")
    assert (found.limits.processes, found.limits.memory) == (7, 7)
    assert found.limits.wall_time == packaged.limits.wall_time
    assert found.origin("limits.wall_time") == "base.toml: limits.wall_time"
    file = places["system"] / "base.toml"
    assert found.origin("limits.processes") == f"{file}: limits.processes"


def test_a_path_is_a_path(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(places["first"], "limits.processes = 1")
    write(tmp_path, "limits.processes = 2")
    monkeypatch.chdir(tmp_path)
    for name in ("mine.toml", "./mine.toml", str(tmp_path / "mine.toml")):
        found = find(name)
        assert (found.limits.processes, found.name) == (2, "mine")
    assert find("mine").limits.processes == 1


def test_what_a_file_extends_may_lie_beside_it(places: dict[str, Path], tmp_path: Path) -> None:
    write(places["first"], "limits.processes = 1", "site")
    (tmp_path / "sub").mkdir()
    file = write(tmp_path / "sub", 'extends = "site"')
    assert find(str(file)).limits.processes == 1
    write(tmp_path / "sub", "limits.processes = 2", "site")
    assert find(str(file)).limits.processes == 2
    write(tmp_path, "limits.processes = 3", "above")
    file.write_text('extends = "../above.toml"')
    assert find(str(file)).limits.processes == 3


def test_a_file_may_have_the_name_of_what_it_extends(tmp_path: Path) -> None:
    file = write(tmp_path, 'extends = "base"', "base")
    assert find(str(file)).limits == find("base").limits


def test_a_directory_that_is_not_there_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SANDBOXD_POLICY_PATH", str(tmp_path / "gone"))
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert find("base").name == "base"
    assert [one.name for one in available()] == NAMES


# -- what cannot be found or read


def test_a_name_that_is_nearly_right() -> None:
    with pytest.raises(PolicyError) as caught:
        find("judge-natve")
    text = str(caught.value)
    assert text.startswith("no policy 'judge-natve' (did you mean judge-native? there are: agent, ")


def test_the_error_of_a_parent_names_the_child(places: dict[str, Path]) -> None:
    file = write(places["first"], '\nextends = "bas"')
    with pytest.raises(PolicyErrors) as caught:
        find("mine")
    text = str(caught.value)
    assert text.startswith(f"{file}:2: extends: no policy 'bas' (did you mean base?")


@pytest.mark.parametrize(
    "name", ["/nowhere/x.toml", "./", "a\0.toml", "/dev", "", "a" * 300, "x\0"]
)
def test_what_is_no_file_is_an_error_that_says_so(name: str) -> None:
    with pytest.raises(PolicyError, match=r"cannot be read|no policy"):
        find(name)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(b'\xef\xbb\xbfextends = "base"\r\ndescription = "of Windows"\r\n')
    assert find(str(file)).description == "of Windows"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('root.source = "/"', "root.source: a root cannot be the one we are in"),
        ("mounts = [{target = '/dev', type = 'tmpfs'}]", "nothing can be mounted on /dev"),
    ],
)
def test_what_no_sandbox_can_be(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(PolicyError, match=said):
        find(str(tmp_path / "x.toml"))


def test_all_errors_at_once(tmp_path: Path) -> None:
    """Also those of names, which are looked at when all files are put together."""
    file = tmp_path / "x.toml"
    file.write_text(
        '[syscalls]\nallow = ["@bse"]\ndeny = ["opne"]\n[limits]\noutptu = 1\n'
        '[network]\nmode = "user"\nallow = ["x"]\n'
    )
    with pytest.raises(PolicyErrors) as caught:
        find(str(file))
    assert [one.where.removeprefix(f"{file}:") for one in caught.value.errors] == [
        "2: syscalls.allow[0]", "3: syscalls.deny[0]", "5: limits.outptu", "8: network.allow[0]",
    ]  # fmt: skip


def test_files_that_are_no_policy(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(b"a = 1\nb = '\xff'\n")
    with pytest.raises(PolicyError, match=r"x\.toml:2: not UTF-8"):
        find(str(file))
    file.write_bytes(b"#" * (policies.LONGEST + 1))
    with pytest.raises(PolicyError, match="this is no policy"):
        find(str(file))


# -- the list


def test_available_names_the_file_that_counts(places: dict[str, Path]) -> None:
    assert [one.name for one in available()] == NAMES
    first = write(places["first"], 'description = "the first"', "base")
    write(places["second"], 'description = "the second"', "base")
    wrong = write(places["own"], "limits = 1", "wrong")
    write(places["own"], "", ".hidden")
    (places["own"] / "directory.toml").mkdir()
    found = {one.name: one for one in available()}
    assert sorted(found) == sorted([*NAMES, "wrong"])
    assert (found["base"].file, found["base"].description) == (first, "the first")
    assert found["wrong"].description.startswith(f"(wrong: {wrong}:1: limits: a number")


# -- the policies that come with sandboxd


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_bounds_what_could_hurt_the_host(name: str) -> None:
    found = find(name)
    assert found.description
    for limit in ("wall_time", "memory", "processes", "disk", "inodes", "open_files"):
        assert getattr(found.limits, limit) is not None, limit
    assert found.network.mode == "none"
    assert found.root.source == "host"
    assert not found.mounts
    assert found.syscalls.default == "enosys"


@pytest.mark.parametrize("name", NAMES)
def test_no_policy_allows_what_is_dangerous(name: str) -> None:
    syscalls = find(name).syscalls
    assert "@dangerous" in syscalls.deny
    sockets = "@sockets-unix" if name.startswith("judge-") else "@sockets"
    assert {sockets, "@no-namespaces", "@guards"} <= set(syscalls.rules)
    assert "@socket-create" in syscalls.eafnosupport
    assert not {"@rare", "@io-uring", "@obsolete"} & set(syscalls.allow)
    assert (syscalls.abi32 == "allow") == (name == "shell")
    assert ("@ptrace" in syscalls.allow) == (name in ("ci", "shell"))
    assert not set(syscalls.allow) & set(syscalls.deny)


@pytest.mark.parametrize("name", ["judge-native", "judge-python", "judge-java"])
def test_submissions_cannot_signal_each_other(name: str) -> None:
    found = find(name)
    assert "@locks" not in found.syscalls.allow
    assert "@no-locks" in found.syscalls.rules
    assert (found.identity.user, found.identity.uid) == ("isolated", None)
    assert not found.root.writable
    assert not found.environment.inherit
    assert found.limits.stack is None


def test_only_what_others_may_see_is_shown_of_etc() -> None:
    secret = {"ssl", "shadow", "gshadow", "sudoers", "ssh", "passwd", "group", "machine-id"}
    for name in NAMES:
        assert not secret & set(find(name).root.etc)
        assert ("ssl/certs" in find(name).root.etc) == (name in ("agent", "ci", "shell"))


def test_the_base_calls_are_in_every_policy() -> None:
    for name in NAMES:
        assert {"@base"} <= set(find(name).syscalls.allow)
        assert "execve" in members("@base")


def test_the_values_that_callers_rely_on() -> None:
    base, native, compiler = (find(name).limits for name in ("base", "judge-native", "compile"))
    assert base == Limits(
        wall_time=600.0, memory=2 << 30, processes=512, output=64 << 20, disk=1 << 30,
        inodes=65536, open_files=1024,
    )  # fmt: skip
    assert native == Limits(
        cpu_time=2.0, wall_time=6.0, memory=256 << 20, processes=64, output=16 << 20,
        disk=64 << 20, inodes=16384, open_files=256,
    )  # fmt: skip
    assert (compiler.cpu_time, compiler.output, compiler.file_size) == (30.0, 4 << 20, 256 << 20)


@pytest.mark.parametrize("name", NAMES)
def test_a_job_can_lower_every_limit_of_every_policy(name: str) -> None:
    lowest = Limits(
        cpu_time=0.1, wall_time=0.1, idle_time=0.1, memory=1, processes=1, output=1, disk=1,
        inodes=1, open_files=1, file_size=1, stack=1, address_space=1, cpus=0.1,
    )  # fmt: skip
    assert tighten(find(name), lowest).limits == lowest


def test_policies_are_values() -> None:
    assert isinstance(find("base"), Policy)
    assert find("base") == find("base")
