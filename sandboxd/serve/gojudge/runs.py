"""Requests of go-judge's protocol, carried out: admitted with all jobs, run, and answered."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import trio

from sandboxd.errors import SandboxError
from sandboxd.job import Job
from sandboxd.result import Result
from sandboxd.serve.book import Book
from sandboxd.serve.callers import Caller
from sandboxd.serve.gojudge.answers import answer, failed, not_run
from sandboxd.serve.gojudge.orders import Order, Orders, Sources, orders
from sandboxd.serve.gojudge.store import Store
from sandboxd.serve.gojudge.wire import CmdResult, Request
from sandboxd.serve.guests import Guest, admitted, count
from sandboxd.serve.live import About
from sandboxd.serve.share import Waiting, need_of, together
from sandboxd.serve.wire import Refusal
from sandboxd.supervise import policies
from sandboxd.supervise.run import Run

POLICY = "go-judge"
PRIORITY = 5
WORDS, LONGEST = 16, 128
"""Words that are shown of a program's, and characters of each."""

LARGE = 256 << 10
"""Bytes of output from which on a thread deals with it."""

Output = Callable[[int, int, bytes], Awaitable[None]]
"""Gets what programs write as they write it: the program's number, the descriptor, the bytes."""


class Runs:
    """What requests become. `local` are the directories whose files may be named by path."""

    def __init__(self, book: Book, store: Store, local: Sequence[Path]) -> None:
        self.book = book
        self.store = store
        self._local_tops = [Path(os.path.realpath(one)) for one in local]
        self._policy = policies.find(POLICY)

    # -- taking on

    def prepare(self, caller: Caller, asked: Request, *, live: bool = False) -> Orders:
        """What a request asks for; Refusal if that cannot be."""
        stored = functools.partial(self._stored, caller)
        made = orders(asked, self._policy, Sources(self._local, stored), live=live)
        for index, order in enumerate(made.orders):
            try:
                self.book.runner.policy(order.job)
            except SandboxError as error:
                raise Refusal(400, "policy", f"cmd[{index}]: {error}") from None
        return made

    def guest(self, caller: Caller, made: Orders, traceparent: str | None) -> Guest:
        """What waits in the queue for all programs of a request together."""
        needs = [need_of(self.book.runner.policy(order.job)) for order in made.orders]
        need = together(needs, self.book.share.most_running)
        words = made.orders[0].cmd.args or [] if made.orders else []
        shown = tuple(word if len(word) <= LONGEST else f"{word[:LONGEST]}…" for word in words)
        about = About(argv=shown[:WORDS], policy=POLICY, priority=PRIORITY, traceparent=traceparent)
        return Guest(caller, about, Waiting(caller.name, PRIORITY, need))

    def _local(self, name: str) -> Path:
        """A file of this machine's, links resolved; Refusal 400 if it lies elsewhere."""
        path = Path(os.path.realpath(name)) if name.startswith("/") and "\0" not in name else None
        if path is None or not any(path.is_relative_to(top) for top in self._local_tops):
            raise Refusal(
                400, "file", f"file ({name[:200]}) does not lie in a directory of --compat-src"
            )
        os.stat(path)  # OSError is told as a fault of the file
        return path

    def _stored(self, caller: Caller, key: str) -> Path:
        found = self.store.find(caller.name, key)
        if found is None:
            raise Refusal(500, "file", f"file does not exist with id: {key[:100]!r}")
        return found.path

    # -- carrying out

    async def carry_out(
        self, guest: Guest, made: Orders, output: Output | None = None
    ) -> list[CmdResult]:
        """The results; Refusal if there is no place, guests.Cancelled if that was given up."""
        if made.faults:
            first = min(made.faults)
            why = RuntimeError(f"not run: the files of cmd[{first}] could not be copied in")
            every = range(len(made.orders))
            return [not_run(made.faults[i]) if i in made.faults else failed(why) for i in every]
        if not made.orders:
            return []
        folder = self.store.new_folder()
        try:
            async with admitted(self.book, guest):
                return await self._run(guest, made, folder, output)
        finally:
            if folder.exists():
                with trio.CancelScope(shield=True):
                    remove = functools.partial(shutil.rmtree, ignore_errors=True)
                    await trio.to_thread.run_sync(remove, folder)

    async def _run(
        self, guest: Guest, made: Orders, folder: Path, output: Output | None
    ) -> list[CmdResult]:
        runner, found = self.book.runner, dict[int, CmdResult]()
        jobs = [_placed(order, folder / str(at)) for at, order in enumerate(made.orders)]
        async with AsyncExitStack() as stack:
            result_of: Callable[[int], Awaitable[Result]]
            if len(jobs) == 1:
                run = await stack.enter_async_context(runner.start(jobs[0]))
                guest.runs, result_of = (run,), _waiting(run)
            else:
                joined = await stack.enter_async_context(runner.start_pipeline(jobs, made.pipes))
                guest.runs, result_of = joined.runs, joined.result
            if guest.cancelled:
                guest.kill()
            guest.begun.set()

            async def follow(at: int, order: Order) -> None:
                await _pass_on(guest.runs[at], at, order, output)
                try:
                    result = await result_of(at)
                except SandboxError as error:
                    count(self.book, guest, "error", None)
                    found[at] = failed(error)
                    return
                count(self.book, guest, result.status, result)
                found[at] = await self._answer(guest, order, result, folder / str(at))

            async with trio.open_nursery() as nursery:
                for at, order in enumerate(made.orders):
                    nursery.start_soon(follow, at, order)
        return [found[at] for at in range(len(jobs))]

    async def _answer(self, guest: Guest, order: Order, result: Result, folder: Path) -> CmdResult:
        """What is large, or goes to a disk, holds nobody up."""
        caller = guest.caller.name
        stored = order.files or any(one.cached for one in order.streams.values())
        large = sum(one.kept for one in result.streams.values()) > LARGE
        if not stored and not large:
            return answer(caller, order, result, self.store, folder)
        return await trio.to_thread.run_sync(answer, caller, order, result, self.store, folder)


def _placed(order: Order, folder: Path) -> Job:
    """Its job, with a place for what it leaves."""
    if not order.job.collect:
        return order.job
    return msgspec.structs.replace(order.job, collect_to=folder)


def _waiting(run: Run) -> Callable[[int], Awaitable[Result]]:
    async def wait(_: int) -> Result:
        return await run.wait()

    return wait


async def _pass_on(run: Run, at: int, order: Order, output: Output | None) -> None:
    """Read the events, which keeps it going; what is wanted live goes on."""
    async for event in run.events:
        fd = order.streamed.get(event.type)
        if fd is not None and output is not None:
            await output(at, fd, event.data)
