"""Every key is explained, with the file that set it; the whole reads as the same policy again."""

from __future__ import annotations

import msgspec
import pytest

from sandboxd.compile.explain import MEANINGS, Explained, explain, written
from sandboxd.compile.load import digest, load
from sandboxd.compile.render import render
from sandboxd.policy import Argument, Limits, Mount, Policy, Rule, Syscalls
from sandboxd.supervise import policies

SHIPPED = [one.name for one in policies.available() if one.file.parent == policies.packaged()]
RULE = Rule(calls=("read",), args=(Argument(index=0, op="eq", value=1),), action="kill")
RICH = Policy(
    description='with "quotes" and é',
    limits=Limits(memory=3 << 29, cpu_time=0.5, cpus=1.5, processes=1),
    mounts=(
        Mount(target="/a", source="/b", optional=True, exec=False),
        Mount(target="/c", type="tmpfs", size=1000, inodes=10, writable=True),
        Mount(target="/d", type="tmpfs", writable=True),
    ),
    syscalls=Syscalls(rules=("@guards", RULE), kill=("getpgid",)),
)


def rows(policy: Policy) -> dict[str, Explained]:
    found = explain(policy)
    assert len({one.key for one in found}) == len(found)
    return {one.key: one for one in found}


def reloaded(policy: Policy) -> Policy:
    return load(policy.name, lambda name: (f"{name}.toml", render(policy)))


def test_every_key_has_a_meaning() -> None:
    lists = {f"syscalls.{one}" for one in ("allow", "deny", "enosys", "eafnosupport", "kill")}
    others = lists | {"syscalls.rules", "environment.set"}
    sections = [
        one
        for one in msgspec.structs.fields(Policy)
        if one.name not in ("name", "description", "mounts", "allow_sources", "origins")
    ]
    keys = {f"{one.name}.{key}" for one in sections for key in one.type.__struct_fields__}
    assert set(MEANINGS) == keys - others


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_that_is_in_force_is_explained(name: str) -> None:
    policy = policies.find(name)
    found = rows(policy)
    assert set(MEANINGS) <= set(found)
    assert {f"environment.set.{one}" for one in policy.environment.set} <= set(found)
    for key in ("allow", "deny", "enosys", "eafnosupport", "kill", "rules"):
        for at, entry in enumerate(getattr(policy.syscalls, key)):
            assert found[f"syscalls.{key}[{at}]"].value == f'"{entry}"'
    for row in found.values():
        assert row.meaning
        assert row.origin == "default" or ".toml: " in row.origin


def test_origins_are_those_of_the_files() -> None:
    found = rows(policies.find("judge-python"))
    assert found["limits.memory"].origin == "judge-python.toml: limits.memory"
    assert found["limits.disk"].origin == "judge-native.toml: limits.disk"
    assert found["root.source"].origin == "base.toml: root.source"
    assert found["root.driver"].origin == "default"
    assert found["syscalls.allow[0]"].origin == "judge-native.toml: syscalls.allow[1]"
    assert found["syscalls.rules[3]"].origin == "judge-native.toml: syscalls.rules[4]"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("limits.memory", 256 << 20, '"256M"'),
        ("limits.cpu_time", 1.5, '"1.5s"'),
        ("limits.memory", None, '"unlimited"'),
        ("identity.uid", None, '"own"'),
        ("identity.uid", 0, "0"),
        ("limits.cpus", 2.0, "2"),
        ("root.writable", True, "true"),
        ("devices.allow", ("null", "tty"), '["null", "tty"]'),
        ("root.source", 'é"\x7f\u202e\U000e0001', r'"é\"\u007f\u202e\U000e0001"'),
    ],
)
def test_values_are_as_in_a_file(key: str, value: object, text: str) -> None:
    assert written(key, value) == text


def test_the_meaning_follows_the_value() -> None:
    none = rows(Policy())
    assert none["limits.memory"].meaning == "not limited by sandboxd"
    assert none["identity.uid"].meaning.startswith("the uid that the run has")
    found = rows(RICH)
    assert "memory.max" in found["limits.memory"].meaning
    assert "/b: MOUNT_ATTR_RDONLY" in found["mounts[0]"].meaning
    assert found["mounts[0]"].meaning.endswith("noexec")
    assert "within 1000" in found["mounts[1]"].meaning
    assert "within limits.disk" in found["mounts[2]"].meaning
    assert found["syscalls.rules[1]"].meaning == "seccomp: read: kill if all comparisons hold"
    assert found["syscalls.kill[0]"].meaning == "seccomp: the process dies of SIGSYS"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_rendered_policy_is_the_same_policy(name: str) -> None:
    policy = policies.find(name)
    assert digest(reloaded(policy)) == digest(policy)


def test_a_rendered_policy_of_every_kind_is_the_same() -> None:
    policy = msgspec.structs.replace(RICH, name="rich")
    assert reloaded(policy) == msgspec.structs.replace(policy, origins=reloaded(policy).origins)
