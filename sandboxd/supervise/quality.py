"""Whether the times of a run can be trusted: was the machine busy with somebody else?

A pure judgement of what was measured anyway. A run that waits for CPUs which its own threads keep
busy is no sign of noise, so waiting counts only if the run did not use all the CPUs it may.
"""

from __future__ import annotations

from sandboxd.result import Quality, Usage
from sandboxd.supervise.watch import LONG

NOTICEABLE = 0.05
"""Share of the wall clock time that waiting may take."""
FORCED = 100.0
"""Switches away from a program that wanted to go on, for each second of CPU it used."""
FEW = 10
"""Fewer switches than that say nothing."""
ALL = 0.95
"""Share of its CPUs from which on a run uses them all."""
TOO_SHORT = Quality(reasons=(f"shorter than {LONG:g} s",))
NOT_KNOWN = Quality(reasons=("no cgroup that counts pressure",))


def judge(usage: Usage, cpus: float, *, crowded: bool) -> Quality:
    """`cpus`: how many it may use. `crowded`: another run is pinned to the same."""
    wall, cpu = usage.wall_time, usage.cpu_time
    if wall is None or cpu is None or wall < LONG:
        return TOO_SHORT
    reasons = []
    wanted_more = cpu < ALL * cpus * wall
    pressure = usage.pressure or {}
    for what, waited in pressure.items():
        if waited > NOTICEABLE * wall and (what != "cpu" or wanted_more):
            reasons.append(f"waited {waited:.3f} s for {what}")
    if (usage.cpu_throttled or 0.0) > NOTICEABLE * wall:
        reasons.append(f"throttled for {usage.cpu_throttled:.3f} s by limits.cpus")
    forced = usage.context_switches_forced
    if forced is not None and forced > max(FEW, FORCED * cpu) and wanted_more:
        reasons.append(f"{forced} forced context switches")
    if crowded:
        reasons.append("another run was on the same CPUs")
    if reasons:
        return Quality(grade="noisy", reasons=tuple(reasons))
    return Quality(grade="good") if pressure else NOT_KNOWN
