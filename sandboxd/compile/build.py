"""The entrance of the compiler: (policy, host) -> tenant and setup plan, (job) -> exec plan.

Pure: same input, same plan. What the host cannot do either has no step and stands in `degraded`,
or refuses the job when the policy requires it (`check_required`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

from sandboxd import plan
from sandboxd.compile import (
    enforce,
    etc,
    idmap,
    landlock,
    network,
    resources,
    rootfs,
    seccomp,
    sources,
)
from sandboxd.compile.egress import Egress
from sandboxd.errors import HostError
from sandboxd.host import Host
from sandboxd.image import Config, Image
from sandboxd.job import Job
from sandboxd.plan import ExecPlan, Plan, SetupPlan, Step, TenantPlan
from sandboxd.policy import Policy
from sandboxd.reference import Inputs

ARCHITECTURES = ("x86_64", "aarch64")
TENANT_NAMESPACES = ("pid", "mount", "ipc", "uts", "net")
SANDBOX_NAMESPACES = ("pid", "mount", "ipc", "uts")
DEFAULT_PATH = b"/usr/local/bin:/usr/bin:/bin"


class Compiled(msgspec.Struct, frozen=True, kw_only=True):
    """What depends on policy and host only: made once, used for every job."""

    policy: Policy
    tenant: TenantPlan
    setup: SetupPlan
    network: SetupPlan
    """A sandbox of one purpose: make a network namespace for the pool."""
    network_serves_again: bool
    egress: Egress | None
    """The way out of mode "user"."""
    cgroup_files: dict[str, str]
    cpu_sets: tuple[str, ...]
    """Where its leaf may be pinned to; nothing for anywhere."""
    cpus: float
    """CPU seconds that a run can use in a second, at most."""
    enforcement: dict[str, str]
    degraded: tuple[tuple[str, str], ...]
    root_driver: str
    image: Image | None
    inputs: Inputs | None
    first_job_uid: int
    """The lowest uid of the tenant's for runs to have as their own."""


def compile_policy(policy: Policy, host: Host, *, keep: bool = False) -> Compiled:
    """Everything about a policy on this host; HostError where it cannot be carried out at all.

    `keep`: what a run changes in its root can be had after it.
    """
    if host.arch not in ARCHITECTURES:
        raise HostError("arch", f"no system call numbers for {host.arch}",
                        hint=f"sandboxd knows {' and '.join(ARCHITECTURES)}")  # fmt: skip
    if not host.user_namespaces:
        reason = host.fault_notes.get("user_namespaces", "the kernel refuses them")
        raise HostError("user_namespaces", f"no user namespace can be made here: {reason}",
                        hint="run `sandboxd doctor`")  # fmt: skip
    sources.check(policy, host, rootfs.driver(policy, host))
    ids = idmap.tenant_ids(host)
    image = host.image if policy.root.image else None
    asked, policy = policy, with_user(policy, image)
    setup = setup_plan(policy, host, keep=keep)
    egress = network.egress(policy, host)
    found = enforce.judge(policy, host, ids, setup)
    enforce.check_required(policy, host, found)
    cpu_sets = resources.cpu_sets(policy, host)
    return Compiled(
        policy=asked,
        tenant=tenant_plan(policy, host),
        setup=setup,
        network=network.network_plan(),
        network_serves_again=network.serves_again(policy, host),
        egress=egress,
        cgroup_files=resources.cgroup_files(policy, host),
        cpu_sets=cpu_sets,
        cpus=resources.cpus_at_once(policy, host, cpu_sets),
        enforcement=found.enforcement,
        degraded=found.degraded,
        root_driver=rootfs.driver(policy, host),
        image=image,
        inputs=host.inputs,
        first_job_uid=idmap.first_job_uid(host, ids),
    )


def tenant_plan(policy: Policy, host: Host) -> TenantPlan:
    """What all jobs of one trust domain and root share."""
    ids = idmap.tenant_ids(host)
    why = policy.origin("identity")
    # With a leaf each sandbox has a cgroup namespace of its own; without, the supervisor's cgroup
    # must not show all the same.
    own = TENANT_NAMESPACES if host.cgroup else (*TENANT_NAMESPACES, "cgroup")
    steps: list[Step] = [
        plan.UserNamespace(ids=ids, why=why),
        plan.Namespaces(flags=plan.namespaces(*own), why="every tenant"),
        plan.PrivatePropagation(why="every tenant"),
        plan.NewSession(why="every tenant"),
        *rootfs.template(policy, host),
    ]
    if ids.writer != "self" and not idmap.needs_leaf(policy.identity, ids):
        # Before capabilities go: nothing in this tenant makes a further user namespace.
        steps += [
            plan.WriteFile(path=f"/proc/sys/user/{name}", content=b"%d" % most,
                           why="what the kernel counts up to the caller")
            for name, most in resources.quotas(policy, host)
        ]  # fmt: skip
    steps += [
        plan.DropBounding(why="every tenant"),
        plan.NoNewPrivileges(why="every tenant"),
    ]
    if host.seccomp:
        base, _ = seccomp.layers(policy.syscalls, host.arch, host.kernel)
        steps += [plan.Filter(program=one, why=policy.origin("syscalls")) for one in base]
    return TenantPlan(ids=ids, steps=tuple(steps))


def joined(compiled: Compiled) -> Compiled:
    """The same in the user namespace of another tenant."""
    tenant = compiled.tenant
    steps = tuple(
        msgspec.structs.replace(step, joined=True) if isinstance(step, plan.UserNamespace) else step
        for step in tenant.steps
    )
    return msgspec.structs.replace(compiled, tenant=msgspec.structs.replace(tenant, steps=steps))


def with_user(policy: Policy, image: Image | None) -> Policy:
    """The policy with the ids that an image means its program to be seen with."""
    config = image.config if image is not None else Config()
    if config.uid is None or "user" not in policy.root.config:
        return policy
    identity = msgspec.structs.replace(policy.identity, uid=config.uid, gid=config.gid)
    return msgspec.structs.replace(policy, identity=identity)


def setup_plan(policy: Policy, host: Host, *, keep: bool = False) -> SetupPlan:
    """What each sandbox does before its job is known."""
    ids = idmap.tenant_ids(host)
    descriptors = ["socket", "network"]
    if keep or rootfs.is_received(policy, host):
        descriptors.append("area")
    if rootfs.driver(policy, host) == "fuse":
        descriptors.append("fuse")
    if host.cgroup:
        descriptors.append("cgroup")
    leaf = idmap.needs_leaf(policy.identity, ids)
    steps: list[Step] = [plan.JoinNetwork(descriptor=1, why=policy.origin("network.mode"))]
    if leaf:
        steps.append(plan.KeepProc(why="what the kernel counts up to the caller"))
    steps += rootfs.sandbox(policy, host, tuple(descriptors))
    if policy.clock.boottime or policy.clock.monotonic:
        steps.append(
            plan.NewTimeNamespace(monotonic=policy.clock.monotonic, boottime=policy.clock.boottime,
                                  why=policy.origin("clock"))
        )  # fmt: skip
    if host.cgroup:
        steps.append(plan.NewCgroupNamespace(why="every sandbox"))
    if policy.root.proc == "none":
        steps.append(plan.Tmpfs(target="/proc", size=4096, mode=0o555,
                                why=policy.origin("root.proc")))  # fmt: skip
    steps += [
        _hostname(policy, host),
        plan.NewSession(why="every sandbox"),
        *idmap.steps(
            policy.identity, ids, resources.quotas(policy, host), policy.origin("identity")
        ),
        *resources.rlimits(policy, host),
    ]
    steps += [plan.DropCapabilities(why="every sandbox"), plan.Hide(why="every sandbox")]
    if host.landlock:
        steps.append(landlock.step(policy, host))
    if host.seccomp:
        _, own = seccomp.layers(policy.syscalls, host.arch, host.kernel)
        steps += [plan.Filter(program=one, why=policy.origin("syscalls")) for one in own]
    return SetupPlan(
        steps=tuple(steps),
        namespaces=plan.namespaces(*SANDBOX_NAMESPACES),
        descriptors=tuple(descriptors),
        cgroup=host.cgroup is not None,
        own_uid=idmap.own_uid(policy.identity, ids),
        landlock=host.landlock > 0,
    )


def _hostname(policy: Policy, host: Host) -> Step:
    if host.place is not None:
        return plan.Hostname(name=host.place.name, why=etc.GROUP)
    return plan.Hostname(name=policy.identity.hostname, why=policy.origin("identity.hostname"))


def exec_plan(job: Job, compiled: Compiled, environ: Mapping[bytes, bytes]) -> ExecPlan:
    """What is done for one job in a sandbox that is ready."""
    policy = compiled.policy
    meant = compiled.image.config if compiled.image else Config()
    wanted = policy.root.config
    env = environment(job, policy, environ, meant.env if "env" in wanted else ())
    argv = tuple(os.fsencode(word) for word in job.argv)
    steps: list[Step] = []
    if job.files or job.collect:
        steps.append(plan.ShareFiles(directory="/box", wait=bool(job.files), why="files"))
    home = meant.cwd if "workdir" in wanted and meant.cwd is not None else "/box"
    cwd = os.fsencode(home if job.cwd is None else job.cwd)
    steps.append(plan.ChangeDir(path=cwd, why="cwd"))
    steps.append(
        plan.Exec(
            programs=candidates(argv[0], env.get(b"PATH", DEFAULT_PATH)),
            argv=argv,
            env=tuple(name + b"=" + value for name, value in env.items()),
            landlock=compiled.setup.landlock,
            terminal=job.terminal is not None,
            time_namespace=bool(policy.clock.boottime or policy.clock.monotonic),
            why="argv",
        )
    )
    return ExecPlan(steps=tuple(steps))


def environment(
    job: Job,
    policy: Policy,
    environ: Mapping[bytes, bytes],
    meant: tuple[tuple[str, str], ...] = (),
) -> dict[bytes, bytes]:
    """What the policy inherits, what it sets, what the image means (`meant`), the job's own."""
    env: dict[bytes, bytes] = {}
    for inherited in map(os.fsencode, policy.environment.inherit):
        if inherited in environ:
            env[inherited] = environ[inherited]
    for key, text in (*policy.environment.set.items(), *meant, *job.env.items()):
        env[encoded(key)] = encoded(text)
    return env


def encoded(text: str | bytes) -> bytes:
    return os.fsencode(text)


def candidates(program: bytes, path: bytes) -> tuple[bytes, ...]:
    """The paths to try, as execvp(3) does; an empty entry of PATH is the working directory."""
    if b"/" in program:
        return (program,)
    return tuple((folder or b".") + b"/" + program for folder in path.split(b":"))


def build(job: Job, policy: Policy, host: Host, environ: Mapping[bytes, bytes]) -> Plan:
    """The whole plan of one job, for `sandboxd plan`."""
    compiled = compile_policy(policy, host, keep=bool(job.keep_root))
    return Plan(
        tenant=compiled.tenant,
        setup=compiled.setup,
        exec=exec_plan(job, compiled, environ),
        cgroup_files=compiled.cgroup_files,
        cpu_sets=compiled.cpu_sets,
        enforcement=compiled.enforcement,
        degraded=compiled.degraded + job.ignored,
    )
