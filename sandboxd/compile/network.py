"""What a job's network namespace must be: one that nobody ever used, or one nobody could use.

A network namespace remembers what was done in it: counters, routes it learned, flow labels. So it
serves one sandbox, and making one is the dearest step of all. Where the filter lets a program have
no sockets but unix ones there is nothing it could do in it, and it may serve again.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from sandboxd import plan
from sandboxd.compile import assemble, bpf, carrying, seccomp
from sandboxd.compile.egress import Egress, understood
from sandboxd.compile.numbers import table
from sandboxd.errors import HostError, PolicyError
from sandboxd.host import Host
from sandboxd.plan import SetupPlan
from sandboxd.policy import Policy, Syscalls

AF_UNIX = 1
FAMILIES = range(64)
"""AF_MAX is 46 (include/linux/socket.h); the rest are asked to be sure."""
KINDS = range(16)


def serves_again(policy: Policy, host: Host) -> bool:
    """Whether no program under this policy can have a socket that uses its network namespace."""
    if not host.seccomp or policy.syscalls.abi32 == "allow":
        return False
    if policy.syscalls.oci:
        return False
    # A rule of one's own may allow a single protocol, which is not asked for below.
    if any(not isinstance(rule, str) and rule.action == "allow" for rule in policy.syscalls.rules):
        return False
    return not _has_sockets(policy.syscalls, host.arch)


@lru_cache(maxsize=256)
def _has_sockets(syscalls: Syscalls, arch: str) -> bool:
    """Whether its filter allows a socket other than a unix one: all are asked, so once."""
    programs = seccomp.programs(syscalls, arch)
    machine, number = assemble.AUDIT_ARCH[arch], table(arch)["socket"]
    return any(
        bpf.decide(programs, number, machine, (family, kind, 0)) == bpf.ALLOW
        for family in FAMILIES
        if family != AF_UNIX
        for kind in KINDS
    )


def egress(policy: Policy, host: Host) -> Egress | None:
    """The way out under this policy here; None if there is to be none."""
    if policy.network.mode == "none" and host.place is None:
        return None
    if serves_again(policy, host):
        where = policy.origin("syscalls.rules")
        wants = 'network.mode = "user"' if host.place is None else "a group"
        raise PolicyError(where, f"no rule admits a socket that {wants} is for",
                          hint='"@sockets" among the rules does')  # fmt: skip
    if host.place is not None and not host.place.shared:
        _check_bridge(host)
    if policy.network.mode == "none":
        return None
    kind, path = carrying.program(policy, host)
    found = understood(policy.network)
    caps = msgspec.structs.replace(
        found.caps,
        bytes=found.caps.bytes if host.net_bytes else None,
        rate=found.caps.rate if host.net_rate else None,
    )
    return msgspec.structs.replace(found, kind=kind, program=path, caps=caps)


def _check_bridge(host: Host) -> None:
    """With a filter: without one a member could fill what the whole machine shares."""
    for fact, there in (("bridge", host.bridge), ("nftables", host.nftables)):
        if not there:
            why = host.fault_notes.get(fact, "not probed")
            raise HostError(fact, f"no bridge for a group can be made here: {fact}: {why}",
                            hint='share = "network" has none; `sandboxd doctor`')  # fmt: skip


def network_plan() -> SetupPlan:
    """A process that makes one network namespace for the pool and hands it over."""
    why = "network namespaces are made ahead"
    return SetupPlan(
        steps=(plan.LoopbackUp(why=why),),
        namespaces=plan.namespaces("net"),
        descriptors=("socket",),
        cgroup=False,
        own_uid=False,
        landlock=False,
    )
