"""Mistakes in a [syscalls] are named with their place; what decided on a call is said."""

from __future__ import annotations

import pytest

from sandboxd.compile import assemble, bpf, numbers, seccomp
from sandboxd.compile.decisions import decisions, problems
from sandboxd.errors import PolicyError, PolicyErrors
from sandboxd.policy import Argument, Rule, Syscalls
from tests.compile.tiers import TIERS


def by_name(policy: Syscalls, name: str, *args: int) -> str:
    number, arch = numbers.table("x86_64")[name], assemble.AUDIT_ARCH["x86_64"]
    programs = seccomp.programs(policy, "x86_64")
    return bpf.action_name(bpf.decide(programs, number, arch, args))


def rule(call: str = "ioctl", value: int = 1, width: int = 32, mask: int | None = None) -> Rule:
    one = Argument(index=1, op="eq", value=value, width=width, mask=mask)  # type: ignore[arg-type]
    return Rule(calls=(call,), args=(one,))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Syscalls(allow=("@base", "opneat")), r"syscalls.allow\[1\]: unknown .*mean openat"),
        (Syscalls(kill=("@sockets",)), r"syscalls.kill\[0\]: @sockets is a group of rules"),
        (Syscalls(rules=("@sockets", "@base")), r"syscalls.rules\[1\]: @base is a group of system"),
        (Syscalls(rules=(rule("iocttl"),)), r"syscalls.rules\[0\]: unknown .*mean ioctl"),
        (Syscalls(rules=(Rule(calls=()),)), r"syscalls.rules\[0\]: a rule without calls"),
        (Syscalls(rules=(rule(width=64),)), r"rules\[0\].args\[0\]: argument 1 of ioctl is an int"),
        (
            Syscalls(rules=(rule(value=1 << 32),)),
            r"args\[0\]: 0x100000000 does not fit into 32 bits",
        ),
        (Syscalls(rules=(rule(mask=-(1 << 40)),)), r"does not fit into 32 bits"),
        (
            Syscalls(allow=()),
            r"syscalls.allow: .* first process .* refused read \(default\), .* and \d+ more \(",
        ),
        (
            Syscalls(kill=("wait4",)),
            r"would be refused wait4 \(kill: wait4\) ",
        ),
        (
            Syscalls(rules=(Rule(calls=("kill",), action="eperm"),)),
            r"would be refused kill \(rules: \[0\]\) ",
        ),
    ],
)
def test_mistakes_are_named_with_their_place(policy: Syscalls, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        seccomp.programs(policy, "x86_64")


def test_all_mistakes_come_at_once() -> None:
    policy = Syscalls(allow=("@base", "opneat", "@bse"), rules=("@x", rule("iocttl")))
    assert [error.where for error in problems(policy)] == [
        "syscalls.allow[1]", "syscalls.allow[2]", "syscalls.rules[0]", "syscalls.rules[1]"
    ]  # fmt: skip
    with pytest.raises(PolicyErrors) as caught:
        seccomp.programs(policy, "x86_64")
    assert len(caught.value.errors) == 4
    assert problems(Syscalls()) == ()


def test_a_rule_that_lets_init_through_is_enough() -> None:
    policy = Syscalls(
        deny=("ioctl",),
        rules=(Rule(calls=("ioctl",), args=(Argument(index=1, op="eq", value=0x540E),)),),
    )
    assert problems(policy) == ()


def test_calls_of_another_architecture_are_skipped() -> None:
    policy = Syscalls(allow=("@base",), kill=("modify_ldt",), rules=(rule("socketcall"),))
    assert "modify_ldt" not in {one.name for one in decisions(policy, "aarch64")}
    assert by_name(policy, "modify_ldt") == "kill process"


def test_negative_values_are_twos_complement() -> None:
    policy = Syscalls(rules=(rule("ioctl", value=-1), Rule(calls=("ioctl",), action="enosys")))
    assert by_name(policy, "ioctl", 0, 0xFFFFFFFF) == "allow"
    assert by_name(policy, "ioctl", 0, 0x7FFFFFFF) == "errno 38"


def test_decisions_say_which_entry_decided() -> None:
    because = {one.name: one.because for one in decisions(TIERS["judge"], "x86_64")}
    assert because["read"] == "allow: @base"
    assert because["keyctl"] == "deny: @dangerous"
    assert because["flock"] == "rules: @no-locks"
    assert because["socket"] == "eafnosupport: @socket-create"
    assert because["splice"] == "default"


def test_later_groups_of_rules_open_more() -> None:
    """An inheriting policy adds to the end; nothing before it may have closed the door already."""
    policy = Syscalls(rules=(*Syscalls().rules, "@sockets-diag", "@personality-aslr"))
    assert by_name(policy, "socket", 16, 3, 4) == by_name(policy, "personality", 0x40000) == "allow"
    assert by_name(policy, "socket", 38, 5, 0) == "errno 97"
    assert by_name(policy, "personality", 8) == "errno 1"
