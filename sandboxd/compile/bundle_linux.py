"""`linux` of a bundle: limits are lowered, paths of /proc are hidden already; the rest is told."""

from __future__ import annotations

import re
from types import MappingProxyType

from sandboxd.compile.document import Node
from sandboxd.compile.granted import Granted
from sandboxd.compile.proc import MASKED

_OWN = ("pid", "network", "mount", "ipc", "uts")
"""Namespaces that every sandbox has new; a bundle that leaves one out means the host's."""
_CPUSET = re.compile("[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*")
_PERIOD = 100_000
"""Microseconds, where a bundle names no period (cpu.max's own)."""
_MOST = (1 << 63) - 1
_WHY = MappingProxyType(
    {
        "uidMappings": "ids outside are the policy's: [identity]",
        "gidMappings": "ids outside are the policy's: [identity]",
        "cgroupsPath": "each run has a cgroup of its own, or none",
        "intelRdt": "not supported",
        "sysctl": "sysctls are not set",
        "mountLabel": "not supported",
        "personality": "not supported",
        "netDevices": "no device of the host is moved",
        "memoryPolicy": "not supported",
    }
)
_WHY_RESOURCES = MappingProxyType(
    {
        "blockIO": "see [[resources.io]] of a policy",
        "hugepageLimits": "a run gets no huge pages where its cgroup can tell",
        "network": "there is no network",
        "rdma": "not supported",
        "unified": "files of a cgroup are not written by name",
    }
)
_WHY_MEMORY = MappingProxyType(
    {
        "reservation": "no memory is set aside",
        "kernel": "counted in limit",
        "kernelTCP": "counted in limit",
        "swappiness": "the machine's own",
        "disableOOMKiller": "a run that is out of memory is killed",
    }
)
_AS_IT_IS = MappingProxyType(
    {"disableOOMKiller": False, "useHierarchy": True, "checkBeforeUpdate": False}
)
"""What need not be asked for."""
_WHY_CPU = MappingProxyType(
    {
        "shares": "see cpu_weight in [resources] of a policy",
        "realtimeRuntime": "no real time", "realtimePeriod": "no real time",
        "burst": "not supported", "mems": "not supported", "idle": "not supported",
    }
)  # fmt: skip


def linux(top: Node, granted: Granted) -> None:
    """All of it but seccomp."""
    node = top.get("linux")
    if node is None:
        return
    _namespaces(node, granted)
    _devices(node, granted)
    _offsets(node.get("timeOffsets"), granted)
    if resources := node.get("resources"):
        _resources(resources, granted)
    for path in node.entries("maskedPaths"):
        if not _is_hidden(path.text, granted, MASKED):
            granted.ignore(path, f"{path.text} is not hidden")
    for path in node.entries("readonlyPaths"):
        if not _is_hidden(path.text, granted, (*MASKED, "sys")):
            granted.ignore(path, f"{path.text} is not made read-only")
    spread = node.get("rootfsPropagation")
    if spread is not None and spread.text not in ("", "private", "rprivate", "slave", "rslave"):
        granted.ignore(spread, "mounts never spread")
    granted.ignore_all(
        node, dict(_WHY), "namespaces", "devices", "timeOffsets", "resources", "maskedPaths",
        "readonlyPaths", "rootfsPropagation", "seccomp",
    )  # fmt: skip


def _is_hidden(path: str, granted: Granted, names: tuple[str, ...]) -> bool:
    """Whether a path of /proc or /sys is out of reach anyway."""
    if f"{path}/".startswith("/sys/"):
        return True
    if not path.startswith("/proc/"):
        return False
    proc = granted.changes.get("root", {}).get("proc", granted.policy.root.proc)
    return proc != "masked" or path.split("/")[2] in names


def _namespaces(node: Node, granted: Granted) -> None:
    found = set()
    for one in node.entries("namespaces"):
        found.add(one.need("type").text)
        if path := one.get("path"):
            granted.ignore(path, "namespaces are always new")
        granted.ignore_all(one, {}, "type", "path")
    if missing := [kind for kind in _OWN if kind not in found]:
        granted.ignore(node.below("namespaces"), f"new as well: {', '.join(missing)}")


def _devices(node: Node, granted: Granted) -> None:
    there = granted.policy.devices.allow
    for one in node.entries("devices"):
        path = one.need("path").text
        if path.removeprefix("/dev/") not in there:
            granted.ignore(one, f"{path} is none of [devices] of {granted.policy.name}")


def _offsets(node: Node | None, granted: Granted) -> None:
    for clock in ("monotonic", "boottime"):
        one = None if node is None else node.get(clock)
        if one is None:
            continue
        if seconds := one.get("secs"):
            granted.set("clock", clock, seconds.number(-(10**9), 10**9), seconds)
        granted.ignore_all(one, {"nanosecs": "whole seconds only"}, "secs")


def _resources(node: Node, granted: Granted) -> None:
    for device in node.entries("devices"):
        allowed = device.get("allow")
        if allowed is not None and allowed.truth:
            granted.ignore(device, "the devices of the policy and no others")
    if memory := node.get("memory"):
        _memory(memory, granted)
    if cpu := node.get("cpu"):
        _cpu(cpu, granted)
    if pids := node.get("pids"):
        most = pids.get("limit")
        if most is not None and most.number(-_MOST, _MOST) > 0:
            granted.lower("processes", min(most.number(), (1 << 31) - 1), most)
        granted.ignore_all(pids, {}, "limit")
    granted.ignore_all(node, dict(_WHY_RESOURCES), "devices", "memory", "cpu", "pids")


def _memory(node: Node, granted: Granted) -> None:
    limit, swap = node.get("limit"), node.get("swap")
    most = -1 if limit is None else limit.number(-_MOST, _MOST)
    if limit is not None and most > 0:
        granted.lower("memory", most, limit)
    if swap is not None and (both := swap.number(-_MOST, _MOST)) > 0 and most > 0:
        more, allowed = max(0, both - most), granted.policy.resources.swap
        if more <= allowed:
            granted.set("resources", "swap", more, swap)
        else:
            granted.ignore(swap, f"{granted.policy.name} allows {allowed} bytes of swap")
    elif swap is not None and swap.value != -1:
        granted.ignore(swap, "counts with a limit only")
    fine = [key for key in _AS_IT_IS if (one := node.get(key)) and one.truth is _AS_IT_IS[key]]
    granted.ignore_all(node, dict(_WHY_MEMORY), "limit", "swap", *fine)


def _cpu(node: Node, granted: Granted) -> None:
    quota, period, cpus = node.get("quota"), node.get("period"), node.get("cpus")
    within = _PERIOD if period is None else period.number(1, _MOST)
    if quota is not None and quota.number(-_MOST, _MOST) > 0:
        granted.lower("cpus", quota.number() / within, quota)
    if cpus is not None and cpus.text:
        if granted.policy.resources.cpuset is not None:
            granted.ignore(cpus, f"{granted.policy.name} names the CPUs itself")
        elif not _CPUSET.fullmatch(cpus.text):
            raise cpus.wrong(f"{cpus.text!r} is no list of CPUs", hint='e.g. "0-3,8"')
        else:
            granted.set("resources", "cpuset", cpus.text, cpus)
    granted.ignore_all(node, dict(_WHY_CPU), "quota", "period", "cpus")
