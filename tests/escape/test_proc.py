"""/proc and the kernel's settings: no host, no other job, no knob."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from tests.escape.attack import (
    CALLER,
    Job,
    Mount,
    achieved,
    any_uid,
    attack,
    every_policy,
    find,
    finished,
    live,
    open_runner,
    plan,
    probe,
    python,
    without,
)

SETTINGS = """
for name in ("kernel/core_pattern", "kernel/modprobe", "kernel/hotplug", "kernel/poweroff_cmd",
             "kernel/hostname", "kernel/domainname", "kernel/panic", "kernel/sysrq",
             "kernel/randomize_va_space", "kernel/yama/ptrace_scope", "kernel/shmmax",
             "kernel/msgmax", "kernel/sem", "kernel/ns_last_pid", "vm/overcommit_memory",
             "vm/drop_caches", "vm/panic_on_oom", "fs/suid_dumpable", "fs/file-max",
             "fs/mqueue/queues_max", "fs/binfmt_misc/register", "net/ipv4/ip_forward",
             "net/ipv4/ip_unprivileged_port_start", "net/ipv4/ping_group_range"):
    found[name] = writes("/proc/sys/" + name, b"1")
for name in ("sysrq-trigger", "self/setgroups", "self/uid_map", "self/gid_map", "1/cgroup", "kcore",
             "irq/0/smp_affinity", "acpi/wakeup", "mtrr", "bus/pci"):
    found[name] = writes("/proc/" + name, b"1")
for name in ("kernel/uevent_helper", "kernel/mm/ksm/run", "power/state", "fs/cgroup/release_agent"):
    found[name] = writes("/sys/" + name, b"1")
"""


@every_policy
async def test_writing_settings(policy: str) -> None:
    """core_pattern, modprobe, sysrq-trigger, uevent_helper: CVE-2022-0492's kind, CVE-2025-31133.

    A program named there runs as root of the host. Countermeasures: /proc with processes only, or
    /proc/sys read-only and the rest masked; no /sys; the owner of these files is no one here.
    """
    found = await attack(policy, SETTINGS)
    assert set(found.values()) <= {"EACCES", "EROFS", "ENOENT", "EPERM", "EISDIR"}, found


async def test_writing_settings_as_the_owner_of_the_namespaces() -> None:
    """Some settings belong to namespaces, and whoever is root of these may write them.

    With its capabilities kept, a job is held by the read-only mount of /proc/sys alone.
    """
    powerful = (plan.Filter, plan.DropCapabilities, plan.DropBounding, plan.BecomeUser)
    policy = find("judge-native", root=find("base").root)
    body = "found['shmmax'] = writes('/proc/sys/kernel/shmmax', b'1')"
    # Landlock would refuse as well: it allows to write below /proc, but not for its sake.
    held = await attack(policy, body, weaken=without(*powerful))
    assert held["shmmax"] == "EROFS"


MASKED = """
for name in ("kcore", "keys", "key-users", "timer_list", "sched_debug", "kmsg", "kallsyms",
             "kpagecount", "kpageflags", "kpagecgroup", "vmallocinfo", "slabinfo", "zoneinfo",
             "pagetypeinfo", "config.gz", "interrupts"):
    found[name] = reads("/proc/" + name)
for name in ("acpi", "bus", "fs", "irq", "tty", "driver", "scsi", "asound"):
    try:
        found[name] = "".join(os.listdir("/proc/" + name))
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
found["modules"] = reads("/sys/kernel/notes")
"""


@every_policy
async def test_reading_the_kernels_memory_and_map(policy: str) -> None:
    """/proc/{kcore,kallsyms,keys,...}: what Docker masks as well, CVE-2025-52565 on racing that.

    Countermeasures: the masks are mounted before the job exists, from descriptors of the
    template; some policies have no such files at all (subset=pid).
    """
    found = await attack(policy, MASKED)
    assert set(found.values()) <= {"", "ENOENT", "EACCES", "EPERM"}, found


PROCESSES = """
found["pids"] = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
found["self"] = os.getpid()
found["parent"] = os.getppid()
answers = {tried(os.kill, pid, 0) for pid in range(3, 4000)}
found["signals"] = sorted(answers)
found["host"] = [tried(os.kill, HOST, 0), tried(call, "pidfd_open", HOST, 0),
                 tried(os.getpgid, HOST), tried(os.sched_getaffinity, HOST),
                 tried(os.getpriority, 0, HOST) if hasattr(os, "getpriority") else "ESRCH"]
found["names"] = [reads(f"/proc/{pid}/cmdline") for pid in found["pids"] if pid != found["self"]]
"""


@every_policy
async def test_processes_of_the_host(policy: str) -> None:
    """Seeing, signalling and rescheduling processes of the same user: pid_namespaces(7).

    Countermeasures: a PID namespace, and a /proc mounted in it. The supervisor's number here is
    that of nobody there.
    """
    found = await attack(policy, PROCESSES.replace("HOST", str(os.getpid())))
    assert found["pids"] == [1, found["self"]]
    assert found["parent"] == 1
    assert found["signals"] == ["ESRCH"]
    assert set(found["host"]) == {"ESRCH"}
    assert found["names"] == [""]  # init has no stack, and there it would be


@any_uid
@pytest.mark.parametrize("ids", ["subordinate", "single"])
async def test_processes_of_another_job(policy: str, ids: str) -> None:
    """Another live job's arguments, environment and memory: with own uids, and with one for all.

    Countermeasures: PID namespaces; with subordinate ids a uid each as well.
    """
    host = probe()
    if ids == "single":
        host = msgspec.structs.replace(host, subuid=None, subgid=None)
    async with open_runner(slots=2, host=host) as runner:
        victim = "secret = 'correct-horse'\nready()\nfound['pids'] = os.listdir('/proc')"
        async with live(runner, policy, victim) as other:
            body = (
                PROCESSES.replace("HOST", str(os.getpid()))
                + """
found["secrets"] = [name for pid in found["pids"] for name in ("cmdline", "environ", "mem")
                    if "horse" in reads(f"/proc/{pid}/{name}") and pid != os.getpid()]
"""
            )
            found = achieved(await runner.run(Job(argv=python(body), policy=policy)))
            assert found["pids"] == [1, found["self"]]
            assert found["signals"] == ["ESRCH"]
            assert found["secrets"] == []
            theirs = await finished(other)
            assert sorted(filter(str.isdigit, theirs["pids"])) == ["1", "2"]


@pytest.mark.parametrize("delegated", [True, False])
@every_policy
async def test_cgroup_of_the_host(policy: str, delegated: bool) -> None:
    """/proc/self/cgroup names the session, unit or pod of the supervisor: cgroup_namespaces(7).

    Countermeasure: a cgroup namespace, whose root is the job's own cgroup.
    """
    host = probe()
    if not delegated:
        host = msgspec.structs.replace(host, cgroup=None, cgroup_why_not="for the test")
    elif host.cgroup is None:
        pytest.skip(f"needs cgroup: {host.cgroup_why_not}")
    found = await attack(policy, "found['own'] = reads('/proc/self/cgroup')", host=host)
    assert {line.partition(":")[2].partition(":")[2] for line in found["own"].splitlines()} == {"/"}


@pytest.mark.needs("cgroup")
async def test_cgroup_of_the_host_without_its_namespace() -> None:
    body = "found['own'] = reads('/proc/self/cgroup')"
    found = await attack("base", body, weaken=without(plan.NewCgroupNamespace))
    assert Path(os.environ["SANDBOXD_CGROUP"]).name in found["own"]


@pytest.mark.parametrize("memfd", [True, False])
async def test_command_line_of_init(memfd: bool) -> None:
    """/proc/1/cmdline is readable to all, so it must not tell where sandboxd lies: proc(5).

    Countermeasures: the machine is started under a name of its own; so must the executor be.
    """
    host = msgspec.structs.replace(probe(), memfd_exec=memfd)
    found = await attack("base", "found['init'] = reads('/proc/1/cmdline')", host=host)
    package = str(Path(plan.__file__).parent.parent)
    assert package not in found["init"]
    assert "/venv" not in found["init"]


@any_uid
async def test_cgroup_files(policy: str) -> None:
    """Writable cgroups: release_agent (CVE-2022-0492), moving out by cgroup.procs, raising limits.

    Countermeasures: no cgroup file system in the sandbox, no way to mount one (test_mounts.py).
    """
    found = await attack(
        policy,
        """
found["mounted"] = [line for line in reads("/proc/self/mountinfo", 1 << 20).splitlines()
                    if " cgroup" in line or " sysfs " in line]
found["sys"] = tried(os.listdir, "/sys")
""",
    )
    assert found == {"mounted": [], "sys": "ENOENT"}


async def test_sources_of_mounts(tmp_path: Path) -> None:
    """What mountinfo says about the host: proc_pid_mountinfo(5).

    The part of a file system that is bound is visible, and no secret: the policy named it. What
    is above it on the host is not.
    """
    (tmp_path / "data").mkdir(mode=0o755)
    mounts = (Mount(target="/data", source=str(tmp_path / "data")),)
    policy = find("base", mounts=mounts, identity=CALLER)
    found = await attack(policy, "found['seen'] = reads('/proc/self/mountinfo', 1 << 20)")
    targets = {line.split()[4] for line in found["seen"].splitlines()}
    assert "/data" in targets
    assert not any(target.startswith(("/sys", "/run", "/home", "/old")) for target in targets)
