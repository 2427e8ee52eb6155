"""What a probe says, held against what other programs find; and probes where something is amiss."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandboxd.probe import idrange
from sandboxd.probe.attempts import Tools, attempt, parse
from sandboxd.probe.host import COSTS, kinds, probe
from tests import needs

pytestmark = pytest.mark.root_ok

not_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may do it all")

# Prints a fresh probe as JSON.
SCRIPT = """\
import msgspec
from sandboxd.probe.host import probe
print(msgspec.json.encode(probe(cached=False), order="deterministic").decode())
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; where its file will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/sandboxd/host.json"


def probe_in(*wrapper: str, **environment: str) -> dict[str, Any]:
    """A fresh probe by a Python that these words start, with these variables on top of ours."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    host: dict[str, Any] = json.loads(done.stdout)
    return host


def output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


# -- facts -----------------------------------------------------------------------------------------


def test_plain_facts() -> None:
    host = probe()
    assert host.arch == output("uname", "-m")
    assert host.kernel == output("uname", "-r")
    assert host.uid == int(output("id", "-u"))
    assert host.gid == int(output("id", "-g"))
    assert host.cpus == int(output("nproc"))
    assert host.page_size == int(output("getconf", "PAGESIZE"))
    assert host.root_dirs == {
        path[1:] for path in output("find", "/", "-maxdepth", "1", "-type", "d").split() if path[1:]
    }
    assert host.root_links == {
        name: os.readlink(f"/{name}") for name in os.listdir("/") if os.path.islink(f"/{name}")
    }
    assert {"self", "meminfo"} <= host.proc_entries
    assert not any(name.isdecimal() for name in host.proc_entries)


def test_etc_follows_links() -> None:
    host = probe()
    assert host.etc_entries["passwd"] == "file"
    for kind, test in (("file", "-f"), ("dir", "-d")):
        named = [f"/etc/{name}" for name, found in host.etc_entries.items() if found == kind]
        for path in named:
            subprocess.run(["test", test, path], check=True)


def test_entries_that_are_neither_file_nor_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("dir")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    expected = {"dir": "dir", "file": "file", "link": "dir"}
    assert {name: kind for name, kind in kinds(tmp_path).items() if name != "cache"} == expected
    assert kinds(tmp_path / "nowhere") == {}


def test_hard_limits_are_those_of_proc() -> None:
    rows = Path("/proc/self/limits").read_text().splitlines()[1:]
    known = {
        "Max open files": "NOFILE",
        "Max processes": "NPROC",
        "Max stack size": "STACK",
        "Max core file size": "CORE",
        "Max locked memory": "MEMLOCK",
        "Max file size": "FSIZE",
    }
    expected = {}
    for row in rows:
        hard = row[26:].split()[1]
        if row[:26].strip() in known and hard != "unlimited":
            expected[known[row[:26].strip()]] = int(hard)
    found = probe().hard_limits
    assert {name: found[name] for name in found if name in known.values()} == expected


@pytest.mark.parametrize(
    ("fact", "argv"),
    [
        ("user_namespaces", ["unshare", "-Urmpiunf", "--cgroup", "true"]),
        ("proc_whole", ["unshare", "-Urpf", "--mount-proc", "true"]),
        ("time_namespaces", ["unshare", "-UrT", "--boottime", "3600", "true"]),
        (
            "overlay",
            [
                *("unshare", "-Urm", "sh", "-ec"),
                "mount -t tmpfs tmpfs /tmp; cd /tmp; mkdir l l/d u w m;"
                "mount -t overlay -o userxattr,lowerdir=l,upperdir=u,workdir=w o m;"
                "rmdir m/d; mkdir m/d",
            ],
        ),
    ],
)
def test_namespaces_agree_with_unshare(fact: str, argv: list[str]) -> None:
    assert getattr(probe(cached=False), fact) == (needs.works(*argv) == "")


@not_root
def test_id_ranges_agree_with_unshare() -> None:
    host = probe()
    works = needs.missing("subuid") == ""
    assert (host.subuid is not None) == works
    assert (host.subgid is not None) == works
    assert not host.direct_maps
    if host.subuid:
        maps = output("unshare", "--map-root-user", "--map-auto", "cat", "/proc/self/uid_map")
        rows = [[int(word) for word in line.split()] for line in maps.splitlines()]
        assert [1, host.subuid.start] in [row[:2] for row in rows]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes maps itself")
def test_root_takes_a_free_range() -> None:
    host = probe()
    if not host.direct_maps:  # root of a container: few ids, or no capability to map them
        assert host.fault_notes["subuid"]
        return
    assert host.subuid == host.subgid
    assert host.subuid
    assert host.subuid.start > 0
    assert host.subuid.count >= idrange.SMALLEST


def test_landlock_agrees_with_the_kernel() -> None:
    assert (probe().landlock > 0) == (needs.missing("landlock") == "")


def test_fuse_overlayfs_mounts_or_says_why_not() -> None:
    host = probe()
    if host.fuse_overlayfs:
        assert host.fuse_overlayfs == shutil.which("fuse-overlayfs")
        assert needs.missing("fuse") == ""
    else:
        assert host.fault_notes["fuse_overlayfs"]


@pytest.mark.needs("fuse", "subuid")
def test_fuse_overlayfs_where_everything_is_there() -> None:
    assert probe(cached=False).fuse_overlayfs


def test_every_note_names_a_cost() -> None:
    for key, note in probe().fault_notes.items():
        assert note.endswith(COSTS[key])
        assert not note.startswith(":")


# -- where something is amiss ----------------------------------------------------------------------


@not_root
@pytest.mark.needs("userns")
def test_path_without_newuidmap(tmp_path: Path) -> None:
    host = probe_in(PATH=str(tmp_path))
    assert host["subuid"] is None
    assert host["subgid"] is None
    assert host["fuse_overlayfs"] is None
    assert host["user_namespaces"]
    if isinstance(idrange.of_caller(), tuple):
        assert "no newuidmap and no newgidmap in PATH" in host["fault_notes"]["subuid"]
    assert "no fuse-overlayfs in PATH" in host["fault_notes"]["fuse_overlayfs"]


@not_root
@pytest.mark.needs("subuid")
def test_newuidmap_that_does_not_work() -> None:
    """Under no_new_privs it is there, and is not set-user-id."""
    host = probe_in("setpriv", "--no-new-privs")
    assert host["subuid"] is None
    assert host["fault_notes"]["subuid"].startswith("newuidmap: ")
    assert host["overlay"] == probe().overlay  # which needs a single id only


@pytest.mark.needs("userns")
def test_user_namespaces_forbidden(cache: Path) -> None:
    host = probe_in(
        *("unshare", "--user", "--map-root-user", "sh", "-c"),
        'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"',
        "sh",
    )
    assert not host["user_namespaces"]
    assert host["fault_notes"]["user_namespaces"].startswith(
        "unshare the user namespace: No space left on device"
    )
    assert not host["overlay"]
    assert host["memfd_exec"]
    assert not cache.exists()  # the limit may have been reached, not 0


@pytest.mark.needs("userns")
def test_proc_masked() -> None:
    """As container engines do; a new proc would show what theirs hides."""
    host = probe_in(
        *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
        'mount -t tmpfs tmpfs /proc/sys && exec "$@"',
        "sh",
    )
    assert host["user_namespaces"]
    assert not host["proc_whole"]
    if not host["proc_subset"]:
        assert "mount proc: Operation not permitted" in host["fault_notes"]["proc"]


@pytest.mark.needs("userns")
def test_no_proc_at_all() -> None:
    done = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
            'mount -t tmpfs tmpfs /proc && exec "$@"',
            *("sh", sys.executable, "-c", SCRIPT),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    said = "/proc/self: No such file or directory (mount -t proc proc /proc)"
    assert done.stderr.splitlines()[-1] == f"sandboxd.errors.HostError: {said}"


def test_a_named_subtree_that_is_none() -> None:
    host = probe_in(SANDBOXD_CGROUP="/nonexistent")
    assert host["cgroup"] is None
    reason = "SANDBOXD_CGROUP=/nonexistent: No such file or directory"
    assert host["cgroup_why_not"] == reason
    assert host["fault_notes"]["cgroup"] == f"{reason}: {COSTS['cgroup']}"


def test_a_prober_that_fails() -> None:
    outcome = attempt(("nonsense",), tools=Tools(None, None, None))["nonsense"]
    assert outcome.why == "the prober: KeyError: 'nonsense'"


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", '{"a": 1}', '{"a": {"found": 1}}', "[" * 100000]
)
def test_an_answer_that_is_none(text: str) -> None:
    assert parse(text) == {}


def test_a_tool_that_does_not_work(tmp_path: Path) -> None:
    tool = tmp_path / "fuse-overlayfs"
    tool.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    tool.chmod(0o755)
    host = probe_in(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert host["fuse_overlayfs"] is None
    reasons = ("no such luck", "open /dev/fuse")  # the latter comes first
    assert host["fault_notes"]["fuse_overlayfs"].startswith(reasons)
