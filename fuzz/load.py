"""Whatever text a policy file has, load() returns a Policy or raises PolicyError; never another.

And a Policy that it returns holds together: its own rendering loads as the same one again, and
explaining it and taking its digest work.

    ./do fuzz load          # until stopped by an error, or after a million examples
    ./do fuzz load 5000     # that many examples
"""

from __future__ import annotations

import sys

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.compile.explain import explain
from sandboxd.compile.load import digest, load
from sandboxd.compile.render import render
from sandboxd.errors import PolicyError
from sandboxd.policy import Limits, Policy

SECTIONS = [one for one in Policy.__struct_fields__ if one not in ("name", "origins")]
KEYS = [
    *("cpu_time", "wall_time", "memory", "disk", "cpus", "source", "writable", "driver", "proc"),
    *("etc", "target", "type", "size", "optional", "exec", "inodes", "mode", "default", "allow"),
    *("deny", "enosys", "kill", "rules", "abi32", "user", "uid", "gid", "name", "home", "set"),
    *("hostname", "inherit", "boottime", "monotonic", "landlock", "calls", "args", "index", "op"),
    *("value", "mask", "width", "action", "extends", "eafnosupport", "", "a.b", "é"),
]
WORDS = [
    *(
        "host",
        "pid",
        "masked",
        "none",
        "tmpfs",
        "bind",
        "/",
        "/a",
        "/a/b",
        "../a",
        "/proc",
        "@base",
    ),
    *("@sockets", "@nothing", "read", "openat", "socket", "!reset", "unlimited", "own", "isolated"),
    *("enforced", "any", "eq", "any_bits", "kill", "enosys", "256M", "1.5s", "base", "p", "self"),
    *("", " ", "\0", "\n", "\x7f", "\u202e", "\ud7ff", '"', "'", "\\", "]", "#", '"""', "a=b"),
]
NUMBERS = [0, 1, -1, 7, 64, 65536, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**30]

scalars = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=8),
    st.sampled_from(NUMBERS),
    st.floats(),
    st.booleans(),
    st.dates(),
)
keys = st.one_of(st.sampled_from(KEYS), st.text(max_size=4))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=8,
)
documents = st.dictionaries(
    st.one_of(st.sampled_from([*SECTIONS, "extends"]), keys),
    st.one_of(st.dictionaries(keys, values, max_size=5), values),
    max_size=5,
)
syntax = st.lists(
    st.one_of(
        st.sampled_from(
            ["[", "]", "[[", "]]", "{", "}", "=", ".", ",", "\n", '"', "'", '"""', "'''"]
        ),
        st.sampled_from(["#", "\\", " ", "1", "1e9", "0x", "inf", "nan", "true", "1979-05-27"]),
        st.sampled_from([*SECTIONS, *KEYS]),
        st.sampled_from(WORDS),
        st.text(max_size=3),
    ),
    max_size=40,
).map("".join)


# Mostly right, so that what comes after reading gets its share.
mounts = st.lists(
    st.fixed_dictionaries(
        {"target": st.sampled_from(["/a", "/a/b", "/c", "/box/x", "/proc/x", "/é"])},
        optional={
            "type": st.sampled_from(["bind", "tmpfs"]),
            "source": st.sampled_from(["/a", "/usr/lib", "relative"]),
            "size": st.sampled_from([1, 4096, "1.5G", "64M"]),
            "inodes": st.integers(0, 10),
            "writable": st.booleans(),
            "optional": st.booleans(),
        },
    ),
    max_size=2,
)
limits = st.dictionaries(
    st.sampled_from(Limits.__struct_fields__),
    st.sampled_from([1, 1.5, "1.5", 4096, "unlimited"]),
    max_size=3,
)
likely: st.SearchStrategy[dict[str, object]] = st.fixed_dictionaries(
    {},
    optional={
        "extends": st.just("base"),
        "description": st.text(max_size=5),
        "mounts": mounts,
        "limits": limits,
        "environment": st.fixed_dictionaries(
            {"set": st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2)}
        ),
        "root": st.fixed_dictionaries({"etc": st.lists(st.sampled_from(WORDS), max_size=3)}),
        "syscalls": st.fixed_dictionaries(
            {}, optional={"kill": st.lists(st.sampled_from(["ptrace", "@numa", "!reset", "x"]))}
        ),
        "identity": st.dictionaries(
            st.sampled_from(["uid", "gid"]), st.sampled_from(["own", 0, 65535, 65536])
        ),
    },
)


def quoted(text: str) -> str:
    return '"' + "".join(f"\\U{ord(one):08x}" for one in text) + '"'


def toml(value: object) -> str:
    """A value as TOML; surrogates, which TOML cannot have, make it wrong."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{quoted(key)} = {toml(one)}' for key, one in value.items())}}}"
    return str(value)


def document(tables: dict[str, object]) -> str:
    return "\n".join(f"{quoted(key)} = {toml(value)}" for key, value in tables.items())


def check(text: str, parent: str) -> None:
    files = {"p": text, "base": parent}

    def read(name: str) -> tuple[str, str]:
        if name not in files:
            raise PolicyError("", f"no policy {name!r}")
        return f"{name}.toml", files[name]

    try:
        policy = load("p", read)
    except PolicyError:
        return
    again = load("p", lambda _: ("p.toml", render(policy)))
    assert digest(again) == digest(policy)
    assert explain(policy)


def fuzz(examples: int) -> None:
    texts = st.one_of(likely.map(document), documents.map(document), syntax, st.text(max_size=60))

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck),
        database=None,
    )  # fmt: skip
    @given(texts, texts)
    def whatever(text: str, parent: str) -> None:
        check(text, parent)

    whatever()


if __name__ == "__main__":
    fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
