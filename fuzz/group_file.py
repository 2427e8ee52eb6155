"""Whatever text a group file has, read() returns a GroupFile or raises PolicyError; never another.

And of what it returns a Group is made, or JobError says why not, and its network laid out.

    ./do fuzz group_file          # until stopped by an error, or after a million examples
    ./do fuzz group_file 5000     # that many examples
"""

from __future__ import annotations

import sys

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.compile.group_file import Entry, Settings, read
from sandboxd.compile.grouping import hosts, lay_out, look_up, resolv_conf
from sandboxd.errors import JobError, PolicyError
from sandboxd.group import Group, Member
from sandboxd.job import Job

KEYS = [*Settings.__struct_fields__, *Entry.__struct_fields__, "memory", "x", ""]
WORDS = [
    *("group", "members", "members.a", "members.b", "network", "bridge", "exit", "never", "a", "b"),
    *("true", "10.7.0.0/24", "10.7.0.2", "10.0.2.0/24", "::1", "1.2.3.4/33", "tcp:80", "tcp:0"),
    *("ended", "udp:99999", "8080:80", "*", "x.example.org:443", "!reset", "64M", "\0", "é", "A"),
]
scalars = st.one_of(
    st.sampled_from(WORDS).map(lambda word: f'"{word}"'.replace("\0", "\\u0000")),
    st.sampled_from(["1", "-1", "1.5", "true", "[]", "{}", "inf", "1979-05-27"]),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3).map(lambda every: f"[{', '.join(every)}]"),
    scalars.map(lambda one: f"{{ memory = {one} }}"),
)
lines = st.one_of(
    st.tuples(st.sampled_from(KEYS), values).map(lambda both: f"{both[0]} = {both[1]}"),
    st.sampled_from(WORDS).map(lambda word: f"[{word}]"),
    st.sampled_from(["[group]", "[members.a]", "[members.b]", 'argv = ["true"]']),
)
texts = st.one_of(
    st.lists(lines, max_size=12).map("\n".join),
    st.lists(lines, max_size=8).map(
        lambda every: '[members.a]\nargv = ["true"]\n' + "\n".join(every)
    ),
    st.text(max_size=60),
)


def group_of(text: str) -> Group | None:
    try:
        found = read("group.toml", text)
        job = Job(argv=("true",))
        return found.group({
            name: Member(job=job, address=one.address or None, after=one.after, ready=one.ready)
            for name, one in found.members.items()
        })  # fmt: skip
    except (PolicyError, JobError):
        return None


def check(text: str) -> None:
    group = group_of(text)
    if group is None:
        return
    try:
        layout = lay_out(group)
    except JobError:
        return
    for name, address in layout.addresses.items():
        place = layout.place(name)
        assert str(address) in hosts(place)
        assert look_up(place, f"{name}.{group.name}") == look_up(place, name) == address
        assert resolv_conf(place)
    assert layout.shared or len(set(layout.addresses.values())) == len(layout.addresses)


def fuzz(examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck),
        database=None,
    )  # fmt: skip
    @given(texts)
    def whatever(text: str) -> None:
        check(text)

    whatever()


if __name__ == "__main__":
    fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
