"""The listener for go-judge's protocol: its paths, and its kinds of answers."""

from __future__ import annotations

import email.policy
import logging
import platform
import re
from collections.abc import Awaitable, Callable
from email.message import Message
from email.parser import BytesParser

import h11
import trio

import sandboxd
from sandboxd.errors import SandboxError
from sandboxd.serve.api import BINARY
from sandboxd.serve.callers import Caller, Callers
from sandboxd.serve.files import pieces_of
from sandboxd.serve.gojudge import sockets, wire
from sandboxd.serve.gojudge.runs import LARGE, Runs
from sandboxd.serve.guests import Cancelled
from sandboxd.serve.http import Gone, Reply, Request
from sandboxd.serve.quotas import Budget
from sandboxd.serve.wire import Refusal, encode, traceparent

BUILD = "v1.9.0"
"""Whose behaviour this is; callers compare it with what they need."""
FEATURES = (
    "copyOutOptional", "pipeProxy", "symlink", "addressSpaceLimit", "stream", "procPeak",
    "copyOutTruncate", "fixSymlinkEscape",
)  # fmt: skip
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}

logger = logging.getLogger("sandboxd.serve")

Handler = Callable[[Request, Caller], Awaitable[Reply]]


class GoJudge:
    """The handler of every connection to this listener."""

    def __init__(self, runs: Runs, callers: Callers, most: int, budget: Budget) -> None:
        self.runs = runs
        self.book = runs.book
        self.callers = callers
        self.most = most
        self._budget = budget

    async def handle(self, request: Request) -> Reply:
        """The reply, whatever happens; Gone where nobody waits for one."""
        try:
            reply = await self._route(request)
        except Refusal as refusal:
            reply = _no(refusal)
        except SandboxError as error:
            reply = _no(Refusal(500, "internal", str(error)))
        except (Gone, trio.BrokenResourceError, h11.ProtocolError):  # the connection's own affair
            raise
        except Exception as error:
            logger.exception("request failed", extra={"path": "/".join(request.path)[:200]})
            reply = _no(Refusal(500, "internal", f"{type(error).__name__}: a bug in sandboxd"))
        self.book.metrics.requests.add(status=str(reply.status))
        return reply

    async def _route(self, request: Request) -> Reply:
        method, path = request.method, request.path
        if (method, path) == ("GET", ("version",)):
            return Reply.of(version())
        if (method, path) == ("GET", ("config",)):
            return Reply.of(self._config())
        handler = self._find(method, path)
        if handler is None:
            raise Refusal(404, "request", "404 page not found")
        return await handler(request, self.callers.find(request.peer, request.headers))

    def _find(self, method: str, path: tuple[str, ...]) -> Handler | None:
        known: dict[tuple[str, str], Handler] = {
            ("POST", "run"): self._run,
            ("GET", "file"): self._files,
            ("POST", "file"): self._put,
            ("GET", "ws"): self._ws,
            ("GET", "stream"): self._stream,
        }
        if len(path) == 2 and path[0] == "file" and path[1]:
            return {"GET": self._get, "DELETE": self._delete}.get(method)
        return known.get((method, path[0])) if len(path) == 1 else None

    def _config(self) -> dict[str, object]:
        subtree = self.runs.book.runner.host.cgroup
        controllers = sorted(subtree.controllers) if subtree else []
        runner = {"cgroupType": 2 if subtree else 0, "cgroupControllers": controllers}
        return {**dict.fromkeys(FEATURES, True), "fileStorePath": "", "runnerConfig": runner}

    # -- running

    async def _run(self, request: Request, caller: Caller) -> Reply:
        size = self.most if request.length is None else min(request.length, self.most)
        self._budget.take(size)
        self.book.replying += 1
        reply = None
        try:
            body = await request.body(self.most)
            size = self._budget.keep(size, body)
            found = await self._carry_out(request, caller, wire.request(body))
            large = sum(len(text) for one in found for text in (one.files or {}).values()) > LARGE
            data = await trio.to_thread.run_sync(encode, found) if large else encode(found)
            reply = Reply(body=data, kind="application/json; charset=utf-8")
        finally:
            self._budget.give_back(size)
            if reply is None:
                self.book.sent()
        reply.replied = self.book.sent
        return reply

    async def _carry_out(
        self, request: Request, caller: Caller, asked: wire.Request
    ) -> list[wire.CmdResult]:
        if not asked.cmd:
            raise Refusal(400, "request", "no cmd provided")
        made = self.runs.prepare(caller, asked)
        guest = self.runs.guest(caller, made, traceparent(request.headers.get("traceparent")))
        try:
            async with request.until_gone() as scope:
                found = await self.runs.carry_out(guest, made)
        except Cancelled:
            raise Refusal(500, "cancelled", "request cancelled before execute") from None
        if scope.cancelled_caught:
            raise Gone
        return found

    async def _ws(self, request: Request, caller: Caller) -> Reply:
        await sockets.many(self.runs, caller, request, (self.most, self._budget))
        raise Gone

    async def _stream(self, request: Request, caller: Caller) -> Reply:
        await sockets.one(self.runs, caller, request, (self.most, self._budget))
        raise Gone

    # -- files

    async def _files(self, request: Request, caller: Caller) -> Reply:
        return Reply.of(self.runs.store.names(caller.name))

    async def _put(self, request: Request, caller: Caller) -> Reply:
        size = self.most if request.length is None else min(request.length, self.most)
        with self._budget.hold(size):
            body = await request.body(self.most)
            kind = request.headers.get("content-type", "")
            name, data = await trio.to_thread.run_sync(uploaded, kind, body)
            save = self.runs.store.save
            key = await trio.to_thread.run_sync(save, caller.name, name, data)
        return Reply.of(key)

    async def _get(self, request: Request, caller: Caller) -> Reply:
        found = self.runs.store.find(caller.name, request.path[1])
        if found is None or not found.path.is_file():
            raise Refusal(404, "file", "no such file")
        name = re.sub(r'[^\x20-\x7e]|["\\]', "_", found.name)
        how = ("Content-Disposition", f'attachment; filename="{name}"')
        length = ("Content-Length", str(found.size))
        return Reply(kind=BINARY, headers=[how, length], stream=pieces_of(found.path))

    async def _delete(self, request: Request, caller: Caller) -> Reply:
        if not self.runs.store.remove(caller.name, request.path[1]):
            raise Refusal(404, "file", "no such file")
        return Reply()


def version() -> dict[str, object]:
    """What we are, in the words that callers look for."""
    machine = platform.machine()
    return {
        "buildVersion": f"{BUILD}-sandboxd.{sandboxd.__version__}",
        "goVersion": f"none (Python {platform.python_version()})",
        "platform": MACHINES.get(machine, machine),
        "os": "linux",
        **dict.fromkeys(FEATURES, True),
    }


def uploaded(kind: str, body: bytes) -> tuple[str, bytes]:
    """Name and content of the part `file` of a form; Refusal 400 if there is none.

    multipart/form-data, RFC 7578. The parts are found by their boundary, and not by the parser of
    mail, which would take their line ends for its own.
    """
    head = BytesParser(policy=email.policy.HTTP).parsebytes(
        b"Content-Type: " + kind.encode("latin-1", "replace") + b"\r\n\r\n", headersonly=True
    )
    boundary = _parameter(head, "content-type", "boundary")
    if head.get_content_type() != "multipart/form-data" or not boundary:
        raise Refusal(400, "request", "request Content-Type isn't multipart/form-data")
    line = b"\r\n--" + boundary.encode("latin-1", "replace")
    _, *parts = (b"\r\n" + body).split(line)
    for part in parts:
        described, found, content = part.partition(b"\r\n\r\n")
        if not found or described.startswith(b"--"):
            continue
        about = BytesParser(policy=email.policy.compat32).parsebytes(
            described.lstrip(b"\r\n") + b"\r\n\r\n", headersonly=True
        )
        name = _parameter(about, "content-disposition", "name")
        filename = _parameter(about, "content-disposition", "filename")
        if name == "file" and filename:
            return re.split(r"[/\\]", filename)[-1][:255], content
    raise Refusal(400, "request", "http: no such file")


def _parameter(message: Message, header: str, name: str) -> str:
    found = message.get_param(name, header=header)
    return found if isinstance(found, str) else ""


def _no(refusal: Refusal) -> Reply:
    """As go-judge says no: a text as JSON."""
    return Reply(refusal.status, encode(str(refusal)), headers=list(refusal.headers))
