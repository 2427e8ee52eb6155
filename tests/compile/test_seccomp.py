"""Programs against three judges: the policy's text read naively, libseccomp, and themselves."""

from __future__ import annotations

import re
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.compile import assemble, bpf, numbers, seccomp, syscalls
from sandboxd.compile.decisions import INTS, decisions
from sandboxd.errors import PolicyError
from sandboxd.policy import Argument, Rule, Syscalls
from sandboxd.script.numbers import numbers as script_numbers
from tests.compile.tiers import TIERS, action, holds, known, meant, shipped

ALL = TIERS | {f"{name}.toml": found for name, found in shipped().items()}
ARCHITECTURES = ("x86_64", "aarch64")
INIT = ("@init",)

everywhere = pytest.mark.parametrize("arch", ARCHITECTURES)
every_tier = pytest.mark.parametrize(
    "name", {policy: name for name, policy in ALL.items()}.values()
)


def answer(
    policy: Syscalls, arch: str, number: int, args: tuple[int, ...] = (0,) * 6, audit: str = ""
) -> int:
    """What a job gets: the answer of all that a tenant and a sandbox of it have loaded."""
    base, own = seccomp.layers(policy, arch)
    return bpf.decide((*base, *own), number, assemble.AUDIT_ARCH[audit or arch], args)


def by_name(policy: Syscalls, name: str, *args: int, arch: str = "x86_64") -> str:
    number = numbers.table(arch)[name]
    return bpf.action_name(answer(policy, arch, number, (*args, *([0] * (6 - len(args))))))


def needs_libseccomp() -> None:
    try:
        pytest.importorskip("seccomp", exc_type=ImportError)
    except pytest.skip.Exception:
        pytest.importorskip("pyseccomp", exc_type=ImportError)


# -- in two parts


@every_tier
@everywhere
def test_a_tenant_leaves_open_what_its_sandboxes_are_made_with(name: str, arch: str) -> None:
    base, own = seccomp.layers(ALL[name], arch)
    audit = assemble.AUDIT_ARCH[arch]
    for call, number in numbers.table(arch).items():
        whole = bpf.decide(seccomp.programs(ALL[name], arch), number, audit)
        open_, closed = bpf.decide(base, number, audit), bpf.decide(own, number, audit)
        if call in syscalls.LAUNCH:
            assert (open_, closed) == (bpf.ALLOW, whole), call
        else:
            assert (open_, closed) == (whole, bpf.ALLOW), call


def test_every_call_of_a_script_is_left_open() -> None:
    assert set(script_numbers("x86_64")) == syscalls.LAUNCH


@everywhere
def test_what_is_not_of_this_architecture_is_killed_by_either_part(arch: str) -> None:
    foreign = "aarch64" if arch == "x86_64" else "x86_64"
    for part in seccomp.layers(TIERS["base"], arch):
        assert bpf.decide(part, 0, assemble.AUDIT_ARCH[foreign]) == bpf.KILL_PROCESS


# -- the tiers


@every_tier
@everywhere
def test_every_number_is_answered_as_written(name: str, arch: str) -> None:
    policy = ALL[name]
    strange = (512, 547, 1 << 30, 1 << 30 | 59, 1 << 31, (1 << 32) - 2, (1 << 32) - 1)
    for number in (*range(601), *strange):
        one = known(policy, arch).get(number)
        for args in seccomp.boundaries(one.rules) if one else [(0,) * 6]:
            got, wanted = answer(policy, arch, number, args), meant(policy, arch, number, args)
            assert got == wanted, (number, one and one.name, args)


@every_tier
@everywhere
def test_libseccomp_agrees(name: str, arch: str) -> None:
    needs_libseccomp()
    assert seccomp.verify(ALL[name], arch) == []


@every_tier
@everywhere
def test_rubbish_above_an_int_changes_nothing(name: str, arch: str) -> None:
    policy = ALL[name]
    for one in decisions(policy, arch):
        ints = {each.index for rule in one.rules for each in rule.args if each.width == 32}
        for args in islice(seccomp.boundaries(one.rules), 500):
            plain = tuple(v & assemble.M32 if i in ints else v for i, v in enumerate(args))
            wanted = answer(policy, arch, one.number, plain)
            for index in ints:
                for rubbish in seccomp.RUBBISH:
                    dirty = (*plain[:index], plain[index] | rubbish, *plain[index + 1 :])
                    assert answer(policy, arch, one.number, dirty) == wanted, (one.name, dirty)


@every_tier
@everywhere
def test_the_upper_half_of_an_int_is_not_even_loaded(name: str, arch: str) -> None:
    policy = ALL[name]
    wide = {
        each.index
        for one in decisions(policy, arch)
        for rule in one.rules
        for each in rule.args
        if each.width == 64
    }
    text = "\n".join(
        line for program in seccomp.programs(policy, arch) for line in bpf.disassemble(program)
    )
    assert {int(index) for index in re.findall(r"args\[(\d)\]\.high", text)} <= wide


@every_tier
def test_foreign_architectures_are_killed(name: str) -> None:
    policy = ALL[name]
    strangers = {"aarch64"} if policy.abi32 == "allow" else {"aarch64", "i386"}
    for stranger in strangers:
        for number in (0, 1, 59, 600, assemble.SKIPPED):
            assert answer(policy, "x86_64", number, audit=stranger) == bpf.KILL_PROCESS
    for stranger in ("x86_64", "i386"):
        assert answer(policy, "aarch64", 0, audit=stranger) == bpf.KILL_PROCESS
    # 32-bit Arm, whatever the policy says: linux/audit.h
    programs = seccomp.programs(policy, "aarch64")
    assert bpf.decide(programs, 1, 0x40000028) == bpf.KILL_PROCESS


@every_tier
@everywhere
def test_a_tier_is_small(name: str, arch: str) -> None:
    (program,) = seccomp.programs(ALL[name], arch)
    assert len(program) % 8 == 0
    assert len(program) // 8 <= 700


@every_tier
@everywhere
def test_init_runs_under_every_tier(name: str, arch: str) -> None:
    calls = {one.name: one for one in decisions(ALL[name], arch)}
    for call in set(syscalls.members("@init")) & set(calls):
        assert calls[call].otherwise == "allow", call
    tioc_sctty = numbers.table(arch)["ioctl"], (0, 0x540E, 0, 0, 0, 0)
    assert answer(ALL[name], arch, *tioc_sctty) == bpf.ALLOW
    flags = 0x100 | 0x4000 | 17  # CLONE_VM | CLONE_VFORK | SIGCHLD
    assert (
        answer(ALL[name], arch, numbers.table(arch)["clone"], (flags, 0, 0, 0, 0, 0)) == bpf.ALLOW
    )


@pytest.mark.parametrize("name", ["base", "judge", "ci", "shell"])
@pytest.mark.parametrize(
    ("call", "args", "wanted"),
    [
        ("read", (), "allow"),
        ("clone3", (), "errno 38"),
        ("io_uring_setup", (), "errno 38"),
        ("unshare", (0x10000000,), "errno 1"),
        ("mount", (), "errno 1"),
        ("open_tree_attr", (), "errno 1"),
        ("bpf", (), "errno 1"),
        ("keyctl", (), "errno 1"),
        ("kexec_load", (), "errno 1"),
        ("statmount", (), "errno 38"),
        ("getxattrat", (), "allow"),
        ("landlock_restrict_self", (), "allow"),
        ("clone", (0x3D0F00,), "allow"),  # pthread_create
        *(("clone", (1 << bit | 17,), "errno 1") for bit in (17, 25, 26, 27, 28, 29, 30)),
        ("clone", (1 << 28 | 1 << 40,), "errno 1"),
        ("socket", (1, 0x80801, 0), "allow"),
        ("socket", (1, 5, 0), "allow"),
        ("socketpair", (1, 2, 0), "allow"),
        ("socket", (2, 1, 6), "allow"),
        ("socket", (2, 0x80002, 0), "allow"),
        ("socket", (2, 2, 1), "allow"),  # ping
        ("socket", (10, 2, 58), "allow"),
        ("socket", (2, 2, 58), "errno 97"),
        ("socket", (2, 3, 1), "errno 97"),  # raw
        ("socket", (2, 1, 132), "errno 97"),  # SCTP
        ("socket", (2, 1, 262), "errno 97"),  # MPTCP
        ("socket", (16, 3, 0), "allow"),  # netlink: route
        ("socket", (16, 3, 12), "errno 97"),  # netlink: netfilter
        ("socket", (17, 3, 0), "errno 97"),  # packet
        ("socket", (38, 5, 0), "errno 97"),  # AF_ALG
        ("socket", (40, 1, 0), "errno 97"),  # vsock
        ("socket", (1 << 32 | 38, 5, 0), "errno 97"),
        ("ioctl", (0, 0x5401), "allow"),
        ("ioctl", (0, 0x5412), "errno 1"),  # TIOCSTI
        ("ioctl", (0, 1 << 32 | 0x5412), "errno 1"),  # CVE-2019-10063
        ("ioctl", (0, 0x541C), "errno 1"),  # TIOCLINUX: CVE-2023-1523
        ("ioctl", (0, 0x5423), "errno 1"),  # TIOCSETD
        ("fcntl", (3, 1), "allow"),
        ("fcntl", (3, 1024), "errno 1"),
        ("fcntl", (3, 7 << 32 | 1026), "errno 1"),
        ("personality", (0xFFFFFFFF,), "allow"),
        ("personality", (0,), "allow"),
        ("personality", (8,), "errno 1"),
        ("prlimit64", (0, 4, 0x7F0000000000, 0), "errno 0"),
        ("prlimit64", (0, 4, 1 << 32, 0), "errno 0"),  # the low half of the pointer is 0
        ("prlimit64", (77, 4, 1 << 32, 0), "errno 1"),
        ("prlimit64", (1 << 32 | 1, 0, 1 << 32, 0), "errno 1"),  # a pid is an int
        ("prlimit64", (77, 4, 0, 1 << 32), "allow"),  # asks
        ("prlimit64", (0, 4, 0, 0x7F0000000000), "allow"),  # asks
        ("prlimit64", (0, 4, 0x7F0000000000, 0x7F0000001000), "allow"),  # sets and asks
        ("prlimit64", (0, 7, 0x7F0000000000, 0), "allow"),
        ("setrlimit", (4, 0x7F0000000000), "errno 0"),
        ("setrlimit", (5, 0x7F0000000000), "allow"),
        ("sync", (), "errno 0"),
        ("rt_sigaction", (), "allow"),
    ],
)
def test_what_all_tiers_have_in_common(
    name: str, call: str, args: tuple[int, ...], wanted: str
) -> None:
    for arch in ARCHITECTURES:
        assert by_name(TIERS[name], call, *args, arch=arch) == wanted, arch


@pytest.mark.parametrize(
    ("call", "args", "wanted"),
    [
        # base, judge, ci, shell: - allowed, P EPERM, S ENOSYS, 0 success, A EAFNOSUPPORT
        ("flock", (), "-0--"),
        ("fcntl", (3, 6), "-0--"),
        ("fcntl", (3, 5), "-P--"),
        ("fcntl", (3, 37), "-0--"),
        ("ptrace", (), "PP--"),
        ("process_vm_readv", (), "PP--"),
        ("pidfd_getfd", (), "PP--"),
        ("kcmp", (), "PP--"),
        ("splice", (), "SS--"),
        ("vmsplice", (), "SS--"),
        ("personality", (0x40000,), "PP--"),
        ("mbind", (), "PPP-"),
        ("move_pages", (), "PPP-"),
        ("get_mempolicy", (), "SS--"),
        ("socket", (16, 3, 4), "AAA-"),
        ("socket", (16, 3, 16), "AAA-"),
    ],
)
def test_what_tiers_differ_in(call: str, args: tuple[int, ...], wanted: str) -> None:
    codes = {"allow": "-", "errno 1": "P", "errno 38": "S", "errno 0": "0", "errno 97": "A"}
    same = {"base": "compile", "judge": "judge-native judge-python judge-java"}
    for arch in ARCHITECTURES:
        for tier, code in zip(("base", "judge", "ci", "shell"), wanted, strict=True):
            files = [f"{file}.toml" for file in (tier, *same.get(tier, "").split())]
            for name in (tier, *(file for file in files if file in ALL)):
                assert codes[by_name(ALL[name], call, *args, arch=arch)] == code, (name, arch)


# -- the 32-bit ABIs


def test_i386_is_held_by_the_same_rules_where_it_is_allowed() -> None:
    policy = TIERS["shell"]
    table = numbers.table("i386")

    def ask(name: str, *args: int) -> str:
        number, padded = table[name], (*args, *([0] * (6 - len(args))))
        return bpf.action_name(answer(policy, "x86_64", number, padded, audit="i386"))

    assert ask("mmap2") == ask("waitpid") == ask("futex_time64") == "allow"
    assert ask("clone", 0x10000000) == ask("umount") == ask("mount") == "errno 1"
    assert ask("socketcall", 1) == ask("clone3") == ask("vm86") == "errno 38"
    assert ask("socket", 38, 5, 0) == "errno 97"
    assert ask("fcntl64", 3, 1024) == ask("ioctl", 0, 0x5412) == "errno 1"
    # The same number means another call on x86-64, and is answered as that.
    assert (table["umount2"], numbers.table("x86_64")["umask"]) == (52, 95)
    assert by_name(policy, "getpeername") == "allow"  # 52 on x86-64


def test_x32_is_killed_and_its_second_numbers_are_unknown() -> None:
    """Linux before 5.4 answered 512 to 547 without the x32 bit, too (commit 6365b842aae4)."""
    for policy in ALL.values():
        for number in (0, 1, 59, 520, 545):
            assert answer(policy, "x86_64", number | 1 << 30) == bpf.KILL_PROCESS
        for number in range(512, 548):
            assert answer(policy, "x86_64", number) == action(policy.default)


def test_a_call_that_a_tracer_skipped_is_not_killed_for() -> None:
    assert by_name(TIERS["ci"], "ptrace") == "allow"
    assert answer(TIERS["ci"], "x86_64", 0xFFFFFFFF) == action("enosys")


# -- any policy


def argument() -> st.SearchStrategy[Argument]:
    ops = ("eq", "ne", "lt", "le", "gt", "ge", "any_bits", "no_bits")

    def build(index: int, op: str, width: int, value: int, mask: int | None) -> Argument:
        bits = (1 << width) - 1
        return Argument(
            index=index,
            op=op,  # type: ignore[arg-type]
            value=value & bits,
            mask=None if mask is None else mask & bits,
            width=width,  # type: ignore[arg-type]
        )

    few = st.sampled_from([0, 1, 2, 6, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, 1 << 63])
    value = few | st.integers(0, (1 << 64) - 1)
    return st.builds(
        build,
        st.integers(0, 5),
        st.sampled_from(ops),
        st.sampled_from([32, 64]),
        value,
        st.none() | value,
    )


ACTIONS = ("allow", "eperm", "enosys", "eafnosupport", "success", "kill")
CALLS = sorted(
    set(numbers.table("x86_64")) - set(INTS) - set(syscalls.members("@init")) - {"restart_syscall"}
)
some = st.lists(st.sampled_from([*CALLS, "@ptrace", "@keyring", "@aio", "@splice"]), max_size=8)


def policies() -> st.SearchStrategy[Syscalls]:
    rule = st.builds(
        Rule,
        calls=st.lists(st.sampled_from(CALLS[::12]), min_size=1, max_size=3).map(tuple),
        args=st.lists(argument(), max_size=3).map(tuple),
        action=st.sampled_from(ACTIONS),
    )
    return st.builds(
        Syscalls,
        default=st.sampled_from(["enosys", "eperm", "kill"]),
        allow=some.map(lambda names: (*INIT, *names)),
        deny=some.map(tuple),
        enosys=some.map(tuple),
        eafnosupport=some.map(tuple),
        kill=some.map(tuple),
        rules=st.lists(rule, max_size=6).map(tuple),
        abi32=st.sampled_from(["kill", "allow"]),
    )


@settings(max_examples=40)
@given(policies(), st.sampled_from(ARCHITECTURES))
def test_any_policy_is_answered_as_written(policy: Syscalls, arch: str) -> None:
    for one in decisions(policy, arch):
        for args in islice(seccomp.boundaries(one.rules), 200):
            assert answer(policy, arch, one.number, args) == meant(policy, arch, one.number, args)
    for number in (401, 600, 1 << 30, 1 << 31, assemble.SKIPPED):
        assert answer(policy, arch, number) == meant(policy, arch, number, (0,) * 6)


@settings(max_examples=15)
@given(policies(), st.sampled_from(ARCHITECTURES))
def test_libseccomp_agrees_on_any_policy(policy: Syscalls, arch: str) -> None:
    needs_libseccomp()
    assert seccomp.verify(policy, arch) == []


@given(argument(), st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=20))
def test_alternatives_mean_the_comparison(one: Argument, seen: list[int]) -> None:
    """What `verify` tells libseccomp: masks and values, at least one of which must match."""
    rules = (Rule(calls=("read",), args=(one,)),)
    edges = [args[one.index] for args in islice(seccomp.boundaries(rules), 50)]
    for value in (*seen, *edges):
        args = (value,) * 6
        matches = any(value & mask == wanted for mask, wanted in seccomp.alternatives(one))
        assert matches == holds(one, args), value


def test_more_rules_than_one_program_holds_are_shared_by_several() -> None:
    """Seccomp programs add up: each answers for its part of the numbers and allows the rest."""
    rules = tuple(
        Rule(
            calls=(call,),
            args=(
                Argument(index=0, op="ge", value=value << 33 | ord(call[-1]), width=64),
                Argument(index=1, op="any_bits", value=1 << value % 64, width=64),
            ),
            action="eperm" if value % 3 else "success",
        )
        for call in ("sendfile", "mmap", "mremap", "msync")
        for value in range(150)
    )
    policy = Syscalls(allow=("@init", "sendfile", "mmap"), rules=rules, abi32="allow")
    programs = seccomp.programs(policy, "x86_64")
    assert len(programs) > 2
    assert all(len(program) // 8 <= bpf.MAX_INSTRUCTIONS for program in programs)
    for number in range(601):
        one = known(policy, "x86_64").get(number)
        for args in islice(seccomp.boundaries(one.rules if one else ()), 300):
            assert answer(policy, "x86_64", number, args) == meant(policy, "x86_64", number, args)
    i386 = {one.number: one for one in decisions(policy, "i386")}
    for number in (19, 52, 90, 144, 163, 187, 500):
        wanted = action(i386[number].otherwise if number in i386 else "enosys")
        assert answer(policy, "x86_64", number, audit="i386") == wanted


@pytest.mark.parametrize(("calls", "rules"), [(("read",), 3000), (("read", "write", "open"), 9000)])
def test_more_rules_than_the_kernel_takes_are_refused(calls: tuple[str, ...], rules: int) -> None:
    every = tuple(
        Rule(calls=(calls[at % len(calls)],), args=(Argument(index=1, op="eq", value=at),))
        for at in range(rules)
    )
    with pytest.raises(PolicyError, match=r"syscalls.rules: more rules .* than the kernel takes"):
        seccomp.programs(Syscalls(rules=every), "x86_64")


# -- for people


def test_a_summary_counts_every_call() -> None:
    found = seccomp.summary(TIERS["base"], "x86_64")
    assert sum(found.counts.values()) == len(numbers.table("x86_64")) == len(found.decisions)
    assert set(found.counts) == {"allow", "rules", "eperm", "enosys", "success"}
    assert found.instructions == tuple(
        len(program) // 8 for program in seccomp.programs(TIERS["base"], "x86_64")
    )


def test_the_same_policy_gives_the_same_bytes() -> None:
    first = seccomp.programs(TIERS["shell"], "x86_64")
    seccomp.programs.cache_clear()
    assert seccomp.programs(TIERS["shell"], "x86_64") == first


def test_verify_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_libseccomp()
    monkeypatch.setitem(assemble.OPERATIONS, "le", (bpf.IF_AT_LEAST, True))  # as if it were lt
    args = (Argument(index=0, op="le", value=9),)
    policy = Syscalls(rules=(Rule(calls=("alarm",), args=args, action="eperm"),))
    found = seccomp.verify(policy, "x86_64")
    assert {(one.number, one.args[0] & assemble.M32, one.ours, one.theirs) for one in found} == {
        (37, 9, "allow", "errno 1")
    }
    seccomp.programs.cache_clear()
