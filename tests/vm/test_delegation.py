"""The ladder on machines that delegate: units of systemd, sessions, an administrator's subtree.

Every test starts programs of its own where it needs them to be, so that pytest itself stays where
it is; those that need pytest to be in a certain place say so (`outside`, `prepared`).
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import needs

pytestmark = [pytest.mark.root_ok, pytest.mark.time_limit(100)]

PATIENCE = 20.0
"""Seconds; in emulation a scope goes in a tenth of one."""

# Prints what the ladder leads to, and where we were before and after.
CLIMB = """\
import json
from sandboxd.cgroup import subtree
from sandboxd.cgroup.ladder import climbed
before = str(subtree.mounted()[1])
with climbed() as climb:
    found = climb.subtree
    print(json.dumps({
        "rung": climb.rung, "passed": climb.passed, "notes": climb.found.notes, "before": before,
        "path": found and found.path, "controllers": sorted(found.controllers) if found else [],
        "after": str(subtree.mounted()[1]),
    }))
"""

# One run that needs more memory than it may have; prints what was enforced and where we are.
LIMITED = """\
import json, sys, trio
from sandboxd.job import Job
from sandboxd.policy import Limits
from sandboxd.cgroup import subtree
from sandboxd.supervise.runner import open_runner
before = str(subtree.mounted()[1])
eater = "x = bytearray(200 << 20)"
job = Job(argv=[sys.executable, "-S", "-c", eater], limits=Limits(memory=64 << 20, wall_time=60))
async def main():
    async with open_runner(slots=2) as runner, open_runner(slots=1) as second:
        one = await runner.run(job)
        other = await second.run(job)
        print(json.dumps({
            "status": [one.status, other.status], "memory": one.enforcement["memory"],
            "peak": one.usage.memory_peak, "oom": one.usage.oom_kills,
            "degraded": [each.what for each in one.degraded],
            "paths": [runner.host.cgroup.path, second.host.cgroup.path],
            "before": before, "after": str(subtree.mounted()[1]),
        }))
trio.run(main)
"""

PROGRAMS = {"climb": CLIMB, "limited": LIMITED}
NO_SESSION = {
    "PATH": os.environ["PATH"],
    "PYTHONPATH": os.pathsep.join(sys.path),
    "LANG": "C.UTF-8",
}
USER = {
    **NO_SESSION,
    "XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}",
    "HOME": os.path.expanduser("~"),
}

SCOPE = ("systemd-run", "--user", "--scope", "--quiet", "--collect")
SERVICE = ("systemd-run", "--user", "--pipe", "--wait", "--quiet", "--collect")
DELEGATE = ("-p", "Delegate=yes")
SHELL = ("sh", "-c", '"$@"; exit $?', "sh")


def run(name: str, *wrapper: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What one of the programs prints that these words start."""
    environment = USER if environment is None else environment
    words = list(wrapper)
    if "--pipe" in words:  # a service has an environment of its own
        place = words.index("--pipe")
        words[place:place] = [f"--setenv={key}={value}" for key, value in NO_SESSION.items()]
    done = subprocess.run(
        [*words, sys.executable, "-P", "-c", PROGRAMS[name]],
        cwd="/", env=environment, capture_output=True, text=True, check=False, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def scopes() -> set[str]:
    """All scopes of ours on this machine."""
    return {str(path) for path in Path("/sys/fs/cgroup").rglob("sandboxd-*.scope")}


@pytest.fixture(autouse=True)
def _no_scope_left() -> Iterator[None]:
    before = scopes()
    yield
    deadline = time.monotonic() + PATIENCE
    while left := scopes() - before:
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {left}")
        time.sleep(0.02)


def it_holds(found: dict[str, Any]) -> None:
    assert found["status"] == ["memory_limit", "memory_limit"]
    assert found["memory"] == "cgroup2"
    assert "memory" not in found["degraded"]
    assert found["peak"] == 64 << 20
    assert found["oom"] >= 1


# -- our own cgroup --------------------------------------------------------------------------------


@pytest.mark.needs("systemd-user", "systemd-memory")
@pytest.mark.parametrize("unit", [SCOPE, SERVICE], ids=["scope", "service"])
def test_a_unit_that_is_delegated(unit: tuple[str, ...]) -> None:
    """We move into a leaf of it and stay below it."""
    found = run("climb", *unit, *DELEGATE)
    assert found["rung"] == "own", found
    assert found["path"] == found["before"]
    assert found["after"] == f"{found['path']}/sandboxd.supervisor"
    assert {"cpu", "memory", "pids"} <= set(found["controllers"])


@pytest.mark.needs("systemd-user", "systemd-memory", "userns")
@pytest.mark.parametrize("unit", [SCOPE, SERVICE], ids=["scope", "service"])
def test_limits_in_a_unit_that_is_delegated(unit: tuple[str, ...]) -> None:
    """The second runner of the process finds us in the leaf, and uses the same subtree."""
    found = run("limited", *unit, *DELEGATE)
    it_holds(found)
    assert found["paths"] == [found["before"]] * 2


@pytest.mark.needs("systemd-user", "systemd-memory")
@pytest.mark.parametrize("unit", [SCOPE, SERVICE], ids=["scope", "service"])
def test_a_unit_that_is_not_delegated(unit: tuple[str, ...]) -> None:
    """Its files belong to us, and yet it is systemd's: we stay where we are."""
    found = run("climb", *unit)
    assert found["rung"] == "systemd", found
    assert found["passed"]["own"].endswith("a unit without Delegate=yes")
    assert found["after"] == found["before"]


@pytest.mark.needs("systemd-user", "systemd-memory", "userns")
def test_limits_in_a_unit_that_is_not_delegated() -> None:
    """The caller, perhaps a service's main process, is not moved."""
    found = run("limited", *SERVICE)
    it_holds(found)
    assert found["after"] == found["before"]
    assert len(set(found["paths"])) == 2


@pytest.mark.needs("systemd-user", "systemd-memory")
def test_a_delegated_unit_with_others_in_it() -> None:
    found = run("climb", *SCOPE, *DELEGATE, *SHELL)
    assert found["rung"] == "systemd"
    assert "other processes sit in it: " in found["passed"]["own"]
    assert "(sh)" in found["passed"]["own"]
    assert found["after"] == found["before"]


@pytest.mark.needs("systemd-user", "systemd-memory")
def test_the_scope_is_in_our_slice() -> None:
    """What limits the slice limits the sandboxes, too."""
    found = run("climb", *SERVICE, "--slice=sandboxd-test.slice")
    assert found["rung"] == "systemd"
    assert Path(found["path"]).parent == Path(found["before"]).parent
    assert "sandboxd-test.slice" in found["path"]


@pytest.mark.needs("prepared", "userns")
def test_a_subtree_of_an_administrator() -> None:
    """We are in a leaf of it with others: the subtree above is ours as well."""
    found = run("climb", environment=NO_SESSION)
    own = needs.own_cgroup()
    assert found["rung"] == "own"
    assert found["path"] == str(own.parent)
    assert found["after"] == found["before"] == str(own)
    assert {"cpu", "memory", "pids"} <= set(found["controllers"])
    it_holds(run("limited", environment=NO_SESSION))


CONTAINER = (
    *("unshare", "--user", "--map-root-user", "--cgroup", "--mount", "sh", "-c"),
    "mount -t tmpfs none /sys/fs && mkdir /sys/fs/cgroup && "
    'mount -t cgroup2 none /sys/fs/cgroup && exec "$@"',
    "sh",
)
"""As in a container with writable cgroups: its own cgroup is the root of what it sees."""


@pytest.mark.needs("systemd-user", "systemd-memory", "userns")
def test_in_a_container() -> None:
    found = run("climb", *SCOPE, *DELEGATE, *CONTAINER)
    assert found["rung"] == "own", found
    assert found["before"] == found["path"] == "/sys/fs/cgroup"
    assert found["after"] == "/sys/fs/cgroup/sandboxd.supervisor"
    assert {"cpu", "memory", "pids"} <= set(found["controllers"])


@pytest.mark.needs("systemd-user", "systemd-memory", "userns")
def test_in_a_container_whose_init_is_a_shell() -> None:
    """Its systemd is out of reach, so nothing is left but a subtree without controllers."""
    found = run("climb", *SCOPE, *DELEGATE, *CONTAINER, *SHELL)
    assert found["rung"] == "own", found
    assert "other processes sit in it: " in found["notes"]["cgroup.memory"]
    assert found["controllers"] == []
    assert "systemd" in found["passed"]


# -- a scope of systemd's --------------------------------------------------------------------------


@pytest.mark.needs("outside", "systemd-user", "systemd-memory")
@pytest.mark.parametrize("environment", [USER, NO_SESSION], ids=["session", "bare"])
def test_outside_of_all_delegation(environment: dict[str, str]) -> None:
    found = run("climb", environment=environment)
    assert found["rung"] == "systemd", found
    assert "not delegated to us" in found["passed"]["own"]
    assert found["after"] == found["before"]
    assert {"cpu", "memory", "pids"} <= set(found["controllers"])


@pytest.mark.needs("outside", "systemd-user", "systemd-memory", "userns")
def test_limits_outside_of_all_delegation() -> None:
    """Two runners of one process have a scope each, and the process stays where it was."""
    found = run("limited", environment=NO_SESSION)
    it_holds(found)
    assert len(set(found["paths"])) == 2
    assert found["after"] == found["before"]


@pytest.mark.needs("systemd-user", "systemd-stock")
@pytest.mark.parametrize("wrapper", [(*SCOPE, *DELEGATE), SERVICE], ids=["own", "systemd"])
def test_what_a_distribution_does_not_delegate(wrapper: tuple[str, ...]) -> None:
    found = run("climb", *wrapper)
    assert found["controllers"] == ["cpu", "memory", "pids"]
    assert found["notes"]["cgroup.io"] == "not delegated to this cgroup"
    assert found["notes"]["cgroup.cpuset"] == "not delegated to this cgroup"


# Says where its scope is, starts a job that never ends, and waits to be killed.
HANGS = """\
import sys, trio
from sandboxd.job import Job
from sandboxd.supervise.runner import open_runner
async def main():
    async with open_runner(slots=1) as runner:
        async with runner.start(Job(argv=["sh", "-c", "echo; exec sleep 1000"])) as run:
            async for event in run.events:
                if event.type == "stdout":
                    print(runner.host.cgroup.path, flush=True)
trio.run(main)
"""


@pytest.mark.needs("outside", "systemd-user", "systemd-memory", "userns")
def test_a_supervisor_that_is_killed_leaves_no_scope() -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", HANGS], cwd="/", env=USER, stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdout is not None
        path = Path(supervisor.stdout.readline().strip())
        assert path.name.endswith(".scope")
        assert (path / "cgroup.procs").exists()
        supervisor.kill()
    deadline = time.monotonic() + PATIENCE
    while path.exists():
        assert time.monotonic() < deadline, list(path.rglob("*/"))
        time.sleep(0.02)


@pytest.mark.needs("outside", "systemd-user", "systemd-memory", "userns")
def test_the_doctor_knows_the_rung() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sandboxd", "doctor", "--json"],
        cwd="/", env=USER, capture_output=True, text=True, check=False,
    )  # fmt: skip
    rows = {row["what"]: row for row in json.loads(done.stdout)["checks"]}
    assert rows["cgroup v2 subtree"]["state"] == "ok"
    assert rows["cgroup: systemd"]["found"].startswith("taken")
    assert "not delegated" in rows["cgroup: own"]["found"]
    assert rows["cgroup: prepared"]["found"] == "not tried"
    assert rows["start in a cgroup"]["state"] == "ok"


@pytest.mark.needs("systemd-system", "userns")
def test_root_gets_a_scope_of_the_system() -> None:
    """Its tenants are somebody else, and are let in and given their leaves."""
    found = run("limited", environment={**NO_SESSION, "HOME": "/root"})
    it_holds(found)
    assert all(path.endswith(".scope") for path in found["paths"])
    assert found["after"] == found["before"]


# -- what an administrator does --------------------------------------------------------------------

USER_NAME = "sandboxd-guest"
MASKED = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run/systemd && exec "$@"', "sh")
"""No systemd is to be seen."""


@contextmanager
def stock() -> Iterator[None]:
    """systemd delegates what it does of its own accord: cpu, memory and pids."""
    folder = Path("/etc/systemd/system/user@.service.d")
    saved = {path: path.read_text() for path in folder.glob("*.conf")}
    for path in saved:
        path.unlink()
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    try:
        yield
    finally:
        for path in folder.glob("*.conf"):
            path.unlink()
        for path, text in saved.items():
            path.write_text(text)
        subprocess.run(["systemctl", "daemon-reload"], check=True)


@pytest.fixture
def user() -> Iterator[tuple[str, int]]:
    """An ordinary user without subordinate ids, and nothing else of theirs."""
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", USER_NAME], check=True)
    account = pwd.getpwnam(USER_NAME)
    for name in ("/etc/subuid", "/etc/subgid"):
        lines = Path(name).read_text().splitlines(keepends=True)
        Path(name).write_text("".join(one for one in lines if not one.startswith(USER_NAME)))
    yield USER_NAME, account.pw_uid
    subprocess.run(["loginctl", "disable-linger", USER_NAME], check=False)
    subprocess.run(["systemctl", "stop", f"user@{account.pw_uid}.service"], check=False)
    subprocess.run(["userdel", "--remove", USER_NAME], check=True, capture_output=True)


def sandboxd_setup(*args: str, wrapper: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [*wrapper, sys.executable, "-P", "-m", "sandboxd", "setup", "--json", *args],
        cwd="/", env={**NO_SESSION, "HOME": "/root"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return {step["what"]: step for step in json.loads(done.stdout)["steps"]}


def states(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {what: step["state"] for what, step in found.items()}


def as_user(name: str) -> tuple[str, ...]:
    return ("setpriv", "--reuid", name, "--regid", name, "--init-groups", "--")


@pytest.mark.needs("disposable", "open-checkout", "systemd-system", "userns")
def test_setup_with_systemd(user: tuple[str, int]) -> None:
    """Shown, done, done again; afterwards the user's jobs have what was missing before."""
    name, uid = user
    home = {**NO_SESSION, "HOME": f"/home/{name}"}
    with stock():
        before = sandboxd_setup("--user", name)
        assert states(before)["subordinate ids"] == "missing"
        assert states(before)["linger"] == states(before)["delegation"] == "missing"
        assert "no cpuset and no io" in before["delegation"]["found"]
        done = sandboxd_setup("--user", name, "--apply")
        assert set(states(done).values()) == {"ok"}, done
        marks = {path: path.stat().st_mtime_ns for path in Path("/etc").rglob("*sandboxd*.conf")}
        assert len(marks) == 1
        assert sandboxd_setup("--user", name, "--apply") == done
        assert {path: path.stat().st_mtime_ns for path in marks} == marks
        wait_for(Path(f"/run/user/{uid}/bus"))
        found = run("climb", *as_user(name), environment=home)
        assert found["rung"] == "systemd", found
        assert found["controllers"] == ["cpu", "cpuset", "io", "memory", "pids"]
        it_holds(run("limited", *as_user(name), environment=home))


@pytest.mark.needs("disposable", "open-checkout", "systemd-system")
def test_a_user_manager_that_runs_already(user: tuple[str, int]) -> None:
    """It is told of its new controllers without being stopped."""
    name, uid = user
    home = {**NO_SESSION, "HOME": f"/home/{name}"}
    with stock():
        subprocess.run(["loginctl", "enable-linger", name], check=True)
        wait_for(Path(f"/run/user/{uid}/bus"))
        pid = main_pid(uid)
        found = run("climb", *as_user(name), environment=home)
        assert found["controllers"] == ["cpu", "memory", "pids"]
        sandboxd_setup("--user", name, "--apply")
        found = run("climb", *as_user(name), environment=home)
        assert found["controllers"] == ["cpu", "cpuset", "io", "memory", "pids"], found
        assert main_pid(uid) == pid


def main_pid(uid: int) -> str:
    words = ["systemctl", "show", "--value", "--property=MainPID", f"user@{uid}.service"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.needs("disposable", "open-checkout", "userns")
def test_setup_without_systemd(user: tuple[str, int]) -> None:
    """A subtree, and once root has put the user's shell into its leaf, limits that hold."""
    name, uid = user
    top = Path(f"/sys/fs/cgroup/sandboxd-{uid}")
    try:
        before = sandboxd_setup("--user", name, wrapper=MASKED)
        assert states(before)["cgroup subtree"] == "missing"
        done = sandboxd_setup("--user", name, "--apply", wrapper=MASKED)
        assert set(states(done).values()) == {"ok"}, done
        assert sandboxd_setup("--user", name, "--apply", wrapper=MASKED) == done
        home = {**NO_SESSION, "HOME": f"/home/{name}"}
        outside = run("climb", *MASKED, *as_user(name), environment=home)
        assert "runs outside of it" in outside["passed"]["prepared"]
        enter = ("sh", "-c", f'echo $$ >{top}/login/cgroup.procs && exec "$@"', "sh")
        found = run("climb", *MASKED, *enter, *as_user(name), environment=home)
        assert found["path"] == str(top)
        assert found["rung"] == "own"
        assert {"cpu", "memory", "pids"} <= set(found["controllers"])
        it_holds(run("limited", *enter, *MASKED, *as_user(name), environment=home))
    finally:
        for path in sorted(top.rglob("*/"), reverse=True):
            path.rmdir()
        top.rmdir()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
