"""The tables against the kernel's headers and libseccomp, the groups against the tables."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sandboxd.compile import numbers, syscalls
from sandboxd.errors import PolicyError
from sandboxd.policy import Rule
from sandboxd.script import numbers as script_numbers

X86 = Path("/usr/include/x86_64-linux-gnu/asm")
LAST = max(numbers.table("x86_64").values())

# What arch/arm64/include/asm/unistd.h sets before it includes the generic header.
ARM64 = """
#define __ARCH_WANT_RENAMEAT
#define __ARCH_WANT_NEW_STAT
#define __ARCH_WANT_SET_GET_RLIMIT
#define __ARCH_WANT_SYS_CLONE3
#define __ARCH_WANT_MEMFD_SECRET
#define __BITS_PER_LONG 64
#define __ASM_X86_BITSPERLONG_H
#define __ASM_GENERIC_BITS_PER_LONG
#include <asm-generic/unistd.h>
"""


def library() -> Any:
    """libseccomp by either of its bindings."""
    try:
        return pytest.importorskip("seccomp", exc_type=ImportError)
    except pytest.skip.Exception:
        return pytest.importorskip("pyseccomp", exc_type=ImportError)


def defined(text: str) -> dict[str, int]:
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\w+)", text)
    return {name: int(value) for name, value in found if value.isdigit()}


def agrees(arch: str, header: dict[str, int]) -> None:
    """All that the header has, except calls that are newer than our table."""
    header = {name: number for name, number in header.items() if number <= LAST}
    assert len(header) > 250
    table = numbers.table(arch)
    assert {name: table.get(name) for name in header} == header


@pytest.mark.parametrize(("arch", "file"), [("x86_64", "unistd_64.h"), ("i386", "unistd_32.h")])
def test_x86_numbers_are_those_of_the_headers(arch: str, file: str) -> None:
    if not (X86 / file).exists():
        pytest.skip(f"needs {X86 / file}")
    agrees(arch, defined((X86 / file).read_text()))


@pytest.mark.needs("gcc")
def test_aarch64_numbers_are_those_of_the_generic_header() -> None:
    command = ("gcc", "-E", "-dM", "-")
    done = subprocess.run(command, input=ARM64, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs asm-generic/unistd.h: {done.stderr.strip()}")
    header = defined(done.stdout)  # __NR_lseek is __NR3264_lseek, and so on; one is named otherwise
    header["newfstatat"] = header.pop("fstatat")
    for bound in ("syscalls", "arch_specific_syscall"):
        header.pop(bound, None)
    agrees("aarch64", header)


@pytest.mark.parametrize(
    ("arch", "constant"), [("x86_64", "X86_64"), ("aarch64", "AARCH64"), ("i386", "X86")]
)
def test_numbers_are_those_of_libseccomp(arch: str, constant: str) -> None:
    seccomp = library()
    token = getattr(seccomp.Arch, constant)
    different = {}
    for name, number in numbers.table(arch).items():
        known = seccomp.resolve_syscall(token, name)
        # Negative: newer than the library, or on i386 a part of socketcall (102) or ipc (117),
        # which some versions answer with instead.
        if known >= 0 and known != number and not (arch == "i386" and known in {102, 117}):
            different[name] = (number, known)
    assert different == {}


def test_the_newest_calls_have_their_numbers() -> None:
    """Linux 6.6 to 6.18: what libseccomp 2.5.4 does not know."""
    newest = {
        "mseal": 462, "statmount": 457, "listmount": 458, "lsm_get_self_attr": 459,
        "lsm_set_self_attr": 460, "lsm_list_modules": 461, "setxattrat": 463, "getxattrat": 464,
        "listxattrat": 465, "removexattrat": 466, "open_tree_attr": 467, "file_getattr": 468,
        "file_setattr": 469,
    }  # fmt: skip
    for arch in ("x86_64", "aarch64", "i386"):
        table = numbers.table(arch)
        assert {name: table[name] for name in newest} == newest
    assert numbers.table("x86_64")["uretprobe"] == 335
    assert numbers.table("x86_64")["uprobe"] == 336


def test_aarch64_has_only_the_newer_forms() -> None:
    absent = "open fork vfork stat lstat poll select pipe dup2 mkdir rename unlink arch_prctl alarm"
    assert not set(absent.split()) & set(numbers.table("aarch64"))
    assert set(absent.split()) <= set(numbers.table("x86_64"))


@pytest.mark.parametrize("arch", ["x86_64", "aarch64", "i386"])
def test_a_number_has_one_name(arch: str) -> None:
    table = numbers.table(arch)
    assert len(set(table.values())) == len(table)


@pytest.mark.parametrize("arch", script_numbers.ARCHITECTURES)
def test_scripts_use_the_same_numbers(arch: str) -> None:
    table = numbers.table(arch)
    used = script_numbers.numbers(arch)
    assert {name: table[name] for name in used} == dict(used)


# -- groups


def test_groups_have_only_calls_that_exist() -> None:
    for name in syscalls.GROUPS:
        assert set(syscalls.members(name)) <= numbers.names(), name


def test_no_group_names_a_call_twice() -> None:
    for name, group in syscalls.GROUPS.items():
        inner = [call for one in group.members for call in syscalls.calls(one, "")]
        assert len(inner) == len(set(inner)), name


def test_every_call_is_thought_of() -> None:
    grouped = {call for name in syscalls.GROUPS for call in syscalls.members(name)}
    ruled = {
        call for name in syscalls.RULES for rule in syscalls.rules(name, "") for call in rule.calls
    }
    assert numbers.names() - grouped - ruled == set()


def test_every_group_says_what_it_is_for() -> None:
    assert all(group.purpose for group in syscalls.GROUPS.values())
    assert all(group.purpose for group in syscalls.RULES.values())
    assert not set(syscalls.GROUPS) & set(syscalls.RULES)
    assert all(name.startswith("@") for name in (*syscalls.GROUPS, *syscalls.RULES))


def test_base_has_what_programs_need_and_nothing_dangerous() -> None:
    base = set(syscalls.members("@base"))
    assert 250 <= len(base & set(numbers.table("x86_64"))) <= 300
    for group in ("@dangerous", "@ptrace", "@io-uring", "@numa", "@ldt", "@obsolete", "@rare"):
        assert not base & set(syscalls.members(group)), group
    assert {"clone3", "socket", "socketpair"}.isdisjoint(base)  # rules decide on these
    assert set(syscalls.members("@landlock")) <= base  # used after the filter is loaded
    assert set(syscalls.members("@init")) <= base


def test_dangerous_covers_the_known_doors() -> None:
    doors = (
        "unshare setns mount umount2 move_mount open_tree open_tree_attr fsopen mount_setattr"
        " chroot pivot_root bpf perf_event_open userfaultfd keyctl add_key request_key"
        " kexec_load kexec_file_load init_module finit_module delete_module acct quotactl"
        " swapon swapoff reboot syslog iopl ioperm clock_settime settimeofday adjtimex"
        " open_by_handle_at fanotify_init lookup_dcookie personality"
    )
    assert set(doors.split()) <= set(syscalls.members("@dangerous"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opneat", r"k: unknown system call 'opneat' \(did you mean openat"),
        ("@bse", r"k: unknown group '@bse' \(did you mean @base"),
        ("zzzzzzzzzz", r"k: unknown system call 'zzzzzzzzzz'$"),
        ("@sockets", r"k: @sockets is a group of rules, not of system calls \(write it into"),
    ],
)
def test_a_wrong_name_for_calls(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        syscalls.calls(name, "k")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("@socket", r"k: unknown group '@socket' \(did you mean @sockets"),
        ("@base", r"k: @base is a group of system calls, not a group of rules \(write it"),
        ("openat", r"k: openat is a system call, not a group of rules \(write it into"),
    ],
)
def test_a_wrong_name_for_rules(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        syscalls.rules(name, "k")


def test_a_rule_means_itself() -> None:
    rule = Rule(calls=("read",))
    assert syscalls.rules(rule, "k") == (rule,)
