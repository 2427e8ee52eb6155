"""How a sandbox sees /proc."""

from __future__ import annotations

from sandboxd import plan
from sandboxd.host import Host
from sandboxd.plan import Attributes, Step
from sandboxd.policy import Policy

# What moby's default profile masks and sets read-only (oci/defaults.go), as far as /proc goes.
MASKED = ("acpi", "asound", "kcore", "keys", "key-users", "latency_stats", "timer_list",
          "timer_stats", "sched_debug", "scsi", "interrupts", "kmsg", "kallsyms", "kpagecount",
          "kpageflags", "kpagecgroup", "vmallocinfo", "slabinfo", "zoneinfo", "pagetypeinfo",
          "config.gz", "bus", "fs", "irq", "sysrq-trigger", "tty", "driver")  # fmt: skip
DIRECTORIES_OF_PROC = frozenset({"acpi", "asound", "scsi", "bus", "fs", "irq", "tty", "driver"})


def steps(policy: Policy, host: Host, root: str, empty: str) -> list[Step]:
    """`empty` is a directory with nothing in it, to hide others behind."""
    why = policy.origin("root.proc")
    found: list[Step] = [plan.Proc(target=f"{root}/proc", subset=policy.root.proc != "masked",
                                   why=why)]  # fmt: skip
    if policy.root.proc != "masked":
        return found
    for name in MASKED:
        if name in host.proc_entries:
            source = empty if name in DIRECTORIES_OF_PROC else "/dev/null"
            found.append(plan.Bind(source=source, target=f"{root}/proc/{name}", why=why,
                                   attributes=Attributes.NONE))  # fmt: skip
    found.append(plan.Bind(source=f"{root}/proc/sys", target=f"{root}/proc/sys", why=why))
    return found
