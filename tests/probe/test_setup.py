"""What an administrator is told to do, from the facts alone; the commands are shell."""

from __future__ import annotations

import dataclasses
import os
import pwd
import subprocess
from pathlib import Path

import pytest

from sandboxd.probe import setup
from sandboxd.probe.setup import Machine, Step, carry_out, look, steps

pytestmark = pytest.mark.root_ok

TOP = Path("/sys/fs/cgroup")
EVERYTHING = frozenset(setup.CONTROLLERS)
FINE = Machine(
    user="judge",
    uid=1000,
    program="/usr/bin/sandboxd",
    ids={"subuid": "100000+65536", "subgid": "100000+65536"},
    sysctls={"user/max_user_namespaces": "15000", "kernel/unprivileged_userns_clone": "1"},
    linger=True,
    delegated=EVERYTHING,
    offered=EVERYTHING | {"hugetlb", "rdma", "misc"},
    top=TOP,
)
NO_SYSTEMD = dataclasses.replace(FINE, systemd=False, linger=False, delegated=frozenset())
RESTRICTED = {**FINE.sysctls, setup.RESTRICTS: "1"}


def by_name(machine: Machine) -> dict[str, Step]:
    return {step.what: step for step in steps(machine)}


def test_all_in_order() -> None:
    for machine in (FINE, dataclasses.replace(NO_SYSTEMD, prepared=EVERYTHING)):
        for step in steps(machine):
            assert step.state == "ok", step
            assert step.commands == ()
            assert step.found


@pytest.mark.parametrize(
    ("changes", "what", "commands"),
    [
        (
            {"newuidmap": False},
            "newuidmap",
            ("apt-get install --yes --no-install-recommends uidmap",),
        ),
        ({"newuidmap": False, "apt": False}, "newuidmap", ()),
        (
            {"ids": {"subuid": "", "subgid": ""}, "first_free": 165536},
            "subordinate ids",
            (
                "usermod --add-subuids 165536-231071 judge",
                "usermod --add-subgids 165536-231071 judge",
            ),
        ),
        (
            {"ids": {"subuid": "100000+65536", "subgid": ""}, "usermod": False},
            "subordinate ids",
            ("echo judge:100000:65536 >>/etc/subgid",),
        ),
        (
            {"sysctls": {"user/max_user_namespaces": "0"}},
            "user namespaces",
            (
                "mkdir -p /etc/sysctl.d",
                r"printf '%s\n' user.max_user_namespaces=15000 >/etc/sysctl.d/60-sandboxd.conf",
                "sysctl -p /etc/sysctl.d/60-sandboxd.conf",
            ),
        ),
        (
            {"sysctls": RESTRICTED},
            "AppArmor",
            (
                "mkdir -p /etc/apparmor.d",
                r"printf '%s\n' 'abi <abi/4.0>,' 'include <tunables/global>'"
                " 'profile sandboxd /usr/bin/sandboxd flags=(unconfined) {' '  userns,'"
                " '  include if exists <local/sandboxd>' '}' >/etc/apparmor.d/sandboxd",
                "apparmor_parser -r /etc/apparmor.d/sandboxd",
            ),
        ),
        ({"sysctls": RESTRICTED, "program": ""}, "AppArmor", ()),
        ({"sysctls": RESTRICTED, "program": "/home/a b/*"}, "AppArmor", ()),
        ({"linger": False}, "linger", ("loginctl enable-linger judge",)),
        (
            {"delegated": frozenset({"cpu", "memory", "pids"})},
            "delegation",
            (
                "mkdir -p /etc/systemd/system/user@.service.d",
                r"printf '%s\n' '[Service]' 'Delegate=cpu cpuset io memory pids'"
                " >/etc/systemd/system/user@.service.d/50-sandboxd.conf",
                "systemctl daemon-reload",
            ),
        ),
        ({"offered": frozenset()}, "delegation", ()),
    ],
)
def test_what_is_missing(changes: dict[str, object], what: str, commands: tuple[str, ...]) -> None:
    found = by_name(dataclasses.replace(FINE, **changes))  # type: ignore[arg-type]
    assert found[what].commands == commands
    assert found[what].state == ("missing" if commands else "by hand")
    assert [step.what for step in found.values() if step.state != "ok"] == [what]


def test_a_profile_that_is_there() -> None:
    ours = dataclasses.replace(
        FINE, sysctls=RESTRICTED, profile="\n".join(setup.rules("/usr/bin/sandboxd"))
    )
    assert by_name(ours)["AppArmor"].state == "ok"
    other = dataclasses.replace(ours, program="/opt/venv/bin/sandboxd")
    assert by_name(other)["AppArmor"].state == "missing"


def test_a_running_user_manager_learns_of_it() -> None:
    machine = dataclasses.replace(FINE, delegated=frozenset(), running=True)
    assert by_name(machine)["delegation"].commands[-1].endswith("systemctl --user daemon-reexec")


@pytest.mark.parametrize(
    ("offered", "prepared", "state"),
    [
        (EVERYTHING, None, "missing"),
        (EVERYTHING, frozenset({"memory"}), "missing"),
        (EVERYTHING, EVERYTHING, "ok"),
        (frozenset(), frozenset(), "ok"),
        (frozenset(), None, "missing"),
    ],
)
def test_without_systemd(
    offered: frozenset[str], prepared: frozenset[str] | None, state: str
) -> None:
    step = by_name(dataclasses.replace(NO_SYSTEMD, offered=offered, prepared=prepared))[
        "cgroup subtree"
    ]
    assert step.state == state
    if state == "missing":
        assert "mkdir -p /sys/fs/cgroup/sandboxd-1000/login" in step.commands
        assert sum("subtree_control" in one for one in step.commands[:-1]) == len(offered)


def test_without_cgroup_v2() -> None:
    step = by_name(dataclasses.replace(NO_SYSTEMD, top=None))["cgroup subtree"]
    assert step.state == "by hand"
    assert "mount -t cgroup2" in step.found


def test_root_needs_no_delegation() -> None:
    found = by_name(dataclasses.replace(FINE, user="root", uid=0, ids={}, linger=False))
    assert "linger" not in found
    assert all(step.state == "ok" for step in found.values())


def test_commands_are_shell() -> None:
    nothing = Machine(
        user="o'neil", uid=1000, program="/usr/bin/sandboxd", newuidmap=False,
        sysctls={**RESTRICTED, "user/max_user_namespaces": "0"}, running=True,
        offered=EVERYTHING, top=TOP,
    )  # fmt: skip
    for machine in (nothing, dataclasses.replace(nothing, systemd=False)):
        for step in steps(machine):
            for command in step.commands:
                subprocess.run(["sh", "-n", "-c", command], check=True)


def test_this_machine() -> None:
    """It is only looked at."""
    name = pwd.getpwuid(os.getuid()).pw_name
    found = look(name, "/usr/bin/sandboxd")
    assert found == look(name, "/usr/bin/sandboxd")
    assert found.uid == os.getuid()
    assert steps(found)
    with pytest.raises(KeyError):
        look("nobody-of-this-name", "")


def test_carrying_out(tmp_path: Path) -> None:
    """In their order, to the first that fails."""
    log = tmp_path / "log"
    commands = (f"echo one >>{log}", "echo no such luck >&2; false", f"echo two >>{log}")
    step = Step(what="x", state="missing", found="", commands=commands)
    assert carry_out(step) == "echo no such luck >&2; false: no such luck"
    assert log.read_text() == "one\n"
    assert carry_out(dataclasses.replace(step, commands=("true",))) == ""
    assert carry_out(dataclasses.replace(step, commands=("exit 3",))) == "exit 3: exit status 3"
