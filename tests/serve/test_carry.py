"""A job whose caller carries it out: what it had is given back whenever the caller's task ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from sandboxd import open_runner
from sandboxd.serve.book import Book, Settings, open_book
from sandboxd.serve.callers import Caller
from sandboxd.serve.carry import carry_here
from sandboxd.serve.journal import open_journal
from sandboxd.serve.live import Asked, Live
from sandboxd.serve.quotas import Quotas
from sandboxd.serve.share import Need
from sandboxd.serve.wire import Refusal, Submission

ME = Caller("me", operator=True)


async def taken_on(book: Book, name: str | None = None) -> Live:
    asked = Asked(Submission(argv=("true",), id=name), b"{}", attached=True, here=True)
    live, new = await book.submit(ME, asked)
    assert new
    assert isinstance(live, Live)
    return live


def nothing_is_held(book: Book) -> bool:
    share = book.share
    return not (share.running or share.queued or book.live or share.running_of("me"))


@asynccontextmanager
async def opened(place: Path) -> AsyncIterator[Book]:
    settings = Settings(state=place, quotas=Quotas(), room=Need(cpus=8.0, memory=1 << 40))
    async with (
        open_journal(place) as journal,
        open_runner(slots=1) as runner,
        open_book(runner, journal, settings) as book,
    ):
        yield book


async def test_nobody_can_look_out_for_its_caller(tmp_path: Path) -> None:
    """EBADF here; ENOSPC where the user has too many (max_user_watches of epoll(7))."""
    async with opened(tmp_path) as book:
        live = await taken_on(book)
        with pytest.raises(OSError, match="descriptor"):
            await carry_here(book, live, 1 << 20)
        assert live.done.is_set()
        assert nothing_is_held(book)


async def test_the_daemon_goes_down_while_an_id_is_looked_up(tmp_path: Path) -> None:
    async with opened(tmp_path) as book, trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(Refusal, match="going down"):
                await taken_on(book, "mine")

        nursery.start_soon(ask)
        while not book.coming:
            await trio.lowlevel.checkpoint()
        await book.drain(0.0)
    assert nothing_is_held(book)


async def test_cancelled_with_a_slot_and_while_it_waits(tmp_path: Path) -> None:
    async with opened(tmp_path) as book:
        for waits_first in (False, True):
            has_slot, waits = await taken_on(book), await taken_on(book)
            assert (book.share.running, book.share.queued) == (1, 1)
            for live in (waits, has_slot) if waits_first else (has_slot, waits):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await carry_here(book, live, None)
                assert live.refused is not None
            assert nothing_is_held(book)
        live = await taken_on(book)
        await carry_here(book, live, None)
        assert (live.status, live.refused) == ("ok", None)
        waits = [await taken_on(book) for _ in range(2)][1]
        await book.cancel(waits)  # who hung up while it waited
        await carry_here(book, waits, None)
        assert waits.status == "cancelled"
        assert (book.share.running, book.share.queued) == (1, 0)
