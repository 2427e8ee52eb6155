"""A disk that is full, or broken, for a while: the daemon lives on, and what was accepted waits."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from sandboxd.errors import HostError, SandboxError
from sandboxd.serve import upkeep
from sandboxd.serve.book import Book
from sandboxd.serve.callers import Caller
from sandboxd.serve.files import PARTIAL, Files
from sandboxd.serve.gojudge.store import Store
from sandboxd.serve.journal import Row, open_journal
from sandboxd.serve.log import CHUNK, Log, read_finished
from sandboxd.serve.wire import Refusal, place
from tests.serve.serving import TRUE, Daemon, daemon
from tests.serve.test_log import MOST, fill, line, read_all

ME = f"uid:{os.getuid()}"
LARGE = {"data": "x" * 8192}
"""Makes a request one that waits in the journal only."""


@asynccontextmanager
async def unwritable(book: Book) -> AsyncIterator[None]:
    """A journal that takes nothing (SQLITE_READONLY)."""
    await book.journal.select("PRAGMA query_only=ON")
    try:
        yield
    finally:
        await book.journal.select("PRAGMA query_only=OFF")


@contextmanager
def in_the_way(folder: Path) -> Iterator[None]:
    """Nothing can be written there: it is a file."""
    aside = folder.with_name("aside")
    if folder.exists():
        folder.rename(aside)
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        if aside.exists():
            aside.rename(folder)


async def running(served: Daemon, job: str) -> None:
    while (await served.ask("GET", f"/v1/jobs/{job}"))["state"] != "running":
        pass


async def feed(served: Daemon, job: str, data: bytes = b"") -> None:
    target = f"/v1/jobs/{job}/stdin?eof=1"
    async with served.links.asking("POST", target, data) as answer:
        await answer.body()


@pytest.mark.needs("userns")
async def test_what_was_accepted_waits_for_the_journal(caplog: pytest.LogCaptureFixture) -> None:
    async with daemon(slots=1) as served:
        runs = await served.submit(argv=["cat"], interactive=True)
        await running(served, runs)
        waits = await served.submit(argv=["echo", "x"])
        async with unwritable(served.book):
            with pytest.raises(SandboxError, match="cannot be written"):
                await served.submit(**TRUE)
            await feed(served, runs, b"said")
            while len(served.book.journal._overdue) < 2:
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert (await served.ask("GET", f"/v1/jobs/{runs}"))["state"] == "running"
            assert (await served.ask("GET", f"/v1/jobs/{waits}"))["state"] == "queued"
        for job in (runs, waits):
            ended = await served.ended(job)
            assert (ended["status"], ended["attempts"]) == ("ok", 1)
        assert (await served.ended(runs))["result"]["streams"]["stdout"]["data"] == "said"
        told = [one.getMessage() for one in caplog.records if "journal" in one.getMessage()]
        assert told == ["the journal cannot be written", "the journal is written again"]


async def test_a_start_that_was_given_up_is_none(tmp_path: Path) -> None:
    """The next daemon would take the job for lost, which was never started."""
    nothing = (None, None, 0, None, None, None)
    async with open_journal(tmp_path) as journal:
        await journal.accept(Row(0, "c", "j", "queued", b"{}", b"{}", None, None, 0.0, *nothing))
        await journal.select("PRAGMA query_only=ON")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.start, "c", "j", 1)
            while not journal._overdue:
                await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        await journal.select("PRAGMA query_only=OFF")
    async with open_journal(tmp_path) as journal:
        found = await journal.find("c", "j")
    assert found is not None
    assert (found.state, found.attempts) == ("queued", 0)


@pytest.mark.needs("userns")
async def test_who_waits_on_its_connection_has_its_result(caplog: pytest.LogCaptureFixture) -> None:
    async with daemon() as served:
        async with unwritable(served.book):
            view = await served.ask("POST", "/v1/jobs?wait=1", TRUE)
            assert view["status"] == "ok"
            await served.book.journal.flush()
        assert "the journal cannot be written" in caplog.text
        with pytest.raises(SandboxError, match="no such job"):  # and no record of it was kept
            await served.ask("GET", f"/v1/jobs/{view['id']}")


@pytest.mark.needs("userns")
async def test_a_job_that_cannot_be_read_ends_nothing_else() -> None:
    async with daemon(slots=1) as served:
        runs = await served.submit(argv=["cat"], interactive=True)
        await running(served, runs)
        batch = {"id": "b", "job": {**TRUE, "files": {"a": LARGE}}, "cases": [{}, {}]}
        await served.ask("POST", "/v1/batches", batch)
        journal = served.book.journal
        await journal.select("ALTER TABLE jobs RENAME TO elsewhere")
        try:
            with pytest.raises(SandboxError, match="cannot be read"):
                await served.ask("DELETE", "/v1/batches/b")
            while len(journal._overdue) < 2:
                await trio.testing.wait_all_tasks_blocked(0.01)
        finally:
            await journal.select("ALTER TABLE elsewhere RENAME TO jobs")
        for number in range(2):
            assert (await served.ended(f"b.{number}"))["status"] == "error"
        await feed(served, runs)
        assert (await served.ended(runs))["status"] == "ok"


@pytest.mark.needs("userns")
async def test_what_is_old_stays_until_it_can_be_removed(caplog: pytest.LogCaptureFixture) -> None:
    async with daemon(age=-1.0) as served, trio.open_nursery() as nursery:
        job = await served.submit(argv=["seq", "50000"])
        await served.ended(job)
        book, log = served.book, served.book.folder(ME, job)
        assert log.exists()
        caplog.set_level(logging.ERROR)
        async with unwritable(book):
            nursery.start_soon(upkeep.keep_small, book)
            while "could not be removed" not in caplog.text:
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert await book.journal.find(ME, job) is not None
        with in_the_way(log.parent):
            await upkeep.expire(book)  # its events cannot be removed: so it is not forgotten
            assert await book.journal.find(ME, job) is not None
        await upkeep.expire(book)
        assert await book.journal.find(ME, job) is None
        nursery.cancel_scope.cancel()


# -- events ----------------------------------------------------------------------------------


async def test_events_wait_for_room(tmp_path: Path) -> None:
    log = Log(tmp_path / "logs" / "log", MOST, stall=False)
    async with trio.open_nursery() as nursery:
        with in_the_way(tmp_path / "logs"):
            nursery.start_soon(fill, log, 100)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert log.last < 99
            assert not log.spilled
    await log.settle()
    assert log.lines() is None
    found = []
    async with aclosing(read_finished(tmp_path / "logs" / "log")) as pieces:
        async for lines in pieces:
            found += [place(one)[0] for one in lines]
    assert found == list(range(100))


async def test_a_job_that_is_killed_does_not_wait_for_room(tmp_path: Path) -> None:
    log = Log(tmp_path / "logs" / "log", MOST, stall=False)
    await fill(log, CHUNK // 4000 + 1)
    assert log.spilled
    with in_the_way(tmp_path / "logs"):
        log.hurry()
        await fill(log, 100, start=log.last + 1)
    log.finish(log.last + 1, line(log.last + 1))
    assert await read_all(log, None if log.first else 17) == list(range(17, log.last + 1))


@pytest.mark.needs("userns")
async def test_a_job_whose_last_events_find_no_room() -> None:
    script = "seq 50000; cat; echo end"
    async with daemon() as served:
        job = await served.submit(argv=["sh", "-c", script], interactive=True)
        live = served.book.live[ME, job]
        while not live.log.spilled or live.log._open_size < 100:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert live.log.folder is not None
        with in_the_way(live.log.folder):
            await feed(served, job)
            while live.ended is None:
                await trio.testing.wait_all_tasks_blocked(0.01)
            async with served.links.asking("GET", "/healthz") as answer:
                assert await answer.body() == b"ok\n"
        assert (await served.ended(job))["status"] == "ok"
        events = await served.events(job)
        text = "".join(one.get("data", "") for one in events if one["type"] == "stdout")
        assert text == "".join(f"{number}\n" for number in range(1, 50001)) + "end\n"


# -- files -----------------------------------------------------------------------------------


@contextmanager
def small_files_only(size: int) -> Iterator[None]:
    """EFBIG for what is larger (RLIMIT_FSIZE of getrlimit(2); Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_of_a_file_without_room_nothing_is_left(tmp_path: Path) -> None:
    files, data = Files(tmp_path, 1 << 20), b"x" * 100_000
    files.open()
    digest = hashlib.sha256(data).hexdigest()

    async def pieces() -> Any:
        yield data

    with small_files_only(4096):
        with pytest.raises(HostError, match="cannot be kept: File too large"):
            files.save("me", digest, data)
        with pytest.raises(HostError, match="cannot be kept: File too large"):
            await files.put(Caller("me"), digest, pieces())
    assert list((tmp_path / PARTIAL).iterdir()) == []
    assert (files.stored("me"), files._coming) == (0, {})
    files.save("me", digest, data)
    assert files.stored("me") == len(data)


def test_of_a_file_of_go_judges_likewise(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", 1 << 20)
    store.open()
    with small_files_only(4096), pytest.raises(HostError, match="cannot be kept: File too large"):
        store.save("me", "a", b"x" * 100_000)
    assert list((tmp_path / "store").iterdir()) == []
    assert (store.total(), store.names("me")) == (0, {})


@pytest.mark.needs("userns")
async def test_what_a_job_leaves_and_has_no_room(tmp_path: Path) -> None:
    job = {"argv": ["sh", "-c", "echo x | tee a"], "collect": ["a"]}
    async with daemon() as served:
        with in_the_way(served.book.settings.state / "files" / PARTIAL):
            view = await served.ask("POST", "/v1/jobs?wait=1", job)
        assert view["result"]["streams"]["stdout"]["data"] == "x\n"
        (error,) = view["result"]["artifact_errors"]
        assert error["path"] == "a"
        assert error["reason"].startswith("not kept: a file cannot be kept: Not a directory")


async def test_a_file_that_cannot_be_stored_is_no_bug_of_ours() -> None:
    digest = hashlib.sha256(b"x").hexdigest()
    async with daemon() as served:
        with in_the_way(served.book.settings.state / "files" / PARTIAL):
            asking = served.links.asking("PUT", f"/v1/files/{digest}", b"x")
            with pytest.raises(SandboxError, match="cannot be kept: Not a directory"):
                async with asking:
                    pass


@pytest.mark.parametrize("kind", [Files, Store])
async def test_who_stores_many_at_once_gets_no_more(tmp_path: Path, kind: Any) -> None:
    store, size = kind(tmp_path / "store", 1 << 20), 700_000
    store.open()
    refused: list[Refusal] = []

    def save(number: int) -> None:
        try:
            store.save("me", f"{number:064}", bytes(size))
        except Refusal as refusal:
            refused.append(refusal)

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(trio.to_thread.run_sync, save, number)
    assert len(refused) == 7
    assert store.total() == size
