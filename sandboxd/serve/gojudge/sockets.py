"""go-judge's WebSockets: /ws for many requests at once, /stream for one that is fed and followed.

A request lives no longer than its connection.
"""

from __future__ import annotations

import msgspec
import trio

from sandboxd.errors import SandboxError
from sandboxd.serve.callers import Caller
from sandboxd.serve.gojudge import wire
from sandboxd.serve.gojudge.orders import Orders
from sandboxd.serve.gojudge.runs import Output, Runs
from sandboxd.serve.guests import Cancelled, Guest
from sandboxd.serve.http import Gone, Request
from sandboxd.serve.quotas import Budget
from sandboxd.serve.websocket import WRONG, WebSocket, accepted
from sandboxd.serve.wire import Refusal, traceparent
from sandboxd.supervise.one_error import one_error
from sandboxd.supervise.run import Run

AT_ONCE = 512
"""Requests of one connection that are not answered yet."""


async def respond(
    runs: Runs, guest: Guest, made: Orders, output: Output | None = None
) -> wire.Response:
    """What is said of a request, however it went."""
    try:
        found = await runs.carry_out(guest, made, output)
        return wire.Response(request_id=made.request_id, results=found)
    except Cancelled:
        error = "request cancelled before execute"
    except (Refusal, SandboxError) as refused:
        error = str(refused)
    return wire.Response(request_id=made.request_id, results=[], error=error)


# -- /ws -------------------------------------------------------------------------------------


Bounds = tuple[int, Budget]
"""Of one message, in bytes; and of all whose programs are not over."""


async def many(runs: Runs, caller: Caller, request: Request, bounds: Bounds) -> None:
    """Requests as they come, answers as they are ready, until the connection ends."""
    most, budget = bounds
    trace = traceparent(request.headers.get("traceparent"))
    with one_error():
        async with accepted(request, most) as socket, trio.open_nursery() as nursery:
            working = _Many((runs, caller, budget), socket, trace)
            try:
                while True:
                    working.take(await socket.receive(), nursery)
            except Refusal as refusal:
                await socket.close(WRONG, str(refusal))
            except Gone:
                pass
            nursery.cancel_scope.cancel()


class _Many:
    def __init__(
        self, whose: tuple[Runs, Caller, Budget], socket: WebSocket, traceparent: str | None
    ) -> None:
        self._runs, self._caller, self._budget = whose
        self._socket = socket
        self._trace = traceparent
        self._guests: dict[str, Guest] = {}

    def take(self, message: bytes | str, nursery: trio.Nursery) -> None:
        """A request, or the end of one. Refusal if it is none."""
        asked = wire.request(message)
        if asked.cancel_request_id:
            guest = self._guests.get(asked.cancel_request_id)
            if guest is not None:
                guest.kill()
            return
        made = self._runs.prepare(self._caller, asked)
        name = asked.request_id
        why = f"duplicated request id: {name!r}" if name in self._guests else ""
        why = why or ("" if name else "empty request id")
        if not why and len(self._guests) >= AT_ONCE:
            why = f"{AT_ONCE} requests are not answered yet"
        size = len(message)
        if not why:
            try:
                self._budget.take(size)
            except Refusal as refusal:
                why = str(refusal)
        if why:
            refused = wire.Response(request_id=name, results=[], error=why)
            nursery.start_soon(self._say, refused)
            return
        self._guests[name] = self._runs.guest(self._caller, made, self._trace)
        nursery.start_soon(self._answer, name, made, size)

    async def _answer(self, name: str, made: Orders, size: int) -> None:
        try:
            with self._runs.book.reply():
                response = await respond(self._runs, self._guests[name], made)
                del self._guests[name]
                await self._say(response)
        finally:
            self._budget.give_back(size)

    async def _say(self, response: wire.Response) -> None:
        await self._socket.send(msgspec.json.encode(response).decode())


# -- /stream ---------------------------------------------------------------------------------


async def one(runs: Runs, caller: Caller, request: Request, bounds: Bounds) -> None:
    """One request, then what is typed and what is printed, then its result."""
    book, (most, budget) = runs.book, bounds
    trace = traceparent(request.headers.get("traceparent"))
    with one_error():
        async with accepted(request, most) as socket, trio.open_nursery() as nursery:
            try:
                said = _bytes(await socket.receive())
                first = wire.message(said)
                if not isinstance(first, wire.Request):
                    raise Refusal(400, "request", "the first message must be a request")
                made = runs.prepare(caller, first, live=True)
                guest = runs.guest(caller, made, trace)
                nursery.start_soon(_listen, socket, guest, made, nursery.cancel_scope)

                async def output(index: int, fd: int, data: bytes) -> None:
                    await socket.send(wire.output(index, fd, data))

                # Who takes in what nobody reads hears of nothing else.
                watching = book.lookout.watching(request.handle, guest.kill)
                with budget.hold(len(said)), watching, book.reply():
                    response = await respond(runs, guest, made, output)
                    response = msgspec.structs.replace(response, request_id="")
                    await socket.send(wire.result(response))
                    await socket.close()
            except Refusal as refusal:
                await socket.close(WRONG, str(refusal))
            except Gone:
                pass
            nursery.cancel_scope.cancel()


def _bytes(data: bytes | str) -> bytes:
    return data.encode() if isinstance(data, str) else data


async def _listen(
    socket: WebSocket, guest: Guest, made: Orders, all_of_it: trio.CancelScope
) -> None:
    """What the client says; whatever is wrong with that ends the connection, and its end all."""
    try:
        while True:
            said = wire.message(_bytes(await socket.receive()))
            if isinstance(said, wire.Cancel):
                guest.kill()
            elif isinstance(said, wire.Request):
                raise Refusal(400, "request", "one request is all there is")
            else:
                await _hand_on(said, guest, made)
    except Refusal as refusal:
        await socket.close(WRONG, str(refusal))
    except Gone:
        pass
    all_of_it.cancel()


async def _hand_on(said: wire.Input | wire.Resize, guest: Guest, made: Orders) -> None:
    """Input and sizes to the program they are for."""
    index = said.index
    if not (0 <= index < len(made.orders) and made.orders[index].fed and said.fd == 0):
        raise Refusal(400, "request", f"input does not exist: {index}/{said.fd}")
    if isinstance(said, wire.Resize) and made.orders[index].job.terminal is None:
        raise Refusal(400, "request", "stream is not a tty")
    await guest.begun.wait()
    run: Run = guest.runs[index]
    if isinstance(said, wire.Resize):
        run.resize(said.rows, said.cols)
        return
    try:
        if run.stdin is not None:
            await run.stdin.send_all(said.content)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return  # the program has closed it
