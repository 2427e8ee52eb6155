"""[limits] and [resources] -> the files of a cgroup, CPUs and enforcement; all tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.compile import resources
from sandboxd.compile.build import compile_policy
from sandboxd.errors import HostError
from sandboxd.host import CgroupSubtree, Host
from sandboxd.policy import Io, Limits, Policy, Resources

ALL = frozenset({"memory", "pids", "cpu", "io", "cpuset", "hugetlb"})
MIB = 1 << 20


def host(*controllers: str, **more: object) -> Host:
    """Four cores with two hyper-threads each, numbered as Intel does."""
    subtree = CgroupSubtree(path="/sys/fs/cgroup/x", controllers=frozenset(controllers))
    facts = {"cores": ((0, 4), (1, 5), (2, 6), (3, 7)), "cpus": 8, "huge_pages": {"2MB": 0}} | more
    return Host(arch="x86_64", kernel="6.1", uid=1, gid=1, cgroup=subtree, **facts)  # type: ignore[arg-type]


def policy(limits: Limits | None = None, wanted: Resources | None = None) -> Policy:
    return Policy(limits=limits or Limits(), resources=wanted or Resources())


EVERYTHING = policy(
    Limits(memory=64 * MIB, processes=4, cpus=1.5),
    Resources(
        memory_high=MIB, cpu_weight=7, swap=5, cores=1, siblings=False,
        io=(Io(device="8:0", read=1, writes=2), Io(device="9:1", write=3)),
    ),
)  # fmt: skip
FILES = {
    "memory": {
        "memory.max": str(64 * MIB), "memory.swap.max": "5", "memory.oom.group": "1",
        "memory.high": str(MIB),
    },
    "pids": {"pids.max": "5"},
    "cpu": {"cpu.max": "150000 100000", "cpu.weight": "7"},
    "io": {"io.max": "8:0 rbps=1 wiops=2\n9:1 wbps=3\n"},
    "cpuset": {},
    "hugetlb": {"hugetlb.2MB.max": "0"},
}  # fmt: skip


@pytest.mark.parametrize("controller", sorted(ALL))
def test_files_of_each_controller(controller: str) -> None:
    assert resources.cgroup_files(EVERYTHING, host(controller)) == FILES[controller]


def test_nothing_without_controllers_and_nothing_unasked() -> None:
    assert resources.cgroup_files(EVERYTHING, host()) == {}
    found = resources.cgroup_files(policy(), host(*ALL))
    assert found == {"hugetlb.2MB.max": "0"}
    one = policy(Limits(memory=MIB), Resources(oom="process"))
    found = resources.cgroup_files(one, host("memory"))
    assert found == {"memory.max": str(MIB), "memory.swap.max": "0"}


@pytest.mark.parametrize(
    ("wanted", "sets", "cpus"),
    [
        (Resources(), (), 8),
        (Resources(cpuset="0-2"), ("0,1,2",), 3),
        (Resources(cpuset="0-2", siblings=False), ("0,1,2",), 3),
        (Resources(cpuset="0,4-5", siblings=False), ("0,5",), 2),
        (Resources(siblings=False), ("0,1,2,3",), 4),
        (Resources(cores=1), ("0,4", "1,5", "2,6", "3,7"), 2),
        (Resources(cores=1, siblings=False), ("0", "1", "2", "3"), 1),
        (Resources(cores=2), ("0,1,4,5", "2,3,6,7"), 4),
        (Resources(cores=3), ("0,1,2,4,5,6",), 6),
        (Resources(cores=1, cpuset="1-2,9999999"), ("1", "2"), 1),
    ],
)
def test_cpus(wanted: Resources, sets: tuple[str, ...], cpus: float) -> None:
    own, here = policy(wanted=wanted), host("cpuset")
    assert resources.cpu_sets(own, here) == sets
    assert resources.cpus_at_once(own, here, sets) == cpus
    half = policy(Limits(cpus=0.5), wanted)
    assert resources.cpus_at_once(half, here, sets) == 0.5
    assert resources.cpu_sets(own, host("cpu")) == ()


@pytest.mark.parametrize("wanted", [Resources(cpuset="64-70"), Resources(cores=5)])
def test_cpus_that_there_are_not(wanted: Resources) -> None:
    with pytest.raises(HostError) as caught:
        resources.cpu_sets(policy(wanted=wanted), host("cpuset"))
    assert caught.value.hint


@given(st.sets(st.integers(0, 300), min_size=1))
def test_lists_of_cpus_read_as_they_are_written(cpus: set[int]) -> None:
    assert resources.parse_cpus(resources.listed(cpus)) == sorted(cpus)


def test_the_kernel_counts_processes_before_rlimit_refuses() -> None:
    """RLIMIT_NPROC is looked at first (copy_process in kernel/fork.c), and counts nothing."""
    for controllers, most in (((), 5), (("pids",), 6)):
        steps = resources.rlimits(EVERYTHING, host(*controllers))
        assert [one.soft for one in steps if getattr(one, "resource", "") == "NPROC"] == [most]  # type: ignore[attr-defined]


@pytest.mark.parametrize("controllers", [ALL, frozenset[str]()])
def test_enforcement_of_what_was_asked_for(controllers: frozenset[str]) -> None:
    asked = ("memory_high", "cpu_weight", "pinning", "io")
    found = compile_policy(EVERYTHING, host(*controllers, huge_pages={"2MB": 3}))
    word = "cgroup2" if controllers else "none"
    assert [found.enforcement[name] for name in asked] == [word] * 4
    told = {what for what, _ in found.degraded}
    assert told & {*asked, "huge pages"} == (set() if controllers else {*asked, "huge pages"})
    idle = compile_policy(policy(), host(*controllers))
    assert {idle.enforcement[name] for name in asked} == {"not asked"}
