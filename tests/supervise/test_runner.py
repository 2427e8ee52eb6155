"""Jobs through a Runner, on this host and on hosts that lack something: what comes back is true."""

from __future__ import annotations

import base64
import json
import os
import signal
import time
from pathlib import Path

import msgspec
import pytest
import trio

from sandboxd.errors import HostError, JobError
from sandboxd.job import File, Job
from sandboxd.policy import Clock, Identity, Limits, Policy, Require
from sandboxd.result import Result, encoded, to_json
from sandboxd.supervise.runner import open_runner
from tests.supervise.variants import EVERY, hosts, policy, without


async def run(host: str, *argv: str | bytes, limits: Limits | None = None, **job: object) -> Result:
    async with open_runner(host=without(host)) as runner:
        return await runner.run(Job(argv=argv, policy=policy(limits), **job))  # type: ignore[arg-type]


@EVERY
async def test_output_and_exit_code(host: str) -> None:
    result = await run(host, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    assert (result.status, result.exit_code, result.signal) == ("nonzero_exit", 3, None)
    assert result.fault == "job"


@EVERY
async def test_stdin_is_what_was_given(host: str) -> None:
    data = bytes(range(256)) * 5000
    result = await run(host, "cat", stdin=data, keep=2 * len(data))
    assert result.stdout == data
    assert result.ok


@EVERY
async def test_a_signal_of_its_own(host: str) -> None:
    result = await run(host, "sh", "-c", "kill -SEGV $$")
    assert (result.status, result.exit_code) == ("signaled", None)
    assert result.signal is not None
    assert (result.signal.number, result.signal.name) == (signal.SIGSEGV, "SIGSEGV")


@EVERY
async def test_a_missing_program_is_start_failed(host: str) -> None:
    result = await run(host, "no-such-program")
    assert (result.status, result.error, result.exit_code) == ("start_failed", "ENOENT", None)
    assert "no-such-program" in result.message


@EVERY
async def test_a_file_that_cannot_be_executed(host: str) -> None:
    result = await run(host, "/etc/passwd")
    assert (result.status, result.error) == ("start_failed", "EACCES")


async def test_a_working_directory_that_is_not_there() -> None:
    result = await run("nothing", "true", cwd="/nowhere")
    assert result.status == "start_failed"
    assert "/nowhere" in result.message


@EVERY
async def test_cpu_time_limit(host: str) -> None:
    result = await run(host, "sh", "-c", "while :; do :; done", limits=Limits(cpu_time=0.3))
    assert result.status == "cpu_time_limit"
    assert result.limits["cpu_time"].action == "killed"
    used = result.usage.cpu_time
    assert used is not None
    assert used >= 0.25
    assert result.signal is None or result.signal.sender == "sandboxd"


@EVERY
async def test_wall_time_limit_for_a_sleeper(host: str) -> None:
    result = await run(host, "sleep", "100", limits=Limits(wall_time=0.2))
    assert result.status == "wall_time_limit"
    assert result.causes[0] == "wall_time_limit"
    assert result.usage.wall_time is not None
    assert result.usage.wall_time >= 0.2


@hosts("nothing", "cgroup")
async def test_idle_limit(host: str) -> None:
    result = await run(host, "sleep", "100", limits=Limits(idle_time=0.3, wall_time=30.0))
    assert result.status == "idle_limit"


@EVERY
async def test_output_limit_keeps_what_came_before(host: str) -> None:
    result = await run(host, "yes", limits=Limits(output=100_000), keep=1 << 20)
    assert result.status == "output_limit"
    assert result.streams["stdout"].bytes == 100_000
    assert result.stdout == b"y\n" * 50_000


@EVERY
async def test_disk_limit_is_the_sum_of_all_places(host: str) -> None:
    fill = " && ".join(f"head -c 3M /dev/zero > {p}/x" for p in ("/tmp", "/box", "/dev/shm"))
    result = await run(host, "sh", "-c", fill, limits=Limits(disk=8 << 20))
    assert result.status == "disk_limit"
    assert result.limits["disk"].exceeded


@EVERY
async def test_inodes_are_limited(host: str) -> None:
    script = "i=0; while [ $i -lt 500 ]; do : > f$i || exit 1; i=$((i+1)); done"
    result = await run(host, "sh", "-c", script, limits=Limits(inodes=200))
    assert result.status == "disk_limit"


@EVERY
async def test_process_limit_is_per_run(host: str) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 5 & done; wait"
    result = await run(host, "bash", "-c", script, limits=Limits(processes=6, wall_time=20.0))
    assert b"fork" in result.stderr


@hosts("nothing", "cgroup", "subuid")
async def test_memory_limit_by_sampling_or_by_cgroup(host: str) -> None:
    script = "b = b'x' * (300 << 20)\nimport time; time.sleep(20)"
    result = await run(
        host, "/usr/bin/python3", "-c", script, limits=Limits(memory=100 << 20, wall_time=30.0)
    )
    assert result.status == "memory_limit"
    assert result.usage.memory_peak is not None
    assert result.usage.memory_peak_source


# It forked twice, ignores signals, and is still busy when the program ends.
DAEMON = """
import os, signal, time
out, into = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        while time.process_time() < 0.2:
            pass
        os.write(into, b"x")
        while True:
            pass
    os._exit(0)
os.wait()
os.read(out, 1)
print("done")
"""


@EVERY
async def test_everything_a_job_leaves_running_is_ended_and_counted(host: str) -> None:
    limits = Limits(wall_time=50.0)
    result = await run(host, "/usr/bin/python3", "-c", DAEMON, limits=limits)
    assert result.stdout == b"done\n"
    assert result.ok
    assert result.usage.cpu_time is not None
    assert result.usage.cpu_time > 0.19


@EVERY
async def test_a_stopped_job_is_ended(host: str) -> None:
    result = await run(host, "sh", "-c", "kill -STOP $$", limits=Limits(wall_time=0.3))
    assert result.status == "wall_time_limit"


@EVERY
async def test_files_in_and_artifacts_out(host: str, tmp_path: Path) -> None:
    source = tmp_path / "input.txt"
    source.write_bytes(b"from a path\n")
    result = await run(
        host, "sh", "-c", "./tool > out; cat dir/input.txt >> out; chmod 600 out; umask",
        files={
            "tool": File(data=b"#!/bin/sh\necho tool\n", mode=0o755),
            "dir/input.txt": source,
            b"odd \xff name": b"x",
        },
        collect=("out", "missing"),
    )  # fmt: skip
    assert result.stdout == b"0022\n"
    assert [artifact.path for artifact in result.artifacts] == ["out"]
    assert result.artifacts[0].data == b"tool\nfrom a path\n"
    assert [error.path for error in result.artifact_errors] == ["missing"]
    assert result.status == "artifact_error"


async def test_names_that_are_not_utf8_in_json() -> None:
    script = b"echo x > '\xff'; ln -s / '\xfe'; exec '\xfd'"
    result = await run("nothing", "sh", "-c", script, collect=("*",))
    record = json.loads(msgspec.json.encode(to_json(result)))
    assert json.loads(encoded(result)) == record
    plain = await run("nothing", "sh", "-c", "echo hi; touch a", collect=("*",))
    assert encoded(plain) == msgspec.json.encode(to_json(plain))
    (artifact,) = record["artifacts"]
    assert artifact["path"] == r"\xff"
    assert base64.b64decode(artifact["path_b64"]) == b"\xff"
    assert record["artifact_errors"][0]["path_b64"] == base64.b64encode(b"\xfe").decode()
    missing = to_json(await run("nothing", b"no-\xfd"))
    assert missing["message"].startswith(r"no-\xfd: ")
    assert base64.b64decode(missing["message_b64"]).startswith(b"no-\xfd: ")
    assert "job_b64" not in missing


async def test_text_is_bytes_end_to_end() -> None:
    result = await run("nothing", b"printf", b"%s", b"\xff\xfe ok")
    assert result.stdout == b"\xff\xfe ok"
    result = await run("nothing", "sh", "-c", 'printf %s "$X"', env={b"X": b"\x80\x81"})
    assert result.stdout == b"\x80\x81"


async def test_many_and_large_arguments() -> None:
    result = await run("nothing", "sh", "-c", "echo $#", "sh", *(["argument"] * 10_000))
    assert result.stdout == b"10000\n"
    value = "x" * 120_000  # execve(2): no single string beyond 128 KiB
    env: dict[str, str] = {f"V{number}": value for number in range(16)}
    result = await run("nothing", "sh", "-c", "echo ${#V15}", env=env)
    assert result.stdout == b"120000\n"


async def test_too_large_arguments_are_a_result_or_a_clear_error() -> None:
    result = await run("nothing", "true", "x" * (1 << 18))
    assert (result.status, result.error) == ("start_failed", "E2BIG")
    with pytest.raises(JobError, match="too large"):
        await run("nothing", "true", *(["x" * 100_000] * 200))


async def test_the_environment_is_the_policys_and_the_jobs() -> None:
    os.environ["SANDBOXD_TEST_SECRET"] = "secret"
    try:
        result = await run("nothing", "env", env={"MINE": "1"})
    finally:
        del os.environ["SANDBOXD_TEST_SECRET"]
    names = {line.partition(b"=")[0] for line in result.stdout.splitlines()}
    assert names == {b"PATH", b"LANG", b"MINE"}


async def test_output_is_counted_hashed_and_kept_at_both_ends() -> None:
    result = await run("nothing", "sh", "-c", "seq 1 100000", keep=1000)
    stream = result.streams["stdout"]
    assert stream.truncated
    assert stream.data.startswith(b"1\n2\n")
    assert stream.tail.endswith(b"99999\n100000\n")
    assert stream.kept == len(stream.data) + len(stream.tail) == 1000
    assert stream.bytes == len("".join(f"{n}\n" for n in range(1, 100001)))


@hosts("nothing", "subuid")
async def test_jobs_at_once_do_not_mix(host: str) -> None:
    results: dict[int, bytes] = {}
    async with open_runner(host=without(host), slots=4) as runner:

        async def one(number: int) -> None:
            job = Job(argv=["sh", "-c", f"echo {number}; ls /box /tmp; echo x > /box/{number}"],
                      policy=policy())  # fmt: skip
            results[number] = (await runner.run(job)).stdout

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(one, number)
        assert runner.statistics().finished == 40
    assert results == {n: f"{n}\n/box:\n\n/tmp:\n".encode() for n in range(40)}


async def test_a_requirement_that_does_not_hold_refuses_the_job() -> None:
    strict = Policy(limits=Limits(memory=1 << 20), require=Require(memory="enforced"))
    async with open_runner(host=without("cgroup")) as runner:
        with pytest.raises(HostError, match=r"memory: required to be enforced, but"):
            await runner.run(Job(argv=["true"], policy=strict))
        unlimited = Policy(require=Require(memory="enforced"))
        with pytest.raises(HostError, match=r"not limited \(set limits\.memory, or relax"):
            await runner.run(Job(argv=["true"], policy=unlimited))


async def test_what_is_not_enforced_is_said() -> None:
    result = await run("cgroup", "true", limits=Limits(memory=1 << 30, cpus=1.0))
    said = {item.what for item in result.degraded}
    assert {"cpu_time", "memory", "cpus"} <= said
    assert result.enforcement["cpus"] == "none"
    assert result.limits["memory"].exceeded is False


async def test_a_job_may_tighten_its_limits() -> None:
    async with open_runner() as runner:
        loose = policy(Limits(wall_time=30.0, output=1 << 20))
        job = Job(argv=["yes"], policy=loose, limits=Limits(output=1000))
        assert (await runner.run(job)).streams["stdout"].bytes == 1000


@pytest.mark.parametrize("size", [0, 1000, (64 << 20) + 1], ids=["empty", "small", "large"])
async def test_stdin_from_a_file_is_a_copy(size: int, tmp_path: Path) -> None:
    source = tmp_path / "input"
    with source.open("wb") as file:
        file.write(b"first\n"[:size])
        file.truncate(size)
    script = "head -c 6 >&2; wc -c; echo changed > /proc/self/fd/0"
    result = await run("nothing", "sh", "-c", script, stdin=source)
    assert int(result.stdout) == max(0, size - 6)
    assert result.stderr.startswith(b"first\n"[:size])
    assert source.stat().st_size == size
    with source.open("rb") as file:
        assert file.read(6) == b"first\n"[:size]


async def test_a_job_that_does_not_read_its_large_stdin(tmp_path: Path) -> None:
    source = tmp_path / "input"
    with source.open("wb") as file:
        file.truncate(100 << 20)
    assert (await run("nothing", "true", stdin=source)).ok


async def test_stdin_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"stdin: .*/none: No such file"):
        await run("nothing", "true", stdin=tmp_path / "none")


async def test_a_time_namespace_shifts_the_clocks() -> None:
    shifted = msgspec.structs.replace(policy(), clock=Clock(monotonic=100_000, boottime=200_000))
    program = "import time; print(time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME))"
    async with open_runner() as runner:
        result = await runner.run(Job(argv=["/usr/bin/python3", "-c", program], policy=shifted))
    monotonic, boottime = map(float, result.stdout.split())
    assert 0 <= monotonic - 100_000 - time.monotonic() + 60 <= 120
    assert 0 <= boottime - 200_000 - time.clock_gettime(time.CLOCK_BOOTTIME) + 60 <= 120
    assert result.usage.wall_time is not None
    assert result.usage.wall_time < 60


async def test_the_identity_a_policy_asks_for() -> None:
    who = msgspec.structs.replace(
        policy(), identity=Identity(uid=4321, gid=99, name="judge", hostname="arena")
    )
    async with open_runner() as runner:
        job = Job(
            argv=["sh", "-c", "id -u; id -g; id -un; hostname; cat /etc/hostname"], policy=who
        )
        result = await runner.run(job)
    assert result.stdout == b"4321\n99\njudge\narena\narena\n"


@hosts("nothing", "subuid")
async def test_two_live_jobs_have_two_uids_where_there_are_subordinate_ids(host: str) -> None:
    async with open_runner(host=without(host), slots=2) as runner:
        uids = []

        async def one() -> None:
            job = Job(argv=["sh", "-c", "id -u; sleep 0.2"], policy=policy())
            uids.append((await runner.run(job)).stdout)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
    assert (len(set(uids)) == 2) == (host == "nothing" and without(host).subuid is not None)


@hosts("nothing", "cgroup")
@pytest.mark.parametrize(
    "allocate",
    [
        "m = mmap.mmap(-1, 300 << 20); m.write(b'x' * (300 << 20))",
        "fd = os.memfd_create('x'); os.truncate(fd, 300 << 20); m = mmap.mmap(fd, 300 << 20);"
        "m.write(b'x' * (300 << 20))",
    ],
    ids=["shared", "memfd"],
)
async def test_shared_memory_counts(host: str, allocate: str) -> None:
    script = f"import mmap, os, time; {allocate}; time.sleep(20)"
    limits = Limits(memory=100 << 20, wall_time=30.0)
    result = await run(host, "/usr/bin/python3", "-c", script, limits=limits)
    assert result.status == "memory_limit"


async def test_memory_shared_by_many_counts_once() -> None:
    script = (
        "import mmap, os, time; m = mmap.mmap(-1, 60 << 20); m.write(b'x' * (60 << 20))\n"
        "for _ in range(4):\n"
        "    if not os.fork():\n"
        "        sum(m[i] for i in range(0, len(m), 4096)); time.sleep(0.4); os._exit(0)\n"
        "time.sleep(0.6)"
    )
    limits = Limits(memory=150 << 20, wall_time=30.0)
    result = await run("cgroup", "/usr/bin/python3", "-c", script, limits=limits)
    assert result.ok, result.message


async def test_a_limit_that_nobody_counted_is_unknown() -> None:
    result = await run("cgroup", "true", limits=Limits(processes=5))
    assert result.limits["processes"].exceeded is None


async def test_times_add_up() -> None:
    async with open_runner() as runner:
        before = time.monotonic()
        timing = (await runner.run(Job(argv=["sleep", "0.1"], policy=policy()))).timing
        elapsed = time.monotonic() - before
    # The program may be on its way before we note that it is.
    assert min(timing.queued, timing.teardown) >= 0
    assert timing.setup > 0
    assert timing.queued + timing.setup + timing.teardown <= elapsed
