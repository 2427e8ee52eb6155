"""One suite for what runs jobs: a Runner of this process, and a client of a daemon."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

import sandboxd
from sandboxd import Event, File, Job, JobError, Limits, PolicyError, SandboxError, Terminal
from sandboxd.job import Pattern, Tar
from sandboxd.policy import Artifacts, Identity, Mount, Policy, Require
from sandboxd.result import to_json
from tests.serve.serving import daemon
from tests.supervise.variants import policy

Either = sandboxd.Runner | sandboxd.Client
BOTH = pytest.mark.parametrize("where", ["runner", "client"])


@asynccontextmanager
async def opened(where: str) -> AsyncIterator[Either]:
    if where == "runner":
        async with sandboxd.open_runner(slots=2) as runner:
            yield runner
    else:
        async with daemon() as served, sandboxd.connect(served.url) as client:
            yield client


async def events_of(run: sandboxd.Run | sandboxd.ClientRun) -> list[Event]:
    return [event async for event in run.events]


@BOTH
async def test_streams_exit_code_and_the_rest_of_the_record(where: str) -> None:
    async with opened(where) as either:
        argv = ["sh", "-c", "cat; echo err >&2; exit 3"]
        job = Job(argv=argv, stdin=b"\0\xff", policy=policy(), id="mine")
        result = await either.run(job)
    assert (result.stdout, result.stderr) == (b"\0\xff", b"err\n")
    assert (result.status, result.exit_code, result.job) == ("nonzero_exit", 3, "mine")
    assert result.policy.name == "test"
    assert to_json(result)["schema"] == "sandboxd.result/1"
    assert result.usage.wall_time is not None


@BOTH
async def test_what_was_asked_for_and_is_not_done(where: str) -> None:
    notes = (("config.json: hooks", "there are none"), ("config.json: x", "what is that?"))
    job = Job(argv=["true"], policy=policy(), ignored=notes)
    async with opened(where) as either:
        results = [await either.run(job)]
        if isinstance(either, sandboxd.Client):
            async with either.batch([job]) as every:
                results += [one async for one in every if isinstance(one, sandboxd.Result)]
    for result in results:
        assert [(one.what, one.why) for one in result.degraded][-2:] == list(notes)
    assert len(results) == (1 if where == "runner" else 2)


@BOTH
async def test_a_terminal_that_is_gone_has_no_size(where: str) -> None:
    """A daemon has the run in its hands until its result is on disk."""
    job = Job(argv=["true"], policy=policy(), stdin=None, terminal=Terminal())
    async with opened(where) as either:
        async with either.start(job) as run:
            await events_of(run)
        first, second = os.openpty()  # who gets the number next
        try:
            before = os.get_terminal_size(first)
            run.resize(11, 12)
            assert os.get_terminal_size(first) == before
        finally:
            os.close(first)
            os.close(second)


@BOTH
async def test_words_that_are_no_text(where: str) -> None:
    async with opened(where) as either:
        argv = [b"sh", b"-c", b'printf %s "$0$X$PWD"', b"\xff"]
        env = {"X": b"\xfe"}
        result = await either.run(Job(argv=argv, env=env, policy=policy(), cwd="/tmp"))
    assert result.stdout == b"\xff\xfe/tmp"


@BOTH
async def test_output_beyond_what_is_kept(where: str) -> None:
    async with opened(where) as either:
        result = await either.run(Job(argv=["seq", "100000"], policy=policy(), keep=100))
    stream = result.streams["stdout"]
    assert (stream.kept, stream.truncated, len(stream.tail)) == (100, True, 50)
    assert stream.tail.endswith(b"99999\n100000\n")


@BOTH
async def test_files_go_in_and_out(where: str, tmp_path: Path) -> None:
    large = bytes(range(256)) * 3000
    (tmp_path / "large").write_bytes(large)
    (tmp_path / "tree/below").mkdir(parents=True)
    (tmp_path / "tree/below/x").write_text("x")
    files: dict[str, bytes | Path | File] = {
        "a": b"a",
        "b": File(data=b"#!/bin/sh\necho b", mode=0o755),
        "large": tmp_path / "large",
        "tree": tmp_path / "tree",
    }
    script = "./b && cat a tree/below/x && cp large out && printf '\\377' > bytes"
    job = Job(
        argv=["sh", "-c", script], files=files, collect=["out", "bytes"],
        policy=policy(identity=Identity()),
    )  # fmt: skip
    async with opened(where) as either:
        result = await either.run(job)
    assert result.stdout == b"b\nax"
    assert {one.path: one.data for one in result.artifacts} == {"out": large, "bytes": b"\xff"}
    assert result.artifacts[0].sha256 == hashlib.sha256(result.artifacts[0].data).hexdigest()


@BOTH
async def test_a_directory_goes_in_with_its_links_and_what_is_empty(
    where: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").write_bytes(b"#!/bin/sh\necho ran")
    (tmp_path / "run").chmod(0o755)
    (tmp_path / "link").symlink_to("run")
    job = Job(
        argv=["sh", "-c", "ls -F d; readlink d/link; d/link"], files={"d": tmp_path},
        policy=policy(identity=Identity()),
    )  # fmt: skip
    async with opened(where) as either:
        result = await either.run(job)
    assert result.stdout == b"empty/\nlink@\nrun*\nrun\nran\n"


@BOTH
async def test_archives_are_unpacked(where: str, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("in/a")
        member.size = 600_000
        archive.addfile(member, io.BytesIO(random.Random(1).randbytes(600_000)))
    (tmp_path / "a.tgz").write_bytes(packed.getvalue())
    async with opened(where) as either:
        for source in (packed.getvalue(), tmp_path / "a.tgz", "fd"):
            with (tmp_path / "a.tgz").open("rb") as file:
                tar = Tar(file.fileno()) if source == "fd" else Tar(source)  # type: ignore[arg-type]
                job = Job(argv=["wc", "-c", "x/in/a"], files={"x": tar}, policy=policy())
                assert (await either.run(job)).stdout == b"600000 x/in/a\n"


@BOTH
async def test_what_a_build_left_goes_in_by_reference(where: str) -> None:
    made = Job(argv=["sh", "-c", "mkdir o; echo hi > o/a"], collect=["o/a"], policy=policy())
    async with sandboxd.open_runner(slots=1) as runner, opened(where) as either:
        reference = (await runner.build(made)).reference
        assert reference is not None
        files = {"b": reference, "one": reference.at("o/a")}
        job = Job(argv=["cat", "b/o/a", "one"], files=files, policy=policy())
        assert (await either.run(job)).stdout == b"hi\nhi\n"


@BOTH
async def test_patterns_and_how_much_is_collected(where: str) -> None:
    script = "touch 'a*' ab; for i in 1 2 3; do echo $i > f$i; done"
    async with opened(where) as either:
        collect = [Pattern("a*", literal=True), Pattern(b"no\xff*", required=True)]
        job = Job(argv=["sh", "-c", script], collect=collect, policy=policy())
        result = await either.run(job)
        assert [one.path for one in result.artifacts] == ["a*"]
        assert result.status == "artifact_error"
        caps = Artifacts(files=2)
        job = Job(argv=["sh", "-c", script], collect=["f*"], artifacts=caps, policy=policy())
        result = await either.run(job)
        assert len(result.artifacts) == 2
        assert len(result.artifact_errors) == 1
        job = msgspec.structs.replace(job, artifacts=Artifacts(files=1 << 30))
        with pytest.raises(PolicyError, match="artifacts"):
            await either.run(job)


@BOTH
async def test_what_is_collected_goes_to_a_directory(where: str, tmp_path: Path) -> None:
    script = "mkdir o; echo a > o/a; echo b > b; chmod 755 b"
    async with opened(where) as either:
        job = Job(
            argv=["sh", "-c", script], collect=["o/*", "b"], collect_to=tmp_path / "to",
            policy=policy(),
        )  # fmt: skip
        result = await either.run(job)
        assert {one.path: one.data for one in result.artifacts} == {"o/a": b"", "b": b""}
        assert (tmp_path / "to/o/a").read_text() == "a\n"
        assert (tmp_path / "to/b").stat().st_mode & 0o100
        (tmp_path / "file").touch()
        with pytest.raises(JobError, match="collect_to"):
            await either.run(msgspec.structs.replace(job, collect_to=tmp_path / "file"))


@BOTH
async def test_what_is_collected_is_read_from_the_run(where: str) -> None:
    job = Job(
        argv=["sh", "-c", "seq 300000 > big; echo s > small"], collect=["*"], collect_to="stream",
        policy=policy(),
    )  # fmt: skip
    async with opened(where) as either:
        found = {}
        async with either.start(job) as run:
            await events_of(run)
            async for one in run.artifacts():
                found[one.record.path] = b"".join([piece async for piece in one])
        assert found == {"big": b"".join(b"%d\n" % n for n in range(1, 300_001)), "small": b"s\n"}
        with pytest.raises(JobError, match="stream"):
            await either.run(job)


@BOTH
async def test_names_of_artifacts_that_are_no_text(where: str) -> None:
    job = Job(argv=["sh", "-c", "printf x > $(printf '\\377')"], collect=["*"], policy=policy())
    async with opened(where) as either:
        result = await either.run(job)
    assert [(one.path, one.data) for one in result.artifacts] == [("\udcff", b"x")]


@BOTH
async def test_stdin_from_a_file(where: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"z" * 1_000_000)
    async with opened(where) as either:
        job = Job(argv=["wc", "-c"], stdin=tmp_path / "in", policy=policy())
        assert (await either.run(job)).stdout == b"1000000\n"


@BOTH
async def test_limits_are_enforced_and_may_only_be_lower(where: str) -> None:
    async with opened(where) as either:
        job = Job(argv=["sleep", "100"], limits=Limits(wall_time=0.2))
        assert (await either.run(job)).status == "wall_time_limit"
        with pytest.raises(PolicyError, match="more than base"):
            await either.run(Job(argv=["true"], limits=Limits(wall_time=1e6)))


@BOTH
async def test_what_sandboxd_cannot_do_is_an_exception(where: str, tmp_path: Path) -> None:
    async with opened(where) as either:
        with pytest.raises(PolicyError, match="no policy 'nope'") as wrong:
            await either.run(Job(argv=["true"], policy="nope"))
        assert "base" in wrong.value.hint
        with pytest.raises(JobError, match="No such file"):
            await either.run(Job(argv=["true"], files={"x": tmp_path / "nothing"}))
        with pytest.raises(JobError, match="use"):
            await either.run(Job(argv=["true"], stdin=None))
        needs = Policy(require=Require(landlock=9999))
        with pytest.raises(SandboxError, match="landlock"):
            await either.run(Job(argv=["true"], policy=needs))
        mount = Mount(target="/x", source="/no/such/place")
        with pytest.raises(SandboxError, match="/no/such/place") as failed:
            await either.run(Job(argv=["true"], policy=Policy(mounts=(mount,))))
        assert type(failed.value).__name__ == "LaunchError"


@BOTH
async def test_events_are_in_order_and_the_last_has_the_result(where: str) -> None:
    async with opened(where) as either:
        job = Job(argv=["sh", "-c", "echo 1; sleep 0.05; echo 2 >&2"], policy=policy())
        async with either.start(job) as run:
            events = await events_of(run)
            result = await run.wait()
    assert [one.type for one in events] == ["start", "stdout", "stderr", "exit"]
    assert [one.seq for one in events] == list(range(4))
    assert (events[1].data, events[-1].result) == (b"1\n", result)


@BOTH
async def test_stdin_is_fed_live(where: str) -> None:
    async with opened(where) as either:
        async with either.start(Job(argv=["cat"], stdin=None, policy=policy())) as run:
            assert run.stdin is not None
            assert (await run.events.receive()).type == "start"
            for word in (b"one", b"two"):
                await run.stdin.send_all(word)
                assert (await run.events.receive()).data == word
            await run.stdin.aclose()
            assert [one.type for one in await events_of(run)] == ["exit"]


@BOTH
async def test_stdin_that_nobody_reads_any_more(where: str) -> None:
    async with opened(where) as either:
        job = Job(argv=["sh", "-c", "exec 0<&-; echo; sleep 100"], stdin=None, policy=policy())
        async with either.start(job) as run:
            assert run.stdin is not None
            while (await run.events.receive()).type != "stdout":
                pass
            with pytest.raises(trio.BrokenResourceError):
                await run.stdin.send_all(b"x" * 1_000_000)


@BOTH
async def test_a_terminal_has_the_size_it_is_given(where: str) -> None:
    async with opened(where) as either:
        job = Job(
            argv=["sh", "-c", "stty size; read x; stty size"], stdin=None, policy=policy(),
            terminal=Terminal(rows=10, columns=20),
        )  # fmt: skip
        async with either.start(job) as run:
            assert run.stdin is not None
            text = b""
            while b"10 20" not in text:
                text += (await run.events.receive()).data
            run.resize(30, 40)
            await trio.sleep(0.2)  # the resize is on its way; reading starts the rest
            await run.stdin.send_all(b"\n")
            async for event in run.events:
                text += event.data
    assert b"30 40" in text


@BOTH
async def test_killing_gives_a_result(where: str) -> None:
    async with opened(where) as either:
        async with either.start(Job(argv=["sleep", "100"], policy=policy())) as run:
            assert (await run.events.receive()).type == "start"
            run.kill()
            await events_of(run)
            assert (await run.wait()).status == "cancelled"


@BOTH
async def test_closing_the_events_ends_the_run(where: str) -> None:
    async with opened(where) as either:
        async with either.start(Job(argv=["yes"], policy=policy())) as run:
            await run.events.receive()
            run.events.close()
            assert (await run.wait()).status == "cancelled"


@BOTH
async def test_leaving_the_block_kills_what_is_left(where: str) -> None:
    async with opened(where) as either:
        with trio.fail_after(30):
            async with either.start(Job(argv=["sleep", "1000"], policy=policy())) as run:
                await run.events.receive()
            # Both slots must come free: the second run would wait for ever.
            for _ in range(2):
                assert (await either.run(Job(argv=["true"], policy=policy()))).ok


@BOTH
async def test_cancelling_leaves_nothing(where: str) -> None:
    async with opened(where) as either:
        with trio.move_on_after(0.5) as scope:
            await either.run(Job(argv=["sleep", "1000"], policy=policy()))
        assert scope.cancelled_caught
        assert (await either.run(Job(argv=["true"], policy=policy()))).ok


@BOTH
async def test_a_reader_who_is_slow_loses_nothing(where: str) -> None:
    async with opened(where) as either:
        text = bytearray()
        async with either.start(Job(argv=["seq", "200000"], policy=policy())) as run:
            await trio.sleep(0.3)
            async for event in run.events:
                text += event.data
            assert (await run.wait()).ok
    assert bytes(text) == b"".join(b"%d\n" % number for number in range(1, 200_001))


@BOTH
async def test_usage_comes_while_it_lives(where: str) -> None:
    async with opened(where) as either:
        job = Job(argv=["sleep", "0.5"], policy=policy())
        async with either.start(job, usage_every=0.05) as run:
            usages = [one.usage async for one in run.events if one.type == "usage"]
        with pytest.raises(JobError, match="usage_every"):
            async with either.start(job, usage_every=0.0):
                pass
    assert usages
    assert usages[0] is not None
    assert usages[0].wall_time is not None


@BOTH
@pytest.mark.needs("cgroup")
async def test_while_it_is_paused_its_clock_stands_still(where: str) -> None:
    async with opened(where) as either:
        limits = Limits(wall_time=2.0)
        job = Job(argv=["sh", "-c", "echo; sleep 0.1"], policy=policy(limits))
        async with either.start(job) as run:
            while (await run.events.receive()).type != "stdout":
                pass
            await run.pause()
            with trio.move_on_after(2.5):
                await events_of(run)
            run.resume()
            await events_of(run)
            assert (await run.wait()).ok
            run.kill()  # it is over: nothing happens
            run.resume()


@BOTH
async def test_an_error_comes_out_of_wait_or_of_the_block(where: str) -> None:
    broken = Policy(mounts=(Mount(target="/x", source="/no/such/place"),))
    async with opened(where) as either:
        with pytest.raises(SandboxError, match="/no/such/place"):
            async with either.start(Job(argv=["true"], policy=broken)) as run:
                await events_of(run)
        async with either.start(Job(argv=["true"], policy=broken)) as run:
            await events_of(run)
            with pytest.raises(SandboxError, match="/no/such/place"):
                await run.wait()


@BOTH
async def test_many_at_once(where: str) -> None:
    async with opened(where) as either:
        results = []

        async def one(number: int) -> None:
            job = Job(argv=["echo", str(number)], policy=policy())
            results.append((await either.run(job)).stdout)

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(one, number)
    assert sorted(results) == sorted(b"%d\n" % number for number in range(30))


# -- what only a client has ------------------------------------------------------------------


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(sandboxd.HostError, match="no daemon at") as error:
        async with sandboxd.connect(f"unix://{tmp_path}/s"):
            pass
    assert "sandboxd serve" in error.value.hint


async def test_an_address_that_is_none() -> None:
    for wrong in ("", "unix://", "unix://s", "ftp://x", "http://x/y", "http://x:y", "x"):
        with pytest.raises(JobError, match="no address"):
            async with sandboxd.connect(wrong):
                pass


async def test_what_has_no_place_in_a_submission(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    async with daemon() as served, sandboxd.connect(served.url) as client:
        with pytest.raises(JobError, match="pipe is no file"):
            await client.run(Job(argv=["true"], files={"x": tmp_path}))
        with pytest.raises(JobError, match="no UTF-8"):
            await client.run(Job(argv=["true"], env={b"\xff": "x"}))
        with pytest.raises(JobError, match="id="):
            await client.run(Job(argv=["true"], id="a/b"))
