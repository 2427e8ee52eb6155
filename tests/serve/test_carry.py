"""A job whose caller carries it out: what it had is given back whenever the caller's task ends."""

from __future__ import annotations

from pathlib import Path

import trio

from sandboxd import open_runner
from sandboxd.serve.book import Book, Settings, open_book
from sandboxd.serve.callers import Caller
from sandboxd.serve.carry import carry_here
from sandboxd.serve.journal import open_journal
from sandboxd.serve.live import Asked, Live
from sandboxd.serve.quotas import Quotas
from sandboxd.serve.share import Need
from sandboxd.serve.wire import Submission

ME = Caller("me", operator=True)


async def taken_on(book: Book) -> Live:
    asked = Asked(Submission(argv=("true",)), b"{}", attached=True, here=True)
    live, new = await book.submit(ME, asked)
    assert new
    assert isinstance(live, Live)
    return live


def nothing_is_held(book: Book) -> bool:
    share = book.share
    return not (share.running or share.queued or book.live or share.running_of("me"))


async def test_cancelled_with_a_slot_and_while_it_waits(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path, quotas=Quotas(), room=Need(cpus=8.0, memory=1 << 40))
    async with (
        open_journal(tmp_path) as journal,
        open_runner(slots=1) as runner,
        open_book(runner, journal, settings) as book,
    ):
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
