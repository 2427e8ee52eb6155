"""What policy files say when they are put together, and how every error in them is told."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sandboxd.compile.load import DEEPEST, digest, load, tighten
from sandboxd.errors import PolicyError, PolicyErrors
from sandboxd.policy import Limits, Mount, Policy, Rule, Syscalls

ROOT = Path(__file__).resolve().parent.parent.parent


def read(**files: str) -> Callable[[str], tuple[str, str]]:
    """Policies that lie nowhere."""

    def text(name: str) -> tuple[str, str]:
        if name not in files:
            raise PolicyError("", f"no policy {name!r}", hint="did you mean it?")
        return f"{name}.toml", files[name]

    return text


def policy(text: str = "", **parents: str) -> Policy:
    return load("p", read(p=text, **parents))


def errors(text: str, **parents: str) -> list[str]:
    with pytest.raises(PolicyErrors) as caught:
        policy(text, **parents)
    assert all(isinstance(one, PolicyError) for one in caught.value.errors)
    return [str(one) for one in caught.value.errors]


# -- what is read


def test_an_empty_file_is_the_default_policy() -> None:
    assert policy() == Policy(name="p")


def test_a_section_keeps_the_defaults_of_its_other_keys() -> None:
    found = policy("limits.memory = 1")
    assert found.limits == msgspec.structs.replace(Policy().limits, memory=1)
    assert found.limits.disk is not None


def test_sizes_and_times_have_units_or_none() -> None:
    text = """
    [limits]
    memory = "256M"
    disk = 4096
    cpu_time = "500ms"
    wall_time = 2
    idle_time = 1.5
    [[mounts]]
    type = "tmpfs"
    target = "/scratch"
    size = "1.5G"
    """
    found = policy(text)
    assert (found.limits.memory, found.limits.disk) == (256 << 20, 4096)
    times = (found.limits.cpu_time, found.limits.wall_time, found.limits.idle_time)
    assert times == (0.5, 2.0, 1.5)
    assert [type(one) for one in times] == [float] * 3
    assert found.mounts[0].size == 3 << 29


def test_a_word_lifts_what_is_inherited() -> None:
    parent = "[limits]\nmemory = 1\ndisk = 1\n[identity]\nuid = 1\ngid = 1"
    text = """
    extends = "base"
    [limits]
    memory = "unlimited"
    disk = "unlimited"
    [identity]
    uid = "own"
    """
    found = policy(text, base=parent)
    assert (found.limits.memory, found.limits.disk) == (None, None)
    assert (found.identity.uid, found.identity.gid) == (None, 1)


def test_rules_are_tables_or_names() -> None:
    text = """
    [syscalls]
    rules = ["@guards", {calls = ["socket"], args = [{index = 0, op = "eq", value = 1}]}]
    """
    name, rule = policy(text).syscalls.rules
    assert name == "@guards"
    assert isinstance(rule, Rule)
    assert rule.args[0].width == 32


# -- how files add up


PARENT = """
description = "the parent"
[limits]
memory = "1G"
processes = 10
[root]
etc = ["magic", "fonts"]
[[mounts]]
target = "/a"
source = "/a"
[syscalls]
allow = ["@base"]
rules = ["@sockets"]
[environment]
inherit = ["TERM"]
[environment.set]
A = "1"
B = "1"
[devices]
allow = ["null"]
"""
CHILD = """
extends = "base"
[limits]
memory = "2G"
[root]
etc = ["fonts", "perl"]
[[mounts]]
target = "/b"
type = "tmpfs"
[syscalls]
allow = ["@locks", "@base"]
rules = ["@guards"]
[environment]
inherit = ["LANG"]
set.B = "2"
[devices]
allow = ["zero"]
"""


MOUNT_A = Mount(target="/a", source="/a")
MOUNT_B = Mount(target="/b", type="tmpfs", writable=True)


def test_tables_merge_and_lists_add_up() -> None:
    found = policy(CHILD, base=PARENT)
    assert found.description == "the parent"
    assert (found.limits.memory, found.limits.processes) == (2 << 30, 10)
    assert found.root.etc == ("magic", "fonts", "perl")
    assert found.mounts == (MOUNT_A, MOUNT_B)
    assert found.syscalls.allow == ("@base", "@locks")
    assert found.syscalls.rules == ("@sockets", "@guards")
    assert found.environment.inherit == ("TERM", "LANG")
    assert found.environment.set == {"A": "1", "B": "2"}
    assert found.devices.allow == ("null", "zero")


def test_the_first_list_of_a_chain_takes_the_place_of_the_default() -> None:
    assert policy('syscalls.allow = ["@base"]').syscalls.allow == ("@base",)
    assert policy("syscalls.deny = []").syscalls.deny == ()


RESETS = {
    'root.etc = ["!reset", "perl"]': ("root.etc", ("perl",)),
    'root.etc = ["!reset"]': ("root.etc", ()),
    'mounts = ["!reset", {target = "/c", source = "/c"}]': (
        "mounts",
        (Mount(target="/c", source="/c"),),
    ),
    'syscalls.allow = ["!reset", "@base", "@ptrace"]': ("syscalls.allow", ("@base", "@ptrace")),
    'syscalls.rules = ["!reset"]': ("syscalls.rules", ()),
    'environment.inherit = ["!reset", "TZ"]': ("environment.inherit", ("TZ",)),
    'devices.allow = ["!reset"]': ("devices.allow", ()),
}


@pytest.mark.parametrize("text", RESETS)
def test_a_list_can_start_afresh(text: str) -> None:
    key, value = RESETS[text]
    found: object = policy(f'extends = "base"\n{text}', base=PARENT)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_a_chain_of_files() -> None:
    parents = {
        "top": 'root.etc = ["a"]',
        "middle": 'extends = "top"\nroot.etc = ["b"]\nlimits.memory = 5',
    }
    found = policy('extends = "middle"\nroot.etc = ["c"]', **parents)
    assert found.root.etc == ("a", "b", "c")
    assert found.limits.memory == 5


def test_origins_name_file_and_key() -> None:
    origins = policy(CHILD, base=PARENT).origins
    assert origins["limits.memory"] == "p.toml: limits.memory"
    assert origins["limits.processes"] == "base.toml: limits.processes"
    assert origins["environment.set.B"] == "p.toml: environment.set.B"
    assert origins["mounts[0]"] == "base.toml: mounts[0]"
    assert origins["mounts[1]"] == "p.toml: mounts[0]"
    assert origins["syscalls.allow[1]"] == "p.toml: syscalls.allow[0]"
    assert "limits.disk" not in origins
    reset = policy('extends = "base"\nroot.etc = ["!reset", "perl"]', base=PARENT).origins
    assert reset["root.etc[0]"] == "p.toml: root.etc[1]"
    assert "root.etc[1]" not in reset


def test_the_name_is_that_of_the_file() -> None:
    for name in ("judge-cpp", "a/judge-cpp.toml", "judge-cpp.toml"):
        assert load(name, lambda name: (name, "")).name == "judge-cpp"


# -- errors


WRONG = {
    # key and value
    "[limits]\nmemori = 1": "p.toml:2: limits.memori: [limits] has no such key"
    " (did you mean memory?)",
    "memory = 1": "p.toml:1: memory: no such section or key (it belongs into [limits])",
    "[root]\nuid = 1": "p.toml:2: root.uid: [root] has no such key (it belongs into [identity])",
    "[limit]": "p.toml:1: limit: no such section or key (did you mean limits?)",
    "[clock]\nzone = 1": "p.toml:2: clock.zone: [clock] has no such key"
    " (there are: boottime, monotonic)",
    'name = "x"': "p.toml:1: name: cannot be set (a policy is named after its file)",
    'limits.memory = "lots"': "p.toml:1: limits.memory: 'lots' is not a size"
    " (write 256M, 1.5G or 4096 (bytes))",
    'limits.cpu_time = "2m"': "p.toml:1: limits.cpu_time: '2m' is not a time"
    " (write 1.5s, 500ms, 2min or 10 (seconds))",
    "limits.memory = 0": 'p.toml:1: limits.memory: 0: expected int >= 1 ("unlimited" is allowed,'
    " too)",
    "limits.memory = 1.5": "p.toml:1: limits.memory: 1.5: expected int, got float"
    ' ("unlimited" is allowed, too)',
    "limits.cpu_time = nan": "p.toml:1: limits.cpu_time: nan is not a time"
    " (write 1.5s, 500ms, 2min or 10 (seconds))",
    "limits.cpus = inf": "p.toml:1: limits.cpus: inf is no number to count with",
    "limits.memory = true": "p.toml:1: limits.memory: true: expected int, got bool"
    ' ("unlimited" is allowed, too)',
    "limits = 1": "p.toml:1: limits: a number where a table belongs (write [limits])",
    'root.proc = "pids"': "p.toml:1: root.proc: 'pids' is not among the choices"
    " (did you mean pid?)",
    'root.proc = "all"': "p.toml:1: root.proc: 'all' is not among the choices"
    " (one of pid, masked, none)",
    'root.writable = "yes"': "p.toml:1: root.writable: 'yes': expected bool, got str",
    'root.etc = "fonts"': 'p.toml:1: root.etc: a string where a list belongs (write ["..."])',
    "root.etc = [1]": "p.toml:1: root.etc[0]: 1: expected str, got int",
    'identity.home = "box"': "p.toml:1: identity.home: 'box' is not absolute"
    " (a path starts with /)",
    "environment.set.A = 1": "p.toml:1: environment.set.A: a number where a string belongs"
    ' (write "1")',
    "clock.boottime = 1979-05-27": "p.toml:1: clock.boottime: 1979-05-27: expected int, got date",
    f"syscalls.rules = [{{calls = [], args = [{{index = 0, op = 'eq', value = {1 << 64}}}]}}]": (
        "p.toml:1: syscalls.rules[0].args[0].value: 18446744073709551616 does not fit into 64 bits"
    ),
    # lists
    'root.etc = ["a", "!reset"]': 'p.toml:1: root.etc[1]: "!reset" must be the first entry',
    "mounts = [1]": "p.toml:1: mounts[0]: a number where a table belongs (write [[mounts]])",
    'mounts = "x"': "p.toml:1: mounts: a string where a list belongs (write [[mounts]])",
    # meaning
    'root.source = "rootfs"': "p.toml:1: root.source: 'rootfs' is not absolute"
    ' ("host", or the absolute path of a directory)',
    'root.etc = ["/etc/ssl"]': "p.toml:1: root.etc[0]: '/etc/ssl' is no name below /etc"
    " (e.g. localtime, ssl/certs)",
    'root.etc = ["ssl/../shadow"]': "p.toml:1: root.etc[0]: 'ssl/../shadow' is no name below /etc"
    " (e.g. localtime, ssl/certs)",
    'devices.allow = ["../sda"]': "p.toml:1: devices.allow[0]: '../sda' is no name below /dev"
    " (e.g. null)",
    'environment.set."A=B" = "1"': "p.toml:1: environment.set.A=B: 'A=B' cannot be set"
    " (names are not empty and have no =)",
    'environment.inherit = [""]': "p.toml:1: environment.inherit[0]: '' cannot be inherited"
    " (names are not empty and have no =)",
    'identity.home = "/a:b"': "p.toml:1: identity.home: '/a:b' contains a colon"
    " (/etc/passwd has no way to say that)",
    'identity.hostname = "a\\n"': "p.toml:1: identity.hostname: 'a\\n' contains a control character"
    " (leave it out)",
    'environment.set.A = "\\u0000"': "p.toml:1: environment.set.A: '\\x00' contains a control"
    " character (leave it out)",
    '[[mounts]]\ntarget = "/a"': "p.toml:1: mounts[0]: a bind without a source"
    ' (name a host path, or write type = "tmpfs")',
    '[[mounts]]\ntarget = "/a"\nsource = "b"': "p.toml:3: mounts[0].source: 'b' is not absolute"
    " (a policy is not tied to a directory)",
    '[[mounts]]\ntarget = "/a"\nsource = "/b/../c"': "p.toml:3: mounts[0].source: '/b/../c'"
    " contains .. (name the place itself)",
    '[[mounts]]\nsource = "/b"': "p.toml:1: mounts[0]: target is missing",
    '[[mounts]]\ntarget = "/"\nsource = "/b"': "p.toml:2: mounts[0].target: nothing can be mounted"
    " on /",
    '[[mounts]]\ntarget = "/proc/1"\nsource = "/b"': "p.toml:2: mounts[0].target: nothing can be"
    " mounted on /proc/1",
    '[[mounts]]\ntarget = "/a/../b"\nsource = "/b"': "p.toml:2: mounts[0].target: '/a/../b' is not"
    " plain (no //, no . and .., no / at the end)",
    '[[mounts]]\ntarget = "/a"\nsource = "/b"\nsize = 1': "p.toml:4: mounts[0].size: a bind has no"
    ' size (leave it out, or write type = "tmpfs")',
    '[[mounts]]\ntype = "tmpfs"\ntarget = "/a"\nsource = "/b"': "p.toml:4: mounts[0].source: a"
    ' tmpfs has no source (leave it out, or write type = "bind")',
    '[[mounts]]\ntype = "tmpfs"\ntarget = "/a"\nwritable = false': "p.toml:4: mounts[0].writable: a"
    " read-only tmpfs would be empty for ever (leave it out)",
    'mounts = [{target = "/a", source = "/a"}, {target = "/a", source = "/b"}]': (
        "p.toml:1: mounts[1].target: something is mounted on /a already (p.toml:1: mounts[0])"
        ' (to replace what is inherited, write mounts = ["!reset", {...}])'
    ),
    'root.aliases = ["w", "usr"]': "p.toml:1: root.aliases[1]: 'usr' is no free name at the top"
    " (e.g. w)",
    'root.aliases = ["a/b"]': "p.toml:1: root.aliases[0]: 'a/b' is no free name at the top"
    " (e.g. w)",
    # system calls
    'syscalls.allow = ["@base", "opena"]': "p.toml:1: syscalls.allow[1]: unknown system call"
    " 'opena' (did you mean openat or open or openat2?)",
    '[syscalls]\nallow = [\n    "@base",\n    "@bas",\n]': "p.toml:4: syscalls.allow[1]: unknown"
    " group '@bas' (did you mean @base?)",
    # the file
    "extends = 1": 'p.toml:1: extends: 1 is no policy (one name, such as extends = "base")',
    'extends = ""': "p.toml:1: extends: '' is no policy (one name, such as extends = \"base\")",
    'extends = "x"': "p.toml:1: extends: no policy 'x' (did you mean it?)",
    "a = \nb = 1": "p.toml:1:5: not TOML: invalid value",
    "a = 1\nb = [": "p.toml:2: not TOML: invalid value",
    "a = 1\na = 2\nb = 1": "p.toml:2:6: not TOML: cannot overwrite a value",
    "a = " + "[" * 5000: "p.toml: not TOML: nested too deeply",
}


@pytest.mark.parametrize("text", WRONG)
def test_errors_say_where_and_what_to_do(text: str) -> None:
    assert errors(text) == [WRONG[text]]


def test_a_number_of_many_digits() -> None:
    (error,) = errors("limits.memory = " + "9" * 5000)
    assert error.startswith("p.toml: not TOML: ")


@pytest.mark.parametrize(
    ("start", "line", "end"),
    [("", "a{} = 1\n", ""), ("syscalls.allow = [\n", '"opena{}",\n', "]")],
)
def test_no_more_errors_are_told_than_one_reads(start: str, line: str, end: str) -> None:
    found = errors(start + "".join(map(line.format, range(137))) + end)
    assert (len(found), found[-1]) == (101, "and 37 more errors")
    assert "p.toml:" in found[99]


def test_all_errors_of_all_files_are_told_in_order() -> None:
    text = """\
extends = "base"
[root]
etc = ["/a"]
proc = "all"
[limits]
memori = 1
memory = "lots"
[[mounts]]
target = "/x"
"""
    found = errors(text, base="limits.disk = 0\nlimits.output = 0")
    assert [one.rpartition(" (")[0].rpartition(": ")[0] for one in found] == [
        "base.toml:1: limits.disk: 0",
        "base.toml:2: limits.output: 0",
        "p.toml:3: root.etc[0]",
        "p.toml:4: root.proc",
        "p.toml:6: limits.memori",
        "p.toml:7: limits.memory",
        "p.toml:8: mounts[0]",
    ]


def test_an_error_of_the_whole_names_the_file_it_is_from() -> None:
    parent = '[syscalls]\nallow = ["@base"]\n\n[[mounts]]\ntarget = "/a"\nsource = "/a"'
    text = 'extends = "base"\n[syscalls]\nallow = ["read", "raed"]\n[[mounts]]\ntarget = "/a"\n'
    found = errors(f'{text}source = "/b"', base=parent)
    assert found[0] == (
        "p.toml:5: mounts[0].target: something is mounted on /a already (base.toml:4: mounts[0])"
        ' (to replace what is inherited, write mounts = ["!reset", {...}])'
    )
    assert found[1].startswith("p.toml:3: syscalls.allow[1]: unknown system call 'raed' (did you")


def test_a_filter_that_starts_nothing_is_an_error() -> None:
    (error,) = errors('syscalls.allow = ["read"]')
    assert error.startswith("p.toml:1: syscalls.allow: sandboxd's own first process")


@pytest.mark.parametrize(
    ("files", "cycle"),
    [
        ({"p": 'extends = "p"'}, "p.toml -> p.toml"),
        ({"p": 'extends = "a"', "a": 'extends = "b"', "b": 'extends = "a" # b'},
         "a.toml -> b.toml -> a.toml"),
    ],
)  # fmt: skip
def test_cycles_are_named(files: dict[str, str], cycle: str) -> None:
    with pytest.raises(PolicyErrors, match=rf"toml:1: extends: a cycle: {cycle}$"):
        load("p", read(**files))


def test_an_endless_chain_ends() -> None:
    def endless(name: str) -> tuple[str, str]:
        return name, f'extends = "{name}x"'

    with pytest.raises(PolicyErrors, match=f"more than {DEEPEST} files"):
        load("x", endless)


def test_a_policy_that_is_not_there() -> None:
    with pytest.raises(PolicyError, match="no policy 'q'"):
        load("q", read(p=""))


# -- a job's limits


def limited(**limits: float) -> Policy:
    text = "\n".join(f"limits.{name} = {value}" for name, value in limits.items())
    return load("judge", lambda _: ("judge.toml", text))


def test_a_job_may_lower_limits() -> None:
    found = tighten(limited(memory=256 << 20, disk=1 << 30), Limits(memory=1 << 20, cpu_time=1.0))
    assert (found.limits.memory, found.limits.cpu_time) == (1 << 20, 1.0)
    assert found.limits.disk == 1 << 30
    assert found.origin("limits.memory") == "the job: limits.memory"
    assert found.origin("limits.disk") == "judge.toml: limits.disk"


def test_a_job_that_changes_nothing_gets_the_policy_itself() -> None:
    same = limited(memory=5, wall_time=2)
    assert tighten(same, None) is same
    assert tighten(same, Limits()) is same
    assert tighten(same, Limits(memory=5, wall_time=2.0)) is same


def test_a_job_that_names_one_limit_keeps_the_others() -> None:
    roomy = limited(disk=1 << 30, inodes=1 << 20, open_files=4096)
    assert tighten(roomy, Limits(memory=1)).limits == msgspec.structs.replace(
        roomy.limits, memory=1
    )


RAISED = {
    "memory": (256 << 20, 512 << 20, "512M is more than judge.toml allows (256M)"),
    "wall_time": (0.5, 90.0, "90s is more than judge.toml allows (500ms)"),
    "processes": (1, 2, "2 is more than judge.toml allows (1)"),
    "cpus": (1, 1.5, "1.5 is more than judge.toml allows (1)"),
}


@pytest.mark.parametrize("name", RAISED)
def test_a_job_may_not_raise_a_limit(name: str) -> None:
    most, wanted, message = RAISED[name]
    with pytest.raises(PolicyError) as caught:
        tighten(limited(**{name: most}), msgspec.structs.replace(Limits(), **{name: wanted}))
    assert str(caught.value) == f"limits.{name}: {message}"
    assert caught.value.where == f"limits.{name}"


def test_every_raised_limit_is_told() -> None:
    with pytest.raises(PolicyErrors) as caught:
        tighten(limited(memory=1, processes=1), Limits(memory=2, processes=2, cpu_time=-1.0))
    wheres = [one.where for one in caught.value.errors]
    assert wheres == ["limits.cpu_time", "limits.memory", "limits.processes"]


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(PolicyError, match="is no limit"):
        tighten(Policy(), Limits(wall_time=value))


# -- digest


def test_the_digest_is_that_of_the_content() -> None:
    one = policy('extends = "base"\nlimits.memory = "1G"', base="limits.processes = 4")
    two = policy(f"[limits]\nprocesses = 4\nmemory = {1 << 30}")
    assert one.origins != two.origins
    assert digest(one) == digest(two)
    assert digest(one) != digest(policy("limits.memory = 1"))
    assert len(digest(one)) == 64
    assert digest(tighten(one, Limits(memory=5))) != digest(one)


def test_the_digest_does_not_depend_on_how_a_number_was_written() -> None:
    assert digest(policy("limits.wall_time = 2")) == digest(policy('limits.wall_time = "2000ms"'))


def test_policies_of_python_have_a_digest_too() -> None:
    rules = (Rule(calls=("read",)), "@guards")
    one = Policy(syscalls=Syscalls(rules=rules), mounts=(Mount(target="/a", source="/a"),))
    assert digest(one) == digest(msgspec.structs.replace(one))


def test_what_the_fuzzer_does() -> None:
    """A short run of it, so that it does not rot."""
    runpy.run_path(str(ROOT / "fuzz" / "load.py"))["fuzz"](examples=200)
