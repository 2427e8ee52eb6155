"""Any config.json makes a policy tighter and shows nothing of the host, or it is a PolicyError.

Tighter: no limit is higher, nothing becomes writable, no more of /proc is shown, the filter admits
no call that it did not; and all that is bound lies in the bundle.

    ./do fuzz bundle          # until stopped by an error, or after a million examples
    ./do fuzz bundle 5000     # that many examples
"""

from __future__ import annotations

import json
import posixpath
import sys

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.compile import bpf, seccomp
from sandboxd.compile.assemble import AUDIT_ARCH
from sandboxd.compile.bundle import bundle
from sandboxd.compile.granted import Around
from sandboxd.compile.numbers import table
from sandboxd.errors import PolicyError
from sandboxd.policy import Limits, Policy, Root

BUNDLE = "/srv/bundle"
POLICIES = [
    Policy(),
    Policy(root=Root(writable=True, proc="masked")),
    Policy(limits=Limits(memory=1 << 20, processes=5, cpus=1, stack=1 << 16, cpu_time=1)),
]
KEYS = [
    *("ociVersion", "root", "path", "readonly", "process", "args", "env", "cwd", "user", "uid"),
    *("terminal", "consoleSize", "height", "width", "capabilities", "rlimits", "type", "soft"),
    *("hard", "hostname", "mounts", "destination", "source", "options", "linux", "namespaces"),
    *("resources", "memory", "limit", "swap", "cpu", "quota", "period", "cpus", "pids", "seccomp"),
    *("devices", "sysctl", "maskedPaths", "readonlyPaths", "rootfsPropagation", "timeOffsets"),
    *("hooks", "annotations", "boottime", "secs", "allow", "gid", "defaultAction"),
]
WORDS = [
    *("1.0.2", "rootfs", "/", "..", "/etc", "data", "tmpfs", "bind", "proc", "rbind", "ro"),
    *("size=1m", "nr_inodes=5", "size=0", "/proc", "/sys", "/dev/shm", "/tmp/x", "pid", "A=1"),
    *("RLIMIT_NOFILE", "RLIMIT_CPU", "0-3", "\0", "\n", "SCMP_ACT_ALLOW", "masked", ""),
]
numbers = st.one_of(st.integers(-2, 9), st.sampled_from([1 << 31, 1 << 63, (1 << 64) - 1, 1.5]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(WORDS), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=2)), inner, max_size=4),
    ),
    max_leaves=10,
)


def some(**keys: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({}, optional=dict(keys))


# Mostly right, so that what comes after reading gets its share.
words = st.sampled_from(WORDS)
mounts = some(
    destination=words, type=words, source=words, options=st.lists(words, max_size=3), more=anything
)
rlimits = st.fixed_dictionaries({"type": words, "soft": numbers, "hard": numbers})
likely = st.fixed_dictionaries(
    {
        "ociVersion": st.just("1.1.0"),
        "root": some(readonly=st.booleans(), more=anything).map(lambda one: one | {"path": "r"}),
        "process": some(
            env=st.lists(words, max_size=2), rlimits=st.lists(rlimits, max_size=2),
            terminal=st.booleans(), user=anything, capabilities=anything,
        ).map(lambda one: one | {"args": ["sh"], "cwd": "/"}),
    },
    optional={
        "mounts": st.lists(mounts, max_size=4),
        "hostname": words,
        "hooks": anything,
        "linux": some(
            resources=some(
                memory=some(limit=numbers, swap=numbers), pids=some(limit=numbers),
                cpu=some(quota=numbers, period=numbers, cpus=words), devices=anything,
            ),
            seccomp=st.sampled_from(
                [{"defaultAction": "SCMP_ACT_ALLOW"}, {"defaultAction": "SCMP_ACT_LOG"}, {}, None]
            ),
            namespaces=st.lists(some(type=words, path=words), max_size=3),
            maskedPaths=st.lists(words, max_size=3),
            timeOffsets=anything,
            more=anything,
        ),
        "more": anything,
    },
)  # fmt: skip


def resolve(path: str) -> str | None:
    real = posixpath.normpath(posixpath.join(BUNDLE, path))
    return real if real.startswith(f"{BUNDLE}/") and "\0" not in path else None


def check(text: str, policy: Policy) -> None:
    try:
        job = bundle(text, policy, Around(resolve=resolve))
    except PolicyError as error:
        if not error.where.startswith("config.json"):
            raise
        return
    after = job.policy
    assert isinstance(after, Policy)
    for name in Limits.__struct_fields__:
        before, now = getattr(policy.limits, name), getattr(after.limits, name)
        assert before is None or now <= before, name
    assert after.resources.swap <= policy.resources.swap
    assert policy.root.writable or not after.root.writable
    assert after.root.proc in (policy.root.proc, "none")
    assert (after.devices, after.network, after.require) == (
        policy.devices, policy.network, policy.require
    )  # fmt: skip
    assert after.root.source.startswith(f"{BUNDLE}/")
    for one in after.mounts:
        assert one.type == "tmpfs" or (one.source or "").startswith(f"{BUNDLE}/")
        assert one.type == "tmpfs" or not one.writable
        assert not f"{one.target}/".startswith(("/proc/", "/sys/"))
    check_filter(policy, after)


def check_filter(before: Policy, after: Policy) -> None:
    old = seccomp.programs(before.syscalls, "x86_64")
    new = seccomp.programs(after.syscalls, "x86_64")
    for number in table("x86_64").values():
        was, now = (bpf.decide(one, number, AUDIT_ARCH["x86_64"]) for one in (old, new))
        assert was == bpf.ALLOW or now == was


def fuzz(examples: int) -> None:
    texts = st.one_of(likely.map(json.dumps), anything.map(json.dumps), st.text(max_size=40))

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck),
        database=None,
    )  # fmt: skip
    @given(texts, st.sampled_from(POLICIES))
    def whatever(text: str, policy: Policy) -> None:
        check(text, policy)

    whatever()


if __name__ == "__main__":
    fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
