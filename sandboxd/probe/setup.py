"""What an administrator does once for a user: what is there already, and the commands for the rest.

`look` reads the machine; `steps` decides, purely; `carry_out` runs exactly the commands that are
shown. What is in order is not touched, so all of it may be repeated.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sandboxd.cgroup import subtree
from sandboxd.cgroup.ladder import prepared_place
from sandboxd.probe import fixes, idrange

State = Literal["ok", "missing", "by hand"]

CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")
DROP_IN = "/etc/systemd/system/user@.service.d/50-sandboxd.conf"
SYSCTLS = "/etc/sysctl.d/60-sandboxd.conf"
PROFILE = "/etc/apparmor.d/sandboxd"
RESTRICTS = "kernel/apparmor_restrict_unprivileged_userns"
LOGIN = "login"
"""The leaf of a prepared subtree for the user's shells and services."""
_IDS = 65536
_PLAIN = re.compile(r"/[A-Za-z0-9_./+-]+")
_PATIENCE = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that has to be so. `commands` make it so; "by hand": `found` says what to do."""

    what: str
    state: State
    found: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """All that the steps depend on."""

    user: str
    uid: int
    program: str = ""
    """The program that gets user namespaces where AppArmor keeps them from others."""
    ids: Mapping[str, str] = field(default_factory=dict)
    """"subuid" and "subgid" -> the range that is there, "" for none."""
    first_free: int = 100000
    newuidmap: bool = True
    usermod: bool = True
    apt: bool = True
    sysctls: Mapping[str, str] = field(default_factory=dict)
    profile: str = ""
    """What PROFILE says; "" if it is not there."""
    systemd: bool = True
    linger: bool = False
    delegated: frozenset[str] = frozenset()
    """What systemd gives to user@UID.service."""
    running: bool = False
    """There is a user manager, which learns of new controllers when it executes itself anew."""
    offered: frozenset[str] = frozenset()
    """Controllers of the machine's cgroup v2 hierarchy."""
    top: Path | None = None
    prepared: frozenset[str] | None = None
    """Controllers in the prepared subtree; None if there is none, or it is not the user's."""


# -- what is there ---------------------------------------------------------------------------------


def look(user: str, program: str) -> Machine:
    """The machine as it is for this user. KeyError if there is no such user."""
    account = pwd.getpwnam(user)
    top, _ = subtree.mounted()
    uid = account.pw_uid
    ids = {kind: idrange.subordinate(kind, uid) for kind in ("subuid", "subgid")}
    unit = f"user@{uid}.service"
    systemd = os.path.isdir("/run/systemd/system")
    names = ("user/max_user_namespaces", "kernel/unprivileged_userns_clone", RESTRICTS)
    return Machine(
        user=account.pw_name,
        uid=uid,
        program=program,
        ids={kind: "" if isinstance(one, str) else f"{one.start}+{one.count}"
             for kind, one in ids.items()},
        first_free=fixes.free_subids(),
        newuidmap=bool(shutil.which("newuidmap") and shutil.which("newgidmap")),
        usermod=shutil.which("usermod") is not None,
        apt=shutil.which("apt-get") is not None,
        sysctls={name: fixes.sysctl(name) for name in names},
        profile=_text(Path(PROFILE)),
        systemd=systemd,
        linger=Path("/var/lib/systemd/linger", account.pw_name).exists(),
        delegated=_delegated(unit) if systemd else frozenset(),
        running=Path(f"/run/user/{uid}/systemd").exists(),
        offered=frozenset(subtree.words(top / "cgroup.controllers")) if top else frozenset(),
        top=top,
        prepared=_prepared(prepared_place(top, uid), uid) if top else None,
    )  # fmt: skip


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _delegated(unit: str) -> frozenset[str]:
    words = ["systemctl", "show", "--property=DelegateControllers", "--value", unit]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    return frozenset(done.stdout.split())


def _prepared(path: Path, uid: int) -> frozenset[str] | None:
    files = ("cgroup.procs", "cgroup.subtree_control")
    try:
        for folder in (path, path / LOGIN):
            if any((folder / name).stat().st_uid != uid for name in (".", *files)):
                return None
    except OSError:
        return None
    return frozenset(subtree.words(path / "cgroup.controllers"))


# -- what to do ------------------------------------------------------------------------------------


def steps(machine: Machine) -> list[Step]:
    """Everything that has to be so for this user, in the order in which it is done."""
    found = [*_ids(machine), *_namespaces(machine), _apparmor(machine)]
    if machine.uid == 0:
        return found  # may make cgroups wherever it wants, and asks the system's systemd
    if machine.systemd:
        # A systemd that is started by the second has what the first gives.
        found += [_delegation(machine), _linger(machine)]
    else:
        found.append(_subtree(machine))
    return found


def _ids(machine: Machine) -> Iterator[Step]:
    if machine.uid == 0:  # probe/idrange.py
        yield Step(what="subordinate ids", state="ok", found="root takes some that nobody has")
        return
    if machine.newuidmap:
        yield Step(what="newuidmap", state="ok", found="newuidmap and newgidmap are there")
    elif machine.apt:
        command = "apt-get install --yes --no-install-recommends uidmap"
        yield Step(what="newuidmap", state="missing", found="not in PATH", commands=(command,))
    else:
        found = "not in PATH: install the package that has it (uidmap, shadow-utils)"
        yield Step(what="newuidmap", state="by hand", found=found)
    lacking = [kind for kind in ("subuid", "subgid") if not machine.ids.get(kind)]
    if not lacking:
        found = f"uids {machine.ids['subuid']}, gids {machine.ids['subgid']}"
        yield Step(what="subordinate ids", state="ok", found=found)
        return
    first, user = machine.first_free, shlex.quote(machine.user)
    commands = tuple(
        f"usermod --add-{kind}s {first}-{first + _IDS - 1} {user}"
        if machine.usermod
        else f"echo {user}:{first}:{_IDS} >>/etc/{kind}"
        for kind in lacking
    )
    missing = f"no range for {machine.user} in {' and '.join(f'/etc/{kind}' for kind in lacking)}"
    yield Step(what="subordinate ids", state="missing", found=missing, commands=commands)


def _namespaces(machine: Machine) -> Iterator[Step]:
    wanted = (
        ("user/max_user_namespaces", "0", "15000"),
        ("kernel/unprivileged_userns_clone", "0", "1"),
    )
    lines = [f"{name.replace('/', '.')}={good}" for name, bad, good in wanted
             if machine.sysctls.get(name) == bad]  # fmt: skip
    if not lines:
        yield Step(what="user namespaces", state="ok", found="allowed")
        return
    commands = (*_written(SYSCTLS, lines), f"sysctl -p {SYSCTLS}")
    yield Step(what="user namespaces", state="missing", found="switched off", commands=commands)


def _written(path: str, lines: list[str]) -> tuple[str, ...]:
    folder = os.path.dirname(path)
    words = " ".join(shlex.quote(line) for line in lines)
    return f"mkdir -p {folder}", f"printf '%s\\n' {words} >{path}"


def rules(program: str) -> list[str]:
    """An AppArmor profile that takes nothing away and gives user namespaces (AppArmor 4)."""
    return [
        "abi <abi/4.0>,",
        "include <tunables/global>",
        f"profile sandboxd {program} flags=(unconfined) {{",
        "  userns,",
        "  include if exists <local/sandboxd>",
        "}",
    ]


def _apparmor(machine: Machine) -> Step:
    """Ubuntu 23.10 and later: only programs with a profile get user namespaces of use."""
    what = "AppArmor"
    value = machine.sysctls.get(RESTRICTS, "")
    if value != "1":
        found = "does not restrict user namespaces" if value else "no such restriction here"
        return Step(what=what, state="ok", found=found)
    if f"profile sandboxd {machine.program} " in machine.profile:
        return Step(what=what, state="ok", found=f"{PROFILE} allows {machine.program}")
    if not _PLAIN.fullmatch(machine.program):
        found = "user namespaces only with a profile: say for which program (--program PATH)"
        return Step(what=what, state="by hand", found=found)
    commands = (*_written(PROFILE, rules(machine.program)), f"apparmor_parser -r {PROFILE}")
    found = f"no profile lets {machine.program} have user namespaces"
    return Step(what=what, state="missing", found=found, commands=commands)


def _linger(machine: Machine) -> Step:
    if machine.linger:
        return Step(what="linger", state="ok", found="systemd of the user runs without a login")
    command = f"loginctl enable-linger {shlex.quote(machine.user)}"
    found = f"no systemd of {machine.user} without a login"
    return Step(what="linger", state="missing", found=found, commands=(command,))


def _delegation(machine: Machine) -> Step:
    what = "delegation"
    wanted = [name for name in CONTROLLERS if name in machine.offered]
    if not wanted:
        return Step(what=what, state="by hand", found=_V1)
    lacking = [name for name in wanted if name not in machine.delegated]
    if not lacking:
        found = f"systemd gives {' '.join(wanted)} to its users"
        return Step(what=what, state="ok", found=found)
    reload = ["systemctl daemon-reload"]
    if machine.running:
        # systemd enables a controller in a slice when a unit comes into it, not when it reloads.
        reload.append(f"systemd-run --quiet --scope --slice=user-{machine.uid}.slice true")
        anew = f"setpriv --reuid {machine.uid} --clear-groups env XDG_RUNTIME_DIR=/run/user/"
        reload.append(f"{anew}{machine.uid} systemctl --user daemon-reexec")
    lines = ["[Service]", f"Delegate={' '.join(CONTROLLERS)}"]
    return Step(
        what=what,
        state="missing",
        found=f"systemd gives no {' and no '.join(lacking)} to its users",
        commands=(*_written(DROP_IN, lines), *reload),
    )


_V1 = (
    "cgroup v2 has no controllers here: boot with cgroup_no_v1=all, and where there is systemd"
    " with systemd.unified_cgroup_hierarchy=1"
)


def _subtree(machine: Machine) -> Step:
    """Without systemd: a subtree, with a leaf for the user's own processes."""
    what = "cgroup subtree"
    if machine.top is None:
        found = "cgroup v2 is not mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup, at every boot"
        return Step(what=what, state="by hand", found=found)
    path = prepared_place(machine.top, machine.uid)
    wanted = [name for name in CONTROLLERS if name in machine.offered]
    if machine.prepared is not None and machine.prepared >= set(wanted):
        have = " ".join(wanted) or "no controllers"
        return Step(what=what, state="ok", found=f"{path} belongs to {machine.user}, with {have}")
    enable = tuple(f"echo +{name} >{machine.top}/cgroup.subtree_control" for name in wanted)
    names = (".", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control")
    files = " ".join(f"{at}/{name}" for at in (path, path / LOGIN) for name in names)
    return Step(
        what=what,
        state="missing",
        found=f"no {path} of {machine.user} with {' '.join(wanted) or 'leaves'}",
        commands=(*enable, f"mkdir -p {path}/{LOGIN}", f"chown {machine.uid} {files}"),
    )


# -- doing it --------------------------------------------------------------------------------------


def carry_out(step: Step) -> str:
    """Run a step's commands to the first that fails; what went wrong, "" if nothing did."""
    for command in step.commands:
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True,
                text=True, errors="replace", timeout=_PATIENCE, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{command}: not done after {_PATIENCE:g} s"
        if done.returncode:
            said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
            return f"{command}: {said}"
    return ""
