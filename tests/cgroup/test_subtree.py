"""Finding the cgroup subtree: what is said beforehand is what the kernel does."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandboxd.cgroup import subtree
from sandboxd.cgroup.ladder import VARIABLE, climbed
from sandboxd.cgroup.subtree import Found
from sandboxd.probe.attempts import Tools, attempt

pytestmark = pytest.mark.root_ok

not_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may do it all")


def find(environment: Mapping[str, str] = os.environ, proc: Path = subtree.PROC) -> Found:
    """What the ladder leads to in this environment."""
    with climbed(None, environment, proc) as climb:
        return climb.found


@pytest.mark.needs("cgroup")
def test_the_named_subtree(cgroup_top: Path) -> None:
    found = find()
    assert found.subtree is not None, found.why_not
    assert found.subtree.path == str(cgroup_top)
    enabled = set((cgroup_top / "cgroup.subtree_control").read_text().split())
    assert found.subtree.controllers == enabled & {*subtree.CONTROLLERS, *subtree.RARE}
    assert found.why_not == ""
    leaf = cgroup_top / "facts"
    leaf.mkdir()
    try:
        assert found.subtree.has_kill == (leaf / "cgroup.kill").exists()
        assert found.subtree.has_memory_peak == (leaf / "memory.peak").exists()
        assert found.subtree.has_pids_peak == (leaf / "pids.peak").exists()
    finally:
        leaf.rmdir()


@pytest.mark.needs("cgroup")
def test_what_is_not_enabled_has_a_reason() -> None:
    found = find()
    assert found.subtree
    for name in subtree.CONTROLLERS:
        assert (name in found.subtree.controllers) != (f"cgroup.{name}" in found.notes)


@contextmanager
def occupied(path: Path) -> Iterator[None]:
    """A cgroup with a process in it."""
    path.mkdir()
    try:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as sitting:
            (path / "cgroup.procs").write_text(str(sitting.pid))
            yield
    finally:
        path.rmdir()


@pytest.mark.needs("cgroup")
def test_a_subtree_with_processes_is_left_alone(cgroup_top: Path) -> None:
    """Enabling what the kernel does not refuse (pids) would spoil the leaves."""
    inner = cgroup_top / "inner"
    with occupied(inner):
        found = find({VARIABLE: str(inner)})
        assert (inner / "cgroup.subtree_control").read_text().split() == []
        assert found.subtree
        assert found.subtree.controllers == frozenset()
        assert start_in_a_leaf(inner) == ""
        for name in (inner / "cgroup.controllers").read_text().split():
            if name in subtree.CONTROLLERS:
                assert "processes sit in the subtree itself" in found.notes[f"cgroup.{name}"]


@pytest.mark.needs("memory")
def test_the_kernel_refuses_it(cgroup_top: Path) -> None:
    """EBUSY: the rule that inner cgroups have no processes (cgroups(7))."""
    inner = cgroup_top / "inner"
    with occupied(inner), pytest.raises(OSError, match="busy") as caught:
        (inner / "cgroup.subtree_control").write_text("+memory")
    assert caught.value.errno == errno.EBUSY


@pytest.mark.needs("pids")
def test_leaves_that_are_no_domains(cgroup_top: Path) -> None:
    inner = cgroup_top / "inner"
    with occupied(inner):
        (inner / "cgroup.subtree_control").write_text("+pids")
        assert "not supported" in start_in_a_leaf(inner)
        found = find({VARIABLE: str(inner)})
        assert found.why_not.endswith("its leaves are domain invalid (cgroup.type), not domains")


# In a process of its own, which the ladder may move. Prints where it was and what was found.
ALONE = """\
from sandboxd.cgroup import subtree
from sandboxd.cgroup.ladder import climbed
_, own = subtree.mounted()
with climbed() as climb:
    print(own)
    print(climb.subtree.path if climb.rung == "own" else "")
"""


def test_our_own_cgroup() -> None:
    top, own = subtree.mounted()
    if own is None or top is None:
        pytest.skip("no cgroup v2 is mounted")
    line = next(
        line for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"
    )
    assert str(own).rstrip("/") == f"{top}{line[3:]}".rstrip("/")
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=True
    )
    was, found = done.stdout.splitlines()
    assert was == str(own)
    if found:
        assert Path(was).is_relative_to(found)
        assert subtree.is_ours(Path(found))
    elif not (own / "cgroup.type").exists():
        assert not subtree.is_ours(own)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/nonexistent/cgroup", "No such file or directory"),
        ("relative/path", "is not an absolute path"),
        ("/etc/passwd", "Not a directory"),
    ],
)
def test_a_subtree_that_is_none(path: str, reason: str) -> None:
    found = find({VARIABLE: path})
    assert found.subtree is None
    assert found.why_not.startswith(f"SANDBOXD_CGROUP={path}")
    assert reason in found.why_not


def test_a_subtree_that_is_a_plain_directory(tmp_path: Path) -> None:
    found = find({VARIABLE: str(tmp_path)})
    assert "is no cgroup v2 directory" in found.why_not
    assert os.listdir(tmp_path) == []


@not_root
def test_a_subtree_that_is_not_ours() -> None:
    top, _ = subtree.mounted()
    if top is None:
        pytest.skip("no cgroup v2 is mounted")
    found = find({VARIABLE: str(top)})
    assert found.subtree is None
    assert "not delegated to us" in found.why_not


def test_what_the_kernel_files_mean(tmp_path: Path) -> None:
    """A blank in the mount point, a mount that shows only a part, and no v2 at all."""
    here = tmp_path / "self"
    here.mkdir()
    (here / "cgroup").write_text("4:memory:/elsewhere\n0::/user/me\n")
    row = "31 23 0:28 {root} {target} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    for root, target, expected in (
        ("/", r"/sys/fs\040/cgroup", ("/sys/fs /cgroup", "/sys/fs /cgroup/user/me")),
        ("/user", "/cg", ("/cg", "/cg/me")),
        ("/another", "/cg", ("/cg", None)),
    ):
        (here / "mountinfo").write_text(row.format(root=root, target=target))
        top, own = subtree.mounted(tmp_path)
        assert (str(top), str(own) if own else None) == expected
    (here / "mountinfo").write_text(row.replace("cgroup2", "cgroup"))
    assert subtree.mounted(tmp_path) == (None, None)
    assert find({}, tmp_path).why_not == "no cgroup v2 hierarchy is mounted here"
    assert subtree.mounted(tmp_path / "nowhere") == (None, None)


def test_outside_of_the_cgroup_namespace(tmp_path: Path) -> None:
    """cgroup_namespaces(7): what lies above its root is shown with /.. in front."""
    here = tmp_path / "self"
    here.mkdir()
    (here / "cgroup").write_text("0::/../other\n")
    (here / "mountinfo").write_text("31 23 0:28 / /cg rw - cgroup2 cgroup2 rw\n")
    assert "lies outside" in find({}, tmp_path).why_not


def start_in_a_leaf(path: Path) -> str:
    """Why no process of ours can, by clone3(2); "" if one did."""
    with subtree.leaf(path) as leaf:
        outcomes = attempt(("into_cgroup",), tools=Tools.in_path(), cgroup=str(leaf))
    return outcomes["into_cgroup"].why


@not_root
@pytest.mark.needs("cgroup")
def test_a_subtree_into_which_we_may_not_move(cgroup_top: Path) -> None:
    """What access(2) says beforehand is what clone3(2) says when it is done."""
    other = cgroup_top / "other"
    other.mkdir()
    gate = cgroup_top / "cgroup.procs"
    mode = stat.S_IMODE(gate.stat().st_mode)
    try:
        assert find({VARIABLE: str(other)}).subtree
        assert start_in_a_leaf(other) == ""
        gate.chmod(0o444)
        assert "runs outside of it" in find({VARIABLE: str(other)}).why_not
        assert "Permission denied" in start_in_a_leaf(other)
    finally:
        gate.chmod(mode)
        other.rmdir()
