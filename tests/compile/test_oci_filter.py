"""Profiles of the OCI's are decided as crun decides; what cannot be is refused with its place."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.compile import bpf, numbers, oci, oci_filter, seccomp, syscalls
from sandboxd.compile.assemble import AUDIT_ARCH, M32, M64, SKIPPED, WHOLE, X32_BIT
from sandboxd.errors import PolicyError
from sandboxd.policy import Argument, Attached
from tests.compile.profiles import (
    ALLOW,
    ERRNO,
    INIT,
    PROFILES,
    Json,
    as_given,
    compare,
    meant,
    program_of_crun,
    program_of_libseccomp,
    questions,
    rule,
)
from tests.compile.tiers import holds

KERNEL = "6.1.0"
KILLS = frozenset({bpf.KILL_PROCESS, bpf.KILL_THREAD})

on_x86_64 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="needs x86_64: crun makes programs for its own machine"
)


def ours(text: Json, arch: str = "x86_64", kernel: str = KERNEL) -> tuple[bytes, ...]:
    found = oci.parse(json.dumps(text), "p.json")
    return tuple(oci_filter.programs(found, arch, kernel, WHOLE))


def differences(text: Json, theirs: bytes) -> Iterator[str]:
    """Every call and class of arguments that a program of crun's answers in another way."""
    programs = ours(text)
    x32, i386 = (f'"SCMP_ARCH_{one}"' in json.dumps(text) for one in ("X32", "X86"))
    for abi in ("x86_64", "i386"):
        names = {number: name for name, number in numbers.table(abi).items()}
        for number in (*range(601), 1 << 31, SKIPPED - 1, SKIPPED):
            name = names.get(number, "")
            if number >= X32_BIT and x32:
                continue
            if name and not known_to_libseccomp(name, abi):
                continue
            for args in questions(text, name):
                seen = tuple(value & M32 for value in args) if abi == "i386" else args
                mine = bpf.decide(programs, number, AUDIT_ARCH[abi], seen)
                other = bpf.simulate(theirs, number, AUDIT_ARCH[abi], seen)
                foreign = number >= X32_BIT or (abi == "i386" and not i386)
                if mine != other and not (foreign and {mine, other} <= KILLS):
                    yield f"{abi} {number} {name} {seen}: {mine:#x}, not {other:#x}"


def known_to_libseccomp(name: str, abi: str) -> bool:
    """Calls newer than the library are passed over by crun, as unknown names are."""
    try:
        library: Any = pytest.importorskip("seccomp", exc_type=ImportError)
    except pytest.skip.Exception:
        library = pytest.importorskip("pyseccomp", exc_type=ImportError)
    arch = {"x86_64": library.Arch.X86_64, "i386": library.Arch.X86}[abi]
    # i386's socket calls are said to have numbers of their own below -100, and are made by both.
    return bool(library.resolve_syscall(arch, name) != -1)


def foreign_kinds(theirs: bytes) -> bool:
    """Whether a program kills what is not in its profile's architectures."""
    return bpf.simulate(theirs, 0, AUDIT_ARCH["aarch64"]) in KILLS


# -- as crun


@on_x86_64
@pytest.mark.needs("crun", "userns")
@pytest.mark.parametrize("name", PROFILES)
def test_every_call_is_decided_as_crun_decides(name: str, tmp_path: Path) -> None:
    """crun's own program, out of its state directory, for every number of both ABIs.

    Left out are x32, which sandboxd never lets in, and how a call of a foreign ABI is killed: the
    thread alone by libseccomp, the process by us.
    """
    theirs = program_of_crun(as_given(PROFILES[name], (6, 1)), tmp_path)
    assert list(differences(PROFILES[name], theirs)) == []
    assert foreign_kinds(theirs)
    assert bpf.decide(ours(PROFILES[name]), 0, AUDIT_ARCH["aarch64"]) == bpf.KILL_PROCESS


VALUES = st.sampled_from([0, 1, 5, 7, 1 << 32, (1 << 32) + 5, 1 << 63, (1 << 64) - 1])
COMPARISONS = st.builds(
    compare,
    st.integers(0, 2),
    st.sampled_from(["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"]),
    VALUES,
    VALUES,
)
RULES = st.builds(
    lambda names, action, args, number: rule(
        " ".join(names), action, *args, **({"errnoRet": number} if action == ERRNO else {})
    ),
    st.lists(st.sampled_from(["umask", "alarm", "lseek", "brk"]), min_size=1, max_size=2),
    st.sampled_from([ALLOW, ERRNO, "SCMP_ACT_LOG", "SCMP_ACT_KILL_PROCESS"]),
    st.lists(COMPARISONS, max_size=3),
    st.sampled_from([1, 38]),
)
ANY = st.fixed_dictionaries(
    {
        "defaultAction": st.sampled_from([ALLOW, ERRNO, "SCMP_ACT_KILL"]),
        "architectures": st.sampled_from([[], ["SCMP_ARCH_X86"]]),
        "syscalls": st.lists(RULES, min_size=1, max_size=4),
    }
)


@on_x86_64
@settings(max_examples=300)
@given(ANY)
def test_any_profile_is_decided_as_libseccomp_decides(text: Json) -> None:
    """Fed as crun does; what could be decided in two ways is refused, and nothing else is."""
    try:
        programs = ours(text)
    except PolicyError as error:
        if "nothing says which counts" not in str(error):
            raise
        return
    theirs = b""
    if not libseccomp_loses_one(text):
        with suppress(FileExistsError):  # two that differ, before a third that counts in any case
            theirs = program_of_libseccomp(text)
    for abi, most in (("x86_64", M64), ("i386", M32)):
        foreign = abi == "i386" and not text["architectures"]
        for name in ("umask", "alarm", "lseek", "brk", "read"):
            number = numbers.table(abi)[name]
            for args in questions(text, name):
                seen = tuple(value & most for value in args)
                mine = bpf.decide(programs, number, AUDIT_ARCH[abi], seen)
                assert foreign or {mine} == meant(text, name, seen, most), (name, seen)
                other = bpf.simulate(theirs, number, AUDIT_ARCH[abi], seen) if theirs else mine
                assert mine == other or (foreign and {mine, other} <= KILLS), (name, seen)


def libseccomp_loses_one(text: Json) -> bool:
    """Of several rules of a call that put an argument into an order, it may pass one over."""
    orders = [
        name
        for one in text["syscalls"]
        for each in one.get("args", ())
        if each["op"].endswith(("LT", "LE", "GE", "GT"))
        for name in one["names"]
    ]
    rules = [name for one in text["syscalls"] for name in one["names"]]
    return any(orders.count(name) > 1 or rules.count(name) > 1 for name in orders)


def argument() -> st.SearchStrategy[Argument]:
    return st.builds(
        lambda op, value, mask: Argument(
            index=0, op=op, value=value & mask if op == "eq" else value,
            mask=mask if op == "eq" else None, width=64,
        ),
        st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge"]),
        VALUES | st.integers(0, 9),
        st.sampled_from([(1 << 64) - 1, 1, 6, 1 << 32, 0xF << 60]),
    )  # fmt: skip


@given(argument(), argument(), st.lists(VALUES | st.integers(0, 70)))
def test_comparisons_meet_where_a_value_satisfies_both(
    one: Argument, other: Argument, seen: list[int]
) -> None:
    values = [*seen, *range(12), *((1 << 64) - n for n in range(1, 9)), 1 << 60, 1 << 32 | 1]
    edges = [each.value + more for each in (one, other) for more in (-1, 0, 1)]
    meeting = any(
        holds(one, (value,)) and holds(other, (value,))
        for value in (*values, *edges)
        if 0 <= value < 1 << 64
    )
    assert oci_filter.meets(one, other) >= meeting
    assert oci_filter.meets(one, other) == oci_filter.meets(other, one)


# -- on machines


def answers(text: Json, arch: str = "x86_64", kernel: str = KERNEL) -> dict[str, str]:
    programs = ours(text, arch, kernel)
    return {
        name: bpf.action_name(bpf.decide(programs, number, AUDIT_ARCH[arch], (0,) * 6))
        for name, number in numbers.table(arch).items()
    }


def test_what_a_dialect_says_depends_on_the_machine() -> None:
    here, there = answers(PROFILES["dialect"]), answers(PROFILES["dialect"], "aarch64")
    assert (here["modify_ldt"], here["migrate_pages"]) == ("allow", "errno 1")
    assert there["migrate_pages"] == "allow"
    assert here["mbind"] == there["mbind"] == "errno 1"
    old, new = (
        answers(PROFILES["dialect"], kernel="4.4.0-rc1"),
        answers(PROFILES["dialect"], kernel="99.10"),
    )
    assert [one["ptrace"] for one in (old, here, new)] == ["errno 1", "allow", "allow"]
    assert [one["splice"] for one in (old, here, new)] == ["errno 1", "errno 1", "allow"]
    assert [one["tee"] for one in (old, here, new)] == ["allow", "errno 1", "errno 1"]
    assert [one["vmsplice"] for one in (old, here, new)] == ["allow", "allow", "errno 1"]
    assert answers(PROFILES["dialect"], kernel="") == new


def test_a_job_has_no_capabilities() -> None:
    found = answers(PROFILES["dialect"])
    assert (found["clone"], found["clone3"], found["setns"]) == ("allow", "errno 38", "errno 1")
    assert found["chroot"] == "errno 1"
    assert found["keyctl"] == "errno 38"


def test_unknown_names_are_passed_over() -> None:
    found = oci.parse(json.dumps(PROFILES["dialect"]), "p.json")
    assert oci_filter.unknown(found) == ("no_such_call", "riscv_flush_icache", "breakpoint")


# -- under sandboxd


def attached(text: Json, on_top: Json | None = None) -> Attached:
    more = "" if on_top is None else json.dumps(on_top)
    return Attached(oci="p.json", profile=json.dumps(text), on_top=more, on_top_name="config.json")


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("arch", numbers.ARCHITECTURES)
def test_a_tenant_leaves_open_what_its_sandboxes_are_made_with(name: str, arch: str) -> None:
    policy, audit = attached(PROFILES[name]), AUDIT_ARCH[arch]
    base, own = seccomp.layers(policy, arch, KERNEL)
    whole = seccomp.programs(policy, arch, KERNEL)
    for call, number in numbers.table(arch).items():
        for args in questions(PROFILES[name], call):
            wanted = bpf.decide(whole, number, audit, args)
            found = bpf.decide(base, number, audit, args), bpf.decide(own, number, audit, args)
            launch = call in syscalls.LAUNCH
            assert found == ((bpf.ALLOW, wanted) if launch else (wanted, bpf.ALLOW)), (call, args)


def test_the_guards_stay_whatever_a_profile_allows() -> None:
    programs = seccomp.programs(attached({"defaultAction": ALLOW}), "x86_64")

    def ask(name: str, *args: int, abi: str = "x86_64") -> str:
        number = numbers.table(abi)[name]
        return bpf.action_name(bpf.decide(programs, number, AUDIT_ARCH[abi], args))

    assert ask("ioctl", 0, 0x5412) == ask("fcntl", 3, 1024) == "errno 1"
    assert ask("ioctl", 0, 1 << 32 | 0x5412) == ask("madvise", 0, 0, 12) == "errno 1"
    assert ask("prlimit64", 77, 4, 1, 0) == "errno 1"
    assert ask("sync") == ask("setrlimit", 4) == "errno 0"
    assert ask("keyctl") == ask("ptrace") == ask("unshare", 1 << 28) == "allow"
    assert bpf.decide(programs, 1 << 30 | 39, AUDIT_ARCH["x86_64"]) == bpf.KILL_PROCESS
    assert ask("read", abi="i386") == "kill process"


def test_of_two_profiles_the_stricter_answer_counts() -> None:
    lax, strict = {"defaultAction": ALLOW}, PROFILES["order"]
    both = seccomp.programs(attached(lax, strict), "x86_64")
    assert bpf.decide(both, numbers.table("x86_64")["ptrace"], AUDIT_ARCH["x86_64"]) == (
        bpf.ERRNO | 38
    )
    on_lists = Attached(on_top=json.dumps({"defaultAction": ALLOW}), on_top_name="config.json")
    one = seccomp.programs(on_lists, "x86_64")
    assert bpf.decide(one, numbers.table("x86_64")["mount"], AUDIT_ARCH["x86_64"]) == bpf.ERRNO | 1


# -- mistakes


def test_a_profile_that_was_not_read_is_no_filter() -> None:
    with pytest.raises(PolicyError, match=r"^syscalls.oci: p.json has not been read"):
        seccomp.programs(Attached(oci="p.json"), "x86_64")


WRONG: list[tuple[object, str]] = [
    ("{", r"^p.json:1:2: not JSON: "),
    ("[" * 100_000, r"^p.json: not JSON: nested too deeply"),
    ('{"defaultAction": ' + "1" * 5000 + "}", r"^p.json: not JSON: a number with too many digits"),
    ([], r"^p.json: a list where an object belongs"),
    ({}, r"^p.json: defaultAction is missing"),
    ({"defaultAction": None}, r"^p.json: defaultAction is missing"),
    ({"defaultAction": 7}, r"^p.json: defaultAction: a number where a string belongs"),
    ({"defaultAction": "SCMP_ACT_ALOW"}, r"defaultAction: .*mean SCMP_ACT_ALLOW\?"),
    ({"defaultAction": ALLOW, "defaultErrnoRet": 1}, r"defaultErrnoRet: SCMP_ACT_ALLOW has no er"),
    ({"defaultAction": ERRNO, "defaultErrnoRet": -1}, r"defaultErrnoRet: -1 is not from 0 to"),
    ({"defaultAction": ERRNO, "defaultErrno": "EPREM"}, r"defaultErrno: 'EPREM' is no errno"),
    (
        {"defaultAction": ERRNO, "defaultErrno": "EPERM", "defaultErrnoRet": 38},
        r"defaultErrno: defaultErrnoRet says something else",
    ),
    ({"defaultAction": "SCMP_ACT_NOTIFY"}, r"defaultAction: there is nobody to be asked"),
    ({"defaultAction": ALLOW, "syscals": []}, r"p.json: syscals: no such key .*mean syscalls\?"),
    ({"defaultAction": ALLOW, "a b": 1}, r'p.json: \["a b"\]: no such key'),
    ({"defaultAction": ALLOW, "architectures": ["amd64"]}, r"architectures\[0\]: 'amd64' is not"),
    ({"defaultAction": ALLOW, "flags": ["SECCOMP_FILTER_FLAG_LOG"]}, r"flags\[0\]: filters are"),
    ({"defaultAction": ALLOW, "flags": ["LOG"]}, r"flags\[0\]: 'LOG' is not among the choices"),
    (
        {"defaultAction": ALLOW, "architectures": [], "archMap": [{"architecture": 1}]},
        r"archMap\[0\].architecture: a number where a string belongs",
    ),
    (
        {"defaultAction": ALLOW, "architectures": ["SCMP_ARCH_X86"], "archMap": [{}]},
        r"archMap: there are architectures, too",
    ),
]  # fmt: skip
WRONG_RULES: list[tuple[object, str]] = [
    ({"action": ALLOW}, r": a rule without names"),
    ({"names": ["read"]}, r": action is missing"),
    ({"names": "read", "action": ALLOW}, r".names: a string where a list belongs"),
    ({"names": [True], "action": ALLOW}, r".names\[0\]: true or false where a string"),
    ({"names": ["\ud800"], "action": ALLOW}, r".names\[0\]: half of a surrogate pair"),
    ({"names": ["a"], "name": "b", "action": ALLOW}, r".name: there are names, too"),
    (rule("read", "SCMP_ACT_NOTIFY"), r".action: there is nobody to be asked"),
    (rule("read", ALLOW, errnoRet=1), r".errnoRet: SCMP_ACT_ALLOW has no errno"),
    (rule("read", ALLOW, argz=1), r".argz: no such key .*mean args\?"),
    (rule("read", ALLOW, compare(6, "EQ", 1)), r".args\[0\].index: 6 is not from 0 to 5"),
    (rule("read", ALLOW, compare(0, "EG", 1)), r"args\[0\].op: .*mean SCMP_CMP_..\?"),
    (rule("read", ALLOW, compare(0, "EQ", 1 << 64)), r"args\[0\].value: 18446744073709551616 is n"),
    (rule("read", ALLOW, compare(0, "EQ", -1)), r"args\[0\].value: -1 is not from 0"),
    (rule("read", ALLOW, {"index": 0, "op": "SCMP_CMP_EQ"}), r"args\[0\]: value is missing"),
    (rule("read", ALLOW, *[compare(0, "EQ", 1)] * 7), r".args: more than 6 comparisons"),
    (rule("read", includes={"minKernel": "new"}), r"includes.minKernel: 'new' is no kernel ver"),
    (rule("read", excludes={"cap": []}), r"excludes.cap: no such key .*mean caps\?"),
    (rule("read", includes=[]), r".includes: a list where an object belongs"),
]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *WRONG,
        *(
            ({"defaultAction": ERRNO, "syscalls": [one]}, rf"syscalls\[0\].*{message}")
            for one, message in WRONG_RULES
        ),
    ],
)
def test_what_is_wrong_is_named_with_file_and_place(text: object, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        oci.parse(text if isinstance(text, str) else json.dumps(text), "p.json")


def test_too_many_rules_are_refused() -> None:
    text = {"defaultAction": ERRNO, "syscalls": [rule("read")] * (oci.MOST_RULES + 1)}
    with pytest.raises(PolicyError, match=r"p.json: syscalls: 8193 rules, more than 8192"):
        oci.parse(json.dumps(text), "p.json")
    many = [rule("read", ALLOW, compare(0, "EQ", at)) for at in range(oci_filter.MOST_CHECKS + 1)]
    with pytest.raises(PolicyError, match=r"syscalls\[512\]: more than 512 rules for read"):
        ours({"defaultAction": ERRNO, "syscalls": many})


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        (compare(0, "EQ", 5), compare(0, "GE", 5), True),
        (compare(0, "EQ", 5), compare(0, "GT", 5), False),
        (compare(0, "EQ", 5), compare(1, "EQ", 5), True),
        (compare(0, "NE", 5), compare(0, "NE", 6), True),
        (compare(0, "NE", 5), compare(0, "EQ", 5), False),
        (compare(0, "MASKED_EQ", 0xF0, 0x10), compare(0, "LT", 0x10), False),
        (compare(0, "MASKED_EQ", 0xF0, 0x10), compare(0, "LT", 0x11), True),
        (compare(0, "MASKED_EQ", 0xF0, 0x10), compare(0, "MASKED_EQ", 0x0F, 1), True),
        (compare(0, "MASKED_EQ", 0xF0, 0x10), compare(0, "MASKED_EQ", 0x30, 0x20), False),
        (compare(0, "LE", 9), compare(0, "GE", 10), False),
    ],
)
def test_rules_that_differ_where_both_hold_are_refused(
    first: Json, second: Json, meet: bool
) -> None:
    text = {
        "defaultAction": ERRNO,
        "defaultErrnoRet": 38,
        "syscalls": [rule("alarm", ALLOW, first), rule("alarm", ERRNO, second, errnoRet=1)],
    }
    if not meet:
        ours(text)
        return
    message = r"^p.json: syscalls\[1\]: for alarm it can hold together with syscalls\[0\], which an"
    with pytest.raises(PolicyError, match=message):
        ours(text)


def test_a_profile_must_let_the_first_process_of_a_sandbox_work() -> None:
    text = {"defaultAction": ERRNO, "syscalls": [rule("execve exit_group")]}
    message = r"^p.json: sandboxd's own first process in a sandbox would be refused .* and \d+ more"
    with pytest.raises(PolicyError, match=message):
        seccomp.programs(attached(text), "x86_64")
    assert seccomp.programs(attached({"defaultAction": ERRNO, "syscalls": [INIT]}), "x86_64")
    later = {"defaultAction": ERRNO, "syscalls": [INIT | {"includes": {"minKernel": "99.1"}}]}
    assert seccomp.programs(attached(later), "x86_64", "99.1")
    with pytest.raises(PolicyError, match=message):  # as this kernel has it
        seccomp.programs(attached(later), "x86_64", KERNEL)
    with pytest.raises(PolicyError, match=r"^config.json: linux.seccomp: sandboxd's own first"):
        seccomp.programs(attached({"defaultAction": ALLOW}, text), "x86_64")
