"""Built once, used many times: what is kept, who sees it, and what happens when things go wrong."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from sandboxd.errors import JobError
from sandboxd.job import File, Job, Tar
from sandboxd.policy import Identity, Limits, Mount, Policy, Root
from sandboxd.reference import Reference
from sandboxd.stores.builds import Store
from sandboxd.supervise import known
from sandboxd.supervise.builds import Build, key_of
from sandboxd.supervise.runner import Runner, open_runner
from tests.supervise.variants import EVERY, as_found, policy, without

pytestmark = pytest.mark.needs("userns")
MAKE = """
mkdir -p lib/deep
printf '#!/bin/sh\\necho built\\n' > prog; chmod 755 prog
echo one > lib/one; echo two > lib/deep/two
"""


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SANDBOXD_BUILDS", str(tmp_path / "builds"))
    return Store(tmp_path / "builds")


def making(script: str = MAKE, **more: Any) -> Job:
    fields: dict[str, Any] = {"policy": policy(), "collect": ["**"]}
    return Job(argv=["sh", "-ec", script], **(fields | more))


def left_over(store: Store) -> list[Path]:
    return [*store.objects.glob(".*")]


async def shell(runner: Runner, script: str, chosen: Policy, **files: Any) -> str:
    job = Job(argv=["sh", "-c", f"exec 2>&1\n{script}"], policy=chosen, files=files)
    result = await runner.run(job)
    assert result.ok, result
    return result.stdout.decode()


async def test_the_second_build_runs_nothing(store: Store) -> None:
    async with open_runner() as runner:
        first = await runner.build(making())
        second = await runner.build(making())
        assert runner.statistics().finished == 1
    assert first.ok
    assert not first.cached
    assert second.cached
    assert second.reference == first.reference
    assert second.key == first.key
    assert second.result == first.result
    assert {one.path: one.bytes for one in second.result.artifacts} == {
        "prog": 21, "lib/one": 4, "lib/deep/two": 4
    }  # fmt: skip
    async with open_runner() as runner:  # also for those who come later
        assert (await runner.build(making())).cached
    assert not left_over(store)


@asynccontextmanager
async def built(host: str = "nothing", spares: int = 0) -> AsyncIterator[tuple[Runner, Reference]]:
    async with open_runner(host=without(host), spares=spares) as runner:
        made = await runner.build(making())
        assert made.reference is not None, made
        yield runner, made.reference


USES = """
set -e
./run; cat lib/one lib/deep/two two deep/er/one own/file
test -x run; test ! -w run; test -w own/file; touch own/new deep/er/new
test ! -e builds
"""


@EVERY
async def test_a_reference_is_a_file_or_a_tree_at_any_place(host: str) -> None:
    async with built(host, spares=1) as (runner, made):
        files = {
            "run": made.at("prog"), "lib": made.at("lib"), "two": made.at("lib/deep/two"),
            "deep/er/one": made.at("lib/one"), "own/file": b"mine\n",
        }  # fmt: skip
        for _ in range(3):
            said = await shell(runner, USES, policy(), **files)
            assert said == "built\none\ntwo\ntwo\none\nmine\n"
        said = await shell(runner, "./prog; ls; ls lib; touch new", policy(), **{".": made})
        assert said == "built\nlib\nprog\ndeep\none\n"
        assert runner.statistics().spares >= 1 or runner.statistics().finished < 4


@pytest.mark.parametrize(
    "root",
    [
        pytest.param(Root(writable=True, driver="kernel"), marks=pytest.mark.needs("overlay")),
        pytest.param(Root(writable=True, driver="fuse"), marks=pytest.mark.needs("fuse")),
        Root(writable=True, driver="tmpfs"),
        Root(proc="masked"),
    ],
    ids=["kernel", "fuse", "tmpfs", "masked"],
)
async def test_under_every_kind_of_root(root: Root) -> None:
    async with built() as (runner, made):
        files = {"run": made.at("prog"), "x/lib": made.at("lib")}
        script = "./run; cat x/lib/one; ls -A; ls /box/builds"
        said = await shell(runner, script + "; true", policy(root=root), **files)
    assert said.startswith("built\none\nrun\nx\n")
    assert "builds'" in said


WRITES = """
for name in run lib/one; do
  echo bad > $name; echo bad >> $name; truncate -s 0 $name; chmod 777 $name; rm -f $name
  mv $name other; ln $name other; touch -d 2001-01-01 $name; ln -sf /etc/passwd $name
done
touch lib/new; mkdir lib/new; rmdir lib/deep; mv lib moved; chmod 777 lib
mount -o remount,rw /box/lib; umount /box/lib; umount /box/run
true
"""


@pytest.mark.parametrize("user", ["isolated", "caller"])
@pytest.mark.parametrize("host", ["nothing", "subuid", "landlock"])
async def test_a_job_cannot_change_what_it_is_given(store: Store, host: str, user: Any) -> None:
    async with built(host) as (runner, made):
        record = store.read(made.key)
        files = {"run": made.at("prog"), "lib": made.at("lib")}
        chosen = policy(identity=Identity(user=user))
        await shell(runner, WRITES, chosen, **files)
        assert store.read(made.key) == record
        assert store.problem(made.key) == ""
        again = await runner.build(making())
        assert again.cached  # no time of change is another one either
        mounts = await shell(runner, "grep ' /box/' /proc/self/mountinfo", chosen, **files)
        shown = [line.split()[4:6] for line in mounts.splitlines()]
        assert {place for place, _ in shown} >= {"/box/run", "/box/lib"}
        for place, options in shown:
            if place in ("/box/run", "/box/lib"):
                assert {"ro", "nosuid", "nodev"} <= {*options.split(",")}


async def test_a_plan_shows_what_is_attached() -> None:
    async with built() as (runner, made):
        job = Job(argv=["true"], policy=policy(), files={"x/run": made.at("prog"), "y": b"1"})
        steps = [f"{one.stage} {one.describe()}" for one in runner.plan(job).setup.steps]
    bind = f"bind /box/builds/{made.key}/tree/prog -> /tmp/box/x/run (ro,nosuid,nodev)"
    assert bind in steps
    assert "make_file /tmp/box/x/run (0 bytes)" in steps


async def test_only_what_is_referred_to_can_be_seen(store: Store) -> None:
    async with built() as (runner, made):
        other = await runner.build(making("echo secret > other"))
        script = f"cat /box/builds/{other.key}/tree/other; find / -name other -not -path '/proc/*'"
        said = await shell(runner, script + "; true", policy(), run=made.at("prog"))
    assert "secret" not in said
    assert "\n/" not in said


async def test_spares_of_references_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes with ever new references leaves no sandboxes behind for the old ones."""
    monkeypatch.setattr(known, "ATTACHED", 2)
    chosen = policy()
    async with open_runner(slots=2, spares=1) as runner:
        for number in range(6):
            made = await runner.build(making(f"echo {number} > a", policy=policy()))
            assert made.reference is not None
            for _ in range(2):
                said = await shell(runner, "cat x", chosen, x=made.reference.at("a"))
                assert said == f"{number}\n"
        with_references = [key for key in runner._known._kept if key[2] is not None]
        assert len(with_references) == 2
        # Two sets of references, and the policy without any.
        while runner.statistics().spares != 3:  # noqa: ASYNC110
            await trio.sleep(0.005)


# -- the key ---------------------------------------------------------------------------------------


def test_every_input_is_in_the_key(tmp_path: Path) -> None:
    file = tmp_path / "input"
    file.write_text("1")
    tree = tmp_path / "tree"
    (tree / "a").mkdir(parents=True)
    base = policy()
    jobs: dict[str, Job] = {
        "as it is": making(),
        "argv": making("true"),
        "env": making(env={"A": "1"}),
        "other env": making(env={"A": "2"}),
        "cwd": making(cwd="/tmp"),
        "stdin": making(stdin=b"1"),
        "collect": making(collect=["a"]),
        "files": making(files={"a": b"1"}),
        "content": making(files={"a": b"2"}),
        "name": making(files={"b": b"1"}),
        "mode": making(files={"a": File(data=b"1", mode=0o755)}),
        "folder": making(files={"a": tree}),
        "large": making(files={"a": b"x" * 100_000}),
        "larger": making(files={"a": b"x" * 99_999 + b"y"}),
        "limit": making(policy=policy(limits=Limits(wall_time=31.0))),
        "job's limit": making(limits=Limits(wall_time=3.0)),
        "root": making(policy=policy(root=Root(writable=True))),
        "mount": making(policy=msgspec.structs.replace(
            base, mounts=(Mount(source=str(tree), target="/data"),))),
        "reference": making(files={"a": Reference(key="1" * 64, names=("a",))}),
        "other reference": making(files={"a": Reference(key="2" * 64, names=("a",))}),
    }  # fmt: skip

    def key(job: Job) -> str:
        chosen = job.policy if isinstance(job.policy, Policy) else base
        limits = job.limits
        if limits is not None:
            chosen = msgspec.structs.replace(chosen, limits=limits)
        return key_of(job, chosen, as_found())

    keys = {name: key(job) for name, job in jobs.items()}
    assert len({*keys.values()}) == len(keys)
    assert keys == {name: key(job) for name, job in jobs.items()}
    assert key_of(making(), base, as_found(), b"salt") != keys["as it is"]
    (tree / "a/new").write_text("")
    assert key(jobs["mount"]) != keys["mount"]
    assert key(jobs["folder"]) != keys["folder"]
    assert key(making(stdin=file)) == key(making(stdin=b"1"))
    assert key(making(files={"a": file})) == key(making(files={"a": File(data=b"1", mode=0o644)}))
    order = making(env={"A": "1", "B": "2"}), making(env={"B": "2", "A": "1"})
    assert key(order[0]) == key(order[1])


def test_the_compiler_is_in_the_key(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "usr/bin").mkdir(parents=True)
    compiler = root / "usr/bin/cc"
    compiler.write_text("1")
    chosen = policy(root=Root(source=str(root)))
    job = Job(argv=["cc"], policy=chosen, collect=["a"], env={"PATH": "/usr/bin"})
    keys = [key_of(job, chosen, as_found())]
    compiler.write_text("2")  # in place: no name changes, but the file does
    keys.append(key_of(job, chosen, as_found()))
    (root / "usr/bin/as").write_text("")
    keys.append(key_of(job, chosen, as_found()))
    (root / "var/lib/dpkg").mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text("Package: cc")
    keys.append(key_of(job, chosen, as_found()))
    assert len({*keys}) == 4


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (making(collect=()), "collects nothing"),
        (making(stdin=None), "nobody to talk to"),
        (
            making(policy=msgspec.structs.replace(
                policy(), mounts=(Mount(source="/tmp", target="/data", writable=True),))),
            r"mounts\[0\].*cannot have /data",
        ),
    ],
)  # fmt: skip
async def test_what_is_no_build_is_refused(job: Job, said: str) -> None:
    async with open_runner() as runner:
        with pytest.raises(JobError, match=said):
            await runner.build(job)


async def test_a_stdin_that_never_ends_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    async with open_runner() as runner:
        for path in (tmp_path / "fifo", Path("/dev/zero")):
            with pytest.raises(JobError, match="is no regular file"):
                await runner.build(making(stdin=path))


# -- when it does not end well ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("echo 1 > a; exit 3", "nonzero_exit"),
        ("true", "artifact_error"),
        ("kill -9 $$", "signaled"),
    ],
)
async def test_a_build_that_fails_is_a_result_and_not_kept(
    store: Store, script: str, status: str
) -> None:
    async with open_runner() as runner:
        for _ in range(2):
            made = await runner.build(making(script))
            assert (made.result.status, made.reference, made.cached) == (status, None, False)
        assert runner.statistics().finished == 2
    assert not store.every()
    assert not left_over(store)


async def test_links_and_devices_are_not_kept(store: Store) -> None:
    async with open_runner() as runner:
        made = await runner.build(making("echo 1 > a; ln -s /etc/passwd b; mkfifo c"))
    assert not made.ok
    assert {one.path for one in made.result.artifact_errors} == {"b", "c"}
    assert not store.every()


async def test_inputs_that_change_meanwhile_make_no_build(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("1")

    async def change(runner: Runner) -> None:
        while not runner.statistics().running:
            await trio.lowlevel.checkpoint()
        source.write_text("2")

    async with open_runner() as runner, trio.open_nursery() as nursery:
        nursery.start_soon(change, runner)
        with pytest.raises(JobError, match="changed while it ran"):
            await runner.build(making("cat s > a", files={"s": source}))
    assert not store.every()


async def test_what_is_gone_is_said_to_be(store: Store) -> None:
    async with built() as (_, made):
        assert not store.remove(made.key)  # the runner holds what it built
    assert store.remove(made.key)
    async with open_runner() as runner:
        with pytest.raises(JobError, match=r"is not in .* any more"):
            await runner.run(Job(argv=["./a"], policy=policy(), files={"a": made.at("prog")}))


@pytest.mark.parametrize(
    "files",
    [
        {"a": "lib", "a/b": b"1"},
        {"a/b": "lib", "a": b"1"},
        {".": "", "prog": b"1"},
        {"./a": "lib", "a": "prog"},
        {".": "prog"},
    ],
)
async def test_names_in_each_others_way(files: dict[str, Any]) -> None:
    async with built() as (runner, made):
        wanted = {name: made.at(one) if isinstance(one, str) else one
                  for name, one in files.items()}  # fmt: skip
        if "./a" in wanted:  # the same place twice: the last one counts, as in any mapping
            await shell(runner, "test -x a", policy(), **wanted)
            return
        with pytest.raises(JobError, match=r"in its way|is a file"):
            await runner.run(Job(argv=["true"], policy=policy(), files=wanted))


def archive(name: str) -> Tar:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as file:
        file.addfile(tarfile.TarInfo(name))
    return Tar(packed.getvalue())


@pytest.mark.parametrize(
    ("name", "place"),
    [("a", "prog"), ("a/b", "lib"), ("a", "lib"), ("a/b/c", "lib/deep"), ("a/b", "prog")],
)
async def test_nothing_is_put_into_what_is_attached(name: str, place: str, tmp_path: Path) -> None:
    """Also by what is found out only when an archive or a directory is read."""
    folder = tmp_path / "folder"
    (folder / name).mkdir(parents=True)
    async with built() as (runner, made):
        for source in (archive(name), folder):
            wanted = {"a/b" if name == "a/b/c" else "a": made.at(place), ".": source}
            with pytest.raises(JobError, match="in its way"):
                await runner.run(Job(argv=["true"], policy=policy(), files=wanted))
        beside = archive("deep/x")
        files: dict[str, Any] = {"deep/a": made.at("lib"), ".": beside, "deep/y": b"1"}
        assert await shell(runner, "ls deep", policy(), **files) == "a\nx\ny\n"
        over: dict[str, Any] = {"one": folder, "one/two": b"1", "lib": made.at("lib")}
        assert await shell(runner, "cat one/two", policy(), **over) == "1"


def test_a_reference_knows_its_names() -> None:
    made = Reference(key="0" * 64, names=("a.out", "lib/x", "lib/y/z"))
    assert [one.path for one in made.entries()] == ["a.out", "lib"]
    assert [one.path for one in made.at("lib").entries()] == ["lib/x", "lib/y"]
    assert made.at("lib").at("y").is_directory
    assert not made.at("lib").at("x").is_directory
    for wrong in ("b", "../x", "/etc", "lib/y/z/.."):
        if wrong == "lib/y/z/..":
            assert made.at(wrong).path == "lib/y"
            continue
        with pytest.raises(JobError, match="nothing in it is called"):
            made.at(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": "../../etc"},
        {"key": "0" * 63 + "/"},
        {"path": "../x"},
        {"path": "a/../../x"},
        {"path": "/etc"},
    ],
)
def test_a_reference_is_to_a_build_and_nothing_else(wrong: dict[str, str]) -> None:
    with pytest.raises(JobError, match=r"is no key of a build|is no plain path in it"):
        Reference(**({"key": "0" * 64} | wrong), names=("a",))


# -- several at once -------------------------------------------------------------------------------


async def test_two_tasks_build_once(store: Store) -> None:
    found: list[Build] = []

    async def one(runner: Runner) -> None:
        found.append(await runner.build(making()))

    async with open_runner(slots=2) as runner:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one, runner)
        assert runner.statistics().finished == 1
    assert sorted(one.cached for one in found) == [False, True, True, True, True]
    assert len(store.every()) == 1


CHILD = """
import sys, trio
from sandboxd import Job, open_runner
from tests.supervise.variants import policy

async def main():
    async with open_runner(slots=1) as runner:
        print("ready", flush=True)
        sys.stdin.readline()
        job = Job(argv=["sh", "-ec", sys.argv[1]], policy=policy(), collect=["a"])
        print((await runner.build(job)).cached, runner.statistics().finished, flush=True)

trio.run(main)
"""


def child(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def test_two_processes_build_once(store: Store) -> None:
    both = [child("echo 1 > a; sleep 0.3") for _ in range(2)]
    for one in both:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    assert sorted(one.communicate()[0] for one in both) == ["False 1\n", "True 0\n"]
    assert len(store.every()) == 1
    assert not left_over(store)


@pytest.mark.parametrize("script", ["sleep 100", "head -c 40000000 /dev/urandom > a"])
def test_who_is_killed_leaves_nothing(store: Store, script: str) -> None:
    """In the middle of the run, or of the moment in which what was made is kept."""
    one = child(script)
    assert one.stdout is not None
    assert one.stdout.readline() == "ready\n"
    assert one.stdin is not None
    one.stdin.write("\n")
    one.stdin.flush()
    running = "sleep" in script
    while one.poll() is None:
        if (store.place / "keys").exists() if running else left_over(store):
            break
    one.send_signal(signal.SIGKILL)
    one.communicate()
    again = child("echo 1 > a" if "sleep" in script else script)
    assert again.communicate("\n")[0] == "ready\nFalse 1\n"
    assert len(store.every()) == 1
    assert not left_over(store)
