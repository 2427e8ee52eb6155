"""The store of builds: what goes when it is full, what never goes, and what was tampered with."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sandboxd.errors import HostError, JobError
from sandboxd.job import Job
from sandboxd.result import Artifact, Result
from sandboxd.stores import builds
from sandboxd.stores.builds import Store
from sandboxd.supervise.builds import keep

RESULT: dict[str, Any] = {
    "job": "1", "policy": {"name": "p", "sha256": ""}, "status": "ok", "causes": [], "fault": None,
    "message": "", "exit_code": 0, "signal": None, "core_dumped": False, "error": None, "usage": {},
    "streams": {}, "limits": {}, "violations": [], "artifacts": [], "artifact_errors": [],
    "enforcement": {}, "degraded": [], "quality": {},
    "timing": {"queued": 0, "setup": 0, "teardown": 0, "started_at": "", "ended_at": ""},
    "host": {"id": "", "kernel": "", "sandboxd": ""},
}  # fmt: skip
LINE = 4096


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SANDBOXD_BUILDS", str(tmp_path / "builds"))
    return Store(tmp_path / "builds")


def result(files: dict[str, bytes]) -> Result:
    artifacts = tuple(
        Artifact(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), mode=0o644,
                 data=data)
        for path, data in files.items()
    )  # fmt: skip
    return msgspec.structs.replace(msgspec.convert(RESULT, Result), artifacts=artifacts)


def key(number: int) -> str:
    return f"{number:x}".ljust(64, "0")


def fill(store: Store, count: int, size: int = LINE) -> Iterator[str]:
    """Builds, each used later than the one before."""
    with store.adding():
        for number in range(1, count + 1):
            store.keep(key(number), ["cc"], result({"a": b"x" * size}))
            os.utime(store.objects / key(number) / "used", (number, number))
            yield key(number)


def test_what_was_unused_for_longest_goes_first(store: Store) -> None:
    keys = [*fill(store, 5)]
    assert [one.record.key for one in store.every()] == keys[::-1]
    assert store.find(keys[0]) is not None  # used now
    gone, used = store.collect(3 * LINE, None)
    assert ([one.record.key for one in gone], used) == ([keys[2], keys[1]], [])
    assert [one.record.key for one in store.every()] == [keys[0], keys[4], keys[3]]


def test_what_is_too_old_goes(store: Store) -> None:
    keys = [*fill(store, 3)]
    store.find(keys[1])
    gone, _ = store.collect(None, 3600.0)
    assert {one.record.key for one in gone} == {keys[0], keys[2]}


def test_what_is_in_use_stays(store: Store) -> None:
    keys = [*fill(store, 3)]
    held = store.hold(keys[0])
    assert held is not None
    try:
        assert not store.remove(keys[0])
        gone, used = store.collect(0, None)
        assert ({one.record.key for one in gone}, [one.record.key for one in used]) == (
            {keys[1], keys[2]},
            [keys[0]],
        )
    finally:
        os.close(held)
    assert store.remove(keys[0])
    assert store.hold(keys[0]) is None
    assert not [*store.objects.iterdir()]


def test_adding_makes_room(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [*fill(store, 4)]
    monkeypatch.setenv("SANDBOXD_BUILDS_SIZE", "12K")
    job = Job(argv=["cc"], collect=["a"])
    keep(store, key(9), job, result({"a": b"x"}))
    assert [one.record.key for one in store.every()] == [key(9)]  # the others are of 1970
    monkeypatch.setenv("SANDBOXD_BUILDS_SIZE", "100")
    keep(store, key(10), job, result({"a": b"x"}))  # too large, but somebody waits for it
    assert [one.record.key for one in store.every()] == [key(10)]
    assert old[0] not in {one.record.key for one in store.every()}
    monkeypatch.setenv("SANDBOXD_BUILDS_SIZE", "much")
    with pytest.raises(HostError, match="SANDBOXD_BUILDS_SIZE"):
        builds.largest()


def test_names_of_any_bytes_and_modes(store: Store) -> None:
    name = os.fsdecode(b"d/\xff\n")
    (kept,) = fill(store, 1)
    with store.adding():
        made = store.keep(key(7), ["cc\udcff".encode("utf-8", "backslashreplace").decode()],
                          result({name: b"1"}))  # fmt: skip
    assert store.read(key(7)) == made
    assert made.reference().names == (name,)
    assert made.whole_result().artifacts[0].path == name
    file = store.objects / key(7) / "tree" / name
    assert file.stat().st_mode & 0o7777 == 0o444
    assert store.find(kept) is not None


def test_what_was_changed_is_not_used(store: Store) -> None:
    changed, touched, lost, broken = fill(store, 4)
    file = store.objects / changed / "tree/a"
    file.chmod(0o644)
    file.write_bytes(b"y" * LINE)
    assert "is not what was kept" in store.problem(changed)
    assert store.find(changed) is None  # and is gone, so that it is built again
    assert store.read(changed) is None

    before = store.read(touched)
    (store.objects / touched / "tree/a").chmod(0o444)  # a new ctime, nothing else
    found = store.find(touched)
    assert found is not None
    assert found == before
    assert store.read(touched) != before  # its new ctime is known now

    (store.objects / lost / "tree/a").unlink()
    assert store.find(lost) is None
    (store.objects / broken / "build.json").write_text("{}")
    assert store.find(broken) is None
    with store.adding():  # in place of what cannot be read
        store.keep(broken, ["cc"], result({"a": b"1"}))
    assert store.find(broken) is not None


def test_after_a_crash_of_the_machine_everything_is_read_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = fill(store, 2)
    file = store.objects / bad / "tree/a"
    stamp = os.stat(file)
    file.chmod(0o644)
    file.write_bytes(bytes(LINE))  # as delayed allocation may leave it, with the stamp known
    record = store.read(bad)
    assert record is not None
    assert stamp.st_size == LINE
    stamps = [os.lstat(file)]
    files = [
        msgspec.structs.replace(one, stamp=(found.st_ino, found.st_size, found.st_ctime_ns))
        for one, found in zip(record.files, stamps, strict=True)
    ]
    same = msgspec.structs.replace(record, files=tuple(files))
    (store.objects / bad / "build.json").write_bytes(msgspec.json.encode(same))
    assert store.find(bad) is not None  # in this boot the stamp is believed
    monkeypatch.setattr(builds, "boot_id", lambda: "another")
    assert store.find(bad) is None
    assert store.find(good) is not None


def test_what_others_left_is_swept(store: Store) -> None:
    (kept,) = fill(store, 1)
    dead = store.objects / ".new-1-dead"
    (dead / "tree/deep").mkdir(parents=True)
    (dead / "tree/deep").chmod(0o555)
    with store.adding():
        assert not dead.exists()
        dead.mkdir()
        with store.adding():  # somebody is at work: his may be there
            assert dead.exists()
    store.collect(None, None)
    assert not dead.exists()
    assert store.find(kept) is not None


def test_looking_up_a_key(store: Store) -> None:
    with store.adding():
        store.keep("a" * 64, ["cc"], result({"a": b"1"}))
        store.keep("a" * 63 + "b", ["cc"], result({"a": b"1"}))
    assert store.look_up("a" * 64).key == "a" * 64
    for wrong, said in (("a" * 7, "more than one"), ("a", "no build"), ("../objects", "no build")):
        with pytest.raises(JobError, match=said):
            store.look_up(wrong)


def test_one_of_two_gets_a_key(store: Store) -> None:
    first, second = store.try_key(key(1)), store.try_key(key(2))
    assert first is not None
    assert second is not None
    assert store.try_key(key(1)) is None
    os.close(first)
    again = store.try_key(key(1))
    assert again is not None
    os.close(again)
    os.close(second)


FULL = """
import sys
from pathlib import Path
from sandboxd.errors import HostError
from sandboxd.job import Job
from sandboxd.stores.builds import Store
from sandboxd.supervise.builds import keep
from tests.stores.test_builds import key, result

store, job = Store(Path(sys.argv[1])), Job(argv=["cc"], collect=["a"])
keep(store, key(1), job, result({"a": b"x" * 600_000}))
keep(store, key(2), job, result({"a": b"y" * 600_000}))
assert [one.record.key for one in store.every()] == [key(2)], "the older one made room"
held = store.hold(key(2))
for size in (600_000, 5_000_000):
    try:
        keep(store, key(3), job, result({"a": b"z" * size}))
    except HostError as error:
        assert "No space left" in str(error) and "cache gc" in str(error), error
    else:
        sys.exit("it cannot have been kept")
    assert [one.record.key for one in store.every()] == [key(2)]
    assert not store.problem(key(2))
    assert not [*store.objects.glob(".*")]
print("well")
"""


@pytest.mark.needs("userns")
def test_a_full_disk(tmp_path: Path) -> None:
    script = f'mount -t tmpfs -o size=1M none {tmp_path} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", sys.executable, "-P", "-c", FULL,
         str(tmp_path / "builds")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("well\n", 0), done.stderr
