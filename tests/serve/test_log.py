"""The events of a job: each once and in order, within bounds, from any number on."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import pytest
import trio

from sandboxd.serve.log import CHUNK, Log, TooOld, read_finished
from sandboxd.serve.wire import encode, place

BIG = 4000
MOST = 8 * CHUNK


def line(seq: int) -> bytes:
    return encode({"v": 1, "seq": seq, "type": "stdout", "data": "x" * BIG})


async def fill(log: Log, count: int, start: int = 0) -> None:
    for seq in range(start, start + count):
        await log.append(seq, line(seq))


async def read_all(log: Log, following: int | None = None) -> list[int]:
    found: list[int] = []
    with log.reading(following) as reader:
        async with aclosing(log.read(reader)) as pieces:
            async for lines in pieces:
                found += [place(one)[0] for one in lines]
    return found


FOLDERS = pytest.mark.parametrize("spills", [True, False])


def made(tmp_path: Path, *, spills: bool, stall: bool = False, most: int = MOST) -> Log:
    return Log(tmp_path / "log" if spills else None, most, stall=stall)


@FOLDERS
async def test_every_line_comes_once_and_in_order(tmp_path: Path, spills: bool) -> None:
    log = made(tmp_path, spills=spills)
    results: list[list[int]] = []

    async def read(following: int) -> None:
        results.append(await read_all(log, following))

    async with trio.open_nursery() as nursery:
        for following in (0, 0, 7, 399):
            nursery.start_soon(read, following)
        await trio.testing.wait_all_tasks_blocked()
        await fill(log, 400)
        log.finish(400, line(400))
    assert sorted(results) == [list(range(start, 401)) for start in (0, 0, 7, 399)]


@FOLDERS
async def test_what_nobody_reads_is_given_up(tmp_path: Path, spills: bool) -> None:
    log = made(tmp_path, spills=spills)
    await fill(log, 1000)
    log.finish(1000, line(1000))
    kept = await read_all(log)
    assert kept == list(range(log.first, 1001))
    assert 0 < log.first < 1000
    if spills:
        assert sum(one.stat().st_size for one in (tmp_path / "log").iterdir()) <= 2 * MOST
    with pytest.raises(TooOld) as error:
        await read_all(log, 0)
    assert error.value.first == log.first


@FOLDERS
@pytest.mark.parametrize("stall", [True, False])
async def test_a_reader_who_is_slow_stalls_the_job(
    tmp_path: Path, spills: bool, stall: bool
) -> None:
    log = made(tmp_path, spills=spills, stall=stall)
    found: list[int] = []
    filled = trio.Event()

    async def job() -> None:
        await fill(log, 2000)
        filled.set()
        log.finish(2000, line(2000))

    with log.reading(0) as reader:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job)
            async with aclosing(log.read(reader)) as pieces:
                found += [place(one)[0] for one in await anext(pieces)]
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert not filled.is_set()
                assert log.last < 1999
                async for lines in pieces:
                    found += [place(one)[0] for one in lines]
    assert found == list(range(2001))


async def test_stalled_until_somebody_reads(tmp_path: Path) -> None:
    log = made(tmp_path, spills=True, stall=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill, log, 1000)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert log.last < 999
        with log.reading(None) as reader:
            async with aclosing(log.read(reader)) as pieces:
                read = [place(one)[0] for one in await anext(pieces)]
        # It broke off: what it had may not have arrived, and is still there.
        async with aclosing(log.read(reader)):
            pass

        async def again() -> None:
            found = await read_all(log, read[0])
            assert found == list(range(1001))

        nursery.start_soon(again)
        while log.last < 999:
            await trio.testing.wait_all_tasks_blocked(0.01)
        log.finish(1000, line(1000))


@FOLDERS
async def test_in_a_hurry_nobody_is_waited_for(tmp_path: Path, spills: bool) -> None:
    log = made(tmp_path, spills=spills, stall=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill, log, 500)
        await trio.testing.wait_all_tasks_blocked(0.05)
        log.hurry()
    log.finish(500, line(500))
    assert await read_all(log) == list(range(501))


async def test_what_is_left_in_files_is_read_when_it_is_over(tmp_path: Path) -> None:
    log = made(tmp_path, spills=True)
    await fill(log, 300)
    await log.settle()
    assert log.lines() is None
    found = []
    async with aclosing(read_finished(tmp_path / "log")) as pieces:
        async for lines in pieces:
            found += [place(one)[0] for one in lines]
    assert found == list(range(log.first, 300))


async def test_a_small_log_stays_in_memory(tmp_path: Path) -> None:
    log = made(tmp_path, spills=True)
    await fill(log, 3)
    await log.settle()
    assert log.lines() == [line(seq) for seq in range(3)]
    assert not (tmp_path / "log").exists()
