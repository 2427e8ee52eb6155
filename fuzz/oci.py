"""Whatever text a seccomp profile is, it is parsed and decides on every call, or PolicyError.

Decides: there are programs for both architectures, no longer than the kernel takes, that have an
answer for any number and arguments.

    ./do fuzz oci          # until stopped by an error, or after a million examples
    ./do fuzz oci 5000     # that many examples
"""

from __future__ import annotations

import json
import sys

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.compile import bpf, oci, oci_filter
from sandboxd.compile.assemble import AUDIT_ARCH, WHOLE
from sandboxd.errors import PolicyError

ACTIONS = [
    *("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_LOG"),
    *("SCMP_ACT_TRACE", "SCMP_ACT_TRAP"),
]
OPERATORS = [
    *("SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT"),
    "SCMP_CMP_MASKED_EQ",
]
ARCHITECTURES = [
    *("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
    "SCMP_ARCH_RISCV64",
]
KEYS = [
    *("defaultAction", "defaultErrnoRet", "defaultErrno", "architectures", "archMap", "flags"),
    *("syscalls", "names", "name", "action", "errnoRet", "errno", "args", "index", "value"),
    *("valueTwo", "op", "includes", "excludes", "arches", "caps", "minKernel", "comment"),
    *("architecture", "subArchitectures", "listenerPath"),
]
WORDS = [*ACTIONS, *OPERATORS, *ARCHITECTURES, "SCMP_ACT_NOTIFY", "EPERM", "read", "4.8", "amd64",
         "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC", "CAP_SYS_ADMIN", ""]  # fmt: skip

numbers = st.one_of(st.integers(0, 9), st.sampled_from([-1, 1 << 31, (1 << 64) - 1, 1 << 64, 1.5]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(WORDS), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=2)), inner, max_size=4),
    ),
    max_leaves=12,
)

# Mostly right, so that what comes after reading gets its share.
names = st.lists(
    st.sampled_from(["read", "socket", "umask", "clone", "semget", "socketcall", "nonsense"]),
    min_size=1,
    max_size=3,
)
when = st.fixed_dictionaries(
    {},
    optional={
        "arches": st.lists(st.sampled_from(["amd64", "arm64", "s390x"]), max_size=2),
        "caps": st.lists(st.just("CAP_SYS_ADMIN"), max_size=1),
        "minKernel": st.sampled_from(["4.8", "99.1", "5"]),
    },
)
comparisons = st.fixed_dictionaries(
    {"index": st.integers(0, 6), "op": st.sampled_from(OPERATORS), "value": numbers},
    optional={"valueTwo": numbers},
)
rules = st.fixed_dictionaries(
    {"names": names, "action": st.sampled_from(ACTIONS)},
    optional={
        "args": st.lists(comparisons, max_size=3),
        "errnoRet": st.integers(0, 40),
        "includes": when,
        "excludes": when,
        "more": anything,
    },
)
likely = st.fixed_dictionaries(
    {"defaultAction": st.sampled_from(ACTIONS)},
    optional={
        "architectures": st.lists(st.sampled_from(ARCHITECTURES), max_size=3),
        "archMap": st.lists(
            st.fixed_dictionaries(
                {"architecture": st.sampled_from(ARCHITECTURES)},
                optional={"subArchitectures": st.lists(st.sampled_from(ARCHITECTURES))},
            ),
            max_size=2,
        ),
        "syscalls": st.lists(rules, max_size=6),
        "defaultErrnoRet": st.integers(0, 40),
    },
)


def check(text: str, kernel: str) -> None:
    try:
        found = oci.parse(text, "p.json")
        programs = {
            arch: tuple(oci_filter.programs(found, arch, kernel, WHOLE))
            for arch in ("x86_64", "aarch64")
        }
    except PolicyError as error:
        if not error.where.startswith("p.json"):
            raise
        return
    for arch, every in programs.items():
        assert all(len(one) <= bpf.MAX_INSTRUCTIONS * bpf.INSTRUCTION.size for one in every)
        for number in (0, 41, 56, 95, 198, 500, (1 << 32) - 1):
            bpf.decide(every, number, AUDIT_ARCH[arch], (1, 5, 1 << 40))
    oci_filter.problems(found)


def fuzz(examples: int) -> None:
    texts = st.one_of(likely.map(json.dumps), anything.map(json.dumps), st.text(max_size=40))

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck),
        database=None,
    )  # fmt: skip
    @given(texts, st.sampled_from(["", "6.1.0-17-amd64", "4.4", "x"]))
    def whatever(text: str, kernel: str) -> None:
        check(text, kernel)

    whatever()


if __name__ == "__main__":
    fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
