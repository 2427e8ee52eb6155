"""What is done for requests for groups and pipelines: a part of routes.py."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING

from sandboxd.serve import events
from sandboxd.serve.ensemble import GroupSubmission, PipelineSubmission
from sandboxd.serve.ensembles import Ensemble, Ensembles, Kind
from sandboxd.serve.http import Gone, Reply, Request
from sandboxd.serve.wire import Refusal, traceparent

if TYPE_CHECKING:
    from sandboxd.serve.quotas import Budget
    from sandboxd.serve.routes import Bounds, Call

PATHS: dict[Kind, str] = {GroupSubmission: "groups", PipelineSubmission: "pipelines"}


class Together:
    """The handlers of /v1/groups and /v1/pipelines."""

    bounds: Bounds
    budget: Budget
    ensembles: Ensembles

    async def submit_group(self, call: Call) -> Reply:
        return await self._submit_ensemble(call, GroupSubmission)

    async def submit_pipeline(self, call: Call) -> Reply:
        return await self._submit_ensemble(call, PipelineSubmission)

    async def group(self, call: Call) -> Reply:
        return Reply.of(self._ensemble(call, GroupSubmission).view())

    async def pipeline(self, call: Call) -> Reply:
        return Reply.of(self._ensemble(call, PipelineSubmission).view())

    async def cancel_group(self, call: Call) -> Reply:
        found = self._ensemble(call, GroupSubmission)
        found.cancel()
        return Reply.of(found.view(), 202)

    async def cancel_pipeline(self, call: Call) -> Reply:
        found = self._ensemble(call, PipelineSubmission)
        found.cancel()
        return Reply.of(found.view(), 202)

    def _ensemble(self, call: Call, kind: Kind) -> Ensemble:
        found = self.ensembles.find(kind, call.caller, call.names["id"])
        if found is None:
            what = PATHS[kind].removesuffix("s")
            hint = "it is there while it goes on; GET /v1/jobs lists your jobs"
            raise Refusal(404, what, f"no such {what}", hint=hint)
        return found

    async def _submit_ensemble(self, call: Call, kind: Kind) -> Reply:
        request, most = call.request, self.bounds.body
        _check_attached(call)
        size = most if request.length is None else min(request.length, most)
        self.budget.take(size)
        try:
            body = await request.body(most)
            size = self.budget.keep(size, body)
            trace = traceparent(request.headers.get("traceparent"))
            found = await self.ensembles.submit(kind, call.caller, (body, trace))
            accepted = events.wanted(request)
            if accepted is not None:
                reply = self._told(found, accepted, size)
                size = 0
            else:
                await _wait(request, found)
                reply = Reply.of(found.view())
        finally:
            self.budget.give_back(size)
        reply.headers.append(("Location", f"/v1/{PATHS[kind]}/{found.id}"))
        return reply

    def _told(self, found: Ensemble, kind: str, size: int) -> Reply:
        """Its events. It ends with the reply, and what its body takes is given back."""
        held = ExitStack()
        readers = {
            name: held.enter_context(live.log.reading(None)) for name, live in found.lives.items()
        }
        reply = events.formed(self.ensembles.lines(found, readers), kind)

        async def ended() -> None:
            held.close()
            found.cancel()
            self.budget.give_back(size)

        reply.ended = ended
        return reply


async def _wait(request: Request, found: Ensemble) -> None:
    """To its end; who goes away cancels it."""
    try:
        if not await request.waits(found.done, math.inf):
            raise Gone
    finally:
        found.cancel()
    if found.refused is not None:
        raise found.refused


def _check_attached(call: Call) -> None:
    """What is said here is not more than is kept."""
    key = "idempotency-key" in call.request.headers
    if key or not call.flag("wait"):
        what = "an Idempotency-Key is not for what" if key else "a group or a pipeline"
        raise Refusal(
            422,
            "request",
            f"{what} belongs to its connection",
            hint="send ?wait=1 and no Idempotency-Key; jobs and batches can be accepted",
        )
