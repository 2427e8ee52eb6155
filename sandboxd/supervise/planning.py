"""What would be done for a job here, without doing it: the plan, and its system calls as text."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from sandboxd.compile.build import build
from sandboxd.errors import HostError
from sandboxd.host import Host
from sandboxd.job import Job
from sandboxd.plan import Plan
from sandboxd.policy import Policy
from sandboxd.probe.host import probe
from sandboxd.script.init import exec_script, setup_image
from sandboxd.script.listing import listing
from sandboxd.script.numbers import ARCHITECTURES
from sandboxd.script.zygote import tenant_image
from sandboxd.supervise import inputs
from sandboxd.supervise.seen import host_for


class Planned(msgspec.Struct, frozen=True):
    """A plan and the host it was made for."""

    plan: Plan
    host: Host

    def scripts(self) -> Iterator[tuple[str, list[tuple[int, str]]]]:
        """Part of the plan -> (number of the step or -1, line) for each of its system calls."""
        arch = self.host.arch
        if arch not in ARCHITECTURES:
            raise HostError("arch", f"scripts have no system call numbers for {arch}")
        yield "tenant", list(listing(tenant_image(arch, self.plan.tenant), arch))
        yield "setup", list(listing(setup_image(arch, self.plan.setup), arch))
        image, content = exec_script(arch, self.plan.exec)
        image = image._replace(content=content, memory=len(content), marks={})
        yield "exec", list(listing(image, arch))


def planned(job: Job, policy: Policy, cgroup: str | None = None) -> Planned:
    """The plan of a job on this machine, which is looked at as for a run."""
    return plan_on(job, policy, probe(cgroup=cgroup))


def plan_on(job: Job, policy: Policy, host: Host) -> Planned:
    """The plan of a job on a machine, with what is attached for its references."""
    split = inputs.split(job)
    with inputs.held(split.attached) as attached:
        host = msgspec.structs.replace(host_for(policy, host), inputs=attached)
        return Planned(build(split.job, policy, host, os.environb), host)
