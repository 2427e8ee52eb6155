"""What the doctor says, held against what the probe and other programs find."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sandboxd.cgroup import subtree
from sandboxd.host import CgroupSubtree, Host, IdRange
from sandboxd.probe import fixes
from sandboxd.probe.host import probe
from sandboxd.supervise import policies
from sandboxd.supervise.doctor import OPEN_FILES, Check, Report, diagnose, guarantees
from tests import needs
from tests.needs import hidden_processes

pytestmark = pytest.mark.root_ok

WHAT = (
    *("machine", "memfd exec", "user namespace", "AppArmor", "id maps", "new /proc"),
    *("seeing processes", "time namespace", "kernel overlay", "fuse-overlayfs", "TUN"),
    *("nftables", "network caps", "user networking", "groups", "IPv6"),
    "cgroup v2 subtree",
    *("cgroup: given", "cgroup: own", "cgroup: systemd", "cgroup: prepared"),
    *("start in a cgroup", "cgroup memory", "cgroup pids", "cgroup cpu", "cgroup io"),
    *("cgroup cpuset", "cgroup.kill", "memory.peak", "pids.peak", "swap", "seccomp"),
    *("Landlock", "libseccomp", "sysctls", "open files", "pressure (PSI)", "SMT"),
)

# Prints a diagnosis as JSON.
SCRIPT = """\
import dataclasses, json
from sandboxd.supervise.doctor import diagnose
print(json.dumps(dataclasses.asdict(diagnose())))
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def report() -> Report:
    return diagnose()


def rows(found: Report) -> dict[str, Check]:
    return {check.what: check for check in found.checks}


def diagnose_in(*wrapper: str, **environment: str) -> dict[str, dict[str, Any]]:
    """What a doctor says that these words start, with these variables on top of ours."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return {row["what"]: row for row in (*said["checks"], *said["guarantees"])}


def test_every_capability_has_a_row(report: Report) -> None:
    assert tuple(check.what for check in report.checks) == WHAT


def test_what_is_not_fine_has_a_fix_and_the_rest_has_none(report: Report) -> None:
    for check in report.checks:
        assert check.found, check
        assert bool(check.fix) == (check.state != "ok"), check
        assert "\n" not in check.found + check.fix


def test_it_agrees_with_the_probe(report: Report) -> None:
    host, seen = probe(cached=False), rows(report)
    for what, fact in (
        ("user namespace", host.user_namespaces),
        ("id maps", host.subuid is not None),
        ("kernel overlay", host.overlay),
        ("fuse-overlayfs", host.fuse_overlayfs is not None),
        ("memfd exec", host.memfd_exec),
        ("seccomp", host.seccomp),
        ("Landlock", host.landlock >= 6),
        ("time namespace", host.time_namespaces),
        ("cgroup v2 subtree", host.cgroup is not None),
        *(
            (f"cgroup {name}", bool(host.cgroup and name in host.cgroup.controllers))
            for name in subtree.CONTROLLERS
        ),
    ):
        assert (seen[what].state == "ok") == fact, what
    assert report.ok == (host.user_namespaces and (host.proc_whole or host.proc_subset))


def test_a_way_out(report: Report) -> None:
    carriers = [name for name in ("slirp4netns", "pasta") if not needs.missing(name)]
    found = rows(report)["user networking"]
    assert [name for name in carriers if name not in found.found] == []
    assert (found.state == "ok") == bool(carriers)
    able = report.ok and needs.missing("nft") == ""
    assert (rows(report)["nftables"].state == "ok") >= able


@pytest.mark.needs("slirp4netns", "tun")
def test_what_carries_packets_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under Debian 12, whose AppArmor keeps pasta from namespaces of others."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = "Couldn't open network namespace /tmp/n1.net: Permission denied"

    def broken(name: str) -> str:
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{words}" >&2; exit 1\n')
        (tmp_path / name).chmod(0o755)
        return f"{tmp_path / name}: {words}"

    pasta = broken("pasta")
    found = rows(diagnose())["user networking"]
    assert (found.state, found.fix) == ("ok", "")
    assert found.found.endswith(f"slirp4netns; but {pasta}")
    slirp4netns = broken("slirp4netns")
    report = diagnose()
    found = rows(report)["user networking"]
    assert (found.state, found.found) == ("warn", f"{slirp4netns}; {pasta}")
    assert "aa-disable" in found.fix
    assert {one.what: one.level for one in report.guarantees}["way out"] == "none"


def test_a_bridge(report: Report) -> None:
    """As ip(8) finds it."""
    there = "ip link add br0 type bridge && ip link add a type veth peer name b"
    able = needs.missing("ip") == "" and (
        needs.works("unshare", "--map-root-user", "--net", "sh", "-c", there) == ""
    )
    assert (rows(report)["groups"].state == "ok") >= able
    assert probe(cached=False).bridge == (rows(report)["groups"].state == "ok")


def test_network_caps(report: Report) -> None:
    """As nft(8) and tc(8) find it, where they are installed."""
    inside = ["unshare", "--map-root-user", "--net"]
    quota = "add table inet t; add quota inet t q over 1 bytes; add chain inet t c; "
    rate = "add rule inet t c limit rate over 1024 bytes/second drop"
    shape = shlex.split("tc qdisc add dev lo root tbf rate 1mbit burst 64kb limit 64kb")
    if needs.works(*inside, "nft", quota + rate) == needs.works(*inside, *shape) == "":
        assert rows(report)["network caps"].state == "ok", rows(report)["network caps"]


def test_tun(report: Report) -> None:
    able = needs.works("unshare", "--map-root-user", "--net", "true") == ""
    assert (rows(report)["TUN"].state == "ok") == (able and needs.missing("tun") == "")


@pytest.mark.needs("cgroup")
def test_a_delegated_subtree(report: Report, cgroup_top: Path) -> None:
    seen = rows(report)
    assert str(cgroup_top) in seen["cgroup v2 subtree"].found
    assert seen["start in a cgroup"].state == "ok"


def test_swap(report: Report) -> None:
    used = len(Path("/proc/swaps").read_text().splitlines()) > 1
    assert used == (rows(report)["swap"].found != "none")


def test_libseccomp(report: Report) -> None:
    script = "import importlib\ntry:\n import seccomp\nexcept ImportError:\n import pyseccomp\n"
    works = needs.works(sys.executable, "-c", script) == ""
    assert (rows(report)["libseccomp"].state == "ok") == works


def test_sysctls_agree_with_proc(report: Report) -> None:
    found = rows(report)["sysctls"]
    value = fixes.sysctl("kernel/unprivileged_bpf_disabled")
    assert ("kernel.unprivileged_bpf_disabled" in found.found) == (value == "0")


def test_open_files_of_the_machine(report: Report) -> None:
    """Our own policies do not allow more than what is warned of."""
    shipped = [policies.find(name).limits for name in ("base", "ci", "shell", "agent", "compile")]
    assert max((one.processes or 0) * (one.open_files or 0) for one in shipped) == OPEN_FILES
    most = int(Path("/proc/sys/fs/file-max").read_text())
    assert (rows(report)["open files"].state == "ok") == (most >= OPEN_FILES)


@pytest.mark.needs("userns")
def test_no_user_namespaces_is_the_failure() -> None:
    seen = diagnose_in(
        *("unshare", "--user", "--map-root-user", "sh", "-c"),
        'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"',
        "sh",
    )
    row = seen["user namespace"]
    assert row["state"] == "FAIL"
    assert row["fix"].endswith("sysctl -w user.max_user_namespaces=15000")
    assert seen["new /proc"]["fix"] == "see user namespace"
    assert [name for name in seen if seen[name].get("state") == "FAIL"] == ["user namespace"]
    assert seen["everything"]["level"] == "none"


@pytest.mark.needs("userns")
def test_root_without_capabilities() -> None:
    """It may not even map itself; an ordinary user may (user_namespaces(7), CAP_SETFCAP)."""
    seen = diagnose_in(
        *("unshare", "--user", "--map-root-user"),
        *("setpriv", "--bounding-set=-all", "--inh-caps=-all"),
    )
    assert seen["user namespace"]["found"] == "write /proc/self/uid_map: Operation not permitted"
    assert seen["user namespace"]["state"] == "FAIL"
    assert "as an ordinary user" in seen["user namespace"]["fix"]


@pytest.mark.needs("userns")
def test_a_masked_proc() -> None:
    seen = diagnose_in(
        *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
        'mount -t tmpfs tmpfs /proc/sys && exec "$@"',
        "sh",
    )
    row = seen["new /proc"]
    assert seen["user namespace"]["state"] == "ok"
    assert row["state"] == "FAIL" or row["found"] == "mounts (pid)"
    assert row["state"] == "ok" or "/proc" in row["fix"] or "docker" in row["fix"]


@pytest.mark.needs("userns")
@pytest.mark.parametrize("how", ["noaccess", "invisible", "ptraceable"])
def test_a_proc_that_hides_processes(how: str) -> None:
    seen = diagnose_in(*hidden_processes(how), SANDBOXD_CGROUP="/nonexistent")
    row = seen["seeing processes"]
    assert (row["state"], row["found"]) == ("warn", f"/proc is mounted with hidepid={how}")
    assert "remount,hidepid=0 /proc" in row["fix"]
    assert seen["memory limit"]["level"] == "none"


@pytest.mark.skipif(os.geteuid() == 0, reason="root needs no newuidmap")
@pytest.mark.needs("subuid")
def test_without_newuidmap(tmp_path: Path) -> None:
    seen = diagnose_in(PATH=str(tmp_path))
    assert seen["id maps"]["state"] == "warn"
    assert seen["id maps"]["fix"] == "sudo apt-get install uidmap"
    assert seen["user ids"]["level"] == "partly"
    assert seen["fuse-overlayfs"]["fix"] == "sudo apt-get install fuse-overlayfs"
    seen = diagnose_in("setpriv", "--no-new-privs")
    assert "no_new_privs" in seen["id maps"]["fix"]


def test_a_subtree_that_is_none() -> None:
    seen = diagnose_in(SANDBOXD_CGROUP="/nonexistent")
    assert seen["cgroup v2 subtree"]["state"] == "warn"
    assert seen["cgroup v2 subtree"]["fix"] == "unset SANDBOXD_CGROUP"
    assert seen["cgroup memory"]["fix"] == "see cgroup v2 subtree"
    assert seen["cpu time"]["level"] == "partly"
    assert seen["nothing left"]["level"] == "kernel"


# -- the guarantees, from facts alone --------------------------------------------------------------

BARE = Host(arch="x86_64", kernel="6.1.0", uid=1000, gid=1000, cpus=2)
ALL = msgspec.structs.replace(
    BARE,
    subuid=IdRange(start=100000, count=65536),
    subgid=IdRange(start=100000, count=65536),
    overlay=True,
    landlock=6,
    cgroup=CgroupSubtree(path="/x", controllers=frozenset(subtree.CONTROLLERS)),
)
ONLY_CGROUP = msgspec.structs.replace(BARE, cgroup=CgroupSubtree(path="/x"))
FUSE = msgspec.structs.replace(BARE, fuse_overlayfs="/usr/bin/fuse-overlayfs")
CARRIED = msgspec.structs.replace(BARE, pasta="/usr/bin/pasta", tun=True, nftables=True)
HIDDEN = msgspec.structs.replace(BARE, hides_processes=True)
NO_FILTER = msgspec.structs.replace(BARE, seccomp=False)


@pytest.mark.parametrize(
    ("host", "what", "level", "word"),
    [
        (BARE, "memory limit", "partly", "sampled"),
        (ONLY_CGROUP, "memory limit", "partly", "sampled"),
        (ALL, "memory limit", "kernel", "memory.max"),
        (HIDDEN, "memory limit", "none", "hidepid"),
        (BARE, "cpu time", "partly", "lower bound"),
        (ONLY_CGROUP, "cpu time", "kernel", "cpu.stat"),
        (BARE, "processes", "kernel", "RLIMIT_NPROC"),
        (ALL, "processes", "kernel", "pids.max"),
        (BARE, "cpus", "none", "not enforced"),
        (ALL, "cpus", "kernel", "cpu.max"),
        (BARE, "disk", "kernel", "tmpfs"),
        (BARE, "nothing left", "kernel", "pid namespace"),
        (ALL, "nothing left", "kernel", "cgroup.kill"),
        (BARE, "network", "kernel", "loopback"),
        (BARE, "way out", "none", "there is none"),
        (CARRIED, "way out", "kernel", "pasta"),
        (BARE, "writable root", "partly", "binds"),
        (FUSE, "writable root", "kernel", "fuse-overlayfs"),
        (ALL, "writable root", "kernel", "overlayfs of the kernel"),
        (BARE, "user ids", "partly", "share"),
        (ALL, "user ids", "kernel", "every run"),
        (BARE, "system calls", "kernel", "seccomp"),
        (NO_FILTER, "system calls", "none", "not filtered"),
        (BARE, "signals, sockets", "partly", "namespaces only"),
        (ALL, "signals, sockets", "kernel", "ABI 6"),
    ],
)
def test_guarantees(host: Host, what: str, level: str, word: str) -> None:
    found = {one.what: one for one in guarantees(host)}[what]
    assert found.level == level
    assert word in found.how


def test_nothing_is_guaranteed_without_user_namespaces() -> None:
    host = msgspec.structs.replace(ALL, user_namespaces=False)
    assert [(one.what, one.level) for one in guarantees(host)] == [("everything", "none")]


# -- commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        fixes.by_root(Path("/sys/fs/cgroup")),
        fixes.id_maps("/etc/subuid has no line for me"),
        fixes.id_maps("newuidmap: write to uid_map failed"),
        fixes.fuse_overlayfs(found=False),
        fixes.bridge(),
        fixes.device("/nonexistent", "tun"),
        fixes.device("/dev/null", "null"),
    ],
)
def test_commands_are_shell(command: str) -> None:
    subprocess.run(["sh", "-n", "-c", command], check=True)


def test_free_subids(tmp_path: Path) -> None:
    assert fixes.free_subids(tmp_path) == 100000
    (tmp_path / "subuid").write_text("a:100000:65536\n")
    (tmp_path / "subgid").write_text("a:100000:65536\nb:165536:10\n")
    assert fixes.free_subids(tmp_path) == 165546
