"""What was accepted is not lost and not done twice, whatever moment the daemon dies at."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import socket
import sys
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from h11 import RemoteProtocolError

from sandboxd.errors import Busy, HostError, SandboxError
from sandboxd.policy import Identity, Limits, Mount
from sandboxd.serve import upkeep
from sandboxd.serve.journal import Row, open_journal
from sandboxd.serve.link import Links
from sandboxd.serve.wire import FIRST_OF_ATTEMPT
from tests.serve.serving import ROOT, Daemon, Process, daemon, folder, process
from tests.supervise.variants import policy

KILLS = int(os.environ.get("SANDBOXD_TEST_KILLS", "8"))
CALLERS = 6


@asynccontextmanager
async def talking(served: Process) -> AsyncIterator[Daemon]:
    links = await served.links()
    try:
        yield Daemon(served.place, None, links)  # type: ignore[arg-type]
    finally:
        await links.close()


async def wait_state(served: Daemon, job: str, state: str) -> None:
    while (await served.ask("GET", f"/v1/jobs/{job}"))["state"] != state:
        pass


async def test_results_and_events_are_there_afterwards() -> None:
    with folder() as place, process(place) as one:
        async with talking(one) as served:
            job = await served.submit(argv=["seq", "50000"])
            small = await served.submit(argv=["echo", "hi"])
            before = await served.ended(job), await served.ended(small)
            events = await served.events(job)
        one.kill()
        one.start()
        async with talking(one) as served:
            assert (await served.ended(job), await served.ended(small)) == before
            assert await served.events(job) == events
            types = [each["type"] for each in await served.events(small)]
            assert types == ["start", "stdout", "exit"]


async def test_what_ran_is_lost_or_retried_and_what_waited_goes_on() -> None:
    with folder() as place, process(place) as one:
        async with talking(one) as served:
            runs = [
                await served.submit(argv=["sleep", "1000"]),
                await served.submit(argv=["sh", "-c", "echo x; sleep 1"], on_lost="retry"),
            ]
            waits = await served.submit(argv=["echo", "waited"], files={"a": {"data": "y" * 9999}})
            for job in runs:
                await wait_state(served, job, "running")
        one.kill()
        one.start()
        async with talking(one) as served:
            lost = await served.ended(runs[0])
            assert (lost["status"], lost["result"]["error"]["kind"]) == ("error", "lost")
            retried = await served.ended(runs[1])
            assert (retried["status"], retried["attempts"]) == ("ok", 2)
            numbers = [each["seq"] for each in await served.events(runs[1])]
            assert numbers[0] == FIRST_OF_ATTEMPT
            went_on = await served.ended(waits)
            assert (went_on["status"], went_on["attempts"]) == ("ok", 1)


async def test_a_job_that_kills_the_daemon_each_time_is_given_up() -> None:
    with folder() as place, process(place) as one:
        async with talking(one) as served:
            job = await served.submit(argv=["sleep", "1000"], on_lost="retry")
        for attempt in (1, 2, 3):
            async with talking(one) as served:
                await wait_state(served, job, "running")
                assert (await served.ask("GET", f"/v1/jobs/{job}"))["attempts"] == attempt
            one.kill()
            one.start()
        async with talking(one) as served:
            assert (await served.ended(job))["result"]["error"]["kind"] == "lost"


async def test_an_end_in_peace_lets_running_jobs_finish() -> None:
    with folder() as place, process(place, "--drain", "30") as one:
        async with talking(one) as served:
            runs = [await served.submit(argv=["sleep", "1"]) for _ in range(2)]
            waits = await served.submit(argv=["true"])
            for job in runs:
                await wait_state(served, job, "running")
            one.process.send_signal(signal.SIGTERM)
            while await ready(served.links):
                pass
            with pytest.raises(Busy, match="going down"):
                await served.submit(argv=["true"])
            assert (await served.ended(runs[0]))["status"] == "ok"
        assert await trio.to_thread.run_sync(one.process.wait) == 0
        one.start()
        async with talking(one) as served:
            for job in (*runs, waits):
                view = await served.ended(job)
                assert (view["status"], view["attempts"]) == ("ok", 1)


async def ready(links: Links) -> bool:
    try:
        async with links.asking("GET", "/readyz") as answer:
            return answer.status == 200
    except Busy:
        return False


async def test_an_end_that_does_not_wait_leaves_jobs_to_the_next() -> None:
    with folder() as place, process(place, "--drain", "1000") as one:
        async with talking(one) as served:
            job = await served.submit(argv=["sleep", "1000"])
            await wait_state(served, job, "running")
            one.process.send_signal(signal.SIGTERM)
            while await ready(served.links):
                pass
        assert one.kill(signal.SIGTERM) == 0
        one.start()
        async with talking(one) as served:
            assert (await served.ended(job))["result"]["error"]["kind"] == "lost"


async def test_an_upgrade_while_jobs_run() -> None:
    """What is longer than --drain is started again where that was asked for, or reported."""
    with folder() as place, process(place, "--drain", "0.3") as one:
        async with talking(one) as served:
            again = await served.submit(argv=["sleep", "1000"], on_lost="retry")
            lost = await served.submit(argv=["sleep", "1000"])
            waits = await served.submit(argv=["echo", "waited"])
            batch = {"id": "b", "job": {"argv": ["true"]}, "cases": [{}] * 3}
            body = msgspec.json.encode(batch)
            asking = served.links.asking("POST", "/v1/batches?wait=1", body)
            async with AsyncExitStack() as stack:
                answer = await stack.enter_async_context(asking)
                for job in (again, lost):
                    await wait_state(served, job, "running")
                assert one.kill(signal.SIGTERM) == 0
                with pytest.raises(RemoteProtocolError):
                    await answer.body()
        one.start()
        async with talking(one) as served:
            await wait_state(served, again, "running")
            assert (await served.ask("GET", f"/v1/jobs/{again}"))["attempts"] == 2
            assert (await served.ended(lost))["result"]["error"]["kind"] == "lost"
            assert (await served.ended(waits))["attempts"] == 1
            for number in range(3):
                assert (await served.ended(f"b.{number}"))["status"] == "ok"


async def test_a_journal_of_before_there_were_batches_is_taken_over(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        await journal.select("DROP TABLE batches")
    async with open_journal(tmp_path) as journal:
        assert await journal.find_batch("c", "b") is None


async def test_one_directory_has_one_daemon() -> None:
    async with daemon() as served:
        argv = [sys.executable, "-P", "-m", "sandboxd", "serve"]
        for flags, message in (
            (["--state", f"{served.place}/state"], "another daemon has it"),
            (["--state", f"{served.place}/two", "--listen", served.url], "listens there already"),
        ):
            second = await trio.run_process(
                [*argv, *flags], cwd=ROOT, capture_stderr=True, check=False
            )
            assert second.returncode == 125
            assert message in second.stderr.decode()


async def test_a_socket_that_nobody_listens_on_is_replaced() -> None:
    with folder() as place:
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(place / "s"))
        dead.close()
        async with daemon(place) as served:
            await served.ask("GET", "/v1/info")
        async with daemon(place) as served:
            (place / "s").unlink()
            (place / "s").write_text("mine")
        assert (place / "s").read_text() == "mine"
        with pytest.RaisesGroup(pytest.RaisesExc(HostError, match="no socket")):
            async with daemon(place):
                pass


async def test_what_is_old_or_too_much_is_forgotten() -> None:
    async with daemon(size=100_000) as served:
        jobs = [await served.submit(argv=["seq", "5000"]) for _ in range(8)]
        for job in jobs:
            await served.ended(job)
        book = served.book
        await upkeep.expire(book)
        kept = [one["id"] for one in (await served.ask("GET", "/v1/jobs"))["jobs"]]
        assert 0 < len(kept) < 8
        assert set(kept) < set(jobs)
        book.settings = dataclasses.replace(book.settings, age=-1.0)
        await upkeep.expire(book)
        assert (await served.ask("GET", "/v1/jobs"))["jobs"] == []
        with pytest.raises(SandboxError, match="no such job"):
            await served.ask("GET", f"/v1/jobs/{jobs[-1]}")


async def test_a_batch_is_kept_as_long_as_a_job_of_it() -> None:
    batch = {"id": "b", "job": {"argv": ["true"]}, "cases": [{}]}
    async with daemon(slots=1, age=-1.0) as served:
        runs = await served.submit(argv=["sleep", "1000"])
        await wait_state(served, runs, "running")
        await served.ask("POST", "/v1/batches", batch, {"Idempotency-Key": "k"})
        await upkeep.expire(served.book)
        assert (await served.ask("GET", "/v1/batches/b"))["state"] == "running"
        again = await served.ask("POST", "/v1/batches", batch, {"Idempotency-Key": "k"})
        assert again["id"] == "b"
        await served.ask("DELETE", f"/v1/jobs/{runs}")
        await served.ended("b.0")
        await upkeep.expire(served.book)
        with pytest.raises(SandboxError, match="no such batch"):
            await served.ask("GET", "/v1/batches/b")


async def test_what_waits_is_taken_up_one_by_one(tmp_path: Path) -> None:
    size, count = 1 << 20, 64

    def row(number: int) -> Row:
        nothing = (None, None, 0, None, None, None)
        return Row(0, "c", f"{number}", "queued", b"{}", bytes(size), None, None, 0.0, *nothing)

    async with open_journal(tmp_path) as journal:
        for number in range(count):
            await journal.accept(row(number))
        tracemalloc.start()
        try:
            async with aclosing(journal.unfinished()) as rows:
                assert [one.id async for one in rows] == [str(number) for number in range(count)]
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert most < 8 * size


async def test_events_that_get_too_old_while_they_are_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A reader who is slow is cut off, and nobody takes that for a bug."""
    async with daemon(age=-1.0) as served:
        job = await served.submit(argv=["seq", "200000"], overflow="stall")
        async with served.links.asking("GET", f"/v1/jobs/{job}/events") as answer:
            await anext(answer.pieces)
            while (await served.ask("GET", f"/v1/jobs/{job}"))["state"] != "done":
                pass
            await upkeep.expire(served.book)
            with pytest.raises(RemoteProtocolError):
                await answer.body()
    assert caplog.text == ""


async def test_a_journal_of_another_version_is_left_alone(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        await journal.select("PRAGMA user_version=99")
    with pytest.raises(HostError, match="another version"):
        async with open_journal(tmp_path):
            pass


async def test_a_change_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    def row(job: str) -> Row:
        nothing = (None, None, 0, None, None, None)
        return Row(0, "c", job, "queued", b"{}", b"{}", None, None, 0.0, *nothing)

    async with open_journal(tmp_path) as journal:
        await journal.accept(row("a"))
        failed = []

        async def accept(job: str) -> None:
            try:
                await journal.accept(row(job))
            except HostError:
                failed.append(job)

        async with trio.open_nursery() as nursery:
            for job in ("b", "a", "c"):
                nursery.start_soon(accept, job)
        assert failed == ["a"]
        others = [one.id for one in await journal.page("c", None, None, 9)][-2::-1]
        assert sorted(others) == ["b", "c"]
        async with aclosing(journal.unfinished()) as rows:
            assert [one.id async for one in rows] == ["a", *others]


# -- killed at any moment --------------------------------------------------------------------


@pytest.mark.time_limit(100 if KILLS <= 8 else 10.0 * KILLS)
async def test_killed_at_random_moments_nothing_is_lost_or_doubled() -> None:
    """SANDBOXD_TEST_KILLS=200 for more (with -o faulthandler_timeout=3000); the seed is printed."""
    seed = int(os.environ.get("SANDBOXD_TEST_SEED", random.randrange(1 << 32)))
    sys.stdout.write(f"SANDBOXD_TEST_SEED={seed}\n")
    chance = random.Random(seed)
    with folder() as place, process(place, "--slots", "3") as one:
        (place / "out").mkdir(mode=0o777)
        (place / "out").chmod(0o777)
        load = _Load(place)
        for _ in range(KILLS):
            if chance.random() < 0.3:  # while it begins, and takes up what was left
                await trio.sleep(chance.uniform(0.0, 1.0))
                one.kill()
                one.start()
                continue
            async with talking(one) as served, trio.open_nursery() as nursery:
                for _ in range(CALLERS):
                    nursery.start_soon(load.submit, served)
                await trio.sleep(chance.choice((0.1, 0.5, 2.0)) * chance.random())
                one.kill()
                nursery.cancel_scope.cancel()
            one.start()
        async with talking(one) as served:
            await load.check(served)


class _Load:
    """Jobs that leave a line outside for each time they are started."""

    def __init__(self, place: Path) -> None:
        self._runs = place / "out" / "runs"
        mount = Mount(target="/out", source=str(place / "out"), writable=True)
        own = policy(limits=Limits(wall_time=30.0), identity=Identity(user="caller"))
        self._policy = msgspec.to_builtins(msgspec.structs.replace(own, mounts=(mount,)))
        self._count = 0
        self.accepted: dict[str, str] = {}

    async def submit(self, served: Daemon) -> None:
        while True:
            self._count += 1
            job, mode = f"j{self._count}", ("retry" if self._count % 3 == 0 else "report")
            argv = ["sh", "-c", f"echo {job} >> /out/runs; sleep 0.0{self._count % 7}"]
            wanted = {"argv": argv, "id": job, "on_lost": mode, "policy": self._policy}
            try:
                view = await served.ask("POST", "/v1/jobs", wanted)
            except SandboxError:
                return  # it has been killed: whether it took the job nobody knows
            assert view["id"] == job
            self.accepted[job] = mode

    async def check(self, served: Daemon) -> None:
        statuses: Counter[str] = Counter()
        views: dict[str, Any] = {}
        for job in self.accepted:
            views[job] = await served.ended(job)
            statuses[views[job]["status"]] += 1
        runs = Counter(self._runs.read_text().split())
        for job, mode in self.accepted.items():
            view = views[job]
            assert runs[job] <= (view["attempts"] if mode == "retry" else 1), (job, view)
            if view["status"] == "ok":
                assert runs[job] >= 1
            else:
                assert view["result"]["error"]["kind"] == "lost"
                assert mode == "report" or view["attempts"] == 3
        sys.stdout.write(f"{len(self.accepted)} accepted: {dict(statuses)}\n")
        assert statuses["ok"]
