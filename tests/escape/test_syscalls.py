"""Parts of the kernel that no job needs: each call is made as an exploit would begin with it."""

from __future__ import annotations

import platform
from typing import NamedTuple

import pytest

from tests.escape.attack import attack, attack_c, every_policy, plan, without


class Attempt(NamedTuple):
    """`answers` are those of the filter; `bare` what the kernel itself would have said."""

    calls: str
    answers: frozenset[str]
    bare: frozenset[str]


def attempt(calls: str, bare: str = "", answers: str = "EPERM") -> Attempt:
    return Attempt(calls, frozenset(answers.split()), frozenset(bare.split()))


# "ok" among `bare`: any program may do it where nothing filters, so the filter is the layer that
# holds. Otherwise a capability is asked for, too, or this kernel was built without it.
ATTEMPTS = {
    # CVE-2020-8835, CVE-2021-3490, CVE-2022-23222: the verifier; bpf(2)
    "bpf": attempt('("bpf", 0, room, 120), ("bpf", 5, room, 120)', "EPERM EINVAL"),
    # CVE-2013-2094, CVE-2023-2235; perf_event_open(2)
    "perf": attempt('("perf_event_open", room, 0, -1, -1, 0)', "EACCES ENOENT EINVAL ok"),
    # the race extender of many exploits, CVE-2016-2384 on; userfaultfd(2)
    "userfaultfd": attempt('("userfaultfd", 0o2000001)', "ok"),
    # CVE-2022-29582, CVE-2023-2598: calls that no filter sees; io_uring(7)
    "io_uring": attempt(
        '("io_uring_setup", 4, params), ("io_uring_enter", 0, 0, 0, 0, None, 0),'
        ' ("io_uring_register", 0, 0, None, 0)',
        "ok EPERM ENOSYS EOPNOTSUPP EBADF ENOTSUP",
        answers="ENOSYS",
    ),
    # CVE-2016-0728; keyrings of one user are everybody's: keyrings(7)
    "keyrings": attempt(
        '("keyctl", 0, -3, 0), ("keyctl", 0, -4, 1), ("keyctl", 1, b"name"),'
        ' ("add_key", b"user", b"name", b"secret", 6, -4),'
        ' ("request_key", b"user", b"name", None, -4)',
        "ok ENOKEY",
    ),
    # shocker.c: files by number, past every mount; open_by_handle_at(2)
    "handles": attempt(
        '("name_to_handle_at", -100, b"/", handle, room, 0),'
        ' ("name_to_handle_at", -100, b"/etc", handle, room, 0x200),'
        ' ("open_by_handle_at", 0, handle, 0)',
        "EOVERFLOW EPERM ok EOPNOTSUPP EINVAL",
    ),
    # sees what others open, whole mounts at a time; fanotify(7)
    "fanotify": attempt('("fanotify_init", 0x200, 0)', "ok EPERM"),
    # kexec_load(2), init_module(2)
    "kernel code": attempt(
        '("kexec_load", 0, 0, None, 0), ("kexec_file_load", -1, -1, 0, b"", 0),'
        ' ("init_module", room, 1, b""), ("finit_module", -1, b"", 0), ("delete_module", b"x", 0)',
        "EPERM ENOSYS",
    ),
    # clock_settime(2), adjtimex(2): the wall clock is everybody's
    "clocks": attempt(
        '("clock_settime", 0, now), ("settimeofday", now, None), ("adjtimex", set_tick),'
        ' ("clock_adjtime", 0, set_tick)',
        "EPERM",
    ),
    # reboot(2): LINUX_REBOOT_CMD_CAD_OFF, harmless should it get through
    "reboot": attempt('("reboot", 0xfee1dead, 0x28121969, 0, None)', "EPERM"),
    "names": attempt('("sethostname", b"x", 1), ("setdomainname", b"x", 1)', "EPERM"),
    "swap": attempt('("swapon", b"/tmp/x", 0), ("swapoff", b"/tmp/x")', "EPERM"),
    # acct(2): appends to a file of the caller's choice in the name of the kernel
    "accounting": attempt('("acct", b"/tmp/x"), ("acct", None)', "EPERM"),
    "quotas": attempt(
        '("quotactl", 0x800002, b"/dev/null", 0, room), ("quotactl_fd", 0, 0, 0, room)',
        "EPERM ENOENT ENOTBLK ENOSYS EINVAL ENODEV EACCES",
    ),
    # READ_IMPLIES_EXEC, MMAP_PAGE_ZERO (CVE-2009-1895); personality(2)
    "personality": attempt(
        '("personality", 0x400000), ("personality", 0x100000), ("personality", 8)', "ok"
    ),
    "kernel log": attempt('("syslog", 3, room, 64), ("syslog", 10, room, 64)', "EPERM"),
    # memory that is merged tells by its timing what other jobs have: prctl(2), madvise(2), ksm.rst
    "merging": attempt('("prctl", 67, 1, 0, 0, 0), ("madvise", page, 4096, 12)', "ok EINVAL"),
    "terminal": attempt('("vhangup",)', "EPERM"),
    # CVE-2022-0185's way in, and namespaces seen from outside: fsopen(2), statmount(2)
    "mount queries": attempt(
        '("statmount", room, room, 8, 0), ("listmount", room, room, 1, 0),'
        ' ("lsm_list_modules", room, room, 0), ("memfd_secret", 0),'
        ' ("process_madvise", 0, room, 1, 4, 0), ("process_mrelease", 0, 0)',
        "EINVAL EPERM E2BIG ok EBADF ENOSYS",
        answers="ENOSYS",
    ),
}
ON_X86 = {
    # CVE-2015-5157, CVE-2017-17053; ioperm(2): CAP_SYS_RAWIO
    "ports": attempt('("iopl", 3), ("ioperm", 0, 1, 1)', "EPERM ENOSYS"),
    "removed calls": attempt(
        '("uselib", b"/tmp/x"), ("_sysctl", room), ("sysfs", 3), ("nfsservctl", 0, 0, 0),'
        ' ("ustat", 0, room)',
        "ok ENOSYS EINVAL EACCES",
        answers="ENOSYS",
    ),
}
X86 = platform.machine() == "x86_64"
ALL = {**ATTEMPTS, **ON_X86} if X86 else ATTEMPTS
MAKING = """
room = ctypes.create_string_buffer(4096)
params = ctypes.create_string_buffer(120)
handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
now = struct.pack("qq", int(time.time()), 0)
held = mmap.mmap(-1, 4096)
page = ctypes.addressof(ctypes.c_char.from_buffer(held))
set_tick = ctypes.create_string_buffer(struct.pack("I", 0x4000), 208)
for one in (CALLS,):
    found[repr(one[:2])] = tried(call, *one)
"""


def making(calls: str) -> str:
    return MAKING.replace("CALLS", calls)


@every_policy
@pytest.mark.parametrize("name", ALL)
async def test_calls_no_job_needs(name: str, policy: str) -> None:
    """What many exploits begin with; each entry above names an incident or a manual page.

    Countermeasure: seccomp, an allowlist. EPERM where programs probe, ENOSYS where libc has an
    older call to fall back to. Second layer for most: no capability, in no namespace.
    """
    found = await attack(policy, making(ALL[name].calls))
    assert set(found.values()) <= ALL[name].answers, found


@pytest.mark.parametrize("name", [name for name, one in ALL.items() if "ok" in one.bare])
async def test_calls_no_job_needs_without_filter(name: str) -> None:
    """Without the filter they work, or the kernel refuses them in words of its own."""
    found = await attack("base", making(ALL[name].calls), weaken=without(plan.Filter))
    assert set(found.values()) <= ALL[name].bare, found
    assert set(found.values()) != ALL[name].answers, found


@every_policy
async def test_debugging_calls(policy: str) -> None:
    """ptrace(2), process_vm_writev(2): CVE-2019-13272, CVE-2014-4699.

    Countermeasures: refused but for the policies that are there for debugging; those may look at
    the job's own processes (test_init.py tries its init).
    """
    calls = '("ptrace", 0, 0, 0, 0), ("process_vm_readv", os.getpid(), room, 0, room, 0, 0)'
    found = await attack(policy, making(calls))
    assert set(found.values()) == ({"ok"} if policy == "shell" else {"EPERM"})


@pytest.mark.skipif(not X86, reason="x86 only")
@pytest.mark.parametrize("policy", ["base", "judge-native", "agent"])
async def test_segment_descriptors(policy: str) -> None:
    """modify_ldt(2): CVE-2015-3290, CVE-2017-17053. Countermeasure: seccomp."""
    calls = '("modify_ldt", 0, room, 16)'
    assert set((await attack(policy, making(calls))).values()) == {"EPERM"}
    bare = await attack(policy, making(calls), weaken=without(plan.Filter))
    assert set(bare.values()) <= {"ok", "ENOSYS"}


OTHER_ABI = r"""
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
static long int80(long nr, long a, long b, long c) {
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(nr), "b"(a), "c"(b), "d"(c)
                     : "memory", "r8", "r9", "r10", "r11");
    return result;
}
int main(int count, char **words) {
    long first = count > 2 ? strtol(words[2], 0, 0) : 0;
    if (!strcmp(words[1], "x32")) {
        syscall(0x40000000 + SYS_getpid);
        printf("%d\n", errno);
    } else {
        printf("%ld\n", int80(strtol(words[1], 0, 0), first, 0, 0));
    }
}
"""
I386_GETPID, I386_UNSHARE, I386_SOCKETCALL, I386_KEYCTL, I386_CLONE = (
    "20",
    "310",
    "102",
    "288",
    "120",
)


@pytest.mark.skipif(not X86, reason="x86 only")
@pytest.mark.needs("gcc")
@pytest.mark.parametrize("policy", ["base", "judge-native", "agent"])
async def test_calls_of_32_bit_programs(policy: str) -> None:
    """int 0x80: other numbers, so a filter for 64 bits alone is passed; CVE-2009-0835.

    Countermeasure: the filter looks at the ABI first, and kills.
    """
    for number in (I386_GETPID, I386_UNSHARE):
        result = await attack_c(policy, OTHER_ABI, number)
        assert result.status == "syscall_denied"
        assert result.stdout == b""
    bare = await attack_c(policy, OTHER_ABI, I386_GETPID, weaken=without(plan.Filter))
    assert bare.stdout.strip() in (b"2", b"-38")


@pytest.mark.skipif(not X86, reason="x86 only")
@pytest.mark.needs("gcc")
async def test_calls_of_32_bit_programs_where_they_are_allowed() -> None:
    """A policy for 32-bit programs holds them by the same rules, under their numbers.

    socketcall(2) hides its arguments from filters, so it is not there.
    """
    expected = {
        (I386_GETPID, "0"): b"2",
        (I386_UNSHARE, "0x10000000"): b"-1",
        (I386_CLONE, "0x10000011"): b"-1",
        (I386_KEYCTL, "0"): b"-1",
        (I386_SOCKETCALL, "1"): b"-38",
    }
    for (number, argument), answer in expected.items():
        result = await attack_c("shell", OTHER_ABI, number, argument)
        assert result.stdout.strip() == answer, (number, result.status, result.stdout)


@pytest.mark.skipif(not X86, reason="x86 only")
@pytest.mark.needs("gcc")
@every_policy
async def test_calls_of_x32_programs(policy: str) -> None:
    """x32: the same ABI word as 64 bits and bit 30 in the number; seccomp(2), CVE-2014-0038.

    Countermeasure: every number with that bit kills.
    """
    result = await attack_c(policy, OTHER_ABI, "x32")
    assert result.status == "syscall_denied"
    bare = await attack_c(policy, OTHER_ABI, "x32", weaken=without(plan.Filter))
    assert bare.status == "ok"
